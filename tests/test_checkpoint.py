"""Stop and go on: runs that are killed, signalled, resumed, contradicted and short of disk."""
import argparse
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from pretrain_runs import (assert_same_run, final, finish, flags, frames, keep_every,  # noqa: F401
                           limited, log, poison, run, same, scaled, spawn, tiny, unbroken)

import augment
import checkpoint
import pretrain
import probe_mes
import vit


def wait_for(condition, processes=(), seconds=120):
    """Until the condition holds, while the processes live."""
    end = time.monotonic() + seconds
    while not condition():
        ended = [p for p in processes if p.exitcode is not None]
        assert time.monotonic() < end and not ended, [p.output.read() for p in ended]
        time.sleep(0.002)


def logged(out):
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


def gone(group):
    """Whether no process of the group lives; zombies that nobody waits for do not."""
    command = ["ps", "-o", "stat=", "-g", str(group)]
    states = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return all(state.startswith("Z") for state in states)


def children(process):
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in listed.split()]


# --- killed, signalled -------------------------------------------------------------------------


@pytest.mark.parametrize("workers, precision", [(0, "fp32"), (2, "fp32"), (0, "bf16")])
def test_killed_and_resumed_equals_never_stopped(frames, unbroken, tmp_path, workers, precision):
    """To the bit, in either number type, and at once, though workers of the killed one may live
    for up to ten seconds."""
    unbroken, more = unbroken(precision), ["--precision", precision]
    argv = flags(frames, tmp_path, *more, steps=30, workers=workers)
    (process,) = spawn([argv], new_session=True)
    wait_for(lambda: logged(tmp_path) >= 4 + workers, [process])
    process.kill()
    process.join()
    killed = time.monotonic()
    assert 2 <= final(tmp_path)["step"] < 30
    run(frames, tmp_path, *more, steps=30, workers=workers)
    assert len(log(tmp_path)) == 30
    assert_same_run(tmp_path, unbroken)
    wait_for(lambda: gone(process.pid), seconds=10 - (time.monotonic() - killed))


def test_workers_that_wait_for_a_disk_end_with_a_killed_trainer(frames, tmp_path):
    shutil.copytree(frames, tmp_path / "frames")
    os.mkfifo(tmp_path / "frames" / "zz.png")  # whoever opens it waits
    argv = flags(tmp_path / "frames", tmp_path, steps=30, workers=2)
    (process,) = spawn([argv], new_session=True)
    wait_for(lambda: logged(tmp_path) >= 1, [process])
    time.sleep(1)
    process.kill()
    process.join()
    wait_for(lambda: gone(process.pid), seconds=10)


@pytest.fixture(scope="module")
def pair(frames, tmp_path_factory):
    """Folders of runs of two processes, one after the other, and how each ended in each process:
    at(name), [{name: sentences} of process 0, of process 1]."""
    at = tmp_path_factory.mktemp("pair").joinpath

    def argv(name, *more, what=(), steps=30):
        return [*what, *flags(frames, at(name), "--save-every", 4, *more, steps=steps)]
    shutil.copytree(frames, at("renamed"))
    (at("renamed") / "00.png").rename(at("renamed") / "another.png")
    both = [argv("unbroken"), argv("read", what=["read=1:3"]), argv("full", steps=2),
            argv("full", what=["room=10000"], steps=4), argv("minutes", "--save-every", "0.001m")]
    here = [argv("local", what=["read=0:5"]), argv("local"), argv("names"), argv("flags", steps=4),
            argv("weights", "--init", at("unbroken") / "teacher_30.pt")]
    there = [argv("elsewhere", what=["read=0:5"]), argv("elsewhere"),
             argv("names", "--data", at("renamed")), argv("flags", "--lr", 1, steps=4), argv("weights")]
    said = finish(spawn(both + here, world=2, others=both + there), code=1)
    ended = [{} for _ in said]
    for found, text in zip(ended, said):
        for part in text.split("run of ")[1:]:
            out, *lines = part.splitlines()
            sentences = [line.partition("ended: ")[2] for line in lines if "ended: " in line]
            found[pathlib.Path(out).name] = sentences
    return at, ended


@pytest.mark.parametrize("workers", [0, 2])
def test_two_killed_processes_resume_to_the_bit(frames, tmp_path, pair, workers):
    """Under torchrun; at once, though workers of the killed ones may live for up to ten seconds."""
    argv = flags(frames, tmp_path, "--save-every", 4, steps=30, workers=workers)
    (launcher,) = spawn([argv], world=2, torchrun=True, new_session=True)
    wait_for((tmp_path / "last.pt").exists, [launcher])
    trainers = children(launcher)
    for pid in [launcher.pid, *trainers]:
        os.kill(pid, signal.SIGKILL)
    launcher.join()
    assert len(trainers) == 2 and final(tmp_path)["step"] < 30
    finish(spawn([argv], world=2))
    assert len(log(tmp_path)) == 30
    assert_same_run(tmp_path, pair[0]("unbroken"))


@pytest.mark.parametrize("torchrun, workers", [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_signals_to_the_whole_group_lose_nothing(frames, unbroken, tmp_path, pair, torchrun, workers):
    """As a queue sends them: to the launcher, and to everybody twice."""
    argv = flags(frames, tmp_path, "--save-every", 1000, steps=30, workers=workers)
    (process,) = spawn([argv], world=1 + torchrun, torchrun=torchrun, new_session=True)
    wait_for(lambda: logged(tmp_path) >= 3, [process])
    for group in [*(children(process) if torchrun else []), process.pid, process.pid]:
        os.killpg(group, signal.SIGTERM)
    process.join(60)
    errors = process.output.read()
    assert process.exitcode is not None and (torchrun or process.exitcode == 0), errors
    assert "DataLoader" not in errors
    assert 3 <= final(tmp_path)["step"] == logged(tmp_path) < 30
    expected = log(pair[0]("unbroken") if torchrun else unbroken("fp32"))
    assert log(tmp_path) == expected[:logged(tmp_path)]
    wait_for(lambda: gone(process.pid), seconds=10)


def signals(*names, later=0):
    """In a process of its own: what became of the signals and, where it lived on, 0."""
    def body():
        with pretrain.asked_to_stop() as asked:
            for name in names:
                os.kill(os.getpid(), getattr(signal, name))
                before = time.monotonic
                time.monotonic = lambda: before() + later
            assert asked == list(names)
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    return process.exitcode


def test_a_second_request_ends_at_once_if_it_is_one():
    for pair in ("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT"):
        assert signals(*pair) == 0
    assert signals("SIGINT", "SIGINT") == -signal.SIGINT
    for first in "SIGTERM", "SIGINT":
        assert signals(first, "SIGTERM", later=6) == -signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_then_ends(frames, unbroken, tmp_path, monkeypatch, capsys, name):
    unbroken = unbroken("fp32")
    before, steps = signal.getsignal(getattr(signal, name)), []

    def signalled_step(*args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), getattr(signal, name))
        return train_step(*args)
    train_step = pretrain.train_step
    monkeypatch.setattr(pretrain, "train_step", signalled_step)
    run(frames, tmp_path, "--save-every", 1000, steps=30)
    assert final(tmp_path)["step"] == 5 and name in capsys.readouterr().out
    assert signal.getsignal(getattr(signal, name)) == before
    run(frames, tmp_path, "--save-every", 1000, steps=30)
    assert_same_run(tmp_path, unbroken)


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
    """A run moves from a machine that multiplies bf16 to one that does not; asked for, the change
    is a contradiction."""
    for name, avx in (("bf16", True), ("fp32", False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        run(frames, tmp_path, "--precision", "auto", steps={"bf16": 1, "fp32": 2}[name])
        written = json.loads((tmp_path / "args.json").read_text())
        assert final(tmp_path)["args"]["number_type"] == written["number_type"] == name
        assert f"matrix products in {name}" in capsys.readouterr().out.replace("--precision auto: ", "")
    run(frames, tmp_path, "--precision", "fp32", steps=3)  # what auto chose
    with pytest.raises(SystemExit, match="precision: fp32 in the checkpoint, bf16 asked for"):
        run(frames, tmp_path, "--precision", "bf16", steps=4)


# --- several processes, one verdict ------------------------------------------------------------


def test_process_0_decides_whether_to_resume(pair):
    """Each process has a disk of its own; the checkpoint lies on one of them."""
    at, _ = pair
    assert_same_run(at("local"), at("unbroken"))
    assert len(log(at("local"))) == 30 and not at("elsewhere").exists()


@pytest.mark.parametrize("name, sentence", [
    ("names", "process 1 differs from process 0 in its --data"),
    ("weights", "process 1 differs from process 0 in its first weights"),
    ("flags", "process 1 differs from process 0 in its --lr: 1.0 instead of 0.012"),
    ("read", "frame.png: Input/output error, process 1"), ("full", "cannot write .*.pt: File too large")])
def test_processes_end_together_with_one_sentence(pair, name, sentence):
    _, (first, second) = pair
    (said,) = first[name]
    assert re.match(sentence, said) and second[name] == ["1"]


def test_a_read_error_saves_first(pair):
    at, (first, _) = pair
    assert final(at("read"))["step"] == logged(at("read")) == 3 and (at("local") / "last_5.pt").exists()
    assert final(at("full"))["step"] == 2


def test_minutes_between_saves_are_those_of_process_0(pair):
    at, (first, second) = pair
    assert_same_run(at("minutes"), at("unbroken"))
    assert first["minutes"] == second["minutes"] == [] and len(list(at("minutes").glob("last_*.pt"))) > 1


# --- disks that are full -----------------------------------------------------------------------


def test_full_disk_is_an_error_before_the_first_step(frames, tmp_path, monkeypatch):
    """Counted are last.pt twice, the exports and best.pt; nothing large is written to find out."""
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    usage, free = shutil.disk_usage, []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free[-1]))
    args = pretrain.parse([str(a) for a in flags(frames, tmp_path, "--export-every", 2, steps=6)])
    model = pretrain.build_model(args, print)
    state = 16 * sum(p.numel() for p in model.student.parameters())
    free.append(2 * state + 3 * 4 * sum(p.numel() for p in model.student["backbone"].parameters()))
    checkpoint.check_room(args, model)
    free.append(free[-1] - 1)
    sentence = "lacks 1 bytes: 3.1 MiB are free and .* write 3.1 MiB, last.pt of 1.3 MiB.* raise --export"
    with pytest.raises(SystemExit, match=sentence):
        run(frames, tmp_path, "--export-every", 2, steps=6)
    assert {p.name for p in tmp_path.iterdir()} <= {".lock"}


def test_sizes_in_words():
    assert [checkpoint.readable(n) for n in (0, 1023, 1024, 5 * 2**20, 1.5 * 2**30, 2**50)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "5.0 MiB", "1.5 GiB", "1024.0 TiB"]


def test_a_disk_that_fills_up_is_an_oserror_for_every_size(tmp_path):
    """torch's writer makes a RuntimeError of it."""
    vit.atomic_save({"old": 1}, tmp_path / "x.pt")
    for size in (0, 100, 1_000, 10_000, 39_000, 40_000, 41_000):
        with limited(size), pytest.raises(OSError, match="File too large"):
            vit.atomic_save({"a": torch.zeros(5_000), "b": torch.zeros(5_000)}, tmp_path / "x.pt")
        assert torch.load(tmp_path / "x.pt") == {"old": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("more, name", [
    ((), "last.pt"), (("--export-every", 3, "--save-every", 100), "teacher_3.pt"),
    (("--probe-every", 3), "best.pt"), (("--max-skips", 1), "nonfinite_3.pt")])
def test_a_disk_that_fills_up_in_mid_run_is_a_sentence(frames, tmp_path, monkeypatch, more, name):
    """Whatever is being written; what lay there before stays."""
    run(frames, tmp_path, steps=2)
    before = (tmp_path / "last.pt").read_bytes()
    if "nonfinite" in name:
        poison(monkeypatch, 3)
        more = (*more, "--save-every", 100)
    monkeypatch.setattr(probe_mes, "online_score", lambda *args, **how: {"kappa": 1.0})
    labelled = argparse.Namespace(paths=[])
    monkeypatch.setattr(pretrain, "open_probe", lambda args, say: args.probe_every and labelled)
    sentence = f"cannot write .*{name}: File too large; what lay there before is untouched"
    with limited(20_000), pytest.raises(SystemExit, match=sentence):
        run(frames, tmp_path, *more, steps=6)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob(".*.tmp*"))


def test_a_full_disk_for_the_log_is_a_sentence(frames, tmp_path, monkeypatch):
    opened = pretrain.Log.open

    def full(self, *args):
        opened(self, *args)
        self.file = open("/dev/full", "a", buffering=1)
    monkeypatch.setattr(pretrain.Log, "open", full)
    with pytest.raises(SystemExit, match="cannot write /dev/full: No space left on device"):
        run(frames, tmp_path, steps=4)
    assert final(tmp_path)["step"] == 1


def test_failed_save_keeps_the_previous_checkpoint(frames, tmp_path, monkeypatch):
    run(frames, tmp_path, steps=2)
    before = (tmp_path / "last.pt").read_bytes()

    def half(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SystemExit, match="No space left on device"):
        run(frames, tmp_path, steps=4)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob(".*.tmp*"))


# --- saving beside the training ----------------------------------------------------------------


def test_training_goes_on_while_the_file_is_written(frames, unbroken, tmp_path, monkeypatch):
    """What is written is the state at the time of the save; the last save waits for the one in
    flight."""
    unbroken = unbroken("fp32")
    train_step, save, steps, later = pretrain.train_step, vit.atomic_save, [], threading.Event()

    def step(*args):
        steps.append(1)
        if len(steps) == 6:
            later.set()
        return train_step(*args)

    def slow(state, path):
        if path.name == "last.pt" and state["step"] == 4:
            assert later.wait(20)
            save(state, path.with_name("kept.pt"))
        save(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train_step", step)
        patch.setattr(vit, "atomic_save", slow)
        run(frames, tmp_path, "--save-every", 4, steps=30)
    assert_same_run(tmp_path, unbroken)
    (tmp_path / "kept.pt").replace(tmp_path / "last.pt")
    run(frames, tmp_path, "--save-every", 4, steps=30)
    assert_same_run(tmp_path, unbroken)


def test_when_to_save(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def times(every, seconds):
        """Steps after which a run saves whose steps take so long."""
        clock[0], found = 0, []
        args = argparse.Namespace(out=tmp_path, save_every=pretrain.interval(every))
        saver = checkpoint.Saver(args, 3, [])
        for step in range(3, 30):
            if saver.due(step):
                saver.saved, saver.clock = step, clock[0]
                found.append(step)
            clock[0] += seconds
        return found
    assert times("9", 100) == [9, 18, 27]
    assert times("10m", 100) == [9, 15, 21, 27] and times("0.5m", 29) == list(range(5, 30, 2))
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    assert times("9", 100) == times("10m", 100) == []
    for wrong in ("0", "-1", "0m", "ten", "1h", "2.5"):
        with pytest.raises(ValueError):
            pretrain.interval(wrong)


def test_at_most_fifty_exports_by_default():
    expected = {200: 5000, 125_000: 5000, 250_000: 5000, 250_001: 5001, 625_000: 12_500}
    for steps, every in expected.items():
        assert pretrain.parse(["--steps", str(steps)]).export_every == every


def test_other_processes_gather_and_keep_nothing(frames, tmp_path, monkeypatch):
    args = pretrain.parse([str(a) for a in flags(frames, tmp_path)])
    model = pretrain.build_model(args, print)
    optimizer = pretrain.make_optimizer(model, args)
    for p in model.student.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()

    def tensors(state):
        return sum(map(tensors, state.values())) if isinstance(state, dict) else torch.is_tensor(state)
    assert tensors(checkpoint.snapshot(model, optimizer, {}, args)) > 100
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    assert tensors(checkpoint.snapshot(model, optimizer, {}, args)) == 0
    assert checkpoint.plain_teacher(model, args) is None


def test_one_nonfinite_file_is_kept(frames, tmp_path, monkeypatch):
    poison(monkeypatch, 1, 3)
    run(frames, tmp_path, "--max-skips", 2, steps=6)
    assert [p.name for p in tmp_path.glob("nonfinite*")] == ["nonfinite_3.pt"]


def test_a_bad_step_saves_the_state_before_it(frames, unbroken, tmp_path, monkeypatch):
    """It is made again by the run that goes on: here with a pixel that is a number."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 5)
        with pytest.raises(SystemExit, match="step 5: not finite .* raise --max-skips"):
            run(frames, tmp_path, "--save-every", 1000, steps=30)
    assert final(tmp_path)["step"] == 5 and final(tmp_path)["skips"] == 0
    run(frames, tmp_path, "--save-every", 1000, steps=30)
    assert_same_run(tmp_path, unbroken("fp32"))


def test_exports_load_and_warm_start(frames, tmp_path, capsys):
    run(frames, tmp_path, "--export-every", 2, steps=4)
    assert sorted(p.name for p in tmp_path.glob("teacher_*")) == ["teacher_2.pt", "teacher_4.pt"]
    saved = final(tmp_path)["teacher"]
    teacher = {k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")}
    assert same(dict(vit.load_backbone(tmp_path / "teacher_4.pt").state_dict()), teacher)
    capsys.readouterr()
    more = ["--init", tmp_path / "last.pt", "--global-size", 84, "--out", tmp_path / "next"]
    model = pretrain.build_model(pretrain.parse([str(a) for a in flags(frames, tmp_path, *more)]), print)
    assert model.student["backbone"].pos_embed.shape == (1, 17, 32)
    assert "dino_head taken" in capsys.readouterr().out
    for part in (model.student, model.teacher):
        assert torch.equal(part["backbone"].norm.weight, teacher["norm.weight"])
        last = part["dino_head"].last_layer.weight_v
        assert torch.equal(last, saved["dino_head.last_layer.weight_v"])


def test_warm_start_keeps_the_stored_position_grid(frames, tmp_path):
    """A 4 x 4 grid trained on crops of 84 px stays 4 x 4, in the exports and in a run that goes on,
    with and without --init."""
    run(frames, tmp_path / "first", steps=2)
    warm = ["--init", tmp_path / "first" / "teacher_2.pt", "--global-size", 84, "--lr", 0, "--min-lr", 0]
    run(frames, tmp_path / "second", *warm, steps=2)
    before, after = (vit.load_backbone(tmp_path / run / "teacher_2.pt") for run in ("first", "second"))
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert after.pos_embed.shape == before.pos_embed.shape == (1, 17, 32)
    assert torch.equal(before(images)["cls"], after(images)["cls"])  # nothing learnt or resized
    run(frames, tmp_path / "second", *warm[2:], steps=3)
    assert final(tmp_path / "second")["step"] == 3


def test_a_run_that_goes_on_does_not_read_init_again(frames, tmp_path):
    """Whose file may be gone."""
    run(frames, tmp_path / "first", steps=2)
    warm = ["--init", tmp_path / "first" / "teacher_2.pt"]
    run(frames, tmp_path / "whole", *warm, steps=4)
    half = final_after(frames, tmp_path / "half", *warm, stop=2)
    warm[1].unlink()
    run(frames, half, *warm, "--save-every", 4, steps=4)
    assert_same_run(half, tmp_path / "whole")
    with pytest.raises(SystemExit, match="--init: .*teacher_2.pt"):
        run(frames, half, "--resume", "no", *warm, steps=4)


# --- the run folder ----------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(frames, tmp_path):
    """The lock is the trainer's: a killed one leaves none, though a child of it lives."""
    program = ("import fcntl, os, sys, time\n"
               "lock = open(sys.argv[1], 'w')\n"
               "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
               "if os.fork(): print('locked', flush=True)\n"
               "time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", program, tmp_path / ".lock"],
                              stdout=subprocess.PIPE, start_new_session=True)
    holder.stdout.readline()
    with pytest.raises(SystemExit, match=f"another process is writing to {tmp_path}"):
        run(frames, tmp_path, steps=2)
    holder.kill()
    holder.wait()
    assert not gone(holder.pid)
    run(frames, tmp_path, steps=2)
    os.killpg(holder.pid, signal.SIGKILL)


def test_leavings_of_killed_saves_are_cleared(frames, tmp_path):
    """In the run folder all, under its lock; elsewhere those that are a day old, of processes that
    do not live."""
    for name in (".last.tmp123456.pt", ".log.tmp1.jsonl", ".teacher_5.tmp99.pt"):
        (tmp_path / name).write_text("half")
    run(frames, tmp_path, steps=2)
    assert not list(tmp_path.glob(".*.tmp*"))
    dead, alive = subprocess.Popen(["true"]), os.getpid()
    dead.wait()
    nobody = 2 ** 22 + 1  # more than Linux gives out
    for pid, hours in ((dead.pid, 25), (alive, 25), (nobody, 23), (nobody + 1, 25), ("file", 25)):
        left = tmp_path / f".x.tmp{pid}.pt"
        left.write_text("half")
        os.utime(left, (time.time() - hours * 3600,) * 2)
    vit.clear_leavings(tmp_path / "x.pt")
    stay = {f".x.tmp{alive}.pt", f".x.tmp{nobody}.pt", ".x.tmpfile.pt"}
    assert {p.name for p in tmp_path.glob(".x*")} == stay


def test_beginning_anew_moves_the_old_run_aside(frames, tmp_path, capsys):
    run(frames, tmp_path, steps=2)
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "notes.txt").write_text("mine")
    run(frames, tmp_path, "--resume", "no", "--lr", 1, steps=3)
    assert "old-1" in capsys.readouterr().out
    assert (tmp_path / "old-1" / "last.pt").read_bytes() == before
    old, new = ({p.name for p in folder.iterdir()} for folder in (tmp_path / "old-1", tmp_path))
    assert old == {"args.json", "last.pt", "log.jsonl", "teacher_2.pt"}
    assert new == old - {"teacher_2.pt"} | {".lock", "notes.txt", "old-1", "teacher_3.pt"}
    with pytest.raises(SystemExit, match="whose last.pt would be lost; give another --out"):
        run(frames, tmp_path, "--resume", tmp_path / "old-1" / "last.pt", steps=3)


# --- going on ----------------------------------------------------------------------------------


def test_another_batch_goes_on_with_the_next_frame(frames, tmp_path, monkeypatch):
    """Steps of 4 frames, then of 8: every frame once in each of two epochs of 24."""
    augmented, seen = augment.augment, []

    def noted(batch, device):
        seen.extend(batch["index"].tolist())
        return augmented(batch, device)
    monkeypatch.setattr(augment, "augment", noted)
    run(frames, tmp_path, steps=4)
    run(frames, tmp_path, steps=8, batch=8)
    assert final(tmp_path)["seen"] == len(seen) == 48
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))


def test_other_frames_of_the_same_number_are_noticed(frames, tmp_path):
    shutil.copytree(frames, tmp_path / "moved")
    run(frames, tmp_path / "run", steps=2)
    run(tmp_path / "moved", tmp_path / "run", steps=3)  # the same names in another folder
    (tmp_path / "moved" / "00.png").rename(tmp_path / "moved" / "another.png")
    with pytest.raises(SystemExit, match="24 frames and so many are here, but of other names"):
        run(tmp_path / "moved", tmp_path / "run", steps=4)


def test_best_is_forgotten_when_something_else_is_measured(frames, tmp_path, monkeypatch, capsys):
    scores = iter([0.8, 0.5, 0.3, 0.9])

    def online_score(*args, **how):
        return dict.fromkeys(("kappa", "macro_f1"), next(scores))

    def open_probe(args, say):
        return argparse.Namespace(paths=[args.probe_data])
    monkeypatch.setattr(probe_mes, "online_score", online_score)
    monkeypatch.setattr(pretrain, "open_probe", open_probe)

    def best(steps, *more):
        """The best score in best.pt and in last.pt, and what was printed."""
        run(frames, tmp_path, "--probe-every", 1, *more, steps=steps)
        kept = torch.load(tmp_path / "best.pt")["metrics"]["kappa"]
        assert kept == final(tmp_path)["best"]
        return kept, capsys.readouterr().out
    kept, said = best(1, "--probe-data", "a")
    assert kept == 0.8 and "inf" not in said and "begins anew" not in said
    kept, said = best(2, "--probe-data", "a")
    assert kept == 0.8 and "best kappa so far 0.800" in said and "begins anew" not in said
    kept, said = best(3, "--probe-data", "b")
    assert kept == 0.3 and "best.pt begins anew" in said
    kept, said = best(4, "--probe-data", "b", "--probe-task", "landmarks")
    assert kept == 0.9 and "best.pt begins anew" in said


def test_lines_that_are_no_records_are_dropped_and_said(frames, tmp_path, capsys):
    run(frames, tmp_path, steps=4)
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole + b"\0\0\0\n\xff\xfe\n[]\n{}\n7\n" + b'{"step": 5, "lo')
    run(frames, tmp_path, steps=6)
    assert [line["step"] for line in log(tmp_path)] == list(range(6))
    assert "5 lines are no records" in capsys.readouterr().out


@pytest.mark.parametrize("error, sentence", [
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n...\nRuntimeError: unable to "
                  "allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"),
     "no shared memory left .* --shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory. Please try to raise your shared "
                  "memory limit."), "no shared memory left .* --shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
     "a loader's worker died .*signal: Killed.*fewer --workers"),
    (augment.data.BadImage("Caught BadImage in DataLoader worker process 1.\nOriginal Traceback\n  "
                           "raise\ndata.BadImage: no readable frame in 20 draws:\n  a.png"),
     "^no readable frame in 20 draws:\n  a.png$")])
def test_trouble_of_the_loader_is_a_sentence_and_saves_first(frames, tmp_path, monkeypatch, error, sentence):
    def batches(*args):
        yield from itertools.islice(made(*args), 3)
        raise error
    made = pretrain.make_batches
    monkeypatch.setattr(pretrain, "make_batches", batches)
    with pytest.raises(SystemExit, match=sentence):
        run(frames, tmp_path, "--save-every", 100, steps=6)
    assert final(tmp_path)["step"] == 3


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


# --- float16 -----------------------------------------------------------------------------------


def test_float16_resumes_to_the_bit_with_its_scale(frames, tmp_path, monkeypatch):
    """The first steps overflow, then the scale grows every two; a run of 8 steps stops after 5."""
    scaled(monkeypatch, 2.0 ** 14, growth_interval=2)
    monkeypatch.setattr(vit, "atomic_save", keep_every(vit.atomic_save))
    more = ["--precision", "fp16", "--save-every", 5]
    run(frames, tmp_path / "whole", *more, steps=8)
    run(frames, tmp_path / "half", *more, "--resume", tmp_path / "whole" / "last_5.pt", steps=8)
    whole, half = final(tmp_path / "whole"), final(tmp_path / "half")
    assert whole["scaler"] == half["scaler"] and whole["scaler"]["scale"] != 2.0 ** 14
    assert_same_run(tmp_path / "half", tmp_path / "whole")
    lines = log(tmp_path / "whole")
    overflows = [line for line in lines if "overflows" in line]
    assert overflows and overflows[0]["step"] == 0 and overflows[0]["loss_scale"] == 2.0 ** 13
    assert all("loss_scale" in line for line in lines) and whole["skips"] == 0
    assert not list((tmp_path / "whole").glob("nonfinite*"))


def test_ten_overflows_in_a_row_end_the_run(frames, tmp_path, monkeypatch):
    scaled(monkeypatch, 2.0 ** 80)
    with pytest.raises(SystemExit, match="step 9: gradients were not finite for ten steps in a row"):
        run(frames, tmp_path, "--precision", "fp16", steps=12)
    assert final(tmp_path)["step"] == 10 and final(tmp_path)["skips"] == 0
