"""Runs of pretrain.py for its tests, with a tiny architecture, in this process or in others.

As a program: pretrain.main for each argument list of a JSON list in turn, keeping every last.pt as last_<step>.pt.

    RANK=0 WORLD_SIZE=2 ... python tests/pretrain_runs.py '[["--steps", "4", ...], ...]'
"""
import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import pretrain  # noqa: E402
import vit  # noqa: E402

TINY = dict(dim=32, depth=2, heads=2)  # named in vit.ARCHS while pretrain's tests run, and in the worker's own process


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """--arch tiny, for these tests alone: other files' tests go through every architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.ARCHS, "tiny", TINY)
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # sums are split among threads: the same in every run
        yield


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """24 small frames: coloured blobs."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((80, 64), Image.BICUBIC).save(folder / f"{i:02}.png")
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
    return ["--arch", "tiny", "--recipe", "demo", "--device", "cpu", "--precision", "fp32", "--data", frames, "--out", out, "--steps", steps, "--batch", batch,
            "--workers", workers, "--global-size", 56, "--local-size", 28, "--local-crops", 2, "--prototypes", 64, "--head-hidden", 48,
            "--bottleneck", 16, "--log-every", 1, "--save-every", 2, *more]


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


def spawn(argvs, world=1, **kwargs):
    """Start this file in `world` processes; returns them."""
    argvs = json.dumps([[str(a) for a in argv] for argv in argvs])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    threads = torch.get_num_threads() if world == 1 else 1  # sums are split among threads: as many as here, to compare to the bit
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), **({"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {}))
    return [subprocess.Popen([sys.executable, __file__, argvs], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)) if world > 1 else env,
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **kwargs) for r in range(world)]


def finish(processes):
    outputs = [p.communicate(timeout=240)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)


def keep_every(atomic_save):
    """atomic_save that leaves a copy last_<step>.pt of each last.pt."""
    def save(obj, path):
        atomic_save(obj, path)
        if path.name == "last.pt":
            shutil.copy(path, path.with_name(f"last_{obj['step']}.pt"))
    return save


if __name__ == "__main__":
    vit.ARCHS["tiny"] = TINY
    vit.atomic_save = keep_every(vit.atomic_save)
    for argv in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 29400)) + 1)
        pretrain.main(argv)
