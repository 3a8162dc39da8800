"""When the host learns whether a step was finite: at once, or late, in the middle of the next step,
as on a GPU. The run is the same to the bit, whatever goes wrong."""
import contextlib
import time

import pytest
import torch
from pretrain_runs import (asked_to_stop, assert_same_run, final, finish, flags,  # noqa: F401
                           frames, keep_every, late, log, poison, run, same, scaled, spawn, tiny)
from test_dino import Questions
from torch.utils._python_dispatch import _disable_current_modes

import dino
import pretrain
import vit

EVERY = ["--log-every", 4, "--save-every", 6]  # of a step that is logged it is always asked at once


def both(frames, tmp_path, disturb, *more, ends=None, steps=12):
    """The folders of two runs that are disturbed alike, the verdicts read at once and late."""
    folders = tmp_path / "at once", tmp_path / "late"
    for out in folders:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vit, "atomic_save", keep_every(vit.atomic_save))
            disturb(patch)
            if out.name == "late":
                late(patch)
            with pytest.raises(SystemExit, match=ends) if ends else contextlib.nullcontext():
                run(frames, out, *EVERY, *more, steps=steps)
    return folders


def assert_same_folders(first, second):
    """All that two runs left behind, but for the times and --out."""
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()} and log(first) == log(second)
    for name in names:
        if name.endswith(".pt"):
            a, b = (torch.load(folder / name, weights_only=True) for folder in (first, second))
            assert a["args"].pop("out") != b["args"].pop("out")
            assert str(a.pop("found", None)) == str(b.pop("found", None))  # nan is not nan
            assert same(a, b), name


def test_a_verdict_read_late_changes_nothing(frames, tmp_path):
    """Of steps 0 to 11 not finite: 2; 5, before a save; 6, after it; 8, which is logged; the last."""
    def disturb(patch):
        poison(patch, 2, 5, 6, 8, 11)
    more = ["--max-skips", 5, "--centering", "centering"]
    at_once, later = both(frames, tmp_path, disturb, *more)
    assert_same_folders(at_once, later)
    assert final(later)["skips"] == 5 and (later / "nonfinite_11.pt").exists()
    assert [line["step"] for line in log(later)] == [0, 4]


@pytest.mark.parametrize("step", [2, 5, 8, 11])
def test_a_bad_step_that_is_seen_late_ends_the_run_before_it(frames, tmp_path, step):
    """nonfinite_*.pt has its own frames and the state before it, and so has last.pt."""
    at_once, later = both(frames, tmp_path, lambda patch: poison(patch, step),
                          ends=f"step {step}: not finite .* raise --max-skips")
    assert_same_folders(at_once, later)
    assert final(later)["step"] == step and (later / f"nonfinite_{step}.pt").exists()


def test_float16_changes_its_scale_after_a_late_verdict_too(frames, tmp_path):
    def disturb(patch):
        scaled(patch, 2.0 ** 14, growth_interval=2)
        poison(patch, 5)  # not finite at any scale
    at_once, later = both(frames, tmp_path, disturb, "--precision", "fp16", "--max-skips", 1)
    assert_same_folders(at_once, later)
    assert final(later)["skips"] == 1 and any("overflows" in line for line in log(later))


def test_ten_overflows_end_the_run_after_the_tenth(frames, tmp_path):
    def disturb(patch):
        scaled(patch, 2.0 ** 80)
    at_once, later = both(frames, tmp_path, disturb, "--precision", "fp16",
                          ends="step 9: gradients were not finite for ten steps in a row")
    assert_same_folders(at_once, later)
    assert final(later)["step"] == 10


def test_a_signal_ends_the_run_after_the_same_step(frames, tmp_path, monkeypatch):
    """Also where the step before it is still open; and what goes on is the same to the bit."""
    at_once, later = both(frames, tmp_path, lambda patch: asked_to_stop(patch, 6))
    assert_same_folders(at_once, later)
    assert final(later)["step"] == 7
    run(frames, tmp_path / "whole", *EVERY, steps=12)
    late(monkeypatch)
    run(frames, later, *EVERY, steps=12)
    assert_same_run(later, tmp_path / "whole")


def test_killed_and_resumed_equals_never_stopped(frames, tmp_path, monkeypatch):
    run(frames, tmp_path / "whole", *EVERY, steps=40)
    (process,) = spawn([["late=", *flags(frames, tmp_path / "killed", *EVERY, steps=40)]])
    while not (tmp_path / "killed" / "last.pt").exists():
        assert process.exitcode is None
        time.sleep(0.002)
    process.kill()
    process.join()
    assert final(tmp_path / "killed")["step"] < 40
    late(monkeypatch)
    run(frames, tmp_path / "killed", *EVERY, steps=40)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_two_processes_read_late_alike(frames, tmp_path):
    """One of them has the bad pixel, or is asked to stop; and what was stopped goes on."""
    cases = {"bad": ["poison=1:2", "poison=0:5"], "ends": ["poison=1:5"], "stopped": ["stop=1:6"]}
    argvs = []
    for name, words in cases.items():
        more = ["--max-skips", 2] if name == "bad" else []
        for how in "", "late=":
            argv = flags(frames, tmp_path / f"{name}{how}", *EVERY, *more, steps=12)
            argvs.append([*words, *filter(None, [how]), *argv])
    go_on = ["--resume", tmp_path / "stoppedlate=" / "last_7.pt"]
    argvs += [flags(frames, tmp_path / "whole", *EVERY, steps=12),
              ["late=", *flags(frames, tmp_path / "resumed", *EVERY, *go_on, steps=12)]]
    finish(spawn(argvs, world=2), code=1)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    for name in cases:
        assert_same_folders(tmp_path / name, tmp_path / f"{name}late=")
    assert [final(tmp_path / name)["step"] for name in cases] == [12, 5, 7]
    assert final(tmp_path / "bad")["skips"] == 2


@pytest.mark.parametrize("reads_late", [True, False])
def test_a_run_asks_for_a_verdict_a_step(frames, tmp_path, monkeypatch, reads_late):
    """Late, it is that on the step before, after this one's gradients were ordered; the first step
    and every fourth are logged, which asks at once, and for more."""
    if reads_late:
        late(monkeypatch)
    finite_everywhere, next_batch = dino.finite_everywhere, pretrain.next_batch
    update_teacher = dino.DINOv2.update_teacher

    def loaded(*args):  # on the processor, whatever the device
        with _disable_current_modes():
            return next_batch(*args)

    def noted(word, function):
        def call(*args):
            questions.asked.append(word)
            return function(*args)
        return call
    monkeypatch.setattr(pretrain, "next_batch", loaded)
    monkeypatch.setattr(dino, "finite_everywhere", noted("gradients", finite_everywhere))
    monkeypatch.setattr(dino.DINOv2, "update_teacher", noted("update", update_teacher))
    with Questions() as questions:
        run(frames, tmp_path, *EVERY, "--save-every", 100, "--centering", "centering", steps=8)
    found = " ".join(questions.asked).replace("_local_scalar_dense", "asks").split("gradients ")
    found = [words.strip() for words in found[2:5] + found[6:7]]  # of steps 1 to 3, and 5
    assert found == (["update", "asks update", "asks update", "update"] if reads_late
                     else ["update asks"] * 4)


def test_gpus_alone_read_late():
    assert pretrain.reads_late(torch.device("cuda:1"))
    assert not any(pretrain.reads_late(torch.device(name)) for name in ("cpu", "mps"))
