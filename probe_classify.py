"""Anatomical landmarks from frozen features: kNN and a linear head, and what a few labelled frames per class buy.

    python probe_classify.py                                        synthetic frames, random initialisation
    python probe_classify.py runs/demo/best.pt                      synthetic frames, a checkpoint against random initialisation
    python probe_classify.py A.pt B.pt --data data/hyper-kvasir     HyperKvasir's six landmarks, official folds
    python probe_classify.py A.pt --data FOLDER                     any tree with one folder per class

The backbone is never trained. Its features are computed once and kept under features/. Everything that is chosen is chosen
on a fold's validation frames; the head that won there, fitted on the training frames alone, is the one that is tested, once.
"""
import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from frozen import (apply, architecture, arguments, backbones, best_on_validation, bootstrap_interval, frozen_features,
                    head_path, mean_of, one_sentence, open_sets, per_split, precision_of, report, summarise, save_head, test_sets,
                    tested_frames)
from heads import Neighbours, Softmax, classifier_input, knn_probabilities


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


def knn_predict(train_x, train_y, x, k=20, temp=0.07, n_classes=None):
    """Labels (n,) of knn_probabilities; the lowest class wins a tie."""
    return knn_probabilities(train_x, train_y, x, k, temp, n_classes).argmax(1)


def mean_std(x):
    """Of every dimension of x (n, d); 1 for the deviation of a constant one."""
    std = x.std(0, correction=0)
    return x.mean(0), torch.where(std > 0, std, 1.0)


def linear_head(features, y, rows, n_classes, blocks, patch, l2, weight=None):
    """The Softmax head fitted on the frames `rows`: head(features, rows) -> class probabilities
    (n, C), labels (n,), on the CPU."""
    x = classifier_input(features, rows, blocks, patch)                      # (n, d)
    mean, std = mean_std(x)
    fit = fit_linear((x - mean) / std, y[rows], n_classes, l2, weight)
    return Softmax(blocks, patch, mean=mean, std=std, weight=fit.weight.data, bias=fit.bias.data)


def knn_head(features, y, rows, n_classes):
    """As linear_head: votes of the 20 nearest training frames."""
    return Neighbours(n_classes, features["cls"][rows, -1], y[rows])


def majority_head(features, y, rows, n_classes):
    """The trivial baseline: every frame gets the training frames' most frequent class."""
    p = torch.bincount(y[rows], minlength=n_classes) / len(rows)
    return lambda features, rows: (p.expand(len(rows), -1), p.argmax().expand(len(rows)))


# ---------------------------------------------------------------------------------------------------------------------
# From features to the results table (probe_mes.py runs the same with its own heads and metrics)

SHOTS = (1, 5, 10, 25, 50)      # labelled frames per class
DRAWS = 10                      # of them; draw d takes its frames from split d (modulo the number of splits)
FEW_SHOT = dict(blocks=1, patch=True, l2=0.1)  # fixed: with a few labels there are none to choose with
GRID = [dict(blocks=b, patch=p, l2=l2) for l2 in (10.0, 1.0, 1e-1, 1e-2, 1e-3) for b in (1, 4) for p in (False, True)]
HEADS = {"kNN": (knn_head, [{}]), "linear": (linear_head, GRID)}


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


def evaluate(args, task, labelled, other, heads, few_shot_head, metrics, keys, score):
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
            features = [frozen_features(model, s.paths, device, args.size, dtype=precision_of(args), folder=args.features)
                        for _, s, _ in sets]
        for head, (fit, grid) in heads.items():
            chosen = [best_on_validation(fit, grid, features[0], y, s, n_classes, score) for s in labelled.splits]
            test(name, head, [predict for predict, *_ in chosen], features)
            for row in results[-len(sets):]:
                row |= {"chosen on validation": [setting for _, setting, _ in chosen], "step": model.info["step"]}
            if name in map(str, args.checkpoints):
                first, setting, value = chosen[0]
                tested = per_split(metrics, y, outcomes[name, head, "same data"])[0]
                save_head(head_path(args, name, task, head), model, first, task=task, head=head.lower(), classes=labelled.classes,
                          size=args.size, view="crop", setting=setting, metrics={"validation": {keys[0]: value}, "test": tested})
        shots += [{"backbone": name, "step": model.info["step"]} | row
                  for row in few_shot(features[0], labelled, n_classes, few_shot_head, metrics, keys, args.seed)]
        arch_of[name] = architecture(model)
    pairs = [(c, f"random initialisation ({arch_of[c]})") for c in map(str, args.checkpoints)]
    return results + shots + differences(outcomes, pairs, sets, metrics, keys, args.seed)


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
    rows = evaluate(args, "landmarks", labelled, other, HEADS, few_shot_head, landmark_metrics(labelled.classes), ["accuracy", "macro F1"], macro_f1)
    return report(args, "Anatomical landmarks", rows, labelled, other, "macro F1 over all classes, an absent class counting 0", "landmarks")


if __name__ == "__main__":
    main()
