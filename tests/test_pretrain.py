"""Whole runs of pretraining with a tiny network: split over processes, poisoned, recomputed, and
whether they learn."""
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from pretrain_runs import (assert_same_run, final, finish, flags, frames,  # noqa: F401
                           keep_every, log, poison, run, spawn, tiny)

import augment
import pretrain
import vit
import watch


def test_recomputed_activations_change_nothing(frames, tmp_path):
    """Stochastic depth draws its samples before the blocks, so that computing a block again
    computes the same."""
    run(frames, tmp_path, "--checkpoint-activations", "--drop-path", 0.5, steps=4)
    run(frames, tmp_path / "kept", "--drop-path", 0.5, steps=4)
    assert_same_run(tmp_path, tmp_path / "kept")


def test_processes_and_shards_agree(frames, tmp_path, monkeypatch):
    """Two gloo processes under DDP and FSDP2 equal one process on the same global batch, and go
    on from each other's files."""
    def at(name):
        return tmp_path / name

    def go(name, *more, batch=4):  # KoLeo and stochastic depth are per process by definition
        return flags(frames, at(name), "--koleo", 0, "--drop-path", 0, "--save-every", 3, *more,
                     steps=6, batch=batch)

    def resumed(name, other, *more, **kwargs):
        return go(f"{name} of {other}", "--resume", at(other) / "last_3.pt", *more, **kwargs)
    monkeypatch.setattr(vit, "atomic_save", keep_every(vit.atomic_save))
    pretrain.main([str(a) for a in go("one", batch=8)])
    finish(spawn([go("ddp"), go("fsdp", "--shard"), resumed("ddp", "one"), resumed("ddp", "ddp"),
                  resumed("fsdp", "ddp", "--shard"),
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
                    rel = 1e-3 if "norm" in key else 1e-4
                    assert line[key] == pytest.approx(value, rel=rel), (name, line["step"], key)
        for side in ("student", "teacher"):
            for key, value in final(at("one"))[side].items():
                if "qkv.bias" not in key:  # rounding alone drives the keys' bias
                    torch.testing.assert_close(final(at(name))[side][key], value, rtol=1e-3,
                                               atol=1e-4, msg=lambda m: f"{name} {key} {m}")

    # KoLeo of two processes is the mean of what each finds in its own half
    args = pretrain.parse([str(a) for a in flags(frames, at("koleo"), "--drop-path", 0, steps=1)])
    index = pretrain.open_frames(args, print)
    model = pretrain.build_model(args, print).train()
    loaders = [pretrain.make_batches(args, index, 0, r, 2, torch.device("cpu")) for r in range(2)]
    halves = [augment.augment(next(loader), "cpu") for loader in loaders]
    koleo = np.mean([model(half, 0.04)["koleo"].item() for half in halves])
    assert log(at("koleo"))[0]["koleo"] == pytest.approx(koleo, rel=1e-4)


def test_shards_agree_with_ddp_in_16_bits(frames, tmp_path):
    """FSDP2 gathers a block's products in the number type itself, where DDP leaves the casting
    to autocast: the first losses are equal but for the order of sums, and three steps later to
    half a percent."""
    def at(kind, precision):
        return tmp_path / f"{kind}-{precision}"
    kinds = {"ddp": [], "fsdp": ["--shard"]}
    finish(spawn([flags(frames, at(kind, precision), "--precision", precision, *more, steps=4)
                  for precision in ("bf16", "fp16") for kind, more in kinds.items()], world=2))
    for precision in ("bf16", "fp16"):
        ddp, fsdp = ([line for line in log(at(kind, precision)) if "loss" in line] for kind in kinds)
        assert [line["step"] for line in ddp] == [line["step"] for line in fsdp]
        for a, b in zip(ddp, fsdp):
            rel = 1e-5 if a["step"] == 0 else 5e-3
            for key in ("dino_global", "dino_local", "ibot"):
                assert a[key] == pytest.approx(b[key], rel=rel), (precision, a["step"], key)
        scaler, other = (final(at(kind, precision))["scaler"] for kind in kinds)
        assert scaler == other and bool(scaler) == (precision == "fp16")


# --- runs that go wrong ------------------------------------------------------------------------


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
    poison(monkeypatch, 2, crops=crops)
    with pytest.raises(SystemExit, match="step 2: not finite .*loss.* raise --max-skips"):
        run(frames, tmp_path, "--centering", centering, steps=6)
    kept, saved = torch.load(tmp_path / "nonfinite_2.pt", weights_only=True), final(tmp_path)
    assert len(kept["frames"][0]) == 4
    assert all(pathlib.Path(p).parent == frames for p in kept["frames"][0])
    assert kept["step"] == saved["step"] == 2
    for part in ("student", "teacher", "centers"):
        assert all(t.isfinite().all() and torch.equal(t, saved[part][name])
                   for name, t in kept[part].items())


def test_poisoned_batches_are_skipped_when_allowed(frames, tmp_path, monkeypatch):
    poison(monkeypatch, 2, 4)
    run(frames, tmp_path, "--max-skips", 2, steps=6)
    assert [line["step"] for line in log(tmp_path)] == [0, 1, 3, 5]
    assert final(tmp_path)["skips"] == 2
    assert all(t.isfinite().all() for t in final(tmp_path)["teacher"].values())


@pytest.mark.parametrize("more, sentence", [
    (["--global-size", 100], "multiple of 14"), (["--steps", 0], "at least 1"),
    (["--arch", "resnet"], "invalid choice"), (["--data", "/nowhere"], "/nowhere"),
    (["--frames", "/nowhere.txt"], "/nowhere.txt"), (["--init", "/nowhere.pt"], "/nowhere.pt"),
    (["--resume", "/nowhere.pt"], "/nowhere.pt"), (["--out", "/dev/null/run"], "/dev/null/run")])
def test_bad_flags_are_named(frames, tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit) as error:
        run(frames, tmp_path, *more, steps=2)
    assert sentence in str(error.value) + capsys.readouterr().err


# --- does it learn? ----------------------------------------------------------------------------


def test_learns_and_is_watched_on_synthetic_frames(tmp_path, monkeypatch, capsys, synthetic_set):
    """A short run on simulated videos: every term falls below chance, the prototypes stay in
    use, and the online probe keeps the best teacher whatever its loss."""
    import synthetic
    monkeypatch.setattr(synthetic, "labelled_jobs", lambda *_: [])  # the videos alone
    synthetic.ensure(tmp_path / "frames", videos=4, frames=8, scale=0.05, size=80, workers=0)
    argv = flags(tmp_path / "frames" / "unlabelled", tmp_path / "run", "--precision", "auto",
                 "--local-crops", 1, "--head-hidden", 128, "--bottleneck", 256, "--lr", 0.03,
                 "--global-scale", 0.8, 1, "--local-scale", 0.5, 1, "--save-every", "10m",
                 "--probe-every", 100, "--probe-data", synthetic_set, steps=200, batch=16)
    pretrain.main([str(a) for a in argv])
    lines = log(tmp_path / "run")
    steps, probes = [r for r in lines if "loss" in r], [r for r in lines if "probe" in r]
    # with one local crop, two of the four pairs are global: chance is ln K / 2 for each
    for name in ("dino_global", "dino_local", "ibot"):
        assert np.mean([r[name] for r in steps[-10:]]) < 0.9 * np.log(64) / 2, name
    # the prototypes share the frames
    assert min(r["entropy_of_mean"] for r in steps[20:]) > 0.8 * np.log(64)
    assert "healthy" in capsys.readouterr().out
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert [r["step"] for r in probes] == [99, 199]
    assert best["metrics"]["kappa"] == max(r["probe"]["kappa"] for r in probes)
    assert best["step"] in (100, 200)


@pytest.mark.parametrize("arch", [name for name in vit.ARCHS])
def test_a_new_network_starts_in_the_healthy_range(frames, arch, monkeypatch):
    """No warning at the first step of any recipe: the teacher of `scratch` is not centred yet,
    so that its loss is below ln K by more than a tenth. One block of each architecture, as
    LayerScale makes the others small at the start."""
    monkeypatch.setitem(vit.ARCHS, arch, vit.ARCHS[arch] | {"depth": 1})
    for recipe in pretrain.RECIPES:
        argv = ["--arch", arch, "--recipe", recipe, "--device", "cpu", "--data", frames,
                "--workers", 0, "--batch", 4, "--head-hidden", 512]
        assert "WARNING" not in first_step(pretrain.parse(list(map(str, argv)))), recipe


@pytest.mark.parametrize("temp", [0.02, 0.04, 0.07])
@pytest.mark.parametrize("k", [16, 1024, 65536])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_the_healthy_range_holds_for_every_temperature_and_k(frames, centering, k, temp):
    argv = flags(frames, "", "--centering", centering, "--prototypes", k, "--bottleneck", 256)
    args = pretrain.parse(list(map(str, argv)))
    args.teacher_temp_start = temp
    assert "WARNING" not in first_step(args)


def first_step(args):
    """The report on the first step of these arguments, of one process."""
    model = pretrain.build_model(args, print).train()
    found = pretrain.open_frames(args, print)
    batch = next(pretrain.make_batches(args, found, 0, 0, 1, torch.device("cpu")))
    temp = pretrain.make_schedules(args, args.batch)["temp"][0]
    with torch.no_grad():
        terms = model(pretrain.augment.augment(batch, "cpu"), temp)
    doubled = {name: 2 * term for name, term in terms.items()}
    assert "WARNING" in watch.initial_loss_report(doubled, args, temp)
    return watch.initial_loss_report(terms, args, temp)


def test_adapt_takes_smaller_crops_on_a_cpu_and_nothing_else():
    on_cpu, on_gpu = (pretrain.defaults("adapt", device) for device in ("cpu", "cuda"))
    differ = {name for name in on_gpu if on_cpu[name] != on_gpu[name]}
    assert differ == {"global_size", "local_size"} and on_gpu["prototypes"] == 256
    assert (on_cpu["global_size"], on_cpu["local_size"]) == (112, 56)


def test_warns_of_collapse():
    spread = {"kl_to_uniform": 2.0, "entropy_of_mean": 3.0, "prototypes_used": 30}
    assert watch.collapse_warnings(spread, 64, 32) == []
    for sign, words in (({"kl_to_uniform": 0.01}, "uniform"),
                        ({"entropy_of_mean": 0.1}, "same prototypes"),
                        ({"prototypes_used": 1}, "1 prototypes")):
        (warning,) = watch.collapse_warnings(spread | sign, 64, 32)
        assert words in warning


def test_a_run_says_in_a_few_lines_what_it_is(frames, tmp_path, capsys):
    """And with --verbose every argument, as args.json has them anyway."""
    run(frames, tmp_path / "run", "--hue", "--no-separate-heads", steps=1)
    said = capsys.readouterr().out.split("first step")[0]
    assert "tiny, recipe demo, seed 0, on cpu in fp32: 45,056 parameters, 50,864 with the heads" in said
    assert f"24 frames of {frames}; of each 2 crops of 56 px and 2 of 28 px" in said
    assert "1 steps of 4 frames (1 x 4) = 0.2 epochs" in said
    others = said.split("other than usual in demo: ")[1].splitlines()[0].split(", ")
    assert {"--hue", "--no-separate-heads", "--steps 1 (200)", "--local-crops 2 (4)"} < {*others}
    assert len(said.splitlines()) < 8 and "layerwise_decay" not in said and "0.5 1.0" not in said
    run(frames, tmp_path / "run", "--hue", "--no-separate-heads", "--verbose", steps=1)
    said = capsys.readouterr().out
    for key, value in json.loads((tmp_path / "run" / "args.json").read_text()).items():
        assert f"  {key:20} {value}\n" in said, key


# --- flags -------------------------------------------------------------------------------------


def test_help_names_every_recipe_and_needs_nothing(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in pretrain.RECIPES) and "square" not in out.split("usage")[0]
    assert all(f"--{key.replace('_', '-')}" in out for key in pretrain.RECIPES["scratch"])


def test_without_a_gpu_and_a_recipe_it_is_the_demo_whole(capsys):
    """`torchrun pretrain.py --arch vitb14` in a classroom: not scratch's temperatures at the
    demo's sizes."""
    args = vars(pretrain.parse(["--arch", "vitb14", "--device", "cpu"]))
    assert args["recipe"] == "demo" and "no --recipe: demo" in capsys.readouterr().out
    assert {key: args[key] for key in pretrain.RECIPES["demo"]} == pretrain.RECIPES["demo"]
    assert pretrain.parse(["--device", "cuda"]).recipe == "scratch"


@pytest.mark.parametrize("cores, on_cpu, on_gpu", [
    (1, (0, 1), (1, 1)), (2, (0, 2), (1, 1)), (4, (1, 3), (3, 1)), (16, (2, 14), (8, 8))])
def test_cores_are_shared_so_that_none_is_idle_or_fought_over(cores, on_cpu, on_gpu):
    assert pretrain.share_cores(cores) == on_cpu
    assert pretrain.share_cores(cores, gpu=True) == on_gpu
    assert sum(on_cpu) == cores
    assert pretrain.share_cores(cores, threads=1) == (min(8, cores - 1), 1)  # OMP_NUM_THREADS
    assert pretrain.share_cores(cores, workers=1) == (1, max(1, cores - 1))  # --workers
    assert pretrain.share_cores(cores, threads=3, workers=5) == (5, 3)


def test_cores_are_those_of_the_affinity_and_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for processes, expected in (("1", (2, 14)), ("4", (1, 3)), ("8", (0, 2)), ("32", (0, 1))):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        args = pretrain.parse(["--device", "cpu"])
        assert (args.workers, args.threads) == expected, processes
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args = pretrain.parse(["--device", "cpu"])
    assert (args.workers, args.threads) == (2, 2)


def test_compile_without_a_compiler_is_one_sentence(frames, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SystemExit, match="C\\+\\+ compiler.*/nowhere/g\\+\\+"):
        run(frames, tmp_path, "--compile", steps=1)


def test_a_new_flag_is_a_row_and_older_runs_go_on(frames, tmp_path, monkeypatch, capsys):
    """A weight that a student adds for one recipe: --help shows it, and last.pt files without it
    go on with its default."""
    run(frames, tmp_path, steps=2)
    row = ("spread", float, 0.5, "weight of a term of one's own")
    monkeypatch.setitem(pretrain.FLAGS, "losses", [*pretrain.FLAGS["losses"], row])
    monkeypatch.setitem(pretrain.ROWS, "spread", row)
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    assert "--spread" in capsys.readouterr().out
    run(frames, tmp_path, steps=3)
    assert final(tmp_path)["args"]["spread"] == 0.5 and final(tmp_path)["step"] == 3
    (tmp_path / "old").mkdir()
    state = final(tmp_path)
    del state["args"]["spread"]
    torch.save(state, tmp_path / "old" / "last.pt")
    with pytest.raises(SystemExit, match="spread: 0.5 in the checkpoint, 0.1 asked for"):
        run(frames, tmp_path / "old", "--spread", 0.1, steps=4)


def test_a_device_that_is_not_there_is_one_sentence(frames, tmp_path):
    with pytest.raises(SystemExit, match="--device mps: PyTorch finds no Apple GPU"):
        run(frames, tmp_path, "--device", "mps", steps=1)
    with pytest.raises(SystemExit, match="--device cuda: process 0 of this machine has no GPU"):
        run(frames, tmp_path, "--device", "cuda", steps=1)


def test_every_recipe_names_the_same_flags():
    assert len({tuple(recipe) for recipe in pretrain.RECIPES.values()}) == 1
    for name in pretrain.RECIPES:
        args = pretrain.parse(["--recipe", name, "--device", "cpu"])
        shrunk = (256, 112, 56) if name == "adapt" else (128, 98, 42)
        assert (args.prototypes, args.global_size, args.local_size) == shrunk
        given = pretrain.parse(["--recipe", name, "--device", "cpu", "--prototypes", "99"])
        assert given.prototypes == 99


def test_a_finished_run_says_what_it_made_and_what_comes_next(frames, tmp_path, capsys):
    run(frames, tmp_path, steps=2)
    said = capsys.readouterr().out
    assert f"done: {tmp_path / 'teacher_2.pt'} is the backbone" in said and "total loss " in said
    assert f"next: python probe_segment.py {tmp_path / 'teacher_2.pt'}" in said
