"""Mayo endoscopic score from frozen features: four classes, remission, a few labelled frames,
and the two figures.

    python probe_mes.py                                   synthetic frames, random weights
    python probe_mes.py A.pt B.pt --data data/LIMUC       LIMUC: ten official folds, one test set
    python probe_mes.py A.pt --data data/hyper-kvasir     UC grades 1/2/3, a smaller stand-in
    python probe_mes.py --curve runs/demo                 Figure 1: loss and kappa against the step
    python probe_mes.py --histogram --data data/LIMUC     Figure 2: frames per class
"""
import itertools
import json
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F

import data
import figures
import vit
from frozen import backbones, extract, one_sentence
from heads import Ordinal, classifier_input
from probe_classify import (FEW_SHOT, GRID, NEIGHBOURS, accuracy, knn_head, linear_head, macro_f1,
                            mean_std, minimise, whitening)
from results import (VIEW, Task, arguments, confusion, evaluate, markdown_table, open_sets, prepare,
                     report)

# ---------------------------------------------------------------------------------------------
# Metrics


def quadratic_kappa(true, pred, n_classes=4):
    """Cohen's kappa with weights (i - j)^2: 1 - observed / expected disagreement. 0 where one
    class alone leaves it undefined, nan for an empty set."""
    if not len(true):
        return float("nan")
    c = confusion(true, pred, n_classes).double()
    grade = torch.arange(n_classes, dtype=torch.double)
    cost = (grade[:, None] - grade).square()                                 # (C, C)
    expected = (cost * torch.outer(c.sum(1), c.sum(0))).sum() / c.sum()
    return (1 - (cost * c).sum() / expected).item() if expected > 0 else 0.0


def auc(positive, score):
    """Probability that a positive scores above a negative, ties counting half; nan where one of
    the two is missing."""
    positive, score = np.asarray(positive, dtype=bool), np.asarray(score)
    n_pos, n_neg = positive.sum(), (~positive).sum()
    if not n_pos or not n_neg:
        return float("nan")
    _, tied, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[tied]           # mean rank of the tied, from 1
    return float((rank[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def mes_metrics(classes):
    """Metrics of the grades, and of remission (MES 0-1) with MES 2-3 as the positive class, as
    LIMUC's own evaluation has it: sensitivity is the share of active disease that is found. A
    quotient without frames is nan."""
    n, active = len(classes), torch.tensor([int(re.search(r"\d", c)[0]) >= 2 for c in classes])

    def ratio(a, b):
        return float(a) / float(b) if b else float("nan")

    def metrics(true, pred, prob):
        t, p = active[true], active[pred]
        hit, rejected = (t & p).sum(), (~t & ~p).sum()
        return {"kappa": quadratic_kappa(true, pred, n), "macro F1": macro_f1(true, pred, n),
                "accuracy": accuracy(true, pred), "sensitivity": ratio(hit, t.sum()),
                "specificity": ratio(rejected, (~t).sum()),
                "F1": ratio(2 * hit, t.sum() + p.sum()), "AUC": auc(t, prob[:, active].sum(1))}
    return metrics


# ---------------------------------------------------------------------------------------------
# Heads, fitted as in probe_classify.py


def balance(y, n_classes, power):
    """(n_classes,) loss weights frequency^-power: at 0 every frame counts the same, at 1 every
    class. Absent classes weigh 0."""
    count = torch.bincount(y, minlength=n_classes).double()
    return torch.where(count > 0, count.clamp(min=1).pow(-power), 0.0)


def softmax_head(features, y, rows, n_classes, blocks, patch, l2, power):
    weight = balance(y[rows], n_classes, power)
    return linear_head(features, y, rows, n_classes, blocks, patch, l2, weight)


def fit_ordinal(x, y, n_classes, l2, weight=None):
    """Proportional odds (McCullagh 1980): P(y <= c) = sigmoid(theta_c - w.x) with theta
    increasing; the (weighted) mean negative log-likelihood + l2/2 |w|^2 by L-BFGS in float64.

    Returns w (D,), theta (C - 1,), which leaves no room for a class without frames: two
    thresholds are equal there, or one is infinite."""
    x, y = x.double(), y.to(x.device)
    weight = x.new_ones(len(y)) if weight is None else weight.to(x)[y]
    present, y = y.unique(return_inverse=True)
    A = whitening(x, l2)                                                     # (min(n, D), D)
    turned = x @ A.T                                                         # (n, min(n, D))
    v = x.new_zeros(len(A), requires_grad=True)
    first = x.new_full((min(len(present) - 1, 1),), 1 - len(present) / 2, requires_grad=True)
    # logarithms of theta_c - theta_(c-1): whatever their value, the thresholds stay in order
    gaps = x.new_zeros(max(len(present) - 2, 0), requires_grad=True)

    def thresholds():  # one less than there are classes present
        return torch.cat([first, first + gaps.exp().cumsum(0)])

    def objective():
        along = turned @ v                                                   # (n,)
        upper = F.pad(thresholds(), (0, 1), value=torch.inf)[y] - along
        lower = F.pad(thresholds(), (1, 0), value=-torch.inf)[y] - along
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - e^(l - u)): as a product, because
        # the logarithm of the difference would lose all digits where both are near 0 or near 1
        width = F.pad(gaps.exp(), (1, 1), value=torch.inf)[y]
        likelihood = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
        return -(weight * likelihood).sum() / weight.sum() + l2 / 2 * (v @ A).square().sum()

    minimise(objective, [v, first, gaps])
    infinity = x.new_tensor([torch.inf])
    ends = torch.cat([-infinity, thresholds().detach(), infinity])
    every = torch.arange(n_classes - 1, device=x.device)
    at_most = torch.searchsorted(present, every, right=True)  # how many present classes are <= c
    return (v @ A).detach(), ends[at_most]


def ordinal_head(features, y, rows, n_classes, blocks, patch, l2, power):
    """The Ordinal head: one direction and ordered thresholds."""
    x = classifier_input(features, rows, blocks, patch)                      # (n, d)
    mean, std = mean_std(x)
    weight = balance(y[rows], n_classes, power)
    w, theta = fit_ordinal((x - mean) / std, y[rows], n_classes, l2, weight)
    return Ordinal(blocks, patch, mean=mean, std=std, direction=w, thresholds=theta)


BALANCED_GRID = [setting | {"power": power} for setting, power in itertools.product(GRID, (1, 0))]
HEADS = {"kNN": (knn_head, NEIGHBOURS), "softmax": (softmax_head, BALANCED_GRID),
         "ordinal": (ordinal_head, BALANCED_GRID)}


# ---------------------------------------------------------------------------------------------
# The score that pre-training watches


def online_score(model, labelled, device, size=224, dtype=None):
    """{"kappa", "macro_f1", "accuracy", "knn_kappa"} on the validation groups of split 0; its
    test frames are never read.

    A class-balanced softmax head of fixed strength on the last block's class and mean patch
    token, and kNN on the class token: nothing is chosen, so that the points of a run compare.
    dtype: of the backbone's products, None for what the device multiplies in hardware. The
    model's mode and the random state stay as they were."""
    split, n_classes = labelled.splits[0], len(labelled.classes)
    if not len(split.train) or not len(split.val):
        raise ValueError(f"{labelled.name}: the online probe needs training and validation frames "
                         f"in split 0, found {len(split.train)} and {len(split.val)}")
    rows = np.concatenate([split.train, split.val])
    paths, y = [labelled.paths[i] for i in rows], torch.from_numpy(labelled.labels[rows])
    features = extract(model, paths, device, size, dtype=dtype or vit.precision(device))
    train, val = np.split(np.arange(len(rows)), [len(split.train)])
    _, pred = softmax_head(features, y, train, n_classes, **FEW_SHOT, power=1)(features, val)
    _, knn = knn_head(features, y, train, n_classes)(features, val)
    return {"kappa": quadratic_kappa(y[val], pred, n_classes),
            "macro_f1": macro_f1(y[val], pred, n_classes), "accuracy": accuracy(y[val], pred),
            "knn_kappa": quadratic_kappa(y[val], knn, n_classes)}


# ---------------------------------------------------------------------------------------------
# The two figures


def curve(args, labelled):
    """Figure 1 of the run folder --curve: the loss and online probe of log.jsonl, and its
    teacher_<step>.pt scored here, with --polyps also by the Dice of a linear head."""
    run = pathlib.Path(args.curve)
    with one_sentence():
        masked = args.polyps and data.open_labelled(args.polyps, "polyps")
    if not (run / "log.jsonl").exists():
        raise SystemExit(f"--curve {run}: expected a run folder of pretrain.py with a log.jsonl, "
                         "found none")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    log = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may tear the last
    losses = [(r["step"], r["loss"]) for r in log if "loss" in r]
    # the teacher after that step, as in teacher_<step>.pt
    online = [(r["step"] + 1, r["probe"]["kappa"]) for r in log if "probe" in r]
    rows = []
    for path in exported(run):
        with one_sentence():
            model = vit.load_backbone(path, args.device).requires_grad_(False)
            score = online_score(model, labelled, args.device, args.size)
            if masked:
                score["dice"] = polyp_dice(args, model.eval(), masked)
        rows.append({"checkpoint": str(path), "step": model.info["step"]} | score)
    if not losses or not (online or rows):
        raise SystemExit(f"--curve {run}: {len(losses)} logged losses, {len(online)} online probes "
                         f"and {len(rows)} exported teachers; the figure needs losses and one of "
                         "the other two (pretrain.py --probe-every, --export-every)")
    print(f"{labelled.name}: validation groups of split 0, paper value not available\n\n"
          f"{markdown_table(rows)}")
    kappas, dice = ([(r["step"], r[name]) for r in rows if name in r] for name in ("kappa", "dice"))
    path = args.out or run / "curve.png"
    title = f"{run.name}: {labelled.name}" + (f", {masked.name}" if masked else "")
    figures.draw_curve(losses, online, kappas, path, title, dice)
    print(f"wrote {path}")
    return rows


def polyp_dice(args, model, masked):
    import probe_segment  # lazily: this table needs its heads, no other does
    flags = ["--size", args.size, "--device", args.device, "--precision", args.precision,
             "--features", args.features]
    return probe_segment.online_dice(probe_segment.parse(map(str, flags)), model, masked)


def exported(run):
    """A run's teacher_<step>.pt in order; teacher_<step>.<task>.<head>.pt are heads of
    theirs."""
    step_of = {p: p.stem.removeprefix("teacher_") for p in run.glob("teacher_*.pt")}
    return sorted((p for p in step_of if step_of[p].isdigit()), key=lambda p: int(step_of[p]))


def histogram(labelled, out):
    """Figure 2: frames per class."""
    counts = np.bincount(labelled.labels, minlength=len(labelled.classes))
    rows = [{"class": c, "frames": int(n), "share": float(n / counts.sum())}
            for c, n in zip(labelled.classes, counts)]
    title = f"{labelled.name}: {counts.sum():,} frames"
    path = out or "runs/mes_histogram.png"
    figures.draw_bars(labelled.classes, counts.tolist(), path, title)
    print(f"{markdown_table(rows)}\nwrote {path}")
    return rows


METRIC = ("quadratic weighted kappa; sensitivity, specificity, F1 and AUC with MES 2-3 (no "
          "remission) as the positive class; class imbalance: every class (power 1) or every frame "
          "(power 0) weighs the same in the loss, whichever validation prefers (few labels: as "
          "drawn)")


def main(argv=None):
    parser = arguments(__doc__, "the Mayo endoscopic score (LIMUC, or HyperKvasir's ulcerative "
                                "colitis grades 1/2/3)")
    parser.add_argument("--view", choices=("crop", "stretch"), default="crop", help=VIEW)
    parser.add_argument("--curve", metavar="RUN",
                        help="draw Figure 1 of this run folder instead, as a PNG in it (or --out)")
    parser.add_argument("--polyps", metavar="ROOT", help="for --curve: frames with masks, whose "
                        "validation frames add the Dice of a linear head")
    parser.add_argument("--histogram", action="store_true",
                        help="draw Figure 2 instead, as a PNG under runs/ (or --out)")
    args = parser.parse_args(argv)
    prepare(args, "mes")
    labelled, sets = open_sets(args, "mes")
    if args.curve:
        return curve(args, labelled)
    if args.histogram:
        return histogram(labelled, args.out)
    task = Task("mes", HEADS, ("softmax", linear_head, FEW_SHOT), mes_metrics(labelled.classes),
                ["kappa", "macro F1", "accuracy"], quadratic_kappa)
    rows = evaluate(args, task, labelled, sets, backbones(args))
    stand_in = ", three grades only: a smaller stand-in for the four of LIMUC"
    title = "Mayo endoscopic score" + stand_in * (len(labelled.classes) != 4)
    about = {"metric": METRIC, "pixels": args.size, "view": args.view}
    return report(args, title, rows, labelled, sets, about)


if __name__ == "__main__":
    main()
