"""Anatomical landmarks from frozen features: kNN and a linear head, and what a few labelled frames per class buy.

    python probe_classify.py                                        synthetic frames, random initialisation
    python probe_classify.py runs/demo/best.pt                      synthetic frames, a checkpoint against random initialisation
    python probe_classify.py A.pt B.pt --data data/hyper-kvasir     HyperKvasir's six landmarks, official folds
    python probe_classify.py A.pt --data FOLDER                     any tree with one folder per class

The backbone is never trained. Its features are computed once and kept under features/. Everything that is chosen is chosen
on a fold's validation frames; the head that won there, fitted on the training frames alone, is the one that is tested, once.
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import synthetic
import vit


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def accuracy(true, pred):
    """Share of equal labels; nan for an empty set."""
    true, pred = torch.as_tensor(true), torch.as_tensor(pred)
    return (true == pred).double().mean().item()


def confusion(true, pred, n_classes):
    """(n_classes, n_classes) counts: rows are the true class, columns the predicted one."""
    true, pred = torch.as_tensor(true), torch.as_tensor(pred)
    if len(true) and not 0 <= min(true.min(), pred.min()) <= max(true.max(), pred.max()) < n_classes:
        raise ValueError(f"labels must lie in 0..{n_classes - 1}, found {true.unique().tolist()} and {pred.unique().tolist()}")
    return torch.bincount(true * n_classes + pred, minlength=n_classes**2).view(n_classes, n_classes)


def class_f1(true, pred, n_classes):
    """(n_classes,) F1 of each class; 0 for a class that is neither present nor predicted."""
    c = confusion(true, pred, n_classes).double()
    return 2 * c.diag() / (c.sum(0) + c.sum(1)).clamp(min=1)


def macro_f1(true, pred, n_classes):
    """Mean F1 over all n_classes (an absent class counts 0, as in scikit-learn with labels given); nan for an empty set."""
    return class_f1(true, pred, n_classes).mean().item() if len(true) else float("nan")


def bootstrap_interval(statistic, groups, n=1000, seed=0):
    """95 % percentile interval of statistic(indices) when whole groups (patients) are drawn with replacement.

    groups: one name per sample. statistic may return a number or an array, and nan where a draw leaves it undefined
    (such draws are left out). Returns (low, high), nan when there is a single group: nothing is known then.
    """
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(group_of == g) for g in range(group_of.max(initial=-1) + 1)]
    if len(members) < 2:
        return (np.full_like(np.asarray(statistic(np.arange(len(groups))), dtype=float), np.nan),) * 2
    rng = np.random.default_rng(seed)
    draws = [statistic(np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])) for _ in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a statistic that no draw defines: nan is the answer
        low, high = np.nanquantile(np.asarray(draws, dtype=float), [0.025, 0.975], axis=0)
    return low, high


# ---------------------------------------------------------------------------------------------------------------------
# Heads on frozen features


def fit_linear(x, y, n_classes, l2, weight=None):
    """Multinomial logistic regression: argmin mean cross-entropy + l2/2 |W|^2, the bias not penalised (DINOv2's log-reg).

    x (n, D), y (n,) in 0..n_classes-1; weight (n_classes,) makes the mean a weighted one. L-BFGS in float64 from zero
    to its minimum (see whitening and minimise), with a warning if that is not reached. A class without frames gets probability 0,
    the limit of the minimum: weights 0 and bias -inf. Returns an nn.Linear in x's precision.
    Features are taken as they are: standardise them first, so that one l2 means the same for every backbone.
    """
    if not len(x):
        raise ValueError("fit_linear needs at least one training frame")
    wide, (present, y) = x.double(), y.to(x.device).unique(return_inverse=True)
    weight = None if weight is None else weight.to(wide)[present]
    turn = whitening(wide, l2)                                                                      # (min(n, D), D)
    turned = wide @ turn.T                                                                          # (n, min(n, D))
    v = wide.new_zeros(len(present), len(turn), requires_grad=True)
    b = wide.new_zeros(len(present), requires_grad=True)

    def objective():
        return F.cross_entropy(F.linear(turned, v, b), y, weight) + l2 / 2 * (v @ turn).square().sum()

    minimise(objective, [v, b])
    head = nn.utils.skip_init(nn.Linear, x.shape[1], n_classes, dtype=x.dtype, device=x.device)  # draws no random number
    head.requires_grad_(False)
    head.weight.zero_()[present] = (v @ turn).detach().to(x.dtype)
    head.bias.fill_(-torch.inf)[present] = b.detach().to(x.dtype)
    return head


def whitening(x, l2):
    """A (min(n, D), D) such that, in terms of v with w = v A, an unweighted logistic loss on x (n, D) + l2/2 |w|^2 is about as
    curved in every direction. The minimum stays where it is, in the span of x's rows; L-BFGS gets there in tens of steps instead of thousands.
    """
    if len(x) < x.shape[1]:
        basis = torch.linalg.qr(x.T)[0]                                                             # (D, n): of the rows' span
        return whitening(x @ basis, l2) @ basis.T
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    curvature = x.T @ x / (4 * len(x)) + max(l2, 1e-6) * identity                                   # (D, D): p (1 - p) <= 1/4
    return torch.linalg.solve_triangular(torch.linalg.cholesky(curvature), identity, upper=False)


def minimise(objective, params, tolerance=1e-7, max_iter=2000):
    """Bring a smooth objective() of float64 params to its minimum, in place: until no gradient entry exceeds the tolerance, or
    the objective, of order 1, has no digits left to change, or no parameter moves by more than 1e-9.
    """
    scale = 2.0 ** 20  # torch's L-BFGS learns nothing from a step whose product with the gradient's change is below 1e-10
    solver = torch.optim.LBFGS(params, max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=scale * tolerance,
                               tolerance_change=scale * 1e-15, history_size=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = scale * objective()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
        closure()
    worst = torch.cat([p.grad.flatten() for p in params]).abs().max().item() / scale
    if not worst <= 100 * tolerance:  # nan is no minimum either
        warnings.warn(f"L-BFGS stopped with a gradient entry of {worst:.1e} after {solver.state[params[0]]['n_iter']} iterations")


def knn_probabilities(train_x, train_y, x, k=20, temp=0.07, n_classes=None):
    """(n, n_classes) votes of the k nearest training frames by cosine, each weighing softmax(similarity / temp) (DINO, 2021).

    k is cut to the number of training frames. Similarities are made for a slice of x at a time, to bound the memory.
    """
    if not len(train_x):
        raise ValueError("knn needs at least one training frame")
    n_classes = n_classes or int(train_y.max()) + 1
    bank, x, train_y = F.normalize(train_x, dim=1), F.normalize(x, dim=1), train_y.to(x.device)
    votes = x.new_zeros(len(x), n_classes)
    rows = max(1, 2**25 // len(bank))
    for i in range(0, len(x), rows):
        similarity, nearest = (x[i:i + rows] @ bank.T).topk(min(k, len(bank)), dim=1)               # (rows, k)
        weights = (similarity / temp).softmax(1)[..., None]                                         # (rows, k, 1)
        votes[i:i + rows] = (F.one_hot(train_y[nearest], n_classes) * weights).sum(1)  # no scatter: the same twice on a GPU too
    return votes


def knn_predict(train_x, train_y, x, k=20, temp=0.07, n_classes=None):
    """Labels (n,) of knn_probabilities; the lowest class wins a tie."""
    return knn_probabilities(train_x, train_y, x, k, temp, n_classes).argmax(1)


def standardised_input(features, rows, blocks, patch):
    """A function (features, rows) -> (n, blocks*D [+ D]): the class tokens of the last `blocks` blocks, with the mean patch token
    if `patch` (the four inputs of DINOv2's linear probe), every dimension standardised by the training `rows` given here.
    """
    def raw(features, rows):
        x = features["cls"][rows, -blocks:].flatten(1)
        return torch.cat([x, features["patch"][rows]], 1) if patch else x

    x = raw(features, rows)
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    return lambda features, rows: (raw(features, rows) - mean) / std


def linear_head(features, y, rows, n_classes, blocks, patch, l2, weight=None):
    """Fit on the frames `rows`; returns predict(features, rows) -> class probabilities (n, C), labels (n,), on the CPU."""
    inputs = standardised_input(features, rows, blocks, patch)
    head = fit_linear(inputs(features, rows), y[rows], n_classes, l2, weight)

    def predict(features, rows):
        p = head(inputs(features, rows)).softmax(1).cpu()
        return p, p.argmax(1)
    return predict


def knn_head(features, y, rows, n_classes):
    """As linear_head: votes of the 20 nearest training frames, by the last block's class token."""
    bank = features["cls"][rows, -1]

    def predict(features, other):
        p = knn_probabilities(bank, y[rows], features["cls"][other, -1], n_classes=n_classes).cpu()
        return p, p.argmax(1)
    return predict


def majority_head(features, y, rows, n_classes):
    """The trivial baseline: every frame gets the training frames' most frequent class."""
    p = torch.bincount(y[rows], minlength=n_classes) / len(rows)
    return lambda features, rows: (p.expand(len(rows), -1), p.argmax().expand(len(rows)))


def best_on_validation(fit, grid, features, y, split, n_classes, score):
    """(predict, setting): the setting of the grid whose head, fitted on split.train, has the highest score(true, pred, n_classes)
    on split.val. The first wins a tie, so a grid goes from the simplest head to the least simple.
    """
    best = None
    for setting in grid:
        predict = fit(features, y, split.train, n_classes, **setting)
        value = score(y[split.val], predict(features, split.val)[1], n_classes)
        if best is None or value > best[0]:
            best = value, predict, setting
    return best[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Frozen features


@contextlib.contextmanager
def one_sentence():
    """A bad checkpoint or data root ends a command with the sentence that names it, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def backbones(checkpoints, device, seed=0):
    """Yield (name, model) for each checkpoint, then one random initialisation per architecture among them (vitt14 if none).

    In evaluation mode, gradients off. Names are the paths as given, and "random initialisation (ARCH)", drawn with `seed`.
    """
    shapes, absent = {}, [str(path) for path in checkpoints if not os.path.isfile(path)]
    if absent:  # said before the first of them has been computed for an hour
        raise SystemExit(f"{', '.join(absent)}: no such checkpoint file")
    for path in checkpoints:
        with one_sentence():
            model = vit.load_backbone(path, device)
        shapes[architecture(model)] = [model.dim, model.depth, model.heads, model.ffn, model.registers]
        yield str(path), model.eval().requires_grad_(False)
    for arch, shape in (shapes or {"vitt14": None}).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = vit.VisionTransformer(*shape) if shape else vit.build_vit(arch)
        model.info = {"path": None, "arch": arch, "step": 0, "format": None, "metrics": {}}
        yield f"random initialisation ({arch})", model.to(device).eval().requires_grad_(False)


def architecture(model):
    """The name in ARCHS, or width/depth/heads/registers where there is none."""
    return model.arch or f"ViT {model.dim}/{model.depth}/{model.heads}/{model.registers}"


def fingerprint(paths, image_size):
    """A hash of the files (path, size, time of last change) and the resolution: the data's part of a cache key."""
    files = [(str(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]
    return hashlib.sha256(repr((files, image_size)).encode()).hexdigest()


def cached(model, data_key, compute, folder="features"):
    """compute() -> dict of tensors, kept on disk under a key of the weights, the data and the kind of device (its precision)."""
    digest = hashlib.sha256(f"1 {data_key} {model.heads}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    path = pathlib.Path(folder) / f"{digest.hexdigest()[:32]}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        vit.atomic_save(compute(), path)
    return torch.load(path, map_location="cpu", weights_only=True)


def frozen_features(model, paths, device, image_size):
    """What extract gives for these frames, computed once and then read from disk."""
    return cached(model, fingerprint(paths, image_size), functools.partial(extract, model, paths, device, image_size))


def read_batch(paths, image_size):
    return torch.stack([data.eval_image(p, image_size) for p in paths])                             # (b, 3, S, S)


@torch.no_grad()
def extract(model, paths, device, image_size=224, batch=64):
    """Features of frames, float32 on the CPU; bf16 autocast on GPUs. The model's mode and the random state are left as they were.

    "cls" (n, 4, D): class tokens of the last four blocks, each through the final norm; "patch" (n, D): mean patch token of the last.
    """
    training, device = model.training, torch.device(device)
    layers = range(max(model.depth - 4, 0), model.depth)
    loader = torch.utils.data.DataLoader(
        list(paths), batch, collate_fn=functools.partial(read_batch, image_size=image_size),
        num_workers=min(8, os.cpu_count()) if device.type == "cuda" and len(paths) > batch else 0,
        generator=torch.Generator())  # its own: a probe in the middle of a training run must not move that run's random state
    cls, patch = [], []
    model.eval()
    for images in tqdm(loader, desc="features", unit="batch", disable=None):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            blocks = model.intermediate(images.to(device), layers)
        cls.append(torch.stack([b["cls"] for b in blocks], 1).float().cpu())                        # (b, 4, D)
        patch.append(blocks[-1]["patches"].float().mean(1).cpu())                                   # (b, D)
    model.train(training)
    if not cls:
        return {"cls": torch.empty(0, len(layers), model.dim), "patch": torch.empty(0, model.dim)}
    features = {"cls": torch.cat(cls), "patch": torch.cat(patch)}
    if not all(f.isfinite().all() for f in features.values()):
        raise ValueError("the backbone's features are not finite: its weights have diverged")
    return features


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown_table(rows, hidden=()):
    """A list of dicts as a GitHub Markdown table: one column per key that holds plain values, in order of first appearance.

    "X sd" joins column X as "X ± sd", "X low" and "X high" as "X [low, high]"; nan prints as n/a; `hidden` keys are left out.
    """
    keys = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, (list, tuple, dict))))
    parts = {f"{k} {part}" for k in keys for part in ("sd", "low", "high")}
    columns = [k for k in keys if k not in parts and k not in hidden]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = []
        for k in columns:
            cell = plain(row.get(k))
            cell += f" ± {plain(row[f'{k} sd'])}" if f"{k} sd" in row else ""
            cell += f" [{plain(row[f'{k} low'])}, {plain(row[f'{k} high'])}]" if f"{k} low" in row else ""
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain(value):
    if isinstance(value, float):
        return "n/a" if np.isnan(value) else f"{value:.3f}"
    return "" if value is None else str(value)


def write_rows(rows, path):
    """The same rows as JSON (nan as null, for every reader)."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in rows]
    with vit.replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# From features to the results table (probe_mes.py runs the same with its own heads and metrics)

SHOTS = (1, 5, 10, 25, 50)      # labelled frames per class
DRAWS = 10                      # of them; draw d takes its frames from split d (modulo the number of splits)
FEW_SHOT = dict(blocks=1, patch=True, l2=0.1)  # fixed: with a few labels there are none to choose with
GRID = [dict(blocks=b, patch=p, l2=l2) for l2 in (10.0, 1.0, 1e-1, 1e-2, 1e-3) for b in (1, 4) for p in (False, True)]
HEADS = {"kNN": (knn_head, [{}]), "linear": (linear_head, GRID)}


def test_sets(labelled, other):
    """[(words for the table, labelled set, test rows of each split)]: the other set, if any, is tested whole by each split's head."""
    n = len(labelled.splits)
    sets = [("same data", labelled, [s.test for s in labelled.splits])]
    return sets + ([("unrelated data", other, [np.arange(len(other.paths))] * n)] if other else [])


def apply(predicts, features, tests, n, n_classes):
    """What each split's head says of its test frames: labels (F, n), -1 where not tested; probabilities (F, n, C)."""
    pred = torch.full((len(tests), n), -1)
    prob = torch.full((len(tests), n, n_classes), float("nan"))
    for f, (predict, rows) in enumerate(zip(predicts, tests)):
        prob[f, rows], pred[f, rows] = predict(features, rows)
    return pred, prob


def per_split(metrics, y, outcome, rows=slice(None)):
    """metrics(true, pred, prob) of every split over those of `rows` that it tested: list of dicts."""
    pred, prob = (t[:, rows] for t in outcome)
    return [metrics(y[rows][p >= 0], p[p >= 0], q[p >= 0]) for p, q in zip(pred, prob)]


def tested_frames(outcome):
    """Numbers of the frames that some split tests; an outcome holds -1 for the others."""
    return (outcome[0] >= 0).any(0).nonzero()[:, 0].numpy()


def mean_of(dicts, keys=None):
    return {k: float(np.mean([d[k] for d in dicts])) for k in keys or dicts[0]}


def summarise(metrics, labelled, outcome, seed):
    """Mean and population standard deviation over splits; where there is one split, a 95 % bootstrap interval over groups."""
    y = torch.from_numpy(labelled.labels)
    scores = per_split(metrics, y, outcome)
    row = mean_of(scores)
    if len(scores) > 1:
        return row | {f"{k} sd": float(np.std([s[k] for s in scores])) for k in row}
    tested = tested_frames(outcome)
    interval = bootstrap_interval(lambda i: list(per_split(metrics, y, outcome, tested[i])[0].values()),
                                  np.asarray(labelled.groups)[tested], seed=seed)
    return row | {f"{k} {end}": float(v) for end, values in zip(("low", "high"), interval) for k, v in zip(row, values)}


def few_shot(features, labelled, n_classes, head, metrics, keys, seed):
    """One row per number of labelled frames per class: mean and standard deviation over DRAWS draws of `keys` of the metrics.

    The frames of a draw are the first of one shuffled order per class, so that larger draws contain the smaller ones, and the same
    for every backbone. A class with fewer training frames than shots gives all it has, and the row says so.
    """
    y, rows = torch.from_numpy(labelled.labels), []
    for shots in SHOTS:
        scores, used = [], []
        for d in range(DRAWS):
            split, rng = labelled.splits[d % len(labelled.splits)], np.random.default_rng((seed, d))
            orders = [rng.permutation(split.train[labelled.labels[split.train] == c]) for c in range(n_classes)]
            drawn = np.concatenate([order[:shots] for order in orders])
            p, pred = head(features, y, drawn, n_classes)(features, split.test)
            scores.append(metrics(y[split.test], pred, p))
            used.append([len(order[:shots]) for order in orders])
        fewest = np.min(used, axis=0)
        short = ", ".join(f"{c}: {n}" for c, n in zip(labelled.classes, fewest) if n < shots)
        rows.append({"table": "few-shot", "labelled per class": shots, "draws": DRAWS, "fewer at hand": short or "-"}
                    | mean_of(scores, keys) | {f"{k} sd": float(np.std([s[k] for s in scores])) for k in keys})
    return rows


def differences(outcomes, pairs, sets, metrics, keys, seed):
    """Checkpoint minus random initialisation for each head and test set: the same groups are drawn for both (paired bootstrap)."""
    rows = []
    for name, random in pairs:
        for head, words in dict.fromkeys((h, w) for b, h, w in outcomes if b == name):
            labelled = next(s for w, s, _ in sets if w == words)
            y, a, b = torch.from_numpy(labelled.labels), outcomes[name, head, words], outcomes[random, head, words]

            def difference(rows):
                x, z = (mean_of(per_split(metrics, y, o, rows), keys) for o in (a, b))
                return np.array([x[k] - z[k] for k in keys])
            tested = tested_frames(a)
            low, high = bootstrap_interval(lambda i: difference(tested[i]), np.asarray(labelled.groups)[tested], seed=seed)
            rows.append({"table": "difference", "backbone": name, "minus": random, "head": head, "tested on": words})
            for k, value, *ends in zip(keys, difference(tested), low, high):
                rows[-1] |= {k: float(value), f"{k} low": float(ends[0]), f"{k} high": float(ends[1])}
    return rows


def evaluate(args, labelled, other, heads, few_shot_head, metrics, keys, score):
    """Every row of the tables: results per backbone, head and test set, few-shot, differences. Features are computed once."""
    sets, n_classes, device = test_sets(labelled, other), len(labelled.classes), args.device
    y, results, shots, outcomes, pairs, arch_of = torch.from_numpy(labelled.labels), [], [], {}, [], {}

    def test(name, head, predicts, features):
        for (words, tested, tests), f in zip(sets, features):
            outcome = outcomes[name, head, words] = apply(predicts, f, tests, len(tested.paths), n_classes)
            matrix = sum(confusion(torch.from_numpy(tested.labels)[p >= 0], p[p >= 0], n_classes) for p in outcome[0])
            results.append({"table": "results", "backbone": name, "head": head, "tested on": words}
                           | summarise(metrics, tested, outcome, args.seed) | {"confusion": matrix.tolist()})

    test("majority class", "none", [majority_head(None, y, s.train, n_classes) for s in labelled.splits], [None] * len(sets))
    for name, model in backbones(args.checkpoints, device, args.seed):
        with one_sentence():  # an unreadable frame
            features = [{k: v.to(device) for k, v in frozen_features(model, s.paths, device, args.size).items()} for _, s, _ in sets]
        for head, (fit, grid) in heads.items():
            chosen = [best_on_validation(fit, grid, features[0], y, s, n_classes, score) for s in labelled.splits]
            test(name, head, [predict for predict, _ in chosen], features)
            for row in results[-len(sets):]:
                row |= {"chosen on validation": [setting for _, setting in chosen], "step": model.info["step"]}
        shots += [{"backbone": name, "step": model.info["step"]} | row
                  for row in few_shot(features[0], labelled, n_classes, few_shot_head, metrics, keys, args.seed)]
        arch_of[name] = architecture(model)
    pairs = [(c, f"random initialisation ({arch_of[c]})") for c in map(str, args.checkpoints)]
    return results + shots + differences(outcomes, pairs, sets, metrics, keys, args.seed)


def arguments(doc, task, size=224, otherwise=""):
    """The parser of the flags that all probes share; `otherwise` says what a --size of None means."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="backbone files: ours, released DINOv2 weights, DINOv2 training checkpoints")
    parser.add_argument("--data", help=f"data root for {task}; without it the synthetic set, made on first use")
    parser.add_argument("--generalise", help="a second root of the same layout: every head fitted on --data is tested on all of "
                        "it too (the synthetic set brings its own, another scope)")
    parser.add_argument("--size", type=int, default=size, help="side in pixels of the square that the backbone sees, a multiple of its "
                        "patch size; a backbone pre-trained on small crops may do better near their size" + otherwise)
    parser.add_argument("--splits", type=int, help="only the first so many splits (folds), for a quick look; None: all, which is what "
                        "published numbers are means over")
    parser.add_argument("--out", help="JSON file of the rows; without it beside the first checkpoint, or under runs/")
    parser.add_argument("--seed", type=int, default=0, help="of the random initialisation, the few-shot draws and the bootstrap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where features are computed")
    return parser


def open_sets(args, task):
    """The labelled set of --data and that of --generalise (None where there is none), of the same classes."""
    with one_sentence():
        root = pathlib.Path(args.data or synthetic.ensure())
        labelled = data.open_labelled(root, task)
        if args.splits is not None and args.splits < 1:
            raise ValueError(f"--splits {args.splits}: at least one split must be left")
        labelled = dataclasses.replace(labelled, splits=labelled.splits[:args.splits])
        other = args.generalise or (None if args.data else root / "scope2")
        other = data.open_labelled(other, task) if other else None
        if task != "polyps" and len(labelled.classes) < 2:
            raise ValueError(f"{root}: expected two or more classes for {task}, found {', '.join(labelled.classes)} alone")
        for k, split in enumerate(labelled.splits):
            counts = [len(split.train), len(split.val), len(split.test)]
            if not all(counts):
                raise ValueError(f"{labelled.name}: split {k} has {counts} training, validation and test frames; each must have some")
        if other and other.classes != labelled.classes:
            raise ValueError(f"--generalise: expected the classes {labelled.classes}, found {other.classes}")
    return labelled, other


def report(args, title, rows, labelled, other, metric, task):
    """Complete the rows with their provenance, print the tables and confusion matrices, write the JSON."""
    split = labelled.splits[0]
    about = {"data": labelled.name, "split": f"{len(labelled.splits)} (first: {len(split.train)} training, {len(split.val)} validation, "
             f"{len(split.test)} test frames)", "metric": metric, "frames": len(labelled.paths), "groups": len(set(labelled.groups)),
             "unrelated data": other and f"{other.name}: {len(other.paths)} frames, {len(set(other.groups))} groups",
             "pixels": args.size, "seed": args.seed, "paper value": "not available"}
    rows = [row | about for row in rows]
    print(f"\n## {title}\n\n" + "\n".join(f"* {k}: {v}" for k, v in about.items() if v is not None))
    for table, caption in (("results", "Results"), ("few-shot", "A few labelled frames per class"),
                           ("difference", "Checkpoint minus random initialisation, 95 % interval over groups")):
        chosen = [row for row in rows if row["table"] == table]
        if chosen:
            print(f"\n### {caption}\n\n{markdown_table(chosen, hidden={'table', 'step', 'draws', *about})}")
    for row in rows:
        if "confusion" in row and row["head"] != "none":
            print(f"\nConfusion, {row['backbone']}, {row['head']}, {row['tested on']} (rows true, columns predicted, summed over splits):\n")
            print(markdown_table([{"true": c} | dict(zip(labelled.classes, n)) for c, n in zip(labelled.classes, row["confusion"])]))
    first = pathlib.Path(args.checkpoints[0]) if args.checkpoints else pathlib.Path("runs/random.pt")
    path = args.out or first.with_suffix(f".{task}.json")
    write_rows(rows, path)
    print(f"\nrows: {path}")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Landmarks


def landmark_metrics(classes):
    def metrics(true, pred, prob):
        f1 = class_f1(true, pred, len(classes))
        return {"accuracy": accuracy(true, pred), "macro F1": macro_f1(true, pred, len(classes))} | {
            f"F1 {c}": f.item() for c, f in zip(classes, f1)}
    return metrics


def main(argv=None):
    args = arguments(__doc__, "anatomical landmarks (HyperKvasir, or one folder per class)").parse_args(argv)
    labelled, other = open_sets(args, "landmarks")
    few_shot_head = functools.partial(linear_head, **FEW_SHOT)
    rows = evaluate(args, labelled, other, HEADS, few_shot_head, landmark_metrics(labelled.classes), ["accuracy", "macro F1"], macro_f1)
    return report(args, "Anatomical landmarks", rows, labelled, other, "macro F1 over all classes, an absent class counting 0", "landmarks")


if __name__ == "__main__":
    main()
