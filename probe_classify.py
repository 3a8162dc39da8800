"""Anatomical landmarks from frozen features: kNN and a linear head, and what a few labelled
frames per class buy.

    python probe_classify.py                                  synthetic frames, random weights
    python probe_classify.py runs/demo/best.pt                a checkpoint against random weights
    python probe_classify.py A.pt B.pt --data data/hyper-kvasir     six landmarks, official folds
    python probe_classify.py A.pt --data FOLDER               any tree with one folder per class

The backbone is never trained. Its features are computed once and kept under features/.
Everything that is chosen is chosen on a fold's validation frames; the head that won there,
fitted on the training frames alone, is the one that is tested, once.
"""
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from frozen import backbones
from heads import Neighbours, Softmax, classifier_input, knn_probabilities
from results import VIEW, Task, arguments, confusion, evaluate, open_sets, prepare, report

# ---------------------------------------------------------------------------------------------
# Metrics


def accuracy(true, pred):
    """Share of equal labels; nan for an empty set."""
    true, pred = torch.as_tensor(true), torch.as_tensor(pred)
    return (true == pred).double().mean().item()


def class_f1(true, pred, n_classes):
    """(n_classes,) F1 of each class; 0 for a class that is neither present nor predicted."""
    c = confusion(true, pred, n_classes).double()
    return 2 * c.diag() / (c.sum(0) + c.sum(1)).clamp(min=1)


def macro_f1(true, pred, n_classes):
    """Mean F1 over all n_classes (an absent class counts 0, as in scikit-learn with labels
    given); nan for an empty set."""
    return class_f1(true, pred, n_classes).mean().item() if len(true) else float("nan")


def landmark_metrics(classes):
    def metrics(true, pred, prob):
        f1 = class_f1(true, pred, len(classes))
        return {"accuracy": accuracy(true, pred), "macro F1": macro_f1(true, pred, len(classes)),
                **{f"F1 {c}": f.item() for c, f in zip(classes, f1)}}
    return metrics


# ---------------------------------------------------------------------------------------------
# Fitting a head on frozen features


def fit_linear(x, y, n_classes, l2, weight=None):
    """Multinomial logistic regression: argmin mean cross-entropy + l2/2 |W|^2, the bias not
    penalised (DINOv2's log-reg).

    x (n, D), y (n,) in 0..n_classes-1; weight (n_classes,) makes the mean a weighted one. L-BFGS
    in float64 from zero to its minimum (see whitening and minimise), with a warning if that is
    not reached. A class without frames gets probability 0, the limit of the minimum: weights 0
    and bias -inf. Returns an nn.Linear in x's precision. Features are taken as they are:
    standardise them first, so that one l2 means the same for every backbone."""
    if not len(x):
        raise ValueError("fit_linear needs at least one training frame")
    wide, (present, y) = x.double(), y.to(x.device).unique(return_inverse=True)
    weight = None if weight is None else weight.to(wide)[present]
    A = whitening(wide, l2)                                                  # (min(n, D), D)
    turned = wide @ A.T                                                      # (n, min(n, D))
    v = wide.new_zeros(len(present), len(A), requires_grad=True)
    b = wide.new_zeros(len(present), requires_grad=True)

    def objective():
        loss = F.cross_entropy(F.linear(turned, v, b), y, weight)
        return loss + l2 / 2 * (v @ A).square().sum()

    minimise(objective, [v, b])
    head = nn.utils.skip_init(nn.Linear, x.shape[1], n_classes, dtype=x.dtype, device=x.device)
    head.requires_grad_(False)  # skip_init: no random number is drawn
    head.weight.zero_()[present] = (v @ A).detach().to(x.dtype)
    head.bias.fill_(-torch.inf)[present] = b.detach().to(x.dtype)
    return head


def whitening(x, l2):
    """A (min(n, D), D): with w = v A, a logistic loss on x (n, D) plus l2/2 |w|^2 is about as
    curved in every direction of v. L-BFGS then needs tens of steps instead of thousands.

    Two ideas. (1) The loss depends on w through x w alone, and the penalty pulls all else to 0:
    the minimum lies in the span of the rows, so with fewer frames than dimensions we search
    there. (2) The curvature of the loss is at most C = x'x / 4n + l2, since p (1 - p) <= 1/4.
    With C = L L' (Cholesky), w = v inv(L) turns it into inv(L) C inv(L)' = 1. The minimum itself
    stays where it is; only the coordinates change.

    Example: x of two independent dimensions with variances 4 and 0.04, l2 = 0. C = diag(1, 0.01),
    a valley a hundred times as curved across as along, in which gradient steps zigzag. With
    A = inv(L) = diag(1, 10) the valley is round in v."""
    if len(x) < x.shape[1]:
        basis = torch.linalg.qr(x.T)[0]                                      # (D, n): (1)
        return whitening(x @ basis, l2) @ basis.T
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    curvature = x.T @ x / (4 * len(x)) + max(l2, 1e-6) * identity            # (D, D): (2)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(curvature), identity, upper=False)


def minimise(objective, params, tolerance=1e-7, max_iter=2000):
    """Bring a smooth objective() of float64 params to its minimum, in place: until no gradient
    entry exceeds the tolerance, or the objective, of order 1, has no digits left to change, or
    no parameter moves by more than 1e-9."""
    # torch's L-BFGS learns the curvature from a step only if its product with the change of the
    # gradient exceeds 1e-10. Near the minimum of a loss of order 1 steps are 1e-5 and changes 1e-6:
    # their product is 1e-11, and it would creep on with what it learnt long before. The loss times
    # 2^20, about a million, has its minimum where it was; a power of two changes no digit.
    scale = 2.0 ** 20
    solver = torch.optim.LBFGS(
        params, max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=scale * tolerance,
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
        n_iter = solver.state[params[0]]["n_iter"]
        warnings.warn(f"L-BFGS stopped with a gradient entry of {worst:.1e} after {n_iter} "
                      "iterations")


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
    tensors = dict(mean=mean, std=std, weight=fit.weight.data, bias=fit.bias.data)
    return Softmax(blocks, patch, **tensors)


def knn_head(features, y, rows, n_classes, k=20, temp=0.07):
    """As linear_head: votes of the k nearest training frames."""
    return Neighbours(n_classes, k, temp, bank=features["cls"][rows, -1], labels=y[rows])


def knn_predict(train_x, train_y, x, k=20, temp=0.07, n_classes=None):
    """Labels (n,) of knn_probabilities; the lowest class wins a tie."""
    return knn_probabilities(train_x, train_y, x, k, temp, n_classes).argmax(1)


FEW_SHOT = dict(blocks=1, patch=True, l2=0.1)  # fixed: few labels leave none to choose with
GRID = [dict(blocks=b, patch=p, l2=l2)
        for l2 in (10.0, 1.0, 1e-1, 1e-2, 1e-3) for b in (1, 4) for p in (False, True)]
NEIGHBOURS = [dict(k=20, temp=0.07)]           # DINO's, nothing to choose
HEADS = {"kNN": (knn_head, NEIGHBOURS), "linear": (linear_head, GRID)}


def main(argv=None):
    parser = arguments(__doc__, "anatomical landmarks (HyperKvasir, or one folder per class)")
    parser.add_argument("--view", choices=("crop", "stretch"), default="crop", help=VIEW)
    args = parser.parse_args(argv)
    prepare(args, "landmarks")
    labelled, sets = open_sets(args, "landmarks")
    task = Task("landmarks", HEADS, ("linear", linear_head, FEW_SHOT),
                landmark_metrics(labelled.classes), ["accuracy", "macro F1"], macro_f1)
    rows = evaluate(args, task, labelled, sets, backbones(args))
    metric = "macro F1 over all classes, an absent class counting 0"
    about = {"metric": metric, "pixels": args.size, "view": args.view}
    return report(args, "Anatomical landmarks", rows, labelled, sets, about)


if __name__ == "__main__":
    main()
