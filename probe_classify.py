"""Anatomical landmarks from frozen features: kNN and a linear head, and what a few labelled frames per class buy.

    python probe_classify.py                                        synthetic frames, random initialisation
    python probe_classify.py runs/demo/best.pt                      synthetic frames, a checkpoint against random initialisation
    python probe_classify.py A.pt B.pt --data data/hyper-kvasir     HyperKvasir's six landmarks, official folds
    python probe_classify.py A.pt --data FOLDER                     any tree with one folder per class

The backbone is never trained. Its features are computed once and kept under features/. Everything that is chosen is chosen
on a fold's validation frames; the head that won there, fitted on the training frames alone, is the one that is tested, once.
"""
import contextlib
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
    (such draws are left out). Returns (low, high); (nan, nan) when there is a single group: nothing is known then.
    """
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(group_of == g) for g in range(group_of.max(initial=-1) + 1)]
    if len(members) < 2:
        return float("nan"), float("nan")
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
    until no gradient entry exceeds 1e-7; a warning says so if that is not reached. Returns an nn.Linear in x's precision.
    Features are taken as they are: standardise them first, so that one l2 means the same for every backbone.
    """
    if not len(x):
        raise ValueError("fit_linear needs at least one training frame")
    wide, y = x.double(), y.to(x.device)
    weight = None if weight is None else weight.to(wide)
    w = wide.new_zeros(n_classes, x.shape[1], requires_grad=True)
    b = wide.new_zeros(n_classes, requires_grad=True)
    minimise(lambda: F.cross_entropy(F.linear(wide, w, b), y, weight) + l2 / 2 * w.square().sum(), [w, b])
    head = nn.utils.skip_init(nn.Linear, x.shape[1], n_classes, dtype=x.dtype, device=x.device)  # draws no random number
    head.weight.data.copy_(w.detach())
    head.bias.data.copy_(b.detach())
    return head.requires_grad_(False)


def minimise(objective, params, tolerance=1e-7, max_iter=2000):
    """Bring a smooth objective() of float64 params to its minimum, in place."""
    solver = torch.optim.LBFGS(params, max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=tolerance,
                               tolerance_change=0, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
        closure()
    worst = max(p.grad.abs().max().item() for p in params)
    if worst > 100 * tolerance:
        warnings.warn(f"L-BFGS stopped with a gradient entry of {worst:.1e} after {max_iter} iterations")


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
        votes[i:i + rows].scatter_add_(1, train_y[nearest], (similarity / temp).softmax(1))
    return votes


def knn_predict(train_x, train_y, x, k=20, temp=0.07, n_classes=None):
    """Labels (n,) of knn_probabilities; the lowest class wins a tie."""
    return knn_probabilities(train_x, train_y, x, k, temp, n_classes).argmax(1)


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

    The models are in evaluation mode with gradients off. The random ones are drawn with `seed`, at the size of the position embedding
    of the checkpoint that they stand beside.
    """
    shapes = {}
    for path in checkpoints:
        with one_sentence():
            model = vit.load_backbone(path, device)
        shapes[model.info["arch"]] = model.pos_embed.shape[1] - 1
        yield str(path), model.eval().requires_grad_(False)
    for arch, patches in (shapes or {"vitt14": 256}).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = vit.build_vit(arch, image_size=14 * round(patches**0.5))
        model.info = {"path": None, "arch": arch, "step": 0, "format": None, "metrics": None}
        yield f"random initialisation ({arch})", model.to(device).eval().requires_grad_(False)


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
    return {"cls": torch.cat(cls), "patch": torch.cat(patch)}


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
    """The same rows as JSON (nan as null, for every reader), written to a temporary name and renamed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in rows]
    temporary = path.with_name(path.name + f".{os.getpid()}")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)
