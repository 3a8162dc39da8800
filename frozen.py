"""Frozen backbones: their features, kept on disk, and the heads fitted on them, in files.

    features = frozen_features(model, paths, "cpu", size=224)    # {"cls" (n, 4, D), "patch" (n, D)}
    head = load_head("teacher_800.mes.ordinal.pt", model)
    (probability, grade), = run_heads(model, [head], images)     # several heads, one backbone pass

B frames, L blocks, N patches, D width.
"""
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import shutil
import zlib

import numpy as np
import torch
from tqdm import tqdm

import data
import heads
import shards
import vit


# ---------------------------------------------------------------------------------------------
# Backbones


@contextlib.contextmanager
def one_sentence():
    """A bad checkpoint or data root ends a command with the sentence that names it, without a
    traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def backbones(args):
    """[(name, model)]: the checkpoints, then one random initialisation per architecture among
    them (vitt14 if there is none), drawn with --seed.

    All are read, on the CPU, before the first of them is computed with for an hour. In
    evaluation mode, gradients off. Names are the paths as given, and "random initialisation
    (ARCH)"."""
    found, shapes = [], {}
    for path in args.checkpoints:
        with one_sentence():
            model = vit.load_backbone(path)
        shapes[random_name(model)] = model.dim, model.depth, model.heads, model.ffn, model.registers
        found.append((path, model))
    for name, shape in (shapes or {"random initialisation (vitt14)": None}).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            model = vit.VisionTransformer(*shape) if shape else vit.build_vit("vitt14")
        model.info = {"path": None, "step": 0, "format": None, "metrics": {}}
        found.append((name, model))
    return [(name, model.eval().requires_grad_(False)) for name, model in found]


def random_name(model):
    """Of the random initialisation with which a backbone is compared; without a name in ARCHS
    its width, depth, heads and registers."""
    arch = model.arch or f"ViT {model.dim}/{model.depth}/{model.heads}/{model.registers}"
    return f"random initialisation ({arch})"


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
    """Rows that are dear to compute, one per frame, in a memory-mapped file: kept[i] is an
    array.

    compute(paths) yields the rows of these frames in batches (b, *shape). Every row has its
    checksum beside it. Checksum 0 means not computed yet, so a run that was killed goes on; a
    row that does not fit its checksum was damaged on the disk: it is computed again, and named,
    when it is first read. Opening a file is instant, however large it is."""

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
            raise ValueError(f"the features of {len(self.paths)} frames need {needed / 1e9:.1f} "
                             f"GB, {self.file.parent} has {free / 1e9:.1f} GB free: give --features "
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
        values = self.records["values"]
        if i not in self.checked and zlib.crc32(values[i]) != self.records["checksum"][i]:
            print(f"{self.file}: the features of {self.paths[i]} were damaged on the disk and are "
                  "computed again")
            self.write(i, next(iter(self.compute([self.paths[i]])))[0])
        self.checked.add(i)
        return values[i]


def kept_file(folder, model, paths, what):
    """Where what is kept of these frames: named by the weights, the kind of device that computes
    (no two round alike), the files and `what` is computed of them."""
    where = next(model.parameters()).device.type
    key = f"3 {what} {where} {fingerprint(paths)} {digest(model)}"
    return pathlib.Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def batches(paths, read, batch, device):
    """Batches of read(some paths), in order; a GPU is fed by workers."""
    many = torch.device(device).type == "cuda" and len(paths) > batch
    workers = min(8, os.cpu_count()) if many else 0
    # a generator of its own: a probe in the middle of a training run must not move that run's
    # random state
    loader = torch.utils.data.DataLoader(list(paths), batch, collate_fn=read, num_workers=workers,
                                         generator=torch.Generator())
    return tqdm(loader, desc="features", unit="batch", disable=None) if len(paths) > 1 else loader


def read_batch(paths, size, view="crop"):
    return torch.stack([data.eval_image(p, size, view) for p in paths])      # (b, 3, S, S)


def check_finite(model, features):
    if not features.isfinite().all():
        name = getattr(model, "info", {"path": "the backbone"})["path"]
        raise ValueError(f"{name}: its features are not finite: the weights have diverged")


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


def frozen_features(model, paths, device, size, view="crop", dtype=torch.float32,
                    folder="features"):
    """What extract gives, computed once and then read from disk."""
    compute = functools.partial(class_features, model, device=device, size=size, view=view,
                                dtype=dtype)
    file = kept_file(folder, model, paths, f"classes {size} {view} {dtype}")
    kept = Kept(file, paths, compute, (min(model.depth, 4) + 1, model.dim), "<f4")
    return named(torch.from_numpy(np.array(list(kept)).reshape(kept.shape)))


@torch.no_grad()
def block_tokens(model, images, blocks, norm, dtype=torch.float32):
    """(B, 3, S, S) -> (B, L, 1 + N, D) of these blocks, class token first, registers left
    out."""
    with vit.autocast(images.device, dtype):
        out = model.intermediate(images, blocks, norm=norm)
    return torch.stack([torch.cat([o["cls"][:, None], o["patches"]], dim=1) for o in out], dim=1)


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
        """tokens (B, L, 1 + N, D) of its blocks, class token first -> a classifier:
        probabilities (B, C) and labels (B,) on the CPU; a polyp head: float32 logits (B, h, w)
        of the square, which heads.resize brings to the frame's own size."""
        if self.task != "polyps":
            tokens = tokens.float()
            return self.network({"cls": tokens[:, :, 0], "patch": tokens[:, -1, 1:].mean(1)})
        side = math.isqrt(tokens.shape[2] - 1)
        return self.network(tokens.float(), (side, side)).float()


def head_path(args, checkpoint, task, head):
    """Where the head of a checkpoint is written: beside --out where that is given (there, of two
    checkpoints of one name, after the name of its folder), otherwise beside the checkpoint."""
    path = pathlib.Path(checkpoint)
    name = f"{path.stem}.{task}.{head.lower()}.pt"
    if not args.out:
        return path.with_name(name)
    same = [c for c in args.checkpoints if pathlib.Path(c).stem == path.stem]
    name = f"{path.resolve().parent.name}." * (len(same) > 1) + name
    return pathlib.Path(args.out).with_name(name)


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
        return heads.Neighbours(len(file["classes"]), setting["k"], setting["temp"], **state)
    if file["task"] != "polyps":
        return CLASSIFIERS[kind](setting["blocks"], setting["patch"], **state)
    width = len(state["project.bias"]) if kind == "dpt" else 0
    network = heads.new_polyp_head(kind, model.dim, model.depth, width)
    network.load_state_dict(state)
    return network


def run_heads(model, loaded, images, dtype=torch.float32):
    """What several heads of one view and size say of a batch of frames, in one backbone pass.

    images (B, 3, S, S) on the model's device, dtype as vit.precision gives it. Returns one
    answer per head, in their order; see Head."""
    tokens_of = shared_tokens(model, loaded, images, dtype)
    with torch.no_grad():
        return [head(tokens_of(head)) for head in loaded]


@torch.no_grad()
def shared_tokens(model, loaded, images, dtype=torch.float32):
    """One backbone pass for several heads: a function head -> the tokens (B, L, 1 + N, D) that
    it reads."""
    wanted = sorted({block for head in loaded for block in head.blocks})
    with vit.autocast(images.device, dtype):
        raw = model.intermediate(images, wanted, norm=False)
        tokens = {block: torch.cat([o["cls"][:, None], o["patches"]], 1)      # (B, 1 + N, D)
                  for block, o in zip(wanted, raw)}
        normed = {block: model.norm(tokens[block])
                  for block in {b for head in loaded if head.norm for b in head.blocks}}
    return lambda head: torch.stack([(normed if head.norm else tokens)[b] for b in head.blocks], 1)
