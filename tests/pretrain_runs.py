"""Runs of pretrain.py for its tests, with a tiny architecture, in this process or in others.

As a program: pretrain.main for each argument list of a JSON list in turn, keeping every last.pt as
last_<step>.pt. A list may begin with disturbances, see `disturbed`.

    RANK=0 WORLD_SIZE=2 ... python tests/pretrain_runs.py '[["--steps", "4", ...], ...]'
"""
import contextlib
import functools
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import sys

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import augment  # noqa: E402
import pretrain  # noqa: E402
import vit  # noqa: E402
from forked import fork  # noqa: E402

TINY = dict(dim=32, depth=2, heads=2)  # in vit.ARCHS while these tests run, and in their processes


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """--arch tiny, for these tests alone: other files' tests go through every architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.ARCHS, "tiny", TINY)
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # sums are split among them
        yield


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """24 small frames: coloured blobs."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for i in range(24):
        blobs = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blobs.resize((80, 64), Image.BICUBIC).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def unbroken(frames, tmp_path_factory):
    """unbroken("bf16"): the folder of a run of 30 steps in this number type that nothing disturbed."""
    @functools.cache
    def folder(precision):
        out = tmp_path_factory.mktemp("unbroken")
        run(frames, out, "--precision", precision, steps=30)
        return out
    return folder


def flags(frames, out, *more, steps=6, batch=4, workers=0):
    """Arguments of a run of a fraction of a second; later flags win."""
    return ["--arch", "tiny", "--recipe", "demo", "--device", "cpu", "--precision", "fp32",
            "--data", frames, "--out", out, "--steps", steps, "--batch", batch, "--workers", workers,
            "--global-size", 56, "--local-size", 28, "--local-crops", 2, "--prototypes", 64,
            "--head-hidden", 48, "--bottleneck", 16, "--log-every", 1, "--save-every", 2, *more]


def run(*args, **kwargs):
    pretrain.main([str(a) for a in flags(*args, **kwargs)])


def log(out):
    """Lines of a run's log without the timing fields."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "input_wait")} for line in lines]


def final(out):
    return torch.load(out / "last.pt", weights_only=True)


def same(a, b):
    """Bit-equal nested dicts of tensors and plain values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(out, expected):
    lines = log(expected)
    assert log(out) == lines[-len(log(out)):]
    for key in ("student", "teacher", "centers", "optimizer", "step"):
        assert same(final(out)[key], final(expected)[key]), key


def free_ports(n):
    """The first of n free ports in a row. They lie below those that the system gives out by itself,
    where a connection of anybody could take one before the run that is to listen there."""
    while True:
        first = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + n):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def spawn(argvs, world=1, others=None, torchrun=False, **kwargs):
    """Start `life` in `world` processes and return them, or the one torchrun that starts this file in
    them; see `fork`. others: the argument lists of the processes other than the first, where they
    differ."""
    port = str(free_ports(len(argvs)))
    argvs, others = ([[str(a) for a in argv] for argv in lists] for lists in (argvs, others or argvs))
    # Sums are split among threads: as many as here, to compare to the bit
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads() if world == 1 else 1)}
    if torchrun:
        words = ["--nproc-per-node", str(world), "--master-port", port, __file__, json.dumps(argvs)]
        return [fork(torch.distributed.run.main, words, env=env, **kwargs)]
    if world > 1:
        env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for r in range(world):
        place = {"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}
        started.append(fork(life, others if r else argvs, env=env | place, **kwargs))
    return started


def finish(processes, code=0):
    """Wait for processes to end with this code; returns what each wrote to its standard error."""
    for p in processes:
        p.join(240)
    ended = [p.exitcode for p in processes]
    for p in processes:  # one of them may wait for another that has failed
        p.kill()
    outputs = [p.output.read() for p in processes]
    assert ended == [code] * len(processes), "\n".join(outputs)
    return outputs


def keep_every(atomic_save):
    """atomic_save that leaves a copy last_<step>.pt of each last.pt."""
    def save(obj, path):
        atomic_save(obj, path)
        if path.name == "last.pt":
            shutil.copy(path, path.with_name(f"last_{obj['step']}.pt"))
    return save


def poison(patch, *steps, crops="global_crops"):
    """A pixel of these steps is not a number."""
    augmented = augment.augment

    def poisoned(batch, device):
        done = augmented(batch, device)
        if batch["step"] in steps:
            done[crops][0, 0, 0, 0] = math.nan
        return done
    patch.setattr(augment, "augment", poisoned)


def read_error(patch, step):
    read = augment.MultiCrop.__getitem__

    def fail(self, keys):
        if keys[0][0] == step:
            raise OSError(f"frame.png: Input/output error, process {os.environ['RANK']}")
        return read(self, keys)
    patch.setattr(augment.MultiCrop, "__getitem__", fail)


def asked_to_stop(patch, step):
    """In the middle of this step."""
    augmented = augment.augment

    def signalled(batch, device):
        if batch["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return augmented(batch, device)
    patch.setattr(augment, "augment", signalled)


def late(patch):
    """Verdicts on steps are read as on a GPU."""
    patch.setattr(pretrain, "reads_late", lambda device: True)


def scaled(patch, scale, **kwargs):
    """Runs in float16 begin with this scale of the loss."""
    patch.setattr(torch.amp.GradScaler, "__init__", functools.partialmethod(
        torch.amp.GradScaler.__init__, init_scale=scale, **kwargs))


@contextlib.contextmanager
def disturbed(words, rank):
    """late=, see there; room=BYTES, no file of process 0 can become larger; and in process RANK
    at this step read=RANK:STEP, poison=RANK:STEP, stop=RANK:STEP."""
    at_a_step = {"read": read_error, "poison": poison, "stop": asked_to_stop}
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for kind, value in (word.split("=") for word in words):
            if kind == "late":
                late(patch)
            elif kind == "room" and rank == 0:
                stack.enter_context(limited(int(value)))
            elif kind in at_a_step and value.split(":")[0] == str(rank):
                at_a_step[kind](patch, int(value.split(":")[1]))
        yield


@contextlib.contextmanager
def limited(size):
    """No file of this process can become larger, as on a full disk."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def work_off(argvs, rank):
    """The runs in turn; how many of them ended with a sentence, which is written to the standard error."""
    failed = 0
    for argv in argvs:
        print(f"run of {argv[argv.index('--out') + 1]}", file=sys.stderr)
        start = next(i for i, word in enumerate(argv) if "=" not in word)
        try:
            with disturbed(argv[:start], rank):
                pretrain.main(argv[start:])
        except SystemExit as end:
            print(f"ended: {end}", file=sys.stderr)
            failed += 1
        os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 29400)) + 1)
    return failed


def life(argvs):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    vit.ARCHS["tiny"] = TINY
    vit.atomic_save = keep_every(vit.atomic_save)
    code = min(1, work_off(argvs, int(os.environ.get("RANK", 0))))
    sys.stderr.flush()
    os._exit(code)  # several process groups in one life: gloo's threads may abort a normal exit


if __name__ == "__main__":
    life(json.loads(sys.argv[1]))
