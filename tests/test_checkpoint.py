"""Stop and go on: runs that are killed, signalled, resumed, contradicted and short of disk."""
import json
import os
import resource
import signal
import time

import pytest
import torch
from pretrain_runs import assert_same_run, final, finish, flags, frames, log, run, same, spawn, tiny, unbroken  # noqa: F401

import pretrain
import vit


@pytest.mark.parametrize("workers, precision", [(0, "fp32"), (2, "fp32"), (0, "bf16")])
def test_killed_and_resumed_equals_never_stopped(frames, unbroken, tmp_path, workers, precision):
    """To the bit, in either number type."""
    unbroken, more = unbroken(precision), ["--precision", precision]
    (process,) = spawn([flags(frames, tmp_path, *more, steps=30, workers=workers)])
    while not (tmp_path / "log.jsonl").exists() or (tmp_path / "log.jsonl").read_text().count("\n") < 4 + workers:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 2 <= final(tmp_path)["step"] < 30
    run(frames, tmp_path, *more, steps=30, workers=workers)
    assert len(log(tmp_path)) == 30
    assert_same_run(tmp_path, unbroken)


def test_two_killed_processes_resume_to_the_bit(frames, tmp_path):
    more = ["--save-every", 4]
    finish(spawn([flags(frames, tmp_path / "unbroken", *more, steps=12)], world=2))
    processes = spawn([flags(frames, tmp_path / "killed", *more, steps=12)], world=2)
    while not (tmp_path / "killed" / "last.pt").exists():
        assert all(p.poll() is None for p in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.wait()
    assert final(tmp_path / "killed")["step"] < 12
    finish(spawn([flags(frames, tmp_path / "killed", *more, steps=12)], world=2))
    assert len(log(tmp_path / "killed")) == 12
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_runs_resume_to_the_bit(frames, tmp_path, precision):
    more = ["--precision", precision, "--compile"]
    run(frames, tmp_path / "whole", *more, "--save-every", 4, steps=4)
    go_on = final_after(frames, tmp_path / "half", *more, stop=2)
    run(frames, go_on, *more, steps=4)
    assert_same_run(go_on, tmp_path / "whole")


def final_after(frames, out, *more, stop):
    """The folder of a run of 4 steps that ended after `stop` of them, as by a signal."""
    with pytest.MonkeyPatch.context() as patch:
        train_step, steps = pretrain.train_step, []

        def signalled_step(*args):
            steps.append(1)
            if len(steps) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*args)
        patch.setattr(pretrain, "train_step", signalled_step)
        run(frames, out, *more, "--save-every", 4, steps=4)
    assert final(out)["step"] == stop
    return out


def test_another_number_type_chosen_by_auto_is_said(frames, tmp_path, monkeypatch, capsys):
    """A run moves from a machine that multiplies bf16 to one that does not; asked for, the change is a contradiction."""
    for name, avx in (("bf16", True), ("fp32", False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        run(frames, tmp_path, "--precision", "auto", steps={"bf16": 1, "fp32": 2}[name])
        assert final(tmp_path)["args"]["number_type"] == json.loads((tmp_path / "args.json").read_text())["number_type"] == name
        assert f"matrix products in {name}" in capsys.readouterr().out.replace("--precision auto: ", "")
    run(frames, tmp_path, "--precision", "fp32", steps=3)  # what auto chose
    with pytest.raises(SystemExit, match="precision: fp32 in the checkpoint, bf16 asked for"):
        run(frames, tmp_path, "--precision", "bf16", steps=4)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_then_ends(frames, unbroken, tmp_path, monkeypatch, capsys, name):
    unbroken, more = unbroken("fp32"), ["--precision", "fp32", "--save-every", 1000]
    before, steps = signal.getsignal(getattr(signal, name)), []

    def signalled_step(*args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), getattr(signal, name))
        return train_step(*args)
    train_step = pretrain.train_step
    monkeypatch.setattr(pretrain, "train_step", signalled_step)
    run(frames, tmp_path, *more, steps=30)
    assert final(tmp_path)["step"] == 5 and name in capsys.readouterr().out
    assert signal.getsignal(getattr(signal, name)) == before
    run(frames, tmp_path, *more, steps=30)
    assert_same_run(tmp_path, unbroken)


def test_torn_log_lines_are_cut(frames, tmp_path):
    run(frames, tmp_path, steps=4)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 4, "loss": 1.0}) + '\n{"step": 5, "lo')
    run(frames, tmp_path, steps=6)
    assert [line["step"] for line in log(tmp_path)] == list(range(6))


def test_more_steps_say_how_the_schedules_change(frames, tmp_path, capsys):
    run(frames, tmp_path, steps=4)
    capsys.readouterr()
    run(frames, tmp_path, steps=8)
    out = capsys.readouterr().out
    assert "from 4 to 8 steps; at step 4" in out and "\n  lr: " in out and final(tmp_path)["step"] == 8
    run(frames, tmp_path, steps=8)  # nothing left to do is no error
    with pytest.raises(SystemExit, match="already done 8 steps"):
        run(frames, tmp_path, steps=4)


def test_contradicting_arguments_are_refused(frames, tmp_path):
    run(frames, tmp_path, steps=2)
    with pytest.raises(SystemExit, match=r"prototypes: 64 in the checkpoint, 32 asked for"):
        run(frames, tmp_path, "--prototypes", 32, "--lr", 0.1, steps=2)
    with pytest.raises(SystemExit, match="arch: tiny in the checkpoint, vitt14 asked for"):
        run(frames, tmp_path, "--arch", "vitt14", steps=2)


def test_damaged_checkpoint_is_named(frames, tmp_path):
    run(frames, tmp_path, steps=2)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="last.pt is truncated"):
        run(frames, tmp_path, steps=2)


def test_full_disk_is_an_error_before_the_first_step(frames, tmp_path, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(SystemExit, match="cannot take a checkpoint of"):
            run(frames, tmp_path, steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "log.jsonl").exists()


def test_failed_save_keeps_the_previous_checkpoint(frames, tmp_path, monkeypatch):
    run(frames, tmp_path, steps=2)
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda obj, f: (f.write(b"half"), (_ for _ in ()).throw(OSError(28, "No space left on device"))))
    with pytest.raises(SystemExit, match="No space left on device"):
        run(frames, tmp_path, steps=4)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp*"))


def test_exports_load_and_warm_start(frames, tmp_path, capsys):
    run(frames, tmp_path, "--export-every", 2, steps=4)
    assert sorted(p.name for p in tmp_path.glob("teacher_*")) == ["teacher_2.pt", "teacher_2_dinov2.pth", "teacher_4.pt", "teacher_4_dinov2.pth"]
    teacher = {k.removeprefix("backbone."): v for k, v in final(tmp_path)["teacher"].items() if k.startswith("backbone.")}
    ours, released = vit.load_backbone(tmp_path / "teacher_4.pt"), torch.load(tmp_path / "teacher_4_dinov2.pth", weights_only=True)
    assert same(dict(ours.state_dict()), teacher) and same(released, teacher)
    capsys.readouterr()
    args = pretrain.parse([str(a) for a in flags(frames, tmp_path, "--init", tmp_path / "last.pt", "--global-size", 84)])
    model = pretrain.build_model(args, print)
    assert model.student["backbone"].pos_embed.shape == (1, 17, 32) and "dino_head taken" in capsys.readouterr().out
    for part in (model.student, model.teacher):
        assert torch.equal(part["backbone"].norm.weight, teacher["norm.weight"])
        assert torch.equal(part["dino_head"].last_layer.weight_v, final(tmp_path)["teacher"]["dino_head.last_layer.weight_v"])


def test_warm_start_keeps_the_stored_position_grid(frames, tmp_path):
    """A 4 x 4 grid trained on crops of 84 px stays 4 x 4, in the exports and in a run that goes on, with and without --init."""
    run(frames, tmp_path / "first", steps=2)
    warm = ["--init", tmp_path / "first" / "teacher_2.pt", "--global-size", 84, "--lr", 0, "--min-lr", 0]
    run(frames, tmp_path / "second", *warm, steps=2)
    before, after = (vit.load_backbone(tmp_path / run / "teacher_2.pt") for run in ("first", "second"))
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert after.pos_embed.shape == before.pos_embed.shape == (1, 17, 32)
    assert torch.equal(before(images)["cls"], after(images)["cls"])  # nothing was learnt at rate 0, and nothing resized
    run(frames, tmp_path / "second", *warm[2:], steps=3)
    assert final(tmp_path / "second")["step"] == 3
