"""Does a balanced sample of the frames do as well as all of them? Pre-training on N curated, N random
and all frames, for several N, architectures and seeds, then three probes with heads of fixed strength.

    python -m docs.study                          # from the repository's root; hours
    python -m docs.study --jobs 2 --targets 50 --archs vitt14 --seeds 0 --steps 100

Flags it does not know go to pretrain.py as they are. The same command goes on where it stopped.
"""
import argparse
import concurrent.futures
import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import torch
from tqdm import tqdm

import curate
import frozen
import pretrain
import probe_classify
import probe_mes
import probe_segment
import synthetic
import vit
from custom_kernels.timing import table
from data import Frames, open_labelled


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m docs.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--targets", type=int, nargs="+", default=[50, 100, 200], help="N (50 100 200)")
    flag("--archs", nargs="+", default=["vitt14", "vits14"], help="architectures (vitt14 vits14)")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2],
         help="of curation, random choice and pre-training alike (0 1 2)")
    flag("--jobs", type=int, default=1, help="pre-trainings at once, sharing the cores (1)")
    flag("--out", default="runs/study",
         help="folder of all runs; other flags want another (runs/study)")
    args, flags = parser.parse_known_args(argv)
    pretrain.parse(["--recipe", "demo", *flags])         # a wrong flag ends here, not hours later

    out, root, runs = pathlib.Path(args.out), synthetic.ensure(), {}
    for seed in args.seeds:
        for kind, n, frames in choose_frames(root / "unlabelled", out, args.targets, seed):
            for arch in args.archs:
                runs[arch, n, kind, seed] = [
                    *frames, "--arch", arch, "--recipe", "demo", "--seed", str(seed), *flags,
                    "--out", str(out / f"{arch}-{n}-{kind}-{seed}")]
    pretrain_all(runs.values(), args.jobs)
    print_scores(root, runs, args.seeds)


def choose_frames(data, out, targets, seed):
    """[("curated" or "random" or "all", N, pretrain.py's flags)]: one seed's frames, listed under out."""
    frames, rng, chosen = Frames(data), np.random.default_rng(seed), []
    out.mkdir(parents=True, exist_ok=True)
    for n in targets:
        folder, listed = out / f"curated-{n}-{seed}", out / f"random-{n}-{seed}.txt"
        if not (folder / "manifest.csv").exists():
            curate.main(["--data", str(data), "--out", str(folder),
                         "--target", str(n), "--seed", str(seed)])
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


def print_scores(root, runs, seeds):
    """Score every run's teacher, and each architecture at random initialisation: means and deviations
    over the seeds, then those of curated - random, seed by seed."""
    scores = {}                                          # (architecture, N, kind) -> four scores per seed
    for (arch, n, kind, seed), flags in tqdm(runs.items(), desc="probes", unit="run"):
        path = next(pathlib.Path(flags[-1]).glob("teacher_*.pt"))
        size = torch.load(path, weights_only=True)["args"]["global_size"]
        models = {(arch, n, kind): vit.load_backbone(path)}
        if kind == "all":                                # once per architecture and seed
            torch.manual_seed(seed)
            models[arch, 0, "none: random initialisation"] = vit.build_vit(arch)
        for row, model in models.items():
            model.eval().requires_grad_(False)
            scores.setdefault(row, []).append(quick_probes(root, model, size))

    rows = [[arch, kind, n, *cells(s)] for (arch, n, kind), s in sorted(scores.items())]
    for (arch, n, kind), s in sorted(scores.items()):
        if kind == "curated":
            difference = np.subtract(s, scores[arch, n, "random"])
            rows.append([arch, "curated - random", n, *cells(difference)])
    header = ["architecture", "pre-trained on", "frames",
              "landmarks accuracy", "landmarks, second scope", "Mayo kappa", "polyps Dice"]
    seeds = ", ".join(map(str, seeds))
    table(f"Data size by model size, seeds {seeds}: mean ± standard deviation", header, rows)


def cells(scores):
    """(seeds, 4) scores -> four cells "mean ± deviation"; one seed has no deviation."""
    if len(scores) == 1:
        return [f"{s:.3f}" for s in scores[0]]
    return [f"{m:.3f} ± {d:.3f}" for m, d in zip(np.mean(scores, 0), np.std(scores, 0, ddof=1))]


def quick_probes(root, model, size):
    """(landmarks accuracy, the same on the second scope, Mayo kappa, polyps Dice) with heads of fixed
    strength; validation frames choose the polyps' learning rate alone."""
    def accuracy(y, predicted, n_classes):
        return probe_classify.accuracy(y, predicted)
    linear = functools.partial(probe_classify.linear_head, **probe_classify.FEW_SHOT)
    softmax = functools.partial(probe_mes.softmax_head, **probe_mes.FEW_SHOT, power=1)
    landmarks = mean_scores(root, "landmarks", model, size, linear, accuracy)
    grades = mean_scores(root, "mes", model, size, softmax, probe_mes.quadratic_kappa)
    return *landmarks, grades[0], polyp_dice(root, model, size)


def mean_scores(root, task, model, size, head, score):
    """[score on the test frames, score on the second scope's], means over the splits."""
    labelled, other = (open_labelled(r, task) for r in (root, root / "scope2"))
    features, elsewhere = (frozen.frozen_features(model, s.paths, "cpu", size) for s in (labelled, other))
    y, z = torch.from_numpy(labelled.labels), torch.from_numpy(other.labels)
    n, found = len(labelled.classes), []
    for split in labelled.splits:
        predict = head(features, y, split.train, n)
        found.append([score(y[split.test], predict(features, split.test)[1], n),
                      score(z, predict(elsewhere, np.arange(len(z)))[1], n)])
    return np.mean(found, 0)


def polyp_dice(root, model, size):
    """Mean Dice of a linear head on the test frames of the first split."""
    polyps = open_labelled(root, "polyps")
    flags = probe_segment.parse(["--size", str(size), "--steps", "200", "--device", "cpu"])
    head, _ = probe_segment.choose_head(flags, model, "linear", polyps)

    def predict(image, shape):
        return probe_segment.predict(model, head, "linear", image, shape, [size])
    return probe_segment.test_head(predict, polyps, polyps.splits[0].test, None)[:, 0].mean()


if __name__ == "__main__":
    main()
