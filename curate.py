"""Curation: from the raw frames of endoscopy videos to a pre-training set that is balanced over what the frames show.

    python curate.py                                               synthetic videos, made on first use
    python curate.py --data FRAMES --target 100000 --checkpoint dinov2_vitb14_pretrain.pth --exclude data/Kvasir-SEG/val.txt
    torchrun --nproc-per-node 4 curate.py --data FRAMES ...        both passes over the images, split over the processes
    python pretrain.py --data curated/manifest.csv                 what it is for

Bad frames go first, then near-duplicates within a video and of a benchmark's test frames. What is left is clustered by
hierarchical k-means and sampled in equal shares from the top of the hierarchy down (Vo et al. 2024, arXiv 2405.15613):
k-means follows density, k-means of its centres less so, and a rare finding gets the share of a common one.

--out gets manifest.csv (path, video, cluster from the top down, scores), report.json and sheet.png (look at it). Every stage
leaves its result in --out/work under a key of its inputs, so a killed run goes on when the same command is given again.
"""
import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import os
import pathlib
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import data
import figures
import synthetic
import vit

# score: (allowed range, what lies outside it). In this order: a frame is counted under the first that it fails.
QUALITY = {
    "dark": ((0, 0.75), "black: share of the frame with less than a tenth of full brightness"),
    "glare": ((0, 0.25), "over-exposed: share of the field of view above nine tenths of full brightness"),
    "tissue": ((0.4, 1), "not endoscopy: share of the field of view that is redder than grey (0 to keep narrow-band and dyed frames)"),
    "relief": ((0.06, 9), "blank, or lit by no endoscope: deviation over mean of the light on a coarse grid"),
    "field": ((0.2, 1), "instrument, text or border nearly everywhere: share of the frame that shows tissue"),
    "sharp": ((0.05, 9), "blurred: root mean square of the Laplacian in the field of view over that of the brightness"),
}
REASONS = ("unreadable", *QUALITY, "near-duplicate", "excluded")  # codes 1, 2, ... ; 0 is kept
SIDE = 128      # px of the thumbnails that scores and descriptor are computed on
BATCH = 256     # frames between two marks of progress of a pass over the images
CHUNK = 2 ** 26  # numbers of the largest intermediate on the device
SAMPLE = 2 ** 16  # frames that the moments and the first centres are taken from, however many there are


# ---------------------------------------------------------------------------------------------------------------------
# Results on disk

def key_of(*inputs):
    """A short hash of anything that json can write."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:20]


def stage(work, name, inputs, compute):
    """compute() -> dict of arrays, or what an earlier run left in the folder `work` for the same inputs."""
    path = work / f"{name}-{key_of(*inputs)}.npz"
    if not path.exists():
        arrays = compute()
        with vit.replacing(path) as temporary:
            np.savez(temporary, **arrays)
    with np.load(path) as file:
        return dict(file)


def fingerprint(frames, bar):
    """A hash of every frame's path, size and time of last change."""
    digest = hashlib.sha256()
    for i in tqdm(range(len(frames)), desc="frames on disk", disable=not bar):
        path = str(frames.path(i))
        with contextlib.suppress(OSError):  # the pass over the images counts it
            found = os.stat(path)
            path = f"{path} {found.st_size} {found.st_mtime_ns}"
        digest.update(path.encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Passes over the images

class Pictures(torch.utils.data.Dataset):
    """Batch b of the frames numbered `rows`: read(path) of each, stacked, and which of them could be read (the others are 0)."""

    def __init__(self, frames, rows, read):
        self.frames, self.rows, self.read = frames, rows, read

    def __getitem__(self, b):
        pictures = []
        for i in self.rows[b * BATCH:(b + 1) * BATCH]:
            try:
                pictures.append(self.read(self.frames.path(i)))
            except data.BadImage:
                pictures.append(None)
        readable = torch.tensor([p is not None for p in pictures])
        some = next((p for p in pictures if p is not None), torch.zeros(1))
        return torch.stack([torch.zeros_like(some) if p is None else p for p in pictures]), readable


def thumbnail(path):
    """(3, SIDE, SIDE) uint8: the whole frame, squeezed to a square, from the smallest decoding that has the pixels."""
    return pil_to_tensor(data.read_image(path, (SIDE, SIDE)).resize((SIDE, SIDE), Image.BILINEAR))


def over_images(path, frames, rows, read, width, dtype, describe, args, desc):
    """The memory-mapped file (len(rows), width) at `path` of describe(pictures (b, ...)) -> (b, width); unreadable rows are nan.

    A second file marks the batches that are on disk: a killed pass loses one batch per process, and any number of processes can
    go on with it. With a process group each takes its share of the batches and waits for the others.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    n_batches, marks = -(-len(rows) // BATCH), path.with_suffix(".done.npy")
    if rank == 0 and not marks.exists():
        for file, shape, kind in ((path, (len(rows), width), dtype), (marks, (n_batches,), np.bool_)):  # marks last: both are there
            with vit.replacing(file) as temporary:
                np.lib.format.open_memmap(temporary, "w+", kind, shape).flush()
    if world > 1:
        dist.barrier()
    out, done = np.load(path, mmap_mode="r+"), np.load(marks, mmap_mode="r+")
    todo = [b for b in range(rank, n_batches, world) if not done[b]]
    loader = torch.utils.data.DataLoader(Pictures(frames, rows, read), batch_size=None, sampler=todo, num_workers=args.workers,
                                         generator=torch.Generator())
    with tqdm(total=len(todo) * BATCH, unit="frame", desc=desc, disable=rank > 0 or not todo) as bar:
        for b, (pictures, readable) in zip(todo, loader):
            if readable.any():
                values = describe(pictures.to(args.device)).float().cpu()
                values[~readable] = torch.nan
            else:
                values = torch.full((len(readable), width), torch.nan)
            out[b * BATCH:(b + 1) * BATCH] = values.numpy()
            out.flush()
            done[b] = True  # only after its rows are on disk
            done.flush()
            bar.update(BATCH)
    if world > 1:
        dist.barrier()
    return np.load(path, mmap_mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: quality

def luma(x):
    """(b, 3, H, W) -> (b, 1, H, W)."""
    return (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)).sum(1, keepdim=True)


def quality(images):
    """Scores in the order of QUALITY: (b, 3, H, W) uint8 -> (b, 6) float32. H and W should be SIDE, which the thresholds are made for.

    The field of view is what is not black, less a rim of two pixels, so that neither its border nor thin text looks sharp.
    """
    x = images.float() / 255
    y = luma(x)                                                                          # (b, 1, H, W)
    field = (F.avg_pool2d((y > 0.06).float(), 5, 1, 2) > 0.999).float()                  # the frame's own border is outside
    red = field * ((x[:, :1] > 1.1 * x[:, 1:2]) & (x[:, :1] > 1.1 * x[:, 2:]))

    def inside(value):
        return (value * field).sum((1, 2, 3)) / field.sum((1, 2, 3)).clamp(min=1)        # (b,)

    weight = F.avg_pool2d(field, 16)                                                     # (b, 1, H/16, W/16)
    light = F.avg_pool2d(y * field, 16) / weight.clamp(min=1e-6)
    mean = (weight * light).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1e-6)
    spread = (weight * (light - mean.view(-1, 1, 1, 1)) ** 2).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1e-6)
    kernel = torch.tensor([[0., 1, 0], [1, -4, 1], [0, 1, 0]], device=x.device)
    edges = F.conv2d(y, kernel[None, None], padding=1)
    return torch.stack([(y < 0.1).float().mean((1, 2, 3)), inside((y > 0.9).float()), inside(red), spread.sqrt() / mean.clamp(min=1e-3),
                        red.mean((1, 2, 3)), (inside(edges ** 2) / inside(y ** 2).clamp(min=1e-4)).sqrt()], 1)


def judge(scores, limits):
    """(n,) int8 code into REASONS plus 1 of the first fault of each frame, 0 where there is none. scores (n, 6), nan = unreadable."""
    code = np.zeros(len(scores), np.int8)
    for column, name in reversed(list(enumerate(QUALITY))):
        low, high = limits[name]
        code[(scores[:, column] < low) | (scores[:, column] > high)] = 1 + REASONS.index(name)
    code[np.isnan(scores[:, 0])] = 1 + REASONS.index("unreadable")
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: embeddings

def descriptor(images, rings=8, angles=16):
    """(b, 3, SIDE, SIDE) uint8 -> (b, 432): log colour, and edges that brighten outward, inward and around, on rings about the centre.

    Needs no training. An endoscope rolls about its axis, which shifts these maps along the angle; the magnitudes of the Fourier
    coefficients along it, which are what is returned, do not see a shift. Our own, for first runs: a trained backbone sees more.
    """
    x = images.float() / 255
    y = luma(x)
    c = torch.linspace(-1, 1, SIDE - 2, device=x.device)
    down, right = c[:, None], c[None]
    radius = torch.hypot(down, right).clamp(min=1e-3)
    dx, dy = y[..., 1:-1, 2:] - y[..., 1:-1, :-2], y[..., 2:, 1:-1] - y[..., :-2, 1:-1]      # (b, 1, SIDE-2, SIDE-2)
    outward, around = (dx * right + dy * down) / radius, (dy * right - dx * down) / radius
    edges = torch.cat([outward.clamp(min=0), (-outward).clamp(min=0), around.abs()], 1) / (y.mean((1, 2, 3), keepdim=True) + 0.05)
    turn = torch.arange(angles, device=x.device) * (2 * torch.pi / angles)
    reach = (torch.arange(rings, device=x.device)[:, None] + 0.5) / rings * 0.95
    places = torch.stack([reach * turn.cos(), reach * turn.sin()], -1).expand(len(x), -1, -1, -1)  # (b, rings, angles, 2)
    polar = [F.grid_sample(F.avg_pool2d(m, s), places, align_corners=False) for m, s in ((x, 4), (edges, 6))]
    polar = torch.cat([(polar[0] + 0.02).log(), polar[1].sqrt()], 1)                      # (b, 6, rings, angles)
    return torch.fft.rfft(polar, dim=-1).abs().flatten(1)


@torch.no_grad()
def class_token(images, model):
    """(b, 3, S, S) normalised -> (b, D): the class token after the final norm; bf16 autocast on GPUs."""
    parts = []
    for some in images.split(64):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            parts.append(model(some)["cls"].float())
    return torch.cat(parts)


def embedder(args):
    """(words, read(path), describe(pictures), width, hash of what it depends on) of the checkpoint, or of the untrained descriptor."""
    if not args.checkpoint:
        return "fixed polar descriptor, untrained (--checkpoint for a backbone)", thumbnail, descriptor, 432, "polar 1"
    model = vit.load_backbone(args.checkpoint, args.device).requires_grad_(False)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return f"class token of {args.checkpoint}", data.eval_image, partial(class_token, model=model), model.dim, digest.hexdigest()


class Embeddings:
    """Rows of a file of embeddings (N, D) as unit vectors on a device: every dimension standardised by the moments, then normalised.

    x[slice or array] -> (b, D) float32. Without the standardisation the mean of all frames would dominate the cosines.
    """

    def __init__(self, file, rows, moments, device):
        self.file, self.rows, self.device = file, rows, device
        self.mean, self.std = (torch.from_numpy(np.asarray(m, np.float32)).to(device) for m in moments)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        x = torch.from_numpy(self.file[self.rows[at]]).to(self.device).float()
        return F.normalize((x - self.mean) / self.std, dim=1)


def moments_of(file, seed):
    """(mean, deviation) of each dimension over SAMPLE rows of a file of embeddings (N, D); rows with nan are left out."""
    rows = np.random.default_rng(seed).choice(len(file), min(len(file), SAMPLE), replace=False)
    x = np.asarray(file[np.sort(rows)], np.float64)
    x = x[~np.isnan(x[:, 0])]
    std = x.std(0)
    return x.mean(0), np.where(std > 1e-6, std, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3: near-duplicates

def chunks(n, width):
    """Slices of range(n), each of at most CHUNK / width rows."""
    size = max(1, CHUNK // max(width, 1))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def duplicates(x, video, sharp, threshold, window=32):
    """(n,) bool, True for the frames to drop: of the frames of a video that resemble each other, all but the sharpest.

    x: unit vectors, n rows in time order within each video; video, sharp: (n,). A frame is compared with the frames that began the
    last `window` groups of its video, and begins a group when no cosine reaches the threshold: a slow sweep is thinned, not swallowed.
    """
    drop, current = np.zeros(len(x), bool), None
    order = np.argsort(video, kind="stable")
    for part in tqdm(chunks(len(x), 4096), desc="near-duplicates", disable=None):
        for i, row in zip(order[part], x[order[part]].cpu().numpy()):
            if video[i] != current:
                current, groups, bank, best = video[i], 0, np.zeros((window, len(row)), np.float32), np.zeros(window, int)
            cosines = bank[:groups] @ row                                                # (up to window,)
            nearest = cosines.argmax() if groups else 0
            if groups and cosines[nearest] >= threshold:
                loser, best[nearest] = sorted((i, best[nearest]), key=lambda j: sharp[j])  # the later one loses a tie
                drop[loser] = True
            else:
                bank[groups % window], best[groups % window], groups = row, i, groups + 1
    return drop


def resembling(x, others, threshold):
    """(n,) bool: rows of x (n, D) whose cosine with any row of others (m, D) reaches the threshold."""
    return np.concatenate([(x[part] @ others.T).amax(1).ge(threshold).cpu().numpy() for part in chunks(len(x), max(others.shape))])


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4: hierarchical k-means

def assign(x, centres, sums=True):
    """Nearest centre of every row: labels (n,) int64, cosines (n,) float32, and the sum of each cluster's rows (k, D) float64.

    Sums are taken in fixed point: integers add up to the same in any order, so a GPU's atomic additions repeat bit for bit.
    """
    labels, cosines = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    total = torch.zeros(centres.shape, dtype=torch.int64, device=centres.device)
    for part in chunks(len(x), max(centres.shape)):
        rows = x[part]                                                                   # (b, D)
        best, label = (rows @ centres.T).max(1)
        labels[part], cosines[part] = label.cpu().numpy(), best.cpu().numpy()
        if sums:
            total.index_add_(0, label, (rows * 2 ** 24).long())
    return labels, cosines, total.double() / 2 ** 24


def first_centres(x, k, rng):
    """k rows of x (n, D) by greedy k-means++: each the best of a few drawn with probability ~ squared distance to the nearest so far."""
    distance, chosen = torch.ones(len(x), device=x.device, dtype=torch.float64), []
    for i in range(k):
        u = torch.from_numpy(rng.random(2 + int(np.log(k)) if i else 1)).to(x.device)
        ends = distance.cumsum(0)
        drawn = torch.searchsorted(ends, u * ends[-1], right=True).clamp(max=len(x) - 1)
        left = torch.minimum(distance[:, None], (1 - x @ x[drawn].T).clamp(min=0).double()) if i else (1 - x @ x[drawn].T).clamp(min=0).double()
        best = left.sum(0).argmin()
        distance = left[:, best]
        chosen.append(drawn[best])
    return x[torch.stack(chosen)]


def kmeans(x, k, seed=0, steps=50, tolerance=1e-4, bar=False):
    """Spherical k-means of n unit vectors (anything with len and x[slice or array] -> (b, D)): centres (k, D), labels, cosines (n,).

    First centres by k-means++ (Arthur and Vassilvitskii 2007) on at most SAMPLE rows, then Lloyd over all of them, chunk by chunk,
    until the inertia, the mean of 1 - cosine, falls by less than `tolerance` of itself. An empty cluster restarts at the row that its
    centre fits worst. Small data gets several starts, the best of which is returned. ValueError if k is not in 1..n.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"{k} clusters asked of {len(x)} frames: --clusters must lie between 1 and the number of frames")
    rng, best = np.random.default_rng(seed), None
    for _ in range(min(10, max(1, 2 ** 20 // (k * len(x))))):
        some = np.sort(rng.choice(len(x), min(len(x), max(SAMPLE, 4 * k)), replace=False))
        centres, before = first_centres(x[some], k, rng), np.inf
        for step in tqdm(range(steps), desc=f"k-means, k = {k}", disable=not bar, leave=False):
            labels, cosines, sums = assign(x, centres)
            inertia = 1 - cosines.mean(dtype=np.float64)
            if inertia >= (1 - tolerance) * before or step == steps - 1:
                break
            before, empty = inertia, np.setdiff1d(np.arange(k), labels)
            centres = F.normalize(sums, dim=1).float()
            if len(empty):
                centres[empty] = x[np.sort(np.argsort(cosines, kind="stable")[:len(empty)])]
        if best is None or inertia < best[0]:
            best = inertia, centres, labels, cosines
    return best[1:]


def nearest(labels, cosines, per):
    """Sorted numbers of the `per` members of each cluster that its centre fits best."""
    order = np.lexsort((-cosines, labels))
    starts = np.searchsorted(labels[order], labels[order])
    return np.sort(order[np.arange(len(order)) - starts < per])


def hierarchy(x, sizes, seed, rounds, save):
    """Levels of k-means, each on the centres of the one below (Vo et al. 2024, section 3.2). sizes: clusters from the leaves up.

    In each round the members nearest to the centres, alike many from each cluster, are clustered in their place (their section 3.3,
    "resampling-clustering"): the centres spread over what there is, not over how often it is there. save(name, compute) keeps the result
    of a level. Returns for each level the label of every item of the level below: (n,), (sizes[0],), (sizes[1],), ...
    """
    tree = []
    for level, k in enumerate(sizes):
        def compute():
            centres, labels, cosines = kmeans(x, k, seed + level, bar=True)
            for r in range(rounds):
                near = nearest(labels, cosines, max(1, len(x) // (2 * k)))
                if len(near) >= k:
                    centres = kmeans(torch.utils.data.Subset(x, near), k, seed + level + r + 1)[0]
                    labels, cosines, _ = assign(x, centres, sums=False)
            return {"centres": centres.cpu().numpy(), "labels": labels}
        found = save(f"clusters{level + 1}", compute)
        tree.append(found["labels"])
        x = torch.from_numpy(found["centres"]).to(x.device)
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# Stage 5: balanced sampling

def equal_shares(n, sizes, rng):
    """(m,) integers that add up to min(n, sum of sizes): as equal as `sizes` (m,) lets them be; rng places what does not divide."""
    order = np.argsort(sizes, kind="stable")
    rising, left = sizes[order], np.arange(len(sizes), 0, -1)
    below = np.cumsum(rising) - rising                                                   # what the smaller ones hold
    first = np.searchsorted(below + rising * left, n)                                    # the smallest that is not emptied
    if first == len(sizes):
        return sizes.copy()
    share, rest = divmod(int(n - below[first]), int(left[first]))
    shares = np.minimum(sizes, share)
    shares[rng.permutation(order[first:])[:rest]] += 1
    return shares


def members(labels, k):
    """List of k arrays: the items of each cluster, ascending."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=k))[:-1])


def sizes_of(tree, rows):
    """Frames under each cluster, level by level from the leaves up, counting only those at `rows`."""
    sizes = [np.bincount(tree[0][rows], minlength=len(tree[1]) if len(tree) > 1 else tree[0].max() + 1)]
    for level in range(1, len(tree)):
        k = len(tree[level + 1]) if level + 1 < len(tree) else tree[level].max() + 1
        sizes.append(np.bincount(tree[level], sizes[-1], k).astype(np.int64))
    return sizes


def capped(video, leaf, cap, rng):
    """Sorted numbers of at most `cap` frames per video, those of a longer one spread evenly over its clusters."""
    chosen = []
    for frames in members(video, video.max() + 1):
        if len(frames) > cap:
            _, local = np.unique(leaf[frames], return_inverse=True)
            groups = members(local, local.max() + 1)
            shares = equal_shares(cap, np.array([len(g) for g in groups]), rng)
            frames = frames[np.concatenate([rng.permutation(g)[:s] for g, s in zip(groups, shares)])]
        chosen.append(frames)
    return np.sort(np.concatenate(chosen))


def balanced_sample(tree, rows, target, rng):
    """Sorted numbers of min(target, len(rows)) of the frames `rows`: every cluster shares its quota equally among the clusters below it,
    none more than it holds, and a leaf draws at random (Vo et al. 2024, section 3.4, flat in the leaves)."""
    sizes = sizes_of(tree, rows)
    quota = equal_shares(target, sizes[-1], rng)
    for level in range(len(tree) - 1, 0, -1):
        shares = np.zeros(len(tree[level]), np.int64)
        for q, below in zip(quota, members(tree[level], len(quota))):
            shares[below] = equal_shares(q, sizes[level - 1][below], rng)
        quota = shares
    leaves = members(tree[0][rows], len(quota))
    return np.sort(np.concatenate([rows[rng.permutation(leaf)[:q]] for leaf, q in zip(leaves, quota)]))


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves behind

def write_manifest(path, frames, chosen, tree_paths, scores):
    """The chosen frames as path (relative to the manifest), video, cluster from the top down, scores."""
    with vit.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["path", "video", "cluster", *QUALITY])
        for i, cluster, row in zip(chosen, tree_paths, scores[chosen]):
            relative = os.path.relpath(os.path.abspath(frames.path(i)), os.path.abspath(path.parent))
            out.writerow([relative, frames.video(i), cluster, *(f"{v:.4f}" for v in row)])


def histogram(sizes):
    """{"0": clusters without a frame, "1": with 1, "2-3": with 2 or 3, "4-7": ...}."""
    power = np.where(sizes > 0, np.log2(np.maximum(sizes, 1)).astype(int) + 1, 0)
    names = ["0", "1"] + [f"{2 ** p}-{2 ** (p + 1) - 1}" for p in range(1, int(power.max()))]
    return dict(zip(names, np.bincount(power, minlength=len(names)).tolist()))


def report(args, out, frames, video, names, code, tree, rows, chosen, about):
    """Write manifest.csv, report.json and sheet.png into the folder `out`; returns the report. rows: the frames that were clustered."""
    place = np.searchsorted(rows, chosen)
    labels, path = tree[0][place], tree[0][place].astype(str).astype(object)
    for level in tree[1:]:
        labels = level[labels]
        path = labels.astype(str).astype(object) + "/" + path
    write_manifest(out / "manifest.csv", frames, chosen, path, about.pop("scores"))
    sizes = [sizes_of(tree, np.arange(len(rows))), sizes_of(tree, place)]
    counts = np.stack([np.bincount(v, minlength=len(names)) for v in (video, video[chosen])], 1)
    result = about | {
        "frames": len(frames), "left after the filters": len(rows), "chosen": len(chosen),
        "dropped": {reason: int((code == 1 + r).sum()) for r, reason in enumerate(REASONS)},
        "cluster sizes before and after, leaves first": [[histogram(a), histogram(b)] for a, b in zip(*sizes)],
        "frames per video before and after": {name: pair.tolist() for name, pair in zip(names, counts)},
        "arguments": {k: v for k, v in vars(args).items()}}
    with vit.replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, default=str) + "\n")
    groups = [(f"kept: {len(chosen)}", chosen)]
    groups += [(f"dropped, {reason}: {(code == 1 + r).sum()}", np.flatnonzero(code == 1 + r)) for r, reason in enumerate(REASONS)]
    figures.contact_sheet(out / "sheet.png", frames, groups)
    print(f"{len(frames)} frames of {len(names)} videos:", ", ".join(f"{n} {reason}" for reason, n in result["dropped"].items()))
    print(f"{len(rows)} left, {len(chosen)} chosen from {np.count_nonzero(counts[:, 1])} videos in {out}/manifest.csv; "
          "see report.json and sheet.png beside it")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# All of it

class Listed(list):
    """Frames that a list of paths names."""
    path = list.__getitem__


def open_excluded(source):
    """Frames of a folder, a manifest, a list of paths, or a list of names or stems of images below the list's own folder."""
    source = pathlib.Path(source)
    if source.is_dir() or source.suffix == ".csv":
        return data.Frames(source)
    lines = data.read_lines(source)
    if not lines:
        raise ValueError(f"--exclude {source}: the list is empty")
    return Listed(lines) if all(os.path.isfile(line) for line in lines) else data.Frames(source.parent, only=source)


def number_videos(frames):
    """(n,) int32 number of every frame's video, and the videos' names in order of appearance."""
    found = {}
    return np.fromiter((found.setdefault(frames.video(i), len(found)) for i in range(len(frames))), np.int32, len(frames)), list(found)


def default_levels(n):
    """Clusters from the leaves up: two frames to a leaf, so that rare views keep one of their own, but at most 100,000 leaves; above
    them ..., 256, 64, 16. With fewer than 16 at the top a view that is rare has no share of its own, however few frames are asked."""
    leaves = max(1, min(n // 2, 100_000))
    return [leaves] + [k for k in (16384, 4096, 1024, 256, 64) if k <= leaves // 2] + [16] * (leaves > 16)


def embed(frames, rows, work, name, key, how, args):
    """(file of embeddings of frames[rows], hash of what it holds)."""
    _, read, describe, width, model = how
    key = key_of(key, hashlib.sha256(rows.tobytes()).hexdigest(), model, args.device.split(":")[0])
    return over_images(work / f"{name}-{key}.npy", frames, rows, read, width, np.float16, describe, args, name), key


def drop_duplicates(frames, video, scores, code, work, key, args):
    """Embeddings of the frames that are good, and code updated in place with near-duplicates and excluded frames.

    Returns (embeddings of what is left, numbers of these frames, hash); None on all processes but the first, whose work is done."""
    how, good = embedder(args), np.flatnonzero(code == 0)
    file, key = embed(frames, good, work, "embeddings", key, how, args)
    benchmarks = []
    for source in args.exclude:
        other = open_excluded(source)
        benchmarks.append(embed(other, np.arange(len(other)), work, "excluded", fingerprint(other, False), how, args))
    if dist.is_initialized() and dist.get_rank() > 0:
        return None
    readable = ~np.isnan(np.asarray(file[:, 0]))
    code[good[~readable]] = 1 + REASONS.index("unreadable")
    rows, good = np.flatnonzero(readable), good[readable]
    moments = moments_of(file, args.seed)
    x = Embeddings(file, rows, moments, args.device)
    drop = stage(work, "duplicates", (key, args.seed, args.duplicate, args.window), lambda: {"drop": duplicates(
        x, video[good], scores[good, list(QUALITY).index("sharp")], args.duplicate, args.window)})["drop"]
    code[good[drop]] = 1 + REASONS.index("near-duplicate")
    for source, (other, other_key) in zip(args.exclude, benchmarks):
        if np.isnan(np.asarray(other[:, 0])).any():
            raise ValueError(f"--exclude {source}: an image in it cannot be read, so its near-duplicates cannot be found; repair it")
        others = Embeddings(other, np.arange(len(other)), moments, args.device)[:]
        hit = stage(work, "excluded", (key, args.seed, other_key, args.exclude_similarity), lambda: {
            "hit": resembling(x, others, args.exclude_similarity)})["hit"]
        code[good[hit]] = 1 + REASONS.index("excluded")
    left = code[good] == 0
    return Embeddings(file, rows[left], moments, args.device), good[left], key_of(key, hashlib.sha256(left.tobytes()).hexdigest()), how[0]


def curate(args):
    """All stages with the arguments of main; returns the report, or None on all processes but the first."""
    frames = data.Frames(args.data or synthetic.ensure() / "unlabelled")
    out = pathlib.Path(args.out)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    first = not dist.is_initialized() or dist.get_rank() == 0
    key = fingerprint(frames, first)
    video, names = number_videos(frames)
    limits = {name: tuple(getattr(args, name)) for name in QUALITY}
    if first:
        print("\n".join(f"{name:7} {low:g} to {high:g}: outside it {QUALITY[name][1]}" for name, (low, high) in limits.items()))
    scores = np.asarray(over_images(work / f"quality-{key_of(key, 1)}.npy", frames, np.arange(len(frames)), thumbnail, len(QUALITY),
                                    np.float32, quality, args, "quality"))
    code = judge(scores, limits)
    if not (code == 0).any():
        raise ValueError(f"{frames.root}: none of the {len(frames)} frames passes the quality filters ("
                         + ", ".join(f"{(code == 1 + r).sum()} {reason}" for r, reason in enumerate(REASONS) if (code == 1 + r).any()) + ")")
    found = drop_duplicates(frames, video, scores, code, work, key, args)
    if found is None:
        return None
    x, rows, key, words = found
    if not len(rows):
        raise ValueError(f"{frames.root}: no frame is left after the filters and --exclude")
    levels = args.clusters or default_levels(len(x))
    tree = hierarchy(x, levels, args.seed, args.resample, lambda name, compute: stage(
        work, name, (key, levels, args.seed, args.resample), compute))
    rng, target = np.random.default_rng(args.seed), args.target or max(1, len(x) // 4)
    cap = args.per_video or max(1, -(-4 * target // len(np.unique(video[rows]))))
    pool = capped(video[rows], tree[0], cap, rng)
    if target > len(pool):
        print(f"{target} frames asked, but only {len(pool)} are left under the cap of {cap} per video: all of them are chosen")
    chosen = rows[balanced_sample(tree, pool, target, rng)]
    return report(args, out, frames, video, names, code, tree, rows, chosen, {
        "embedding": words, "clusters": levels, "target": target, "cap per video": cap, "thresholds": limits, "scores": scores})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder of frames (sub-folder = video) or manifest; without it the synthetic videos, made on first use")
    add("--out", default="curated", help="folder of the results (default: %(default)s)")
    add("--target", type=int, help="frames to choose (default: a quarter of those that pass the filters)")
    add("--per-video", type=int, help="most frames of one video (default: four times an even share)")
    add("--checkpoint", help="backbone whose class tokens are clustered; without it a fixed descriptor that needs no training")
    add("--exclude", action="append", default=[], metavar="LIST_OR_FOLDER", help="benchmark frames (folder, manifest, list of paths "
        "or of names below the list's folder): whatever resembles one is never chosen; repeatable")
    add("--exclude-similarity", type=float, default=0.85, help="cosine from which a frame resembles one of those (default: %(default)s)")
    add("--duplicate", type=float, default=0.95, help="cosine from which two frames of a video are one (default: %(default)s)")
    add("--window", type=int, default=32, help="groups of its video that a frame is compared with (default: %(default)s)")
    add("--clusters", type=int, nargs="+", metavar="K", help="clusters of each level from the leaves up (default: from the number of frames)")
    add("--resample", type=int, default=3, help="rounds of resampling-clustering at each level (default: %(default)s)")
    add("--seed", type=int, default=0, help="the result is a function of it, on one machine with one number of threads (default: %(default)s)")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="processes that read images (default: %(default)s)")
    add("--device", help="where all but reading happens (default: a GPU if there is one)")
    for name, (allowed, words) in QUALITY.items():
        add(f"--{name}", type=float, nargs=2, metavar=("MIN", "MAX"), default=allowed, help=f"else {words} (default: %(default)s)")
    args = parser.parse_args(argv)
    counts = [args.target, args.per_video, args.window, *(args.clusters or ())]
    if any(n is not None and n < 1 for n in counts) or min(args.workers, args.resample) < 0:
        parser.error("--target, --per-video, --window and --clusters must be positive, --workers and --resample not negative")
    if args.clusters and args.clusters != sorted(args.clusters, reverse=True):
        parser.error("--clusters go from the leaves up: every number at most the one before it")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # processes wait for the slowest one's images
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.device = args.device or (gpu if torch.cuda.is_available() else "cpu")
    try:
        return curate(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
