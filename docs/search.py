"""Which settings adapt released weights best? Short runs from them, one change at a time, scored
on validation frames alone.

    python -m docs.search WEIGHTS --data FRAMES --polyps Kvasir-SEG --grades hyper-kvasir
    python -m docs.search WEIGHTS ... --settings base thawed --jobs 2

Test frames are never read: Dice is that of a linear head fitted on one half of Kvasir-SEG's
training frames and scored on the other, both ways round; kappa that of the official folds'
validation frames, for heads of fixed strength. The same command goes on where it stopped. From the
repository's root.
"""
import argparse
import pathlib

import numpy as np
import torch

import probe_classify
import probe_mes
import probe_segment
import vit
from custom_kernels.timing import table
from data import open_labelled
from docs.study import pretrain_all
from frozen import frozen_features

BASE = ("--recipe adapt --steps 900 --batch 32 --global-size 112 --local-size 56 "
        "--freeze-backbone 0.15 --export-every 0")
SETTINGS = {  # what differs from BASE; of a flag that is given twice the last holds
    "base": "",
    "thawed": "--freeze-backbone 0",
    "rate 1/7": "--backbone-lr 0.15",
    "rate 1/50": "--backbone-lr 0.02",
    "1,024 prototypes": "--prototypes 1024",
    "KoLeo 0.1": "--koleo 0.1",
    "colour": "--hue --grayscale --solarize",
    "DINOv2's crop areas": "--global-scale 0.32 1 --local-scale 0.05 0.32",
    "224 and 98 px": "--global-size 224 --local-size 98",
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m docs.search", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("weights", help="released weights to start from: a file or a name")
    flag("--arch", default="vits14", help="their architecture (vits14)")
    flag("--data", required=True, help="frames or manifest to adapt on")
    flag("--polyps", required=True, help="Kvasir-SEG, or another set with masks")
    flag("--grades", required=True, help="HyperKvasir's or LIMUC's grades")
    flag("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME",
         help=", ".join(SETTINGS) + " (all)")
    flag("--jobs", type=int, default=1, help="pre-trainings at once, sharing the cores (1)")
    flag("--out", default="runs/search", help="folder of all runs (runs/search)")
    args, flags = parser.parse_known_args(argv)  # further flags are pretrain.py's
    runs = {}
    for name in args.settings:
        folder = pathlib.Path(args.out) / name.replace(" ", "-").replace("/", "-of-")
        start = ["--arch", args.arch, "--init", args.weights, "--data", args.data]
        runs[name] = [*BASE.split(), *start, *SETTINGS[name].split(), *flags, "--out", str(folder)]
    pretrain_all(runs.values(), args.jobs)
    models = {"as released": vit.load_backbone(args.weights)}
    for name, flags in runs.items():
        models[name] = vit.load_backbone(next(pathlib.Path(flags[-1]).glob("teacher_*.pt")))
    rows = [[name, *(f"{score:.3f}" for score in validation_scores(args, model.eval()))]
            for name, model in models.items()]
    table("Adapting, scored on validation frames",
          ["setting", "Dice", "kappa, softmax", "kappa, ordinal", "kappa, kNN"], rows)


def validation_scores(args, model):
    """(Dice, kappa of softmax, ordinal and kNN) of a frozen backbone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).requires_grad_(False)
    found = halves_dice(args, model, device), *grade_kappas(args, model, device)
    model.to("cpu")
    return found


def halves_dice(args, model, device):
    """Mean Dice over the training frames, each scored by the head fitted on the other half."""
    flags = probe_segment.parse(["--size", "224", "--steps", "400", "--device", device])
    polyps = open_labelled(args.polyps, "polyps")
    rows = np.sort(np.concatenate([polyps.splits[0].train, polyps.splits[0].val]))
    halves = rows[::2], rows[1::2]
    return np.mean([probe_segment.fixed_head_dice(flags, model, polyps, *ways)
                    for ways in (halves, halves[::-1])])


def grade_kappas(args, model, device):
    """Quadratic kappa of softmax, ordinal and kNN, means over the folds' validation frames."""
    grades, kappas = open_labelled(args.grades, "mes"), []
    features = frozen_features(model, grades.paths, device, 224, dtype=vit.precision(device))
    y, n = torch.from_numpy(grades.labels), len(grades.classes)
    fixed = probe_classify.FEW_SHOT | {"power": 1}
    heads = ((probe_mes.softmax_head, fixed), (probe_mes.ordinal_head, fixed),
             (probe_mes.knn_head, {}))
    for split in grades.splits:
        said = [head(features, y, split.train, n, **setting)(features, split.val)[1]
                for head, setting in heads]
        kappas.append([probe_mes.quadratic_kappa(y[split.val], labels, n) for labels in said])
    return np.mean(kappas, 0)


if __name__ == "__main__":
    main()
