"""What the probes share: frozen features and their cache, intervals, tables, the flags and the sets that they open.

    for name, model in backbones(["teacher_800.pt"], "cpu"):    # the checkpoint, then random weights
        features = frozen_features(model, paths, "cpu", 224)    # {"cls" (n, 4, D), "patch" (n, D)}
    low, high = bootstrap_interval(lambda i: values[i].mean(), groups)
    print(markdown_table(rows))
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import warnings
import zlib

import numpy as np
import torch
from tqdm import tqdm

import data
import heads
import shards
import synthetic
import vit


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


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


# ---------------------------------------------------------------------------------------------
# Backbones


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
    shapes = {}
    absent = [str(path) for path in checkpoints if not os.path.isfile(path) and path not in vit.RELEASED]
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


# ---------------------------------------------------------------------------------------------
# Frozen features, kept on disk


def digest(tensors):
    """sha256 of a module's, or a dict's, tensors: names, shapes, types and values, wherever they
    lie. It is how kept features and a head know their backbone."""
    if isinstance(tensors, torch.nn.Module):
        n_heads = torch.tensor(getattr(tensors, "heads", 0))  # no tensor's shape tells it
        tensors = tensors.state_dict() | {"heads": n_heads}
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint(paths):
    """sha256 of the files' paths, sizes and times of last change: whether they are the same."""
    return hashlib.sha256(repr([(str(p), *shards.stamp(p)) for p in paths]).encode()).hexdigest()


class Kept:
    """Rows that are dear to compute, one per frame, in a memory-mapped file: kept[i] is an array.

    compute(paths) yields the rows of these frames in batches (b, *shape). Every row has its
    checksum beside it. Checksum 0 means not computed yet, so a run that was killed goes on; a row
    that does not fit its checksum was damaged on the disk: it is computed again, and named, when
    it is first read. Opening a file is instant, however large it is."""

    def __init__(self, file, paths, compute, shape, dtype):
        self.file, self.paths, self.compute = pathlib.Path(file), list(paths), compute
        self.shape, self.checked = (len(self.paths), *shape), set()
        self.records = self.open(np.dtype([("checksum", "<u4"), ("values", dtype, tuple(shape))]))
        missing = np.flatnonzero(self.records["checksum"] == 0)
        done = 0
        for batch in compute([self.paths[i] for i in missing]):
            for row in batch:
                self.write(missing[done], row)
                done += 1

    def open(self, kind):
        """The file's records, writable where the file is; a new file if it is not there or is
        not whole."""
        if not self.paths:
            return np.empty(0, kind)
        if self.file.exists():
            try:
                mode = "r+" if os.access(self.file, os.W_OK) else "c"
                records = np.load(self.file, mmap_mode=mode)
                if records.dtype == kind and records.shape == (len(self.paths),):
                    return records
                problem = f"{records.shape} records of {records.dtype}"
            except (ValueError, EOFError) as error:
                problem = str(error).splitlines()[0]
            print(f"{self.file} is damaged ({problem}) and is computed again")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        needed, free = kind.itemsize * len(self.paths), shutil.disk_usage(self.file.parent).free
        if needed > free:
            raise ValueError(f"the features of {len(self.paths)} frames need {needed / 1e9:.1f} GB, "
                             f"{self.file.parent} has {free / 1e9:.1f} GB free: give --features "
                             "another folder, or take fewer heads or a smaller --size")
        return np.lib.format.open_memmap(self.file, "w+", kind, (len(self.paths),))

    def write(self, i, row):
        self.records["values"][i] = row
        self.records["checksum"][i] = zlib.crc32(self.records["values"][i])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if not 0 <= i < len(self.paths):
            raise IndexError(i)
        if i not in self.checked and zlib.crc32(self.records["values"][i]) != self.records["checksum"][i]:
            print(f"{self.file}: the features of {self.paths[i]} were damaged and are computed again")
            self.write(i, next(iter(self.compute([self.paths[i]])))[0])
        self.checked.add(i)
        return self.records["values"][i]


def kept_file(folder, model, paths, what):
    """Where what is kept of these frames: named by the weights, the kind of device that computes
    (no two round alike), the files and `what` is computed of them."""
    where = next(model.parameters()).device.type
    key = f"3 {what} {where} {fingerprint(paths)} {digest(model)}"
    return pathlib.Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def batches(paths, read, batch, device):
    """Batches of read(some paths), in order; a GPU is fed by workers."""
    workers = min(8, os.cpu_count()) if torch.device(device).type == "cuda" and len(paths) > batch else 0
    # a generator of its own: a probe in the middle of a training run must not move that run's
    # random state
    loader = torch.utils.data.DataLoader(list(paths), batch, collate_fn=read, num_workers=workers,
                                         generator=torch.Generator())
    return tqdm(loader, desc="features", unit="batch", disable=None) if len(paths) > 1 else loader


def read_batch(paths, size, view="crop"):
    return torch.stack([data.eval_image(p, size, view) for p in paths])      # (b, 3, S, S)


def check_finite(model, features):
    if not features.isfinite().all():
        raise ValueError(f"{model.info['path'] if hasattr(model, 'info') else 'the backbone'}: its "
                         "features are not finite: the weights have diverged")


@torch.no_grad()
def class_features(model, paths, device, size, view="crop", dtype=torch.float32, batch=64):
    """Yield (b, L + 1, D) float32: class tokens of the last four blocks, each through the final
    norm, and the mean patch token of the last. The model's mode stays as it was."""
    training, layers = model.training, range(max(model.depth - 4, 0), model.depth)
    read = functools.partial(read_batch, size=size, view=view)
    for images in batches(paths, read, batch, device):
        model.eval()
        with vit.autocast(device, dtype):
            blocks = model.intermediate(images.to(device), layers)
        model.train(training)
        tokens = [b["cls"].float() for b in blocks] + [blocks[-1]["patches"].float().mean(1)]
        features = torch.stack(tokens, 1).cpu()                              # (b, L + 1, D)
        check_finite(model, features)
        yield features


def named(rows):
    """(n, L + 1, D) -> the two that the heads read."""
    return {"cls": rows[:, :-1], "patch": rows[:, -1]}                       # (n, L, D), (n, D)


def extract(model, paths, device, image_size=224, batch=64, view="crop", dtype=torch.float32):
    """{"cls" (n, L, D), "patch" (n, D)} of frames, float32 on the CPU: see class_features.

    dtype: what the matrix products are computed in. The random state stays as it was."""
    empty = torch.empty(0, min(model.depth, 4) + 1, model.dim)
    found = class_features(model, paths, device, image_size, view, dtype, batch)
    return named(torch.cat([empty, *found]))


def frozen_features(model, paths, device, size, view="crop", dtype=torch.float32, folder="features"):
    """What extract gives, computed once and then read from disk."""
    compute = functools.partial(class_features, model, device=device, size=size, view=view, dtype=dtype)
    file = kept_file(folder, model, paths, f"classes {size} {view} {dtype}")
    kept = Kept(file, paths, compute, (min(model.depth, 4) + 1, model.dim), "<f4")
    return named(torch.from_numpy(np.array(list(kept)).reshape(kept.shape)))


@torch.no_grad()
def block_tokens(model, images, blocks, norm, dtype=torch.float32):
    """(B, 3, S, S) -> (B, L, 1 + N, D) of these blocks, class token first, registers left out."""
    with vit.autocast(images.device, dtype):
        out = model.intermediate(images, blocks, norm=norm)
    return torch.stack([torch.cat([o["cls"][:, None], o["patches"]], dim=1) for o in out], dim=1)


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
# The flags and the sets that every probe opens


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
    parser.add_argument("--precision", choices=("auto", *vit.PRECISIONS), default="auto", help="type of the backbone's matrix products; "
                        "auto: bf16 where the device multiplies it in hardware, else fp16 on GPUs and fp32 on CPUs")
    parser.add_argument("--features", default="features", help="folder where frozen features are kept; a large file per backbone and "
                        "segmentation head")
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
        if not labelled.splits:
            raise ValueError(f"{root}: {len(labelled.paths)} frames are too few to split ({data.ENOUGH} are enough); "
                             "as --generalise all of them can be tested on")
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


def precision_of(args):
    """The torch type in which the backbone's matrix products are computed."""
    return vit.precision(args.device, args.precision)


def precision_words(args):
    """For a table's head: "bf16 features (auto)"."""
    name = {dtype: name for name, dtype in vit.PRECISIONS.items()}[precision_of(args)]
    return f"{name} features" + " (auto)" * (args.precision == "auto")


def report(args, title, rows, labelled, other, metric, task):
    """Complete the rows with their provenance, print the tables and confusion matrices, write the JSON."""
    split = labelled.splits[0]
    about = {"data": labelled.name, "split": f"{len(labelled.splits)} (first: {len(split.train)} training, {len(split.val)} validation, "
             f"{len(split.test)} test frames)", "metric": metric, "frames": len(labelled.paths), "groups": len(set(labelled.groups)),
             "unrelated data": other and f"{other.name}: {len(other.paths)} frames, {len(set(other.groups))} groups",
             "pixels": args.size, "precision": precision_words(args), "seed": args.seed, "paper value": "not available"}
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
# What the heads of every split say of their test frames


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


# ---------------------------------------------------------------------------------------------------------------------
# Choice


def best_on_validation(fit, grid, features, y, split, n_classes, score):
    """(predict, setting, its score): the setting of the grid whose head, fitted on split.train, has the highest score(true, pred, n_classes)
    on split.val. The first wins a tie, so a grid goes from the simplest head to the least simple.
    """
    best = None
    for setting in grid:
        predict = fit(features, y, split.train, n_classes, **setting)
        value = score(y[split.val], predict(features, split.val)[1], n_classes)
        if best is None or value > best[0]:
            best = value, predict, setting
    return best[1:] + best[:1]


# ---------------------------------------------------------------------------------------------
# Heads on disk: <checkpoint without suffix>.<task>.<head>.pt, plain tensors and plain values.
# It is predict.py that uses them, several on one pass of their backbone.

HEAD_FORMAT = "endodino-head-1"
CLASSIFIERS = {"knn": heads.Neighbours, "linear": heads.Softmax, "softmax": heads.Softmax,
               "ordinal": heads.Ordinal}


@dataclasses.dataclass
class Head:
    """A head read from its file, ready to run on the backbone that it was fitted on.

    task "landmarks", "mes" or "polyps"; name "knn", "linear", "softmax", "ordinal", "boosted" or
    "dpt"; size: pixels of the square that the backbone sees, view: how a frame becomes that
    square ("crop" or "stretch"); blocks: numbers of the blocks it reads, norm: whether through
    the final norm; setting: what was chosen or fixed; metrics: {"validation", "test"}."""
    task: str
    name: str
    classes: tuple
    size: int
    view: str
    blocks: tuple
    norm: bool
    setting: dict
    metrics: dict
    network: torch.nn.Module

    def __call__(self, tokens):
        """tokens (B, L, 1 + N, D) of its blocks, class token first -> a classifier: probabilities
        (B, C) and labels (B,) on the CPU; a polyp head: float32 logits (B, h, w) of the square,
        which heads.resize brings to the frame's own size."""
        if self.task != "polyps":
            tokens = tokens.float()
            return self.network({"cls": tokens[:, :, 0], "patch": tokens[:, -1, 1:].mean(1)})
        side = math.isqrt(tokens.shape[2] - 1)
        return self.network(tokens.float(), (side, side)).float()


def head_path(args, checkpoint, task, head):
    """Where the head of a checkpoint is written: beside --out where that is given, otherwise beside the checkpoint. Of two
    checkpoints of one name the folder's name stands before it."""
    path = pathlib.Path(checkpoint)
    same = [c for c in args.checkpoints if pathlib.Path(c).stem == path.stem]
    stem = f"{path.resolve().parent.name}.{path.stem}" if args.out and len(same) > 1 else path.stem
    return (pathlib.Path(args.out).parent if args.out else path.parent) / f"{stem}.{task}.{head.lower()}.pt"


def save_head(path, model, network, *, task, head, classes, size, view, setting, metrics):
    """Write the head `network` of `model` (see Head); setting and metrics hold plain values."""
    last = getattr(network, "blocks", 1)
    state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    vit.atomic_save({
        "format": HEAD_FORMAT, "task": task, "head": head, "classes": list(classes), "size": size,
        "view": view, "blocks": list(heads.blocks_of(head, model.depth, last)[0]),
        "setting": setting, "metrics": metrics, "state": state, "state digest": digest(state),
        "backbone": digest(model)}, path)


def load_head(path, model):
    """The Head in a file, on the device of `model`, whose head it must be.

    Raises FileNotFoundError, or ValueError with one sentence: no head file, a damaged one, or
    one that was fitted on another backbone."""
    file = vit.read_checkpoint(path)
    if not isinstance(file, dict) or file.get("format") != HEAD_FORMAT:
        raise ValueError(f"{path} is no head: give a file <checkpoint>.<task>.<head>.pt, which the "
                         "probes write beside their rows")
    wanted = ("task", "head", "classes", "size", "view", "setting", "metrics", "blocks", "state")
    missing = [name for name in (*wanted, "state digest", "backbone") if name not in file]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    if file["backbone"] != digest(model):
        raise ValueError(f"{path} was fitted on another backbone than {model.info['path']}: give "
                         "the checkpoint that the probe was run with")
    if file["state digest"] != digest(file["state"]):
        raise ValueError(f"{path} is damaged: its tensors are not those that were written; run the "
                         "probe again")
    network = head_network(file, model).to(next(model.parameters()).device)
    norm = heads.blocks_of(file["head"], model.depth)[1]
    return Head(file["task"], file["head"], tuple(file["classes"]), file["size"], file["view"],
                tuple(file["blocks"]), norm, file["setting"], file["metrics"],
                network.eval().requires_grad_(False))


def head_network(file, model):
    """The network of a head file, with its tensors."""
    state, setting, kind = file["state"], file["setting"], file["head"]
    if kind == "knn":
        return heads.Neighbours(len(file["classes"]), **state)
    if file["task"] != "polyps":
        return CLASSIFIERS[kind](setting["blocks"], setting["patch"], **state)
    width = len(state["project.bias"]) if kind == "dpt" else 0
    network = heads.new_polyp_head(kind, model.dim, model.depth, width)
    network.load_state_dict(state)
    return network


def run_heads(model, loaded, images, dtype=torch.float32):
    """What several heads of one view and size say of a batch of frames, in one backbone pass.

    images (B, 3, S, S) on the model's device, dtype as vit.precision gives it. Returns one answer
    per head, in their order; see Head."""
    tokens_of = shared_tokens(model, loaded, images, dtype)
    with torch.no_grad():
        return [head(tokens_of(head)) for head in loaded]


@torch.no_grad()
def shared_tokens(model, loaded, images, dtype=torch.float32):
    """One backbone pass for several heads: a function head -> the tokens (B, L, 1 + N, D) that it reads."""
    wanted = sorted({block for head in loaded for block in head.blocks})
    with vit.autocast(images.device, dtype):
        raw = model.intermediate(images, wanted, norm=False)
        tokens = {block: torch.cat([o["cls"][:, None], o["patches"]], 1)      # (B, 1 + N, D)
                  for block, o in zip(wanted, raw)}
        normed = {block: model.norm(tokens[block])
                  for block in {b for head in loaded if head.norm for b in head.blocks}}
    return lambda head: torch.stack([(normed if head.norm else tokens)[b] for b in head.blocks], 1)