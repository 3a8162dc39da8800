"""Does a balanced sample of the frames do as well as all of them? The same number of steps on N
curated, N random and all frames, for several N, architectures and seeds; then heads of fixed
strength.

    python -m docs.study                          # synthetic frames; hours
    python -m docs.study --data FRAMES --polyps Kvasir-SEG CVC-ClinicDB --grades hyper-kvasir \\
        --exclude Kvasir-SEG/val.txt --init vits14=dinov2_vits14

Flags it does not know go to pretrain.py as they are. The same command goes on where it stopped.
From the repository's root.
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

TASKS = {"landmarks": "landmarks", "mes": "grades", "polyps": "polyps"}  # data.py's name: ours
# nothing is chosen for a backbone, so that many compare
FIXED = probe_classify.FEW_SHOT
STEPS = 400  # of a polyp head
KINDS = ["curated", "random", "all"]
HEADS = {    # score: (head, its setting)
    "landmarks": {"accuracy": (probe_classify.linear_head, FIXED)},
    "mes": {"kappa, softmax": (probe_mes.softmax_head, FIXED | {"power": 1}),
            "kappa, kNN": (probe_mes.knn_head, {})},
    "polyps": {"Dice": None},
}


class Run(NamedTuple):
    """A row's one seed: what pre-trains it (None: nothing), and the backbone to score (None: a
    random one)."""
    arch: str
    frames: int
    kind: str
    seed: int
    flags: list = None
    weights: str = None

    @property
    def folder(self):
        """Its name below --out."""
        return f"{self.arch}-{self.frames}-{self.kind.replace(' ', '-')}-{self.seed}"


def main(argv=None):
    args, flags = parse(argv)
    out, runs = pathlib.Path(args.out), []
    data = pathlib.Path(args.data or synthetic.ensure() / "unlabelled")
    sets = open_all(args)  # a wrong folder ends here, not hours later
    for seed in args.seeds:
        chosen = choose_frames(data, out, args.targets, seed, args.exclude)
        for (kind, n, frames), arch in itertools.product(chosen, args.archs):
            if kind in args.kinds:
                start = ["--recipe", "demo"]
                if arch in args.init:
                    start = ["--recipe", "adapt", "--init", args.init[arch]]
                run = Run(arch, n, kind, seed)
                runs.append(run._replace(flags=[
                    *frames, "--arch", arch, *start, "--seed", str(seed), *flags,
                    "--out", str(out / run.folder)]))
    pretrain_all([run.flags for run in runs], args.jobs)
    for arch in args.archs:
        start = "as released" if arch in args.init else "random initialisation"
        seeds = args.seeds[:1] if arch in args.init else args.seeds
        runs += [Run(arch, 0, start, seed, weights=args.init.get(arch)) for seed in seeds]
    answers = score_all(args, sets, runs)
    report(args, runs, answers, sets)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m docs.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--data", help="folder of unlabelled frames (the synthetic set's)")
    for task, name in TASKS.items():
        flag(f"--{name}", dest=task, nargs="+", metavar="ROOT",
             help=f"labelled {name}: heads are fitted on the first and tested on its test frames, and "
             "on all of the others (synthetic, if --data is not given)")
    flag("--exclude", action="append", metavar="FRAMES",
         help="test frames: curate.py drops what resembles them; may be given again")
    flag("--init", nargs="+", default=[], metavar="ARCH=WEIGHTS",
         help="architectures that go on from released weights, with the recipe adapt, not demo")
    flag("--targets", type=int, nargs="+", default=[50, 100, 200], help="N (50 100 200)")
    flag("--kinds", nargs="+", choices=KINDS, default=KINDS,
         help="choices of frames to compare (curated random all)")
    flag("--archs", nargs="+", default=["vitt14", "vits14"],
         help="architectures (vitt14 vits14)")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2],
         help="of curation, random choice and pre-training alike (0 1 2)")
    flag("--size", type=int,
         help="side of a labelled frame in pixels (that of the global crops)")
    flag("--jobs", type=int, default=1, help="runs at once, sharing the cores (1)")
    flag("--out", default="runs/study",
         help="folder of all runs; other flags want another (runs/study)")
    args, flags = parser.parse_known_args(argv)
    for pair in args.init:
        if "=" not in pair:
            parser.error(f"--init {pair}: give an architecture and its weights, ARCH=WEIGHTS")
    args.init = dict(pair.split("=", 1) for pair in args.init)
    shape = pretrain.parse(["--recipe", "demo", *flags])  # a wrong flag ends here
    args.size, args.device = args.size or shape.global_size, shape.device
    return args, flags


def choose_frames(data, out, targets, seed, exclude=None):
    """[("curated" or "random" or "all", N, pretrain.py's flags)]: one seed's frames, listed under
    out."""
    frames, rng, chosen = Frames(data), np.random.default_rng(seed), []
    out.mkdir(parents=True, exist_ok=True)
    for n in targets:
        folder, listed = out / f"curated-{n}-{seed}", out / f"random-{n}-{seed}.txt"
        if not (folder / "manifest.csv").exists():
            given = [word for path in exclude or () for word in ("--exclude", path)]
            curate.main(["--data", str(data), "--out", str(folder), "--target", str(n),
                         "--seed", str(seed), *given])
        rows = sorted(rng.choice(len(frames), n, replace=False))
        listed.write_text("".join(os.path.relpath(frames.path(i), data) + "\n" for i in rows))
        chosen.append(("curated", n, ["--data", str(folder / "manifest.csv")]))
        chosen.append(("random", n, ["--data", str(data), "--frames", str(listed)]))
    return chosen + [("all", len(frames), ["--data", str(data)])]


def pretrain_all(runs, jobs):
    """pretrain.py with each list of flags (the last is the run folder), `jobs` at a time; skips
    those that have a teacher. One that fails ends the study and names its log."""
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
    return {task: results.open_sets(SimpleNamespace(data=own, generalise=others, splits=None), task)
            for task, (own, *others) in roots.items()}


def score_all(args, sets, runs):
    """Every run's answers on the test frames, `jobs` runs at a time: see answer."""
    if args.jobs == 1:
        return [answer(args, sets, run) for run in tqdm(runs, desc="heads", unit="run")]
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawned) as pool:
        found = pool.map(answer, itertools.repeat(args), itertools.repeat(sets), runs)
        return list(tqdm(found, total=len(runs), desc="heads", unit="run"))


def answer(args, sets, run):
    """{column: what the heads say of each test frame}: Dice (n,) float, or labels (splits, n) int,
    -1 where a split does not test the frame. Kept in the run's folder."""
    kept = pathlib.Path(args.out) / run.folder / f"answers-{args.size}.npz"
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
        for task, (labelled, opened) in sets.items():
            ask = segment if task == "polyps" else classify
            found |= ask(args, model, task, labelled, opened, features)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with vit.replacing(kept) as temporary, open(temporary, "wb") as file:
        np.savez(file, **found)
    return found


def column(task, score, tested):
    return f"{TASKS[task]} {score}, {tested.words}"


def classify(args, model, task, labelled, sets, folder):
    found, y, n = {}, torch.from_numpy(labelled.labels), len(labelled.classes)
    features = [frozen_features(model, tested.labelled.paths, args.device, args.size,
                                dtype=vit.precision(args.device), folder=folder) for tested in sets]
    for score, (fit, setting) in HEADS[task].items():
        heads = [fit(features[0], y, split.train, n, **setting) for split in labelled.splits]
        for tested, these in zip(sets, features):
            said = results.answers(heads, these, tested, n).pred
            found[column(task, score, tested)] = said.numpy().astype(np.int8)
    return found


def segment(args, model, task, labelled, sets, folder):
    flags = probe_segment.parse(["--size", str(args.size), "--steps", str(STEPS),
                                 "--device", args.device, "--features", folder])
    head = probe_segment.fixed_head(flags, model, labelled, labelled.splits[0].train)
    return {column(task, "Dice", tested): probe_segment.head_dice(
        flags, model, head, tested.labelled, tested.rows[0]) for tested in sets}


# ---------------------------------------------------------------------------------------------
# The table


def report(args, runs, answers, sets):
    """Print and write a row per architecture, N and kind, then the differences."""
    by_row = {}  # (architecture, N, kind) -> a dict of Measured per seed
    for run, found in zip(runs, answers):
        by_row.setdefault((run.arch, run.frames, run.kind), []).append(measured(sets, found))
    pairs = [(ours, theirs) for ours in by_row for theirs in by_row
             if ours[0] == theirs[0] and ours[2] == "curated"
             and theirs[1:] in ((ours[1], "random"), (theirs[1], "all"))]
    rows = [{"architecture": arch, "frames": n, "pre-trained on": kind}
            | spread([values(seed) for seed in by_row[arch, n, kind]])
            for arch, n, kind in sorted(by_row)]
    for ours, theirs in sorted(pairs):
        rows.append({"architecture": ours[0], "frames": ours[1],
                     "pre-trained on": f"curated - {theirs[2]}"}
                    | paired(by_row[ours], by_row[theirs]))
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    print(f"\n**Data size by model size, seeds {', '.join(map(str, args.seeds))}: mean ± standard "
          "deviation over the seeds, 95 % interval over groups** "
          f"({device_name()}, {versions})\n")
    for _, opened in sets.values():
        print("\n".join(map(results.about_set, opened)))
    print("\n" + results.markdown_table(rows))
    path = pathlib.Path(args.out) / "study.json"
    results.write_rows(rows, path)
    print(f"\nthe rows as JSON: {path}")


def measured(sets, found):
    """{column: Measured} of one run's answers."""
    return {column(task, score, tested): measure(task, score, tested, found)
            for task, (_, opened) in sets.items() for tested in opened for score in HEADS[task]}


def measure(task, score, tested, found):
    name = column(task, score, tested)
    said = found[name]
    if task == "polyps":
        return results.Measured(probe_segment.groups_of(tested),
                                lambda draw: {name: float(said[draw].mean())})

    def metrics(true, pred, prob):
        if task == "landmarks":
            return {name: probe_classify.accuracy(true, pred)}
        return {name: probe_mes.quadratic_kappa(true, pred, len(tested.labelled.classes))}
    said = torch.from_numpy(said).long()
    return results.measure(metrics, tested.labelled, results.Answers(said, said))


def values(measured):
    """{column: its score on all test frames}"""
    return {k: m.score(np.arange(len(m.groups)))[k] for k, m in measured.items()}


def spread(each):
    """Dicts of one seed each -> mean, and sample standard deviation as "X sd"."""
    row = results.mean_of(each)
    if len(each) > 1:
        row |= {f"{k} sd": float(np.std([one[k] for one in each], ddof=1)) for k in row}
    return row


def paired(ours, theirs):
    """A difference row's cells: its mean and deviation over the seeds, and the 95 % interval of the
    mean over groups of test frames, both sides scored on the same draws."""
    row = spread([{k: a[k] - b[k] for k in a}
                  for a, b in zip(map(values, ours), map(values, theirs))])
    for k in ours[0]:
        def gain(draw):
            gains = [results.gained(a[k], b[k], draw)[k] for a, b in zip(ours, theirs)]
            return {k: np.mean(gains)}
        row |= results.interval_of(results.Measured(ours[0][k].groups, gain), seed=0)
    return row


if __name__ == "__main__":
    main()
