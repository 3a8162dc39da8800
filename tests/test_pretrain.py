"""Pre-training: the official training steps, the schedules, and runs that are stopped, resumed, split and poisoned."""
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from fill import array
from PIL import Image

import pretrain
import vit

WORKER = str(pathlib.Path(__file__).parent / "pretrain_worker.py")
sys.path.insert(0, str(pathlib.Path(WORKER).parent))
import pretrain_worker  # noqa: E402

META = json.loads((REFERENCE / "meta.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def tiny_architecture():
    """--arch tiny, for these tests alone: other files' tests go through every architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.ARCHS, "tiny", pretrain_worker.TINY)
        yield


# --- against DINOv2's own numbers -------------------------------------------------------------------------------------


def reference_model(cfg, filled):
    backbone = vit.VisionTransformer(cfg["dim"], cfg["depth"], cfg["heads"], ffn="swiglu" if "swiglu" in cfg["ffn"] else "mlp",
                                     registers=cfg["reg"], image_size=cfg["global_size"])
    model = pretrain.DINOv2(backbone, cfg["prototypes"], cfg["hidden"], cfg["bottleneck"], cfg["separate_head"], cfg["bottleneck"],
                            "centering" if cfg["centering"] == "centering" else "sinkhorn", cfg["koleo_weight"])
    for side in (model.student, model.teacher):
        for name, module in side.items():
            filled(module, name + ".")
    return model.train()


@pytest.mark.parametrize("case", ["sk_separate", "center_shared"])
def test_four_steps_equal_dinov2(case, reference, filled):
    """Losses to 1e-4, gradient norms to 1e-3, parameters of student and teacher after the last step to 1e-3."""
    cfg, expected = META[f"steps_{case}"], reference(f"steps_{case}")
    model = reference_model(cfg, filled)
    optimizer = torch.optim.AdamW(pretrain.param_groups(model.student, cfg["layerwise_decay"], cfg["patch_embed_lr_mult"]),
                                  lr=0.0, betas=cfg["betas"])
    B, L, G, g = (cfg[k] for k in ("batch", "local_crops", "global_size", "local_size"))
    for step in range(cfg["steps"]):
        want = {k.split("/")[1]: expected[k] for k in expected if k.startswith(f"step{step}/")}
        batch = {"global_crops": torch.from_numpy(array(f"{case}global{step}", (2 * B, 3, G, G))),
                 "local_crops": torch.from_numpy(array(f"{case}local{step}", (L * B, 3, g, g))), "masks": torch.from_numpy(want["masks"])}
        lr, wd, momentum, temp, last_lr = want["hyper"]
        now = {"lr": lr, "backbone_lr": lr, "last_layer_lr": last_lr, "weight_decay": wd, "momentum": momentum, "temp": temp}
        terms, norms, finite = pretrain.train_step(model, optimizer, batch, now, cfg["clip"])
        assert finite
        found = {"dino_local_crops_loss": terms["dino_local"], "dino_global_crops_loss": terms["dino_global"], "total": terms["loss"],
                 "koleo_loss": terms["koleo"] / 2, "ibot_loss": terms["ibot"] / 2}  # DINOv2 logs half of these two
        for name, value in found.items():
            assert value.item() == pytest.approx(want[name].item(), rel=1e-4), (step, name)
        assert len(norms) == sum(k.startswith("grad_norm") for k in want)
        for name, value in norms.items():
            assert value.item() == pytest.approx(want[f"grad_norm_{name}"].item(), rel=1e-3), (step, name)
    for side in ("student", "teacher"):
        for name, p in getattr(model, side).named_parameters():
            module, name = name.split(".", 1)
            want = expected[f"final/{side}/{module}/{name}"]
            p = p.detach()
            # the gradient of the keys' bias is zero but for rounding, which Adam blows up to full steps
            atol = 1e-4 if name.endswith("qkv.bias") else 1e-5
            np.testing.assert_allclose([p.mean(), p.std(correction=0), p.flatten()[0]], want, rtol=1e-3, atol=atol, err_msg=f"{side} {name}")


def test_schedules_equal_dinov2(reference):
    expected, s = reference("schedules"), META["schedules"]
    args = pretrain.parse(["--recipe", "scratch-long", "--device", "cpu", "--steps", str(s["total"]), "--lr", "0.0002"])
    args.warmup, args.temp_warmup, args.freeze_last_layer = (s[k] / s["total"] for k in ("warmup", "temp_warmup", "freeze_last_layer"))
    found = pretrain.make_schedules(args, global_batch=3072)
    for name, theirs in {"lr": "lr", "last_layer_lr": "last_layer_lr", "weight_decay": "weight_decay", "momentum": "momentum",
                         "temp": "teacher_temp"}.items():
        np.testing.assert_allclose(found[name], expected[theirs][: s["total"]], rtol=1e-12, atol=1e-15, err_msg=name)
    assert (found["backbone_lr"] == found["lr"]).all()


def test_adapt_holds_the_backbone_then_ramps():
    args = pretrain.parse(["--recipe", "adapt", "--device", "cpu", "--steps", "1000"])
    s = pretrain.make_schedules(args, global_batch=64)
    assert (s["backbone_lr"][:400] == 0).all() and s["lr"][399] == pytest.approx(5e-5)   # FINO: 5e-5 at 64 frames per step
    assert (np.diff(s["backbone_lr"][399:441]) > 0).all() and (s["backbone_lr"][440:] == s["lr"][440:]).all()
    assert (s["last_layer_lr"][:18] == 0).all() and s["last_layer_lr"][18] > 0


def test_param_groups_equal_dinov2():
    cfg = META["param_groups"]
    backbone = vit.VisionTransformer(64, 3, 2, registers=4, image_size=56)
    student = pretrain.DINOv2(backbone, 64, 48, 16, separate_ibot_head=False).student
    groups = pretrain.param_groups(student, cfg["layerwise_decay"], cfg["patch_embed_lr_mult"])
    found = {name: [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]] for g in groups for name in g["names"]}
    wanted = {f"backbone.{k}": v for k, v in cfg["backbone"].items()} | {f"dino_head.{k}": v for k, v in cfg["head"].items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name
    assert sum(len(g["params"]) for g in groups) == len(found)


def test_each_submodule_is_clipped_on_its_own():
    student = torch.nn.ModuleDict({"backbone": torch.nn.Linear(4, 4), "dino_head": torch.nn.Linear(4, 4)})
    for p in student["backbone"].parameters():
        p.grad = torch.full_like(p, 10.0)
    for p in student["dino_head"].parameters():
        p.grad = torch.full_like(p, 0.1)
    norms = pretrain.clip_gradients(student, 3.0)
    assert norms["backbone"].item() == pytest.approx(10 * 20**0.5) and norms["dino_head"].item() == pytest.approx(0.1 * 20**0.5)
    assert student["backbone"].weight.grad[0, 0].item() == pytest.approx(3 / 20**0.5, rel=1e-5)
    assert (student["dino_head"].weight.grad == 0.1).all()


# --- whole runs, with a tiny network ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """24 small frames: coloured blobs."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((80, 64), Image.BICUBIC).save(folder / f"{i:02}.png")
    return folder


def flags(frames, out, *more, steps=6, batch=4, workers=0):
    """Arguments of a run of a fraction of a second; later flags win."""
    return ["--arch", "tiny", "--recipe", "demo", "--device", "cpu", "--data", frames, "--out", out, "--steps", steps, "--batch", batch,
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


def spawn(argvs, world=1, **kwargs):
    """Start pretrain_worker.py in `world` processes; returns them."""
    argvs = json.dumps([[str(a) for a in argv] for argv in argvs])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    threads = torch.get_num_threads() if world == 1 else 1  # sums are split among threads: as many as here, to compare to the bit
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), **({"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {}))
    return [subprocess.Popen([sys.executable, WORKER, argvs], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)) if world > 1 else env,
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **kwargs) for r in range(world)]


@pytest.fixture(scope="module")
def unbroken(frames, tmp_path_factory):
    """A run of 30 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken")
    run(frames, out, steps=30)
    return out


def assert_same_run(out, expected):
    lines = log(expected)
    assert log(out) == lines[-len(log(out)):]
    for key in ("student", "teacher", "centers", "optimizer", "step"):
        assert same(final(out)[key], final(expected)[key]), key


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_equals_never_stopped(frames, unbroken, tmp_path, workers):
    (process,) = spawn([flags(frames, tmp_path, steps=30, workers=workers)])
    while not (tmp_path / "log.jsonl").exists() or (tmp_path / "log.jsonl").read_text().count("\n") < 4 + workers:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 2 <= final(tmp_path)["step"] < 30
    run(frames, tmp_path, steps=30, workers=workers)
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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_then_ends(frames, unbroken, tmp_path, monkeypatch, capsys, name):
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


def test_recomputed_activations_change_nothing(frames, unbroken, tmp_path):
    """Stochastic depth draws its samples before the blocks, so that computing a block again computes the same."""
    run(frames, tmp_path, "--checkpoint-activations", "--drop-path", 0.5, steps=4)
    run(frames, tmp_path / "kept", "--drop-path", 0.5, steps=4)
    assert_same_run(tmp_path, tmp_path / "kept")


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_and_shards_agree(frames, tmp_path, monkeypatch):
    """Two gloo processes under DDP and FSDP2 equal one process on the same global batch, and go on from each other's files."""
    def at(name):
        return tmp_path / name

    def go(name, *more, batch=4):  # KoLeo and stochastic depth are per process by definition, so they are off here
        return flags(frames, at(name), "--koleo", 0, "--drop-path", 0, "--save-every", 3, *more, steps=6, batch=batch)

    def resumed(name, other, *more, **kwargs):
        return go(f"{name} of {other}", "--resume", at(other) / "last_3.pt", *more, **kwargs)
    monkeypatch.setattr(vit, "atomic_save", pretrain_worker.keep_every(vit.atomic_save))
    pretrain.main([str(a) for a in go("one", batch=8)])
    finish(spawn([go("ddp"), go("fsdp", "--shard"), resumed("ddp", "one"), resumed("ddp", "ddp"), resumed("fsdp", "ddp", "--shard"),
                  flags(frames, at("koleo"), "--drop-path", 0, steps=1)], world=2))
    pretrain.main([str(a) for a in resumed("one", "fsdp", batch=8)])

    assert_same_run(at("ddp of ddp"), at("ddp"))  # to the bit
    expected = log(at("one"))
    for name in ("ddp", "fsdp", "ddp of one", "fsdp of ddp", "one of fsdp"):
        lines = log(at(name))
        assert [line["step"] for line in lines] == list(range(6 - len(lines), 6)), name
        for line, want in zip(lines, expected[-len(lines):]):
            for key, value in want.items():
                if "loss" in key or "dino" in key or key == "ibot" or "norm" in key:
                    assert line[key] == pytest.approx(value, rel=1e-3 if "norm" in key else 1e-4), (name, line["step"], key)
        for side in ("student", "teacher"):
            for key, value in final(at("one"))[side].items():
                if "qkv.bias" not in key:  # rounding alone drives the keys' bias
                    torch.testing.assert_close(final(at(name))[side][key], value, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name} {key} {m}")

    # KoLeo of two processes is the mean of what each finds in its own half
    args = pretrain.parse([str(a) for a in flags(frames, at("koleo"), "--drop-path", 0, steps=1)])
    index = pretrain.open_frames(args, print)
    model = pretrain.build_model(args, print).train()
    halves = [pretrain.data.augment(next(pretrain.make_batches(args, index, 0, r, 2, torch.device("cpu"))), "cpu") for r in range(2)]
    koleo = np.mean([model(half, 0.04)["koleo"].item() for half in halves])
    assert log(at("koleo"))[0]["koleo"] == pytest.approx(koleo, rel=1e-4)


def finish(processes):
    outputs = [p.communicate(timeout=240)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)


# --- runs that go wrong -----------------------------------------------------------------------------------------------


def poison(monkeypatch, steps, crops="global_crops"):
    """A pixel of these steps is not a number."""
    augment = pretrain.data.augment

    def augment_or_nan(batch, device):
        done = augment(batch, device)
        if batch["step"] in steps:
            done[crops][0, 0, 0, 0] = float("nan")
        return done
    monkeypatch.setattr(pretrain.data, "augment", augment_or_nan)


def test_unreadable_frames_are_logged_and_too_many_stop_the_run(frames, tmp_path):
    """One empty file among 120 is replaced and named; among 24 it is more than 1 %."""
    for copy in range(5):
        for path in frames.iterdir():
            (tmp_path / "many" / f"{copy}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "many" / f"{copy}" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "many" / "0" / "00.png").write_bytes(b"")
    run(tmp_path / "many", tmp_path / "run", steps=30)
    named = [line["unreadable"] for line in log(tmp_path / "run") if "unreadable" in line]
    assert len(named) == 1 and len(named[0]) == 1 and "0/00.png" in named[0][0]
    with pytest.raises(SystemExit, match="1 of 24 frames cannot be read, more than 1 %(.|\n)*00.png"):
        run(tmp_path / "many" / "0", tmp_path / "few", steps=30)


@pytest.mark.parametrize("crops", ["global_crops", "local_crops"])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_a_poisoned_batch_stops_the_run_and_changes_nothing(frames, tmp_path, monkeypatch, centering, crops):
    poison(monkeypatch, {2}, crops)
    with pytest.raises(SystemExit, match="step 2: not finite .*loss.* raise --max-skips"):
        run(frames, tmp_path, "--centering", centering, steps=6)
    kept, saved = torch.load(tmp_path / "nonfinite_2.pt", weights_only=True), final(tmp_path)
    assert len(kept["frames"][0]) == 4 and all(pathlib.Path(p).parent == frames for p in kept["frames"][0])
    assert kept["step"] == saved["step"] == 2
    for part in ("student", "teacher", "centers"):
        assert all(t.isfinite().all() and torch.equal(t, saved[part][name]) for name, t in kept[part].items())


def test_poisoned_batches_are_skipped_when_allowed(frames, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4})
    run(frames, tmp_path, "--max-skips", 2, steps=6)
    assert [line["step"] for line in log(tmp_path)] == [0, 1, 3, 5] and final(tmp_path)["skips"] == 2
    assert all(t.isfinite().all() for t in final(tmp_path)["teacher"].values())


def test_contradicting_arguments_are_refused(frames, tmp_path):
    run(frames, tmp_path, steps=2)
    with pytest.raises(SystemExit, match=r"prototypes: 64 in the checkpoint, 32 asked for"):
        run(frames, tmp_path, "--prototypes", 32, "--lr", 0.1, steps=2)
    with pytest.raises(SystemExit, match="arch: tiny in the checkpoint, vitt14 asked for"):
        run(frames, tmp_path, "--arch", "vitt14", steps=2)


@pytest.mark.parametrize("more, sentence", [
    (["--global-size", 100], "multiple of 14"), (["--steps", 0], "at least 1"), (["--arch", "resnet"], "invalid choice"),
    (["--data", "/nowhere"], "/nowhere"), (["--frames", "/nowhere.txt"], "/nowhere.txt"), (["--init", "/nowhere.pt"], "/nowhere.pt"),
    (["--resume", "/nowhere.pt"], "/nowhere.pt"), (["--out", "/dev/null/run"], "/dev/null/run")])
def test_bad_flags_are_named(frames, tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit) as error:
        run(frames, tmp_path, *more, steps=2)
    assert sentence in str(error.value) + capsys.readouterr().err


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


# --- does it learn? ---------------------------------------------------------------------------------------------------


def test_learns_and_is_watched_on_synthetic_frames(tmp_path, capsys):
    """A short run on simulated videos: every term falls below chance, the prototypes stay in use, and the online probe keeps the
    best teacher whatever its loss."""
    import synthetic
    synthetic.ensure(tmp_path / "frames", videos=4, frames=8, scale=0.15, size=80, workers=0)
    argv = ["--arch", "tiny", "--recipe", "demo", "--device", "cpu", "--data", tmp_path / "frames" / "unlabelled", "--out", tmp_path / "run",
            "--steps", 200, "--batch", 16, "--workers", 0, "--global-size", 56, "--local-size", 28, "--local-crops", 1, "--prototypes", 64,
            "--head-hidden", 128, "--global-scale", 0.8, 1, "--local-scale", 0.5, 1, "--lr", 0.03, "--log-every", 1, "--probe-every", 100, "--probe-data", tmp_path / "frames"]
    pretrain.main([str(a) for a in argv])
    lines = log(tmp_path / "run")
    steps, probes = [r for r in lines if "loss" in r], [r for r in lines if "probe" in r]
    for name in ("dino_global", "dino_local", "ibot"):  # with one local crop, two of the four pairs are global: chance is ln K / 2 for each
        assert np.mean([r[name] for r in steps[-10:]]) < 0.9 * np.log(64) / 2, name
    assert min(r["entropy_of_mean"] for r in steps[20:]) > 0.8 * np.log(64)  # the prototypes share the frames
    assert "healthy" in capsys.readouterr().out
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert [r["step"] for r in probes] == [99, 199]
    assert best["metrics"]["kappa"] == max(r["probe"]["kappa"] for r in probes) and best["step"] in (100, 200)


def test_warns_of_collapse():
    spread = {"kl_to_uniform": 2.0, "entropy_of_mean": 3.0, "prototypes_used": 30}
    assert pretrain.collapse_warnings(spread, 64, 32) == []
    for sign, words in (({"kl_to_uniform": 0.01}, "uniform"), ({"entropy_of_mean": 0.1}, "same prototypes"), ({"prototypes_used": 1}, "1 prototypes")):
        (warning,) = pretrain.collapse_warnings(spread | sign, 64, 32)
        assert words in warning


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_help_names_every_recipe_and_needs_nothing(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in pretrain.RECIPES) and "square" not in out.split("usage")[0]
    assert all(f"--{key.replace('_', '-')}" in out for key in pretrain.RECIPES["scratch"])


def test_every_recipe_names_the_same_flags():
    assert len({tuple(recipe) for recipe in pretrain.RECIPES.values()}) == 1
    for name in pretrain.RECIPES:
        args = pretrain.parse(["--recipe", name, "--device", "cpu"])
        assert (args.prototypes, args.global_size, args.local_size) == (128, 98, 42)  # no GPU: shrunk
        assert pretrain.parse(["--recipe", name, "--device", "cpu", "--prototypes", "99"]).prototypes == 99


def test_exports_load_and_warm_start(frames, tmp_path, capsys):
    run(frames, tmp_path, "--export-every", 2, steps=4)
    assert sorted(p.name for p in tmp_path.glob("teacher_*")) == ["teacher_2.pt", "teacher_2_dinov2.pth", "teacher_4.pt", "teacher_4_dinov2.pth"]
    teacher = {k.removeprefix("backbone."): v for k, v in final(tmp_path)["teacher"].items() if k.startswith("backbone.")}
    ours, released = vit.load_backbone(tmp_path / "teacher_4.pt"), torch.load(tmp_path / "teacher_4_dinov2.pth", weights_only=True)
    assert same(dict(ours.state_dict()), teacher) and same(released, teacher)
    capsys.readouterr()
    args = pretrain.parse([str(a) for a in flags(frames, tmp_path, "--init", tmp_path / "last.pt", "--global-size", 84)])
    model = pretrain.build_model(args, print)
    assert model.student["backbone"].pos_embed.shape == (1, 37, 32) and "dino_head taken" in capsys.readouterr().out
    for part in (model.student, model.teacher):
        assert torch.equal(part["backbone"].norm.weight, teacher["norm.weight"])
        assert torch.equal(part["dino_head"].last_layer.weight_v, final(tmp_path)["teacher"]["dino_head.last_layer.weight_v"])
