"""Mayo endoscopic score from frozen features: four classes, remission, a few labelled frames, and the two figures.

    python probe_mes.py                                             synthetic frames, random initialisation
    python probe_mes.py A.pt B.pt --data data/LIMUC                 LIMUC: ten official folds, one fixed test set
    python probe_mes.py A.pt --data data/hyper-kvasir               HyperKvasir UC grades 1/2/3, a smaller stand-in
    python probe_mes.py --curve runs/demo                           Figure 1: total loss and kappa against the step
    python probe_mes.py --histogram --data data/LIMUC               Figure 2: frames per class
"""
import numpy as np
import torch

from probe_classify import accuracy, confusion, extract, fit_linear, knn_predict, macro_f1


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def quadratic_kappa(true, pred, n_classes=4):
    """Cohen's kappa with weights (i - j)^2: 1 - observed / expected disagreement. 0 where one class alone leaves it undefined,
    nan for an empty set.
    """
    if not len(true):
        return float("nan")
    c = confusion(true, pred, n_classes).double()
    grade = torch.arange(n_classes, dtype=torch.double)
    cost = (grade[:, None] - grade).square()                                                        # (C, C)
    expected = (cost * torch.outer(c.sum(1), c.sum(0))).sum() / c.sum()
    return (1 - (cost * c).sum() / expected).item() if expected > 0 else 0.0


def balance(y, n_classes, power=1.0):
    """(n_classes,) loss weights 1 / frequency^power: 1 lets every class count the same, 0 every frame. Absent classes weigh 0."""
    count = torch.bincount(y, minlength=n_classes).double()
    return torch.where(count > 0, count.clamp(min=1).pow(-power), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The score that pre-training watches


def online_score(model, labelled, device):
    """{"kappa", "macro_f1", "accuracy", "knn_kappa"} on the validation groups of split 0; its test frames are never read.

    A class-balanced linear head of fixed strength on the last block's class and mean patch token, and kNN on the class token:
    nothing is chosen, so that points of one run compare. The model's mode and the random state stay as they were.
    """
    split, n_classes = labelled.splits[0], len(labelled.classes)
    if not len(split.train) or not len(split.val):
        raise ValueError(f"{labelled.name}: the online probe needs training and validation frames in split 0, "
                         f"found {len(split.train)} and {len(split.val)}")
    rows = np.concatenate([split.train, split.val])
    features = extract(model, [labelled.paths[i] for i in rows], device)
    y, n = torch.from_numpy(labelled.labels[rows]), len(split.train)
    cls = features["cls"][:, -1]                                                                    # (n, D)
    x = torch.cat([cls, features["patch"]], 1)                                                      # (n, 2D)
    x = (x - x[:n].mean(0)) / x[:n].std(0, correction=0).clamp(min=1e-6)
    pred = fit_linear(x[:n], y[:n], n_classes, l2=0.1, weight=balance(y[:n], n_classes))(x[n:]).argmax(1)
    knn = knn_predict(cls[:n], y[:n], cls[n:], n_classes=n_classes)
    return {"kappa": quadratic_kappa(y[n:], pred, n_classes), "macro_f1": macro_f1(y[n:], pred, n_classes),
            "accuracy": accuracy(y[n:], pred), "knn_kappa": quadratic_kappa(y[n:], knn, n_classes)}
