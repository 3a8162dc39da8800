"""From frozen features to a table of results: the flags and sets that every probe opens, the
choice on validation, few labels, paired differences, intervals, tables.

    args = arguments(__doc__, "landmarks").parse_args(argv)
    prepare(args, "landmarks")
    labelled, sets = open_sets(args, "landmarks")
    rows = evaluate(args, task, labelled, sets, backbones(args))    # task: see Task
    report(args, "Landmarks", rows, labelled, sets, {})
"""
import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import shlex
import tempfile
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import data
import synthetic
import vit
from frozen import frozen_features, head_path, one_sentence, random_name, save_head


# ---------------------------------------------------------------------------------------------
# Flags, and what they open

VIEW = ("how a frame becomes the backbone's square: short side resized and the middle cropped, or "
        "all of it stretched, as the polyp heads see it, so that all heads can share one pass")


def arguments(doc, task, size=224, otherwise=""):
    """The parser of the flags that all probes share; `otherwise`: what a --size of None
    means."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("checkpoints", nargs="*",
         help="backbones: our files, released DINOv2 weights or their name (dinov2_vits14), "
         "DINOv2 training checkpoints")
    flag("--data", help=f"data root for {task}; without it the synthetic set, made on first use")
    flag("--generalise", action="append", metavar="FOLDER",
         help="another root with the same classes, or several (give the flag again): every head "
         "fitted on --data is tested on all of it too (the synthetic set brings its own)")
    flag("--against", metavar="CHECKPOINT",
         help="weights from which every checkpoint's paired difference is printed; None: those "
         "that its run started from, when they are among the checkpoints")
    flag("--size", type=int, default=size,
         help="side in pixels of the square that the backbone sees, a multiple of its patch size; "
         "a backbone pre-trained on small crops may do better near their size" + otherwise)
    flag("--splits", type=int, help="only the first so many splits (folds), for a quick look; "
         "None: all, which is what published numbers are means over")
    flag("--shots", type=int, nargs="+", metavar="N",
         help="only the few-label table, with so many labelled frames per class (for polyps so "
         "many frames); the heads that are written are those of the last number's first draw")
    flag("--precision", choices=("auto", *vit.PRECISIONS), default="auto",
         help="type of the backbone's matrix products; auto: bf16 where the device multiplies it "
         "in hardware, otherwise fp16 on GPUs and fp32 on CPUs")
    flag("--features", default="features", metavar="FOLDER",
         help="where frozen features are kept; a large file per backbone and segmentation head")
    flag("--out", help="JSON file of the rows, with the heads beside it; without it beside the "
         "first checkpoint (each head beside its own), or under runs/")
    flag("--seed", type=int, default=0,
         help="of the random initialisation, the few-label draws and the bootstrap")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         help="where features are computed")
    return parser


def prepare(args, task):
    """What is wrong with the flags is said before anything is computed. Sets args.json, and puts
    --against among the checkpoints."""
    if args.size < 14 or args.size % 14:
        raise SystemExit(f"--size {args.size}: give a multiple of the patch size, 14 pixels")
    if args.splits is not None and args.splits < 1:
        raise SystemExit(f"--splits {args.splits}: at least one split must be left")
    if min(args.shots or [1]) < 1:
        raise SystemExit(f"--shots {min(args.shots)}: give at least one frame")
    if args.against:
        args.against = same_file(args.against, args.checkpoints) or args.against
        if args.against not in args.checkpoints:
            args.checkpoints.append(args.against)
    absent = [c for c in args.checkpoints if not os.path.isfile(c) and c not in vit.RELEASED]
    if absent:
        raise SystemExit(f"{', '.join(absent)}: no such checkpoint file")
    first = args.checkpoints[0] if args.checkpoints else "runs/random.pt"
    args.json = pathlib.Path(args.out or pathlib.Path(first).with_suffix(f".{task}.json"))
    if args.json.is_dir():
        raise SystemExit(f"--out {args.json} is a folder: give the name of a JSON file")
    heads_of = {head_path(args, c, task, "x").parent for c in args.checkpoints}
    for folder in sorted({args.json.parent} | heads_of):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise SystemExit(f"{folder}: the results cannot be written there ({error.strerror}); "
                             "give --out a file in another folder") from error


def same_file(path, among):
    """The one of these paths that is the file `path`; None if there is none."""
    return next((c for c in among if os.path.realpath(c) == os.path.realpath(path)), None)


class Tested(NamedTuple):
    """A set on which heads are tested."""
    words: str      # what the tables call it
    labelled: data.Labelled
    rows: list      # the numbers of the frames that each split's head is tested on


def open_sets(args, task):
    """(the labelled set of --data, [Tested, ...]): its own test frames, then all frames of every
    --generalise set, which has the same classes and goes by its folder's name."""
    with one_sentence():
        root = pathlib.Path(args.data or synthetic.ensure())
        labelled = data.open_labelled(root, task)
        if not labelled.splits:
            raise ValueError(f"{root}: {len(labelled.paths)} frames are too few to split "
                             f"({data.ENOUGH} are enough); as --generalise all can be tested on")
        labelled = dataclasses.replace(labelled, splits=labelled.splits[:args.splits])
        check_splits(labelled, task)
        own = Tested(made_by(labelled) + "held-out, same source", labelled,
                     [split.test for split in labelled.splits])
        folders = args.generalise or ([] if args.data else [root / "scope2"])
        names = [pathlib.Path(folder).resolve().name for folder in folders]
        names = [n if names.count(n) == 1 else str(f) for n, f in zip(names, folders)]
        return labelled, [own, *(open_other(f, n, labelled, task) for f, n in zip(folders, names))]


def check_splits(labelled, task):
    if task != "polyps" and len(labelled.classes) < 2:
        raise ValueError(f"{labelled.name}: expected two or more classes for {task}, found "
                         f"{', '.join(labelled.classes)} alone")
    for k, split in enumerate(labelled.splits):
        counts = [len(split.train), len(split.val), len(split.test)]
        if not all(counts):
            raise ValueError(f"{labelled.name}: split {k} has {counts} training, validation and "
                             "test frames; each must have some")


def open_other(folder, name, labelled, task):
    """A --generalise set."""
    other = data.open_labelled(folder, task)
    if other.classes != labelled.classes:
        raise ValueError(f"--generalise {folder}: expected the classes {labelled.classes}, found "
                         f"{other.classes}")
    common = set(map(os.path.realpath, labelled.paths)) & set(map(os.path.realpath, other.paths))
    if common:
        raise ValueError(f"--generalise {folder}: {len(common)} of its frames are --data's own, "
                         f"such as {min(common)}: heads are fitted on that set; give another")
    everything = np.arange(len(other.paths))
    return Tested(made_by(other) + name, other, [everything] * len(labelled.splits))


def made_by(labelled):
    """"synthetic " of what synthetic.py made, so that no table passes for one of real frames."""
    return "synthetic " if labelled.name.startswith("synthetic") else ""


# ---------------------------------------------------------------------------------------------
# Intervals


def bootstrap_interval(statistic, groups, n=1000, seed=0):
    """95 % percentile interval of statistic(indices) when whole groups (patients) are drawn with
    replacement.

    groups: one name per sample. statistic may return a number or an array, and nan where a draw
    leaves it undefined (such draws are left out). Returns (low, high), nan when there is a
    single group: nothing is known then."""
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(group_of == g) for g in range(group_of.max(initial=-1) + 1)]
    if len(members) < 2:
        unknown = np.full(np.shape(statistic(np.arange(len(groups)))), np.nan)
        return unknown, unknown
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n):
        drawn = rng.integers(len(members), size=len(members))
        draws.append(statistic(np.concatenate([members[g] for g in drawn])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what no draw defines: nan is the answer
        low, high = np.nanquantile(np.asarray(draws, dtype=float), [0.025, 0.975], axis=0)
    return low, high


# ---------------------------------------------------------------------------------------------
# Classification: from features to rows


SHOTS = (1, 5, 10, 25, 50)  # labelled frames per class
DRAWS = 10                  # of them; draw d takes its frames from split d (modulo their number)


@dataclasses.dataclass
class Task:
    """What a classification probe brings.

    heads: {name in the table: (fit, grid)}; fit(features, y, rows, n_classes, **setting) gives a
    head, the grid is the list of settings that validation chooses from, the simplest first.
    few_shot: (name, fit, setting): with a few labels there are none to choose with.
    metrics(true, pred, prob) -> {column: value}; `keys` of them stand in the few-label and the
    difference table; score(true, pred, n_classes) is what the choice on validation maximises."""
    name: str
    heads: dict
    few_shot: tuple
    metrics: Callable
    keys: list
    score: Callable


class Answers(NamedTuple):
    """What each split's head says of its test frames."""
    pred: torch.Tensor  # (F, n) labels, -1 where the split does not test the frame
    prob: torch.Tensor  # (F, n, C) probabilities, nan there


def answers(heads_of_splits, features, tested, n_classes):
    n, n_splits = len(tested.labelled.paths), len(tested.rows)
    pred = torch.full((n_splits, n), -1)
    prob = torch.full((n_splits, n, n_classes), float("nan"))
    for f, (head, rows) in enumerate(zip(heads_of_splits, tested.rows)):
        prob[f, rows], pred[f, rows] = head(features, rows)
    return Answers(pred, prob)


def per_split(metrics, y, found, frames=slice(None)):
    """metrics(true, pred, prob) of every split over those of `frames` that it tested."""
    each = zip(found.pred[:, frames], found.prob[:, frames])
    return [metrics(y[frames][p >= 0], p[p >= 0], q[p >= 0]) for p, q in each]


def mean_of(dicts, keys=None, whole=None):
    """Mean of every column over the splits in which it is defined; nan where it is in none.

    whole: the splits' scores of all frames, when `dicts` are those of a draw among them. What is
    defined in all of a split's frames and not in the draw makes the draw's mean nan."""
    means = {}
    for k in keys or dicts[0]:
        values = [d[k] for d, w in zip(dicts, whole or dicts) if not np.isnan(w[k])]
        means[k] = float(np.mean(values)) if values else float("nan")
    return means


def deviation_of(dicts, keys=None):
    """{"X sd"}: population standard deviation over the splits in which X is defined, and
    {"X splits"}: how many of them, where it is not in all."""
    row = {}
    for k in keys or dicts[0]:
        values = np.array([d[k] for d in dicts])
        known = values[~np.isnan(values)]
        row[f"{k} sd"] = float(np.std(known)) if len(known) else float("nan")
        if 0 < len(known) < len(values):
            row[f"{k} splits"] = f"{len(known)} of {len(values)}"
    return row


class Measured(NamedTuple):
    """A backbone's head on a test set, to be drawn from again and again."""
    groups: np.ndarray  # of each tested frame
    score: Callable     # score(draw) -> {column: value}; draw: numbers among the tested frames


def measure(metrics, labelled, found, keys=None):
    y = torch.from_numpy(labelled.labels)
    frames = (found.pred >= 0).any(0).nonzero()[:, 0].numpy()                # those ever tested
    whole = per_split(metrics, y, found, frames)

    def score(draw):
        return mean_of(per_split(metrics, y, found, frames[draw]), keys, whole)
    return Measured(np.asarray(labelled.groups)[frames], score)


def summarise(metrics, labelled, found, seed):
    """Mean and standard deviation over splits; of one split, its value and a 95 % bootstrap
    interval over groups."""
    scores = per_split(metrics, torch.from_numpy(labelled.labels), found)
    row = mean_of(scores)
    if len(scores) > 1:
        return row | deviation_of(scores)
    return row | interval_of(measure(metrics, labelled, found), seed)


def interval_of(measured, seed):
    """{"X low", "X high"} of each column X."""
    columns = measured.score(np.arange(len(measured.groups)))
    low, high = bootstrap_interval(lambda draw: list(measured.score(draw).values()),
                                   measured.groups, seed=seed)
    return {f"{k} {end}": float(value) for end, values in (("low", low), ("high", high))
            for k, value in zip(columns, values)}


class Chosen(NamedTuple):
    head: Callable
    setting: dict
    score: float  # on validation


def best_on_validation(fit, grid, features, y, split, n_classes, score):
    """The setting of the grid whose head, fitted on split.train, has the highest
    score(true, pred, n_classes) on split.val; of equals the first, so a grid goes from the
    simplest head to the least simple."""
    best = None
    for setting in grid:
        head = fit(features, y, split.train, n_classes, **setting)
        value = score(y[split.val], head(features, split.val)[1], n_classes)
        if best is None or value > best.score:
            best = Chosen(head, setting, value)
    return best


def in_words(setting, of=""):
    return ", ".join(f"{k} {v}" for k, v in setting.items()) + of


def most_often(settings):
    """For a table: the setting that most splits chose, and how many did."""
    counts = collections.Counter(map(in_words, settings))
    words, n = counts.most_common(1)[0]
    return words + (f" ({n} of {len(settings)} splits)" if len(settings) > 1 else "")


def confusion(true, pred, n_classes):
    """(n_classes, n_classes) counts: rows are the true class, columns the predicted one."""
    true, pred = torch.as_tensor(true), torch.as_tensor(pred)
    labels = torch.cat([true, pred])
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"labels must lie in 0..{n_classes - 1}, found {true.unique().tolist()} "
                         f"and {pred.unique().tolist()}")
    counts = torch.bincount(true * n_classes + pred, minlength=n_classes**2)
    return counts.view(n_classes, n_classes)


def result_rows(about, task, sets, found, seed):
    """A row per test set: what is being tested (`about`), its metrics, its confusion matrix."""
    rows = []
    for tested, answered in zip(sets, found):
        y, n_classes = torch.from_numpy(tested.labelled.labels), len(tested.labelled.classes)
        matrix = sum(confusion(y[p >= 0], p[p >= 0], n_classes) for p in answered.pred)
        rows.append({"table": "results"} | about | {"tested on": tested.words}
                    | summarise(task.metrics, tested.labelled, answered, seed)
                    | {"confusion": matrix.tolist()})
    return rows


def majority_head(features, y, rows, n_classes):
    """The trivial baseline: every frame gets the training frames' most frequent class."""
    p = torch.bincount(y[rows], minlength=n_classes) / len(rows)
    return lambda features, rows: (p.expand(len(rows), -1), p.argmax().expand(len(rows)))


def evaluate(args, task, labelled, sets, models):
    """Every row of a classification probe's tables.

    For each backbone the frozen features of every set, for each head and split the setting that
    validation prefers, its answers on the test frames of every set; then the few-label table and
    the differences between backbones. Heads of checkpoints are written (those of split 0)."""
    y, n_classes = torch.from_numpy(labelled.labels), len(labelled.classes)
    rows, few_rows, measured = [], [], {}
    majority = [majority_head(None, y, split.train, n_classes) for split in labelled.splits]
    found = [answers(majority, None, tested, n_classes) for tested in sets]
    about = {"backbone": "majority class", "head": "none"}
    rows += result_rows(about, task, sets, found, args.seed)
    for name, model in models:
        model.to(args.device)
        with one_sentence():  # an unreadable frame, a full disk
            features = [frozen_features(model, tested.labelled.paths, args.device, args.size,
                                        args.view, precision_of(args), args.features)
                        for tested in sets]
        for head, (fit, grid) in ({} if args.shots else task.heads).items():
            chosen = [best_on_validation(fit, grid, features[0], y, split, n_classes, task.score)
                      for split in labelled.splits]
            found = [answers([c.head for c in chosen], f, tested, n_classes)
                     for f, tested in zip(features, sets)]
            about = {"backbone": name, "head": head}
            settings = [c.setting for c in chosen]
            more = {"setting": most_often(settings), "chosen on validation": settings,
                    "step": model.info["step"]}
            rows += [row | more for row in result_rows(about, task, sets, found, args.seed)]
            for tested, answered in zip(sets, found):
                measured[name, head, tested.words] = measure(task.metrics, tested.labelled,
                                                             answered, task.keys)
            val, test = labelled.splits[0].val, per_split(task.metrics, y, found[0])[0]
            prob, pred = chosen[0].head(features[0], val)
            metrics = {"validation": task.metrics(y[val], pred, prob), "test": test}
            save_classifier(args, task, name, model, labelled, head, chosen[0], metrics)
        few_rows += few_shot(args, task, labelled, name, model, features[0])
        model.to("cpu")
    return rows + few_rows + differences(measured, comparisons(args, models), args.seed)


def save_classifier(args, task, backbone, model, labelled, head, chosen, metrics):
    """Write a checkpoint's head; no random initialisation's."""
    if backbone in args.checkpoints:
        save_head(head_path(args, backbone, task.name, head), model, chosen.head, task=task.name,
                  head=head.lower(), classes=labelled.classes, size=args.size, view=args.view,
                  setting=chosen.setting, metrics=metrics)


def few_shot(args, task, labelled, backbone, model, features):
    """A row per number of labelled frames per class: mean and standard deviation over DRAWS
    draws.

    The frames of a draw are the first of one shuffled order per class, so that larger draws
    contain the smaller ones, and the same for every backbone. A class with fewer training frames
    than that gives all it has, and the row says so."""
    (name, fit, setting), n_classes = task.few_shot, len(labelled.classes)
    y, rows = torch.from_numpy(labelled.labels), []
    for shots in args.shots or SHOTS:
        scores, used = [], []
        for d in range(DRAWS):
            split = labelled.splits[d % len(labelled.splits)]
            rng = np.random.default_rng((args.seed, d))
            drawn = [rng.permutation(split.train[labelled.labels[split.train] == c])[:shots]
                     for c in range(n_classes)]
            head = fit(features, y, np.concatenate(drawn), n_classes, **setting)
            p, pred = head(features, split.test)
            scores.append(task.metrics(y[split.test], pred, p))
            used.append([len(frames) for frames in drawn])
            if args.shots and shots == args.shots[-1] and d == 0:
                chosen = Chosen(head, setting | {"labelled per class": shots}, float("nan"))
                metrics = {"validation": {}, "test": scores[0]}
                save_classifier(args, task, backbone, model, labelled, name, chosen, metrics)
        fewest = zip(labelled.classes, np.min(used, axis=0))
        short = ", ".join(f"{c}: {n}" for c, n in fewest if n < shots)
        rows.append({"table": "few-shot", "backbone": backbone, "step": model.info["step"],
                     "head": name, "labelled per class": shots, "draws": DRAWS,
                     "fewer at hand": short or "-"}
                    | mean_of(scores, task.keys) | deviation_of(scores, task.keys)
                    | {"setting": in_words(setting, " (fixed)")})
    return rows


def comparisons(args, models):
    """[(checkpoint, what it is compared with)]: the random initialisation of its architecture;
    and --against, or the weights that its run started from, when those are a checkpoint too."""
    pairs, trained = [], models[:len(args.checkpoints)]
    for name, model in trained:
        pairs.append((name, random_name(model)))
    for name, model in trained:
        start = args.against or started_from(model, args.checkpoints)
        if start and start != name:
            pairs.append((name, start))
    return pairs


def started_from(model, checkpoints):
    """The one of the checkpoints that this one's run took its first weights from. A path in the
    file that leads nowhere from here counts by its name."""
    start = model.info.get("args", {}).get("init")
    if not start:
        return None
    named = [c for c in checkpoints if pathlib.Path(c).name == pathlib.Path(start).name]
    if not os.path.exists(start) and len(named) == 1:
        return named[0]
    return same_file(start, checkpoints)


def differences(measured, pairs, seed):
    """For every (backbone, other) of pairs, the paired difference on each head and test set:
    both are scored on the same draw of groups, a thousand times.

    measured: {(backbone, head, words of the test set): Measured}"""
    rows = []
    for backbone, other in pairs:
        for (name, head, words), ours in measured.items():
            if name == backbone:
                theirs = measured[other, head, words]
                gain = Measured(ours.groups, functools.partial(gained, ours, theirs))
                rows.append({"table": "difference", "backbone": backbone, "minus": other,
                             "head": head, "tested on": words}
                            | gain.score(np.arange(len(gain.groups))) | interval_of(gain, seed))
    return rows


def gained(ours, theirs, draw):
    a, b = ours.score(draw), theirs.score(draw)
    return {k: a[k] - b[k] for k in a}


# ---------------------------------------------------------------------------------------------
# Tables


def markdown_table(rows, hidden=()):
    """A list of dicts as a GitHub Markdown table: one column per key that holds plain values, in
    order of first appearance.

    "X sd" joins column X as "X ± sd", "X low" and "X high" as "X [low, high]", "X splits" as
    "X (3 of 5 splits)"; nan prints as n/a; `hidden` keys are left out."""
    values = (list, tuple, dict)
    keys = dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, values))
    parts = {f"{k} {part}" for k in keys for part in ("sd", "low", "high", "splits")}
    columns = [k for k in keys if k not in parts and k not in hidden]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row, k) for k in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(row, k):
    text = plain(row.get(k))
    if f"{k} sd" in row:
        text += f" ± {plain(row[f'{k} sd'])}"
    if f"{k} low" in row:
        text += f" [{plain(row[f'{k} low'])}, {plain(row[f'{k} high'])}]"
    if f"{k} splits" in row:
        text += f" ({row[f'{k} splits']} splits)"
    return text


def plain(value):
    if isinstance(value, float):
        return "n/a" if np.isnan(value) else f"{value:.3f}"
    return "" if value is None else str(value)


def write_rows(rows, path):
    """The same rows as JSON (nan as null, for every reader)."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}
            for row in rows]
    with vit.replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


def precision_of(args):
    """The torch type in which the backbone's matrix products are computed."""
    return vit.precision(args.device, args.precision)


CAPTIONS = {"results": "Results",
            "few-shot": f"A few labelled frames: mean ± standard deviation over {DRAWS} draws",
            "difference": "Paired differences: backbone minus the one beside it, 95 % interval "
                          "over groups"}


def about_set(tested):
    labelled = tested.labelled
    return (f"{tested.words}: {labelled.name}, {len(labelled.paths)} frames of {labelled.root}, "
            f"{labelled.grouping}")


def report(args, title, rows, labelled, sets, about):
    """Complete the rows with where they come from, print the tables and confusion matrices,
    write the JSON. about: what the probe adds to the head of its tables."""
    split, dtype = labelled.splits[0], precision_of(args)
    precision = next(name for name, value in vit.PRECISIONS.items() if value == dtype)
    about = {
        "data": labelled.name, "root": labelled.root,
        "split": f"{len(labelled.splits)} (first: {len(split.train)} training, {len(split.val)} "
                 f"validation, {len(split.test)} test frames)",
        "frames": len(labelled.paths), "groups": labelled.grouping,
        "also tested on": "; ".join(map(about_set, sets[1:])) or None,
        "precision": f"{precision} features" + " (auto)" * (args.precision == "auto"),
        "seed": args.seed} | about | {"paper value": "not available"}
    rows = [row | about for row in rows]
    print(f"\n## {'Synthetic: ' if made_by(labelled) else ''}{title}\n")
    print("\n".join(f"* {k}: {v}" for k, v in about.items() if v is not None))
    hidden = {"table", "step", "draws", "panels", *about}
    for table, caption in CAPTIONS.items():
        if shown := [row for row in rows if row["table"] == table]:
            print(f"\n### {caption}\n\n{markdown_table(shown, hidden)}")
    for row in rows:
        if "confusion" in row and row["head"] != "none":
            print(f"\nConfusion, {row['backbone']}, {row['head']}, {row['tested on']} (rows true, "
                  "columns predicted, summed over splits):\n")
            print(markdown_table([{"true": c} | dict(zip(labelled.classes, counts))
                                  for c, counts in zip(labelled.classes, row["confusion"])]))
    write_rows(rows, args.json)
    print("\n" + closing_words(args, rows, labelled, sets[0].words))
    return rows


def closing_words(args, rows, labelled, own):
    """What a probe wrote, whether each backbone is better than what it is compared with on the set
    `own`, and the next command."""
    lines = [f"wrote {args.json}" + ", and the heads of each checkpoint" * bool(args.checkpoints)]
    for row in rows:
        if row["table"] == "difference" and row["tested on"] == own:
            metric = next(k for k in row if f"{k} low" in row)
            low, high = row[f"{metric} low"], row[f"{metric} high"]
            better = "better" if low > 0 else "worse" if high < 0 else "not surely another"
            lines.append(f"{row['backbone']}, {row['head']}: {metric} {row[metric]:+.3f} "
                         f"[{low:.3f}, {high:.3f}] beside {row['minus']}: {better}")
    if not args.checkpoints:
        return "\n".join([*lines, "next: python pretrain.py --arch vitt14 --recipe demo   "
                                  "# a checkpoint to test beside random weights"])
    first = args.checkpoints[0]
    heads = shlex.quote(str(head_path(args, first, "", ""))[:-len("...pt")]) + ".*.*.pt"
    frames = pathlib.Path(labelled.paths[labelled.splits[0].test[0]]).parent
    source = shlex.join(["--data", str(frames), "--out", str(args.json.with_name("predicted"))])
    return "\n".join([*lines, f"next: python predict.py {shlex.quote(str(first))} --heads {heads} "
                              f"{source}   # or your own frames"])
