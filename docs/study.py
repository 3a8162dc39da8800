"""Does a balanced sample of the frames do as well as all of them? The same number of steps on N curated,
N random and all frames, for several N, architectures and seeds; then heads of fixed strength.

    python -m docs.study                          # synthetic frames; hours
    python -m docs.study --data FRAMES --polyps Kvasir-SEG CVC-ClinicDB --grades hyper-kvasir \\
        --exclude Kvasir-SEG/val.txt --init vits14=dinov2_vits14

Flags it does not know go to pretrain.py as they are. The same command goes on where it stopped. From
the repository's root.
"""
import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import curate
import pretrain
import probe_classify
import probe_mes
import probe_segment
import results
import synthetic
import vit
from custom_kernels.timing import device_name
from data import Frames
from frozen import frozen_features

# nothing is chosen for a backbone, so that many compare: column -> (head, its setting, its score)
FIXED = probe_classify.FEW_SHOT
HEADS = {
    "landmarks": {"accuracy": (probe_classify.linear_head, FIXED,
                               lambda true, pred, n: probe_classify.accuracy(true, pred))},
    "mes": {"kappa, softmax": (probe_mes.softmax_head, FIXED | {"power": 1}, probe_mes.quadratic_kappa),
            "kappa, kNN": (probe_mes.knn_head, {}, probe_mes.quadratic_kappa)},
}
STEPS = 400  # of a polyp head
TASKS = {"landmarks": "landmarks", "mes": "grades", "polyps": "polyps"}  # data.py's name, the table's


class Run(NamedTuple):
    """A row's one seed: what pre-trains it (None: nothing), and the backbone to score (None: a
    random one)."""
    arch: str
    frames: int
    kind: str
    seed: int
    flags: list = None
    weights: str = None


def main(argv=None):
    args, flags = parse(argv)
    out, runs = pathlib.Path(args.out), []
    data = pathlib.Path(args.data or synthetic.ensure() / "unlabelled")
    sets = open_all(args)                                # a wrong folder ends here, not hours later
    for seed in args.seeds:
        for kind, n, frames in choose_frames(data, out, args.targets, seed, args.exclude):
            for arch in args.archs:
                start = ["--recipe", "demo"]
                if arch in args.init:
                    start = ["--recipe", "adapt", "--init", args.init[arch]]
                runs.append(Run(arch, n, kind, seed, [
                    *frames, "--arch", arch, *start, "--seed", str(seed), *flags,
                    "--out", str(out / f"{arch}-{n}-{kind}-{seed}")]))
    pretrain_all([run.flags for run in runs], args.jobs)
    for arch in args.archs:
        start = "as released" if arch in args.init else "random initialisation"
        seeds = args.seeds[:1] if arch in args.init else args.seeds
        runs += [Run(arch, 0, start, seed, weights=args.init.get(arch)) for seed in seeds]
    answers = score_all(args, runs)
    report(args, runs, answers, sets)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m docs.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--data", help="folder of unlabelled frames (the synthetic set's)")
    for task, name in TASKS.items():
        flag(f"--{name}", dest=task, nargs="+", metavar="ROOT", help=f"labelled {name}: heads are fitted "
             "on the first and tested on its test frames, and on all of the others (synthetic, if "
             "--data is not given)")
    flag("--exclude", action="append", metavar="FRAMES",
         help="test frames: curate.py drops what resembles them; may be given again")
    flag("--init", nargs="+", default=[], metavar="ARCH=WEIGHTS",
         help="architectures that go on from released weights, with the recipe adapt instead of demo")
    flag("--targets", type=int, nargs="+", default=[50, 100, 200], help="N (50 100 200)")
    flag("--archs", nargs="+", default=["vitt14", "vits14"], help="architectures (vitt14 vits14)")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2],
         help="of curation, random choice and pre-training alike (0 1 2)")
    flag("--size", type=int, help="side of a labelled frame in pixels (that of the global crops)")
    flag("--jobs", type=int, default=1, help="runs at once, sharing the cores (1)")
    flag("--out", default="runs/study",
         help="folder of all runs; other flags want another (runs/study)")
    args, flags = parser.parse_known_args(argv)
    args.init = dict(pair.split("=", 1) for pair in args.init)
    shape = pretrain.parse(["--recipe", "demo", *flags])  # a wrong flag ends here
    args.size, args.device = args.size or shape.global_size, shape.device
    return args, flags


def choose_frames(data, out, targets, seed, exclude=None):
    """[("curated" or "random" or "all", N, pretrain.py's flags)]: one seed's frames, listed under out."""
    frames, rng, chosen = Frames(data), np.random.default_rng(seed), []
    out.mkdir(parents=True, exist_ok=True)
    for n in targets:
        folder, listed = out / f"curated-{n}-{seed}", out / f"random-{n}-{seed}.txt"
        if not (folder / "manifest.csv").exists():
            curate.main(["--data", str(data), "--out", str(folder), "--target", str(n), "--seed", str(seed),
                         *(word for path in exclude or () for word in ("--exclude", path))])
        rows = sorted(rng.choice(len(frames), n, replace=False))
        listed.write_text("".join(os.path.relpath(frames.path(i), data) + "\n" for i in rows))
        chosen.append(("curated", n, ["--data", str(folder / "manifest.csv")]))
        chosen.append(("random", n, ["--data", str(data), "--frames", str(listed)]))
    return chosen + [("all", len(frames), ["--data", str(data)])]


def pretrain_all(runs, jobs):
    """pretrain.py with each list of flags (the last is the run folder), `jobs` at a time; skips those
    that have a teacher. One that fails ends the study and names its log."""
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}

    def run(flags):
        folder = pathlib.Path(flags[-1])
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("teacher_*.pt")):
            return
        with open(folder / "output.txt", "w") as log:
            command = [sys.executable, pathlib.Path(__file__).parents[1] / "pretrain.py", *flags]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode:
                raise SystemExit(f"pretrain.py failed: see {folder / 'output.txt'}")

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(run, runs), total=len(runs), desc="pre-training", unit="run"))


# ---------------------------------------------------------------------------------------------
# Scores


def open_all(args):
    """{task: (labelled set, [Tested, ...])} of the tasks that are studied."""
    given = {task: getattr(args, task) for task in TASKS if getattr(args, task)}
    roots = given if args.data or given else dict.fromkeys(TASKS, [None])
    return {task: results.open_sets(SimpleNamespace(data=first, generalise=others, splits=None), task)
            for task, (first, *others) in roots.items()}


def score_all(args, runs):
    """Every run's answers on the test frames, `jobs` runs at a time: see answer."""
    if args.jobs == 1:
        return [answer(args, run) for run in tqdm(runs, desc="heads", unit="run")]
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawned) as pool:
        found = pool.map(answer, itertools.repeat(args), runs)
        return list(tqdm(found, total=len(runs), desc="heads", unit="run"))


def answer(args, run):
    """{"task column, test set": what the heads say of each test frame}: (n,) Dice, or (splits, n)
    labels, -1 where a split does not test the frame. Kept in the run's folder."""
    name = f"{run.arch}-{run.frames}-{run.kind.replace(' ', '-')}-{run.seed}"
    kept = pathlib.Path(args.out) / name / f"answers-{args.size}.npz"
    if kept.exists():
        with np.load(kept) as file:
            return dict(file)
    torch.set_num_threads(max(1, pretrain.cores() // args.jobs))
    torch.manual_seed(run.seed)
    weights = run.weights
    if run.flags:
        weights = next(pathlib.Path(run.flags[-1]).glob("teacher_*.pt"))
    model = vit.load_backbone(weights) if weights else vit.build_vit(run.arch)
    model.to(args.device).eval().requires_grad_(False)
    found = {}
    with tempfile.TemporaryDirectory() as features:
        for task, (labelled, sets) in open_all(args).items():
            ask = segment if task == "polyps" else classify
            found |= ask(args, model, task, labelled, sets, features)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with vit.replacing(kept) as temporary, open(temporary, "wb") as file:
        np.savez(file, **found)
    return found


def column_of(task, score, tested):
    return f"{TASKS[task]} {score}, {tested.words}"


def classify(args, model, task, labelled, sets, folder):
    dtype, n, found = vit.precision(args.device), len(labelled.classes), {}
    features = [frozen_features(model, tested.labelled.paths, args.device, args.size, dtype=dtype,
                                folder=folder) for tested in sets]
    y = torch.from_numpy(labelled.labels)
    for score, (fit, setting, _) in HEADS[task].items():
        heads = [fit(features[0], y, split.train, n, **setting) for split in labelled.splits]
        for tested, these in zip(sets, features):
            said = results.answers(heads, these, tested, n).pred
            found[column_of(task, score, tested)] = said.numpy().astype(np.int8)
    return found


def segment(args, model, task, labelled, sets, folder):
    flags = probe_segment.parse(["--size", str(args.size), "--steps", str(STEPS), "--device", args.device,
                                 "--features", folder])
    head = probe_segment.fixed_head(flags, model, labelled, labelled.splits[0].train)
    return {column_of(task, "Dice", tested): probe_segment.head_dice(
        flags, model, head, "linear", tested.labelled, tested.rows[0]) for tested in sets}


# ---------------------------------------------------------------------------------------------
# The table


def report(args, runs, answers, sets):
    """Print and write a row per architecture, kind and N, then the differences."""
    by_row = {}                                          # (architecture, N, kind) -> [answers per seed]
    for run, found in zip(runs, answers):
        by_row.setdefault((run.arch, run.frames, run.kind), []).append(found)
    pairs = [(row, other) for row in by_row for other in by_row
             if row[0] == other[0] and row[2] == "curated"
             and (other[2] == "all" or other[1:] == (row[1], "random"))]
    rows = []
    for arch, n, kind in sorted(by_row):
        rows.append({"architecture": arch, "frames": n, "pre-trained on": kind}
                    | spread(sets, by_row[arch, n, kind]))
    for ours, theirs in sorted(pairs):
        rows.append({"architecture": ours[0], "frames": ours[1],
                     "pre-trained on": f"curated - {theirs[2]}"}
                    | paired(sets, by_row[ours], by_row[theirs]))
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    print(f"\n**Data size by model size, seeds {', '.join(map(str, args.seeds))}: mean ± standard "
          f"deviation over the seeds, 95 % interval over groups** ({device_name()}, {versions})\n")
    print("\n".join(results.about_set(tested) for _, opened in sets.values() for tested in opened))
    print("\n" + results.markdown_table(rows))
    path = pathlib.Path(args.out) / "study.json"
    results.write_rows(rows, path)
    print(f"\nthe rows as JSON: {path}")


def measured(sets, found):
    """{column: Measured} of one row: its score over a draw is the mean over the seeds."""
    every = {}
    for task, (labelled, opened) in sets.items():
        for tested in opened:
            for score in HEADS.get(task, ("Dice",)):
                column = column_of(task, score, tested)
                every[column] = over_seeds(task, score, tested, [f[column] for f in found])
    return every


def over_seeds(task, score, tested, arrays):
    if task == "polyps":
        scores = [probe_segment.measure(a[:, None], probe_segment.groups_of(tested)) for a in arrays]
    else:
        rate, n = HEADS[task][score][2], len(tested.labelled.classes)
        scores = [results.measure(lambda true, pred, _: {score: float(rate(true, pred, n))},
                                  tested.labelled, results.Answers(torch.from_numpy(a).long(), a))
                  for a in arrays]
    return results.Measured(scores[0].groups, lambda draw: {column_of(task, score, tested): np.mean(
        [value for one in scores for value in one.score(draw).values()])})


def spread(sets, found):
    """A row's cells: mean and sample standard deviation over the seeds."""
    each = [values(measured(sets, [one])) for one in found]
    row = results.mean_of(each)
    if len(each) > 1:
        row |= {f"{k} sd": float(np.std([one[k] for one in each], ddof=1)) for k in row}
    return row


def values(measured):
    """{column: its score on all test frames}"""
    return {k: float(m.score(np.arange(len(m.groups)))[k]) for k, m in measured.items()}


def paired(sets, ours, theirs):
    """A difference row's cells: its mean over the seeds with an interval over groups of test frames,
    both sides scored on the same draws, and its deviation from seed to seed."""
    each = [(values(measured(sets, [a])), values(measured(sets, [b]))) for a, b in zip(ours, theirs)]
    row, others = {}, measured(sets, theirs)
    for column, one in measured(sets, ours).items():
        gain = results.Measured(one.groups, lambda draw, one=one, other=others[column]:
                                results.gained(one, other, draw))
        row |= gain.score(np.arange(len(gain.groups))) | results.interval_of(gain, 0)
        if len(each) > 1:
            row[f"{column} sd"] = float(np.std([a[column] - b[column] for a, b in each], ddof=1))
    return row


if __name__ == "__main__":
    main()
