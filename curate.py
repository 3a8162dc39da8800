"""Curation: from the raw frames of videos to a pre-training set balanced over what they show.

    python curate.py                                        synthetic videos, made on first use
    python curate.py --data FRAMES --target 100000 --checkpoint dinov2_vitb14_pretrain.pth \\
        --exclude data/Kvasir-SEG/val.txt
    torchrun --nproc-per-node 4 curate.py --data FRAMES     every stage split over processes
    python pretrain.py --data curated/manifest.csv          what it is for

What is looked at is the field of view, which is found for each video, not the black frame with
text that a recorder puts around it. Bad frames go first, then near-duplicates within a video and
of a benchmark's test frames. What is left is clustered by hierarchical k-means and sampled in
equal shares from the top of the hierarchy down (clusters.py; Vo et al. 2024, arXiv 2405.15613).
k-means follows density, k-means of its centres less so: a finding that is rare, and that the
embedding tells from the others, gets several times the share that it has of the frames. How even
it comes out depends on the embedding.

--out gets manifest.csv (path, video, cluster from the top down, scores), report.json and
sheet.png (look at it). Every stage leaves its result in --out/work under a key of its inputs,
so a killed run goes on when the same command is given again, with any number of processes of
one machine: several give exactly what one gives.
"""
import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import tempfile
import time
import zlib
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
import frozen
import synthetic
import vit
from clusters import (Columns, add_up, balanced_sample, capped, chunks, first_decides, hierarchy,
                      left_by_earlier_run, members, rank, shares, sizes_of, width_of, world)

# score: (allowed range, what lies outside it). A frame is counted under the first that it fails.
QUALITY = {
    "dark": ((0, 0.75), "black: share of the picture with less than a tenth of full brightness"),
    "glare": ((0, 0.25), "over-exposed: share of the field of view above nine tenths of full "
                         "brightness"),
    "tissue": ((0.4, 1), "not endoscopy: share of the field of view that is redder than grey "
                         "(0 to keep narrow-band and dyed frames)"),
    "relief": ((0.06, 9), "blank, or lit by no endoscope: deviation over mean of the light on a "
                          "coarse grid"),
    "field": ((0.2, 1), "instrument, text or border nearly everywhere: share of the picture that "
                        "shows tissue"),
    "sharp": ((0.03, 9), "blurred: root mean square of the Laplacian in the field of view over "
                         "that of the brightness"),
}
REASONS = ("unreadable", *QUALITY, "blur", "near-duplicate", "excluded")  # codes 1, 2, ...; 0 is kept
BLACK = 0.1  # brightness below which a pixel may be border; that of a video in studio range has
#              0.06 (16 of 255), CVC-ClinicDB's up to 0.09
SIDE = 128  # px of the thumbnails that scores and descriptor are computed on
LOOKED = 32  # frames of a video that its field of view is found from
BATCH = 256  # frames between two marks of progress of a pass over the images
SAMPLE = 2 ** 16  # frames that the moments are taken from, however many there are


# -----------------------------------------------------------------------------------------------
# Results on disk

def key_of(*inputs):
    """A short hash of anything that json can write."""
    words = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:20]


def stage(work, name, inputs, compute):
    """compute() -> dict of arrays, or what an earlier run left in the folder `work` for the same
    inputs."""
    path = work / f"{name}-{key_of(*inputs)}.npz"
    arrays = first_decides(lambda: left_by_earlier_run(path))
    if arrays is None:
        arrays = compute()
        if rank() == 0:
            with vit.replacing(path) as temporary:
                np.savez(temporary, **arrays)
    return arrays


def fingerprint(frames, bar):
    """A hash of every frame's path, size and time of last change."""
    digest = hashlib.sha256()
    for i in tqdm(range(len(frames)), desc="frames on disk", disable=None if bar else True):
        path = os.fsencode(frames.path(i))
        with contextlib.suppress(OSError):  # the pass over the images counts it
            path += b" %d %d" % data.stamp(frames.path(i))
        digest.update(path + b"\n")
    return digest.hexdigest()


def check_writable(out):
    """The folder of intermediate results in the folder `out`, made; ValueError if nothing can be
    written there."""
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "work"):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        words = f"--out {out}: cannot be written ({error.strerror}); name another folder"
        raise ValueError(words) from error
    return out / "work"


# -----------------------------------------------------------------------------------------------
# Passes over the images

class Pictures(torch.utils.data.Dataset):
    """Batch b of the frames numbered `rows`: read(path, box) of each, stacked, and which of them
    could be read (the others are 0). A machine that fails (data.Transient, a bad shard) is no
    frame's fault and ends the run, before the batch is marked."""

    def __init__(self, frames, rows, read, boxes):
        self.frames, self.rows, self.read, self.boxes = frames, rows, read, boxes

    def __getitem__(self, b):
        pictures = []
        for i in self.rows[b * BATCH:(b + 1) * BATCH]:
            box = WHOLE if self.boxes is None else self.boxes[i]
            try:
                pictures.append(self.read(self.frames.path(i), box))
            except data.BadImage:
                pictures.append(None)
        readable = torch.tensor([p is not None for p in pictures])
        none = torch.zeros_like(next((p for p in pictures if p is not None), torch.zeros(1)))
        return torch.stack([none if p is None else p for p in pictures]), readable


WHOLE = (0, 0, SIDE, SIDE)


def read_inside(path, box, side):
    """(PIL image of a frame, left, top, right, bottom of its part `box` in pixels), from the
    smallest decoding that has `side` pixels there each way. box: the same four on the thumbnail."""
    left, top, right, bottom = (int(edge) for edge in box)
    image = data.read_image(path, (side * SIDE / (right - left), side * SIDE / (bottom - top)))
    x, y = image.width / SIDE, image.height / SIDE
    return image, (left * x, top * y, right * x, bottom * y)


def thumbnail(path, box=WHOLE):
    """(3, SIDE, SIDE) uint8: the part `box` of a frame, squeezed to a square."""
    image, part = read_inside(path, box, SIDE)
    return pil_to_tensor(image.resize((SIDE, SIDE), Image.BILINEAR, part))


def backbone_view(path, box=WHOLE):
    """(3, 224, 224) normalised floats of the part `box` of a frame, as a probe sees a frame."""
    image, part = read_inside(path, box, 256)
    return data.square(image.crop([round(edge) for edge in part]), 224)


def open_table(path, shape, dtype, empty):
    """The memory-mapped array at `path`, made (and filled with `empty`) where there is none of
    this shape. One that was cut short is filled up with zeros, which the checksums find."""
    def right():
        with contextlib.suppress(FileNotFoundError, ValueError, EOFError):
            found = np.load(path, mmap_mode="r+")
            return found.shape == shape and found.dtype == dtype
        return False

    def make():
        if right():
            return
        need = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = shutil.disk_usage(path.parent).free
        if need > free:
            raise OSError(f"{path}: needs {need / 1e6:.1f} MB, and the disk has {free / 1e6:.1f} MB "
                          "left; make room, or name another --out")
        with vit.replacing(path) as temporary:
            table = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            if empty:
                table[:] = empty
            table.flush()

    first_decides(make)
    return np.load(path, mmap_mode="r+")


def over_images(path, frames, rows, read, width, dtype, describe, args, desc, boxes=None):
    """describe(pictures (b, ...)) -> (b, width) of all frames[rows], as the memory-mapped file
    (len(rows), width) at `path`, and which of them could be read, (len(rows),) bool; the others
    are nan. boxes: (len(frames), 4), what is looked at of each frame; without them all of it.

    A second file holds a checksum of every batch that is on disk: a killed pass loses one batch
    per process, any number of processes can go on with it, and a batch that the disk has damaged
    is computed again."""
    n_batches = -(-len(rows) // BATCH)
    out = open_table(path, (len(rows), width), np.dtype(dtype), 0)
    sums = open_table(path.with_suffix(".crc.npy"), (n_batches,), np.dtype(np.int64), -1)  # -1: to do
    checksum = lambda b: zlib.crc32(out[b * BATCH:(b + 1) * BATCH])
    mine = range(rank(), n_batches, world())
    todo = [b for b in mine if sums[b] < 0 or sums[b] != checksum(b)]
    damaged = sum(sums[b] >= 0 for b in todo)
    if damaged:
        print(f"{path}: {damaged} of {n_batches} batches are damaged, so they are computed again")
    loader = torch.utils.data.DataLoader(
        Pictures(frames, rows, read, boxes), batch_size=None, sampler=todo, num_workers=args.workers,
        generator=torch.Generator())
    hidden = rank() > 0 or not todo
    with tqdm(total=len(todo) * BATCH, unit="frame", desc=desc, disable=hidden) as bar:
        for b, (pictures, readable) in zip(todo, loader):
            values = torch.full((len(readable), width), torch.nan)
            if readable.any():
                values = describe(pictures.to(args.device)).float().cpu()
                if values[readable].isnan().any():
                    raise FloatingPointError(f"{desc}: NaN comes out for a frame that can be read")
                values[~readable] = torch.nan
            out[b * BATCH:(b + 1) * BATCH] = values.numpy()
            out.flush()
            sums[b] = checksum(b)  # only after its rows are on disk
            sums.flush()
            bar.update(BATCH)
    readable = np.zeros(len(rows), np.uint8)
    for b in mine:
        readable[b * BATCH:(b + 1) * BATCH] = ~np.isnan(out[b * BATCH:(b + 1) * BATCH, 0])
    add_up(readable)  # waits for all processes
    return np.load(path, mmap_mode="r"), readable.astype(bool)


def luma(x):
    """(b, 3, H, W) -> (b, 1, H, W)."""
    weight = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)
    return (x * weight).sum(1, keepdim=True)


# -----------------------------------------------------------------------------------------------
# Stage 1: the field of view. A recording shows it in a black frame, beside lines of text, as much
# as a fifth of the picture or nearly all of it. Seen whole, frames of one layout would be alike,
# whatever they show, and a share of black would say how large the field is, not how dark

def lit_box(frames, size=15):
    """(left, top, right, bottom) of the field of view of thumbnails of one layout: (n, 3, SIDE, SIDE)
    uint8 -> int array, WHOLE where no border is seen.

    It is what is brighter than the darkest corner in a tenth of the frames at least. Only what a
    square of `size` pixels fits into counts, so that text does not, nor a line."""
    y = luma(frames / 255)[:, 0]                                            # (n, SIDE, SIDE)
    ends = F.avg_pool2d(y[:, None], 4)[:, 0, ::SIDE // 4 - 1, ::SIDE // 4 - 1]  # (n, 2, 2) corners
    corner = ends.amin((1, 2)).view(-1, 1, 1)
    lit = (y > corner + 0.03) | (corner > BLACK)  # no border: tissue in every corner
    often = (lit.float().mean(0) >= 0.1).float()[None, None]                # (1, 1, SIDE, SIDE)
    square = (F.avg_pool2d(often, size, 1, size // 2) > 0.999).float()      # centres of such squares
    field = F.max_pool2d(square, size, 1, size // 2)
    for _ in range(2):  # into the corners that no square fits into
        field = F.max_pool2d(field, 3, 1, 1) * often
    if not field.any():
        return np.array(WHOLE)
    right, down = field.amax((0, 1, 2)).nonzero(), field.amax((0, 1, 3)).nonzero()
    return np.array([right.min(), down.min(), right.max() + 1, down.max() + 1])


class Fields(torch.utils.data.Dataset):
    """The lit_box of group g of frames, found from at most LOOKED of them, spread evenly."""

    def __init__(self, frames, groups):
        self.frames, self.groups = frames, groups

    def __getitem__(self, g):
        group, seen = self.groups[g], []
        for i in group[np.unique(np.linspace(0, len(group) - 1, LOOKED).round().astype(int))]:
            with contextlib.suppress(data.BadImage):  # the pass over the images counts it
                seen.append(thumbnail(self.frames.path(i)))
        return lit_box(torch.stack(seen)) if seen else np.array(WHOLE)


def fields_of_view(frames, groups, work, key, args):
    """(len(frames), 4) uint8: the field of view of the group that each frame is in, on a
    thumbnail. groups: list of arrays of numbers of frames."""
    def look():
        boxes, mine = np.zeros((len(groups), 4), np.int64), range(rank(), len(groups), world())
        loader = torch.utils.data.DataLoader(
            Fields(frames, groups), batch_size=None, sampler=mine, num_workers=args.workers,
            generator=torch.Generator())
        hidden = True if rank() else None
        for g, box in zip(mine, tqdm(loader, desc="fields of view", disable=hidden)):
            boxes[g] = box
        return {"boxes": add_up(boxes)}

    found = stage(work, "fields", (key, 1), look)["boxes"]
    boxes = np.zeros((len(frames), 4), np.uint8)
    for box, group in zip(found, groups):
        boxes[group] = box
    return boxes


# -----------------------------------------------------------------------------------------------
# Stage 2: quality


def quality(images):
    """Scores in the order of QUALITY of fields of view: (b, 3, H, W) uint8 -> (b, 6) float32. H and
    W should be SIDE, which the thresholds are made for.

    The field of view is what is not black, less a rim of two pixels, so that neither its border
    nor thin text looks sharp."""
    x = images.float() / 255
    y = luma(x)                                                             # (b, 1, H, W)
    lit = F.avg_pool2d((y > BLACK).float(), 5, 1, 2)                        # share of 5x5 pixels
    field = (lit > 0.999).float()                                           # the border is outside
    red = field * ((x[:, :1] > 1.1 * x[:, 1:2]) & (x[:, :1] > 1.1 * x[:, 2:]))

    def inside(value):
        return (value * field).sum((1, 2, 3)) / field.sum((1, 2, 3)).clamp(min=1)  # (b,)

    weight = F.avg_pool2d(field, 16)                                        # (b, 1, H/16, W/16)
    light = F.avg_pool2d(y * field, 16) / weight.clamp(min=1e-6)
    area = weight.sum((1, 2, 3)).clamp(min=1e-6)
    mean = (weight * light).sum((1, 2, 3)) / area
    spread = (weight * (light - mean.view(-1, 1, 1, 1)) ** 2).sum((1, 2, 3)) / area
    kernel = torch.tensor([[0., 1, 0], [1, -4, 1], [0, 1, 0]], device=x.device)
    edges = F.conv2d(y, kernel[None, None], padding=1)
    dark = (y < BLACK).float().mean((1, 2, 3))
    relief = spread.sqrt() / mean.clamp(min=1e-3)
    sharp = (inside(edges ** 2) / inside(y ** 2).clamp(min=1e-4)).sqrt()
    glare, tissue, field = inside((y > 0.9).float()), inside(red), red.mean((1, 2, 3))
    return torch.stack([dark, glare, tissue, relief, field, sharp], 1)


def judge(scores, limits):
    """(n,) int8 code into REASONS plus 1 of the first fault of each frame, 0 where there is
    none. scores (n, 6), nan = unreadable."""
    code = np.zeros(len(scores), np.int8)
    for column, name in reversed(list(enumerate(QUALITY))):
        low, high = limits[name]
        code[(scores[:, column] < low) | (scores[:, column] > high)] = 1 + REASONS.index(name)
    code[np.isnan(scores[:, 0])] = 1 + REASONS.index("unreadable")
    return code


def blurred(sharp, video, least):
    """(n,) bool: frames that are less sharp than `least` times the median of their video. sharp,
    video: (n,).

    How sharp a good frame looks depends on the patient's mucosa and on the recorder more than on
    the camera's motion: the median differs fivefold between real videos, so no one threshold parts
    the blurred frames of all of them from the good ones."""
    blurry = np.zeros(len(sharp), bool)
    for frames in members(video, video.max(initial=-1) + 1):
        if len(frames):
            blurry[frames] = sharp[frames] < least * np.median(sharp[frames])
    return blurry


# -----------------------------------------------------------------------------------------------
# Stage 3: embeddings

def descriptor(images, rings=5, angles=16, waves=4):
    """(b, 3, SIDE, SIDE) uint8 -> (b, 120): log colour, and edges that brighten outward, inward
    and around, on rings about the centre.

    Needs no training. An endoscope rolls about its axis, which shifts these maps along the
    angle; the magnitudes of the Fourier coefficients along it, which are what is returned, do
    not see a shift. Each point is the mean of a fifth of the picture's width: finer maps of two
    frames of one view differ as much as those of two views, since the hand trembles and the
    border of the field is found to a pixel or two. Our own, for first runs: a trained backbone
    sees more."""
    def around_points(maps, pool, wide):
        smooth = F.avg_pool2d(F.avg_pool2d(maps, pool), wide, 1, wide // 2, count_include_pad=False)
        return F.grid_sample(smooth, places, align_corners=False)           # (b, 3, rings, angles)

    x = images.float() / 255
    y = luma(x)
    c = torch.linspace(-1, 1, SIDE - 2, device=x.device)
    down, right = c[:, None], c[None]
    radius = torch.hypot(down, right).clamp(min=1e-3)
    dx = y[..., 1:-1, 2:] - y[..., 1:-1, :-2]                               # (b, 1, SIDE-2, SIDE-2)
    dy = y[..., 2:, 1:-1] - y[..., :-2, 1:-1]
    outward, around = (dx * right + dy * down) / radius, (dy * right - dx * down) / radius
    edges = torch.cat([outward.clamp(min=0), (-outward).clamp(min=0), around.abs()], 1)
    edges = edges / (y.mean((1, 2, 3), keepdim=True) + 0.05)
    turn = torch.arange(angles, device=x.device) * (2 * torch.pi / angles)
    reach = (torch.arange(rings, device=x.device)[:, None] + 0.5) / rings * 0.95
    places = torch.stack([reach * turn.cos(), reach * turn.sin()], -1)      # (rings, angles, 2)
    places = places.expand(len(x), -1, -1, -1)
    colour, edges = (around_points(x, 4, 7) + 0.1).log(), around_points(edges, 6, 5).sqrt()
    polar = torch.cat([colour, edges], 1)                                   # (b, 6, rings, angles)
    return torch.fft.rfft(polar, dim=-1).abs()[..., :waves].flatten(1)


@torch.no_grad()
def class_token(images, model, dtype):
    """(b, 3, S, S) normalised -> (b, D) float32: the class token after the final norm; products
    in dtype."""
    parts = []
    for some in images.split(64):
        with vit.autocast(images.device, dtype):
            parts.append(model(some)["cls"].float())
    return torch.cat(parts)


def embedder(args):
    """(words, read(path), describe(pictures), width, hash of what it depends on) of the
    checkpoint, or of the untrained descriptor."""
    if not args.checkpoint:
        words = "fixed polar descriptor, untrained (--checkpoint for a backbone)"
        return words, thumbnail, descriptor, 120, "polar 2"
    model = vit.load_backbone(args.checkpoint, args.device).requires_grad_(False)
    dtype = vit.precision(args.device, args.precision)
    describe = partial(class_token, model=model, dtype=dtype)
    words = f"class token of {args.checkpoint}, {str(dtype).removeprefix('torch.')}"
    return words, backbone_view, describe, model.dim, f"{frozen.digest(model)} {dtype}"


class Embeddings:
    """Rows of a file of embeddings (N, D) as unit vectors on a device: every dimension
    standardised by the moments, then normalised.

    x[slice or array] -> (b, D) float32. Without the standardisation the mean of all frames would
    dominate the cosines."""

    def __init__(self, file, rows, moments, device):
        self.file, self.rows, self.device = file, rows, device
        self.moments = moments
        self.mean, self.std = (
            torch.as_tensor(m, dtype=torch.float32, device=device) for m in moments)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        x = torch.from_numpy(self.file[self.rows[at]]).to(self.device).float()
        return F.normalize((x - self.mean) / self.std, dim=1)


def moments_of(file, seed):
    """(mean, deviation) of each dimension over SAMPLE rows of a file of embeddings (N, D); rows
    with nan are left out."""
    rows = np.random.default_rng(seed).choice(len(file), min(len(file), SAMPLE), replace=False)
    x = np.asarray(file[np.sort(rows)], np.float64)
    x = x[~np.isnan(x[:, 0])]
    std = x.std(0)
    return x.mean(0), np.where(std > 1e-6, std, 1.0)


# -----------------------------------------------------------------------------------------------
# Stage 4: near-duplicates

def duplicates(x, video, sharp, threshold, window=32):
    """(n,) bool, True for the frames to drop: of the frames of a video that resemble each other,
    all but the sharpest.

    x: unit vectors, n rows in time order within each video; video, sharp: (n,). A frame is
    compared with the frames that began the last `window` groups of its video, and begins a group
    when no cosine reaches the threshold: a slow sweep is thinned, not swallowed. Every process
    takes whole videos."""
    drop, current = np.zeros(len(x), np.uint8), None
    order = np.argsort(video, kind="stable")
    begins = np.append(np.flatnonzero(np.diff(video[order], prepend=-1)), len(x))
    ends = [begins[np.searchsorted(begins, len(x) * r // world())] for r in (rank(), rank() + 1)]
    order = order[slice(*ends)]
    parts = tqdm(chunks(len(order), 4096), desc="near-duplicates", disable=True if rank() else None)
    for part in parts:
        for i, row in zip(order[part], x[order[part]].cpu().numpy()):
            if video[i] != current:
                current, groups = video[i], 0
                bank, best = np.zeros((window, len(row)), np.float32), np.zeros(window, int)
            cosines = bank[:groups] @ row                                   # (up to window,)
            nearest = cosines.argmax() if groups else 0
            if groups and cosines[nearest] >= threshold:
                # of two that are equally sharp the later one is dropped
                loser, best[nearest] = sorted((i, best[nearest]), key=lambda j: sharp[j])
                drop[loser] = 1
            else:
                bank[groups % window], best[groups % window], groups = row, i, groups + 1
    return add_up(drop).astype(bool)


def resembling(x, others, threshold):
    """(n,) bool: rows of x (n, D) whose cosine with any row of others (m, D) reaches the
    threshold."""
    hit, others = np.zeros(len(x), np.uint8), Columns(others)
    parts = shares(len(x), width_of(others.x))
    for part in tqdm(parts, desc="excluded", disable=True if rank() else None):
        row, _, cosines = others.near(x[part], threshold)
        hit[part.start + row[cosines >= threshold].cpu().numpy()] = 1
    return add_up(hit).astype(bool)


# -----------------------------------------------------------------------------------------------
# What it leaves behind

def write_manifest(path, frames, chosen, tree_paths, scores):
    """The chosen frames as path (relative to the manifest), video, cluster from the top down,
    scores."""
    any_name = dict(encoding="utf-8", errors="surrogateescape")  # file names need not be UTF-8
    with vit.replacing(path) as temporary, open(temporary, "w", newline="", **any_name) as file:
        out = csv.writer(file)
        out.writerow(["path", "video", "cluster", *QUALITY])
        home = os.path.abspath(path.parent)
        for i, cluster, row in zip(chosen, tree_paths, scores[chosen]):
            relative = os.path.relpath(os.path.abspath(frames.path(i)), home)
            out.writerow([relative, frames.video(i), cluster, *(f"{v:.4f}" for v in row)])


def histogram(sizes):
    """{"0": clusters without a frame, "1": with 1, "2-3": with 2 or 3, "4-7": ...}."""
    power = np.where(sizes > 0, np.log2(np.maximum(sizes, 1)).astype(int) + 1, 0)
    names = ["0", "1"] + [f"{2 ** p}-{2 ** (p + 1) - 1}" for p in range(1, int(power.max()))]
    return dict(zip(names, np.bincount(power, minlength=len(names)).tolist()))


def report(args, out, frames, code, tree, rows, chosen, about):
    """Write manifest.csv, report.json and sheet.png into the folder `out`; returns the report.
    rows: the frames that were clustered."""
    place, video, names = np.searchsorted(rows, chosen), frames.video_of, frames.videos
    labels, path = tree[0][place], tree[0][place].astype(str).astype(object)
    for level in tree[1:]:
        labels = level[labels]
        path = labels.astype(str).astype(object) + "/" + path
    write_manifest(out / "manifest.csv", frames, chosen, path, about.pop("scores"))
    sizes = [sizes_of(tree, np.arange(len(rows))), sizes_of(tree, place)]
    counts = np.stack([np.bincount(v, minlength=len(names)) for v in (video, video[chosen])], 1)
    dropped = {reason: np.flatnonzero(code == 1 + r) for r, reason in enumerate(REASONS)}
    result = about | {
        "frames": len(frames), "left after the filters": len(rows), "chosen": len(chosen),
        "dropped": {reason: len(which) for reason, which in dropped.items()},
        "cluster sizes before and after, leaves first": [
            [histogram(a), histogram(b)] for a, b in zip(*sizes)],
        "frames per video before and after": {n: pair.tolist() for n, pair in zip(names, counts)},
        "arguments": dict(vars(args))}
    with vit.replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, default=str) + "\n")
    groups = [(f"kept: {len(chosen)}", chosen)]
    groups += [(f"dropped, {reason}: {len(which)}", which) for reason, which in dropped.items()]
    figures.contact_sheet(out / "sheet.png", frames, groups)
    print(f"{len(frames)} frames of {len(names)} videos:",
          ", ".join(f"{n} {reason}" for reason, n in result["dropped"].items()))
    print(f"{len(rows)} left, {len(chosen)} chosen from {np.count_nonzero(counts[:, 1])} videos in "
          f"{out}/manifest.csv; see report.json and sheet.png beside it")
    start = "python pretrain.py --arch vitt14 --recipe demo"
    if args.device != "cpu":
        start = "torchrun --nproc-per-node gpu pretrain.py"
    print(f"next: {start} --data {shlex.quote(str(out / 'manifest.csv'))}")
    return result


# -----------------------------------------------------------------------------------------------
# All of it

class Listed(list):
    """Frames that a list of paths names."""
    path = list.__getitem__


def open_excluded(source):
    """Frames of a folder, a manifest, a list of paths, or a list of names or stems of images
    below the list's own folder."""
    source = pathlib.Path(source)
    if source.is_dir() or source.suffix in (".csv", ".tar"):
        return data.Frames(source)
    lines = data.read_lines(source)
    if not lines:
        raise ValueError(f"--exclude {source}: the list is empty")
    if all(os.path.isfile(line) for line in lines):
        return Listed(lines)
    return data.Frames(source.parent, only=source)


def default_levels(n):
    """Clusters from the leaves up: two frames to a leaf, so that rare views keep one of their
    own, but at most 100,000 leaves; above them ..., 256, 64, 16. With fewer than 16 at the top a
    view that is rare has no share of its own, however few frames are asked."""
    leaves = max(1, min(n // 2, 100_000))
    middle = [k for k in (16384, 4096, 1024, 256, 64) if k <= leaves // 2]
    return [leaves] + middle + [16] * (leaves > 16)


def embed(frames, rows, boxes, work, name, key, how, args):
    """(file of embeddings of frames[rows], which could be read, hash of what it holds). boxes: their
    fields of view; None: whole."""
    _, read, describe, width, model = how
    numbers = hashlib.sha256(rows.tobytes() + (b"" if boxes is None else boxes.tobytes())).hexdigest()
    key = key_of(key, numbers, model, args.device.split(":")[0])
    path = work / f"{name}-{key}.npy"
    return *over_images(path, frames, rows, read, width, np.float16, describe, args, name, boxes), key


def score(frames, boxes, work, key, args):
    """Quality scores (n, 6) of all frames and their codes (n,); ValueError if no frame
    passes."""
    limits = {name: tuple(getattr(args, name)) for name in QUALITY}
    if rank() == 0:
        for name, (low, high) in limits.items():
            print(f"{name:7} {low:g} to {high:g}: outside it {QUALITY[name][1]}")
    path = work / f"quality-{key_of(key, 2)}.npy"
    scores, _ = over_images(path, frames, np.arange(len(frames)), thumbnail, len(QUALITY), np.float32,
                            quality, args, "quality", boxes)
    scores = np.asarray(scores)
    code = judge(scores, limits)
    good = np.flatnonzero(code == 0)
    sharp, video = scores[good, list(QUALITY).index("sharp")], frames.video_of[good]
    code[good[blurred(sharp, video, args.blur)]] = 1 + REASONS.index("blur")
    if not (code == 0).any():
        counts = np.bincount(code, minlength=1 + len(REASONS))[1:]
        counts = ", ".join(f"{n} {reason}" for n, reason in zip(counts, REASONS) if n)
        raise ValueError(f"{frames.root}: none of the {len(frames)} frames passes the quality filters "
                         f"({counts})")
    return scores, code, limits


def drop_duplicates(frames, boxes, scores, code, work, key, how, args):
    """Embeddings of the good frames, their numbers and the hash of both; code is updated in place
    with near-duplicates."""
    good = np.flatnonzero(code == 0)
    file, readable, key = embed(frames, good, boxes, work, "embeddings", key, how, args)
    code[good[~readable]] = 1 + REASONS.index("unreadable")
    rows, good = np.flatnonzero(readable), good[readable]
    x = Embeddings(file, rows, moments_of(file, args.seed), args.device)
    video, sharp = frames.video_of[good], scores[good, list(QUALITY).index("sharp")]
    drop = stage(work, "duplicates", (key, args.seed, args.duplicate, args.window), lambda: {
        "drop": duplicates(x, video, sharp, args.duplicate, args.window)})["drop"]
    code[good[drop]] = 1 + REASONS.index("near-duplicate")
    return x, good, key


def drop_excluded(frames, benchmarks, x, good, code, work, key, how, args):
    """code updated in place with the frames that resemble an image of --exclude, opened as
    `benchmarks`. x: embeddings of the frames `good`.

    They are compared by their fields of view, as benchmarks crop and frame their images anew, and
    whole, as the field of view of one dark image may not be found: of real frames saved again
    whole the first alone misses one in nine, of cropped ones the second alone two in three."""
    left = np.flatnonzero(code == 0)
    file, readable, whole = embed(frames, left, None, work, "whole", key, how, args)
    y = Embeddings(file, np.flatnonzero(readable), moments_of(file, args.seed), args.device)
    views = (good, x, key, True), (left[readable], y, whole, False)
    for source, benchmark in zip(args.exclude, benchmarks):
        named = first_decides(lambda: fingerprint(benchmark, False))
        found = [numbers[excluded(source, benchmark, named, rows, inside, work, of, how, args)]
                 for numbers, rows, of, inside in views if len(numbers)]
        hit = np.unique(np.concatenate(found))
        code[hit] = 1 + REASONS.index("excluded")
        others = np.flatnonzero(np.isin(frames.video_of, frames.video_of[hit]) & (code == 0))
        if args.exclude_videos:
            code[others] = 1 + REASONS.index("excluded")
        if rank() == 0:
            videos = len(np.unique(frames.video_of[hit]))
            print(f"--exclude {source}: {len(hit)} frames of {videos} videos resemble one of its images; "
                  f"{len(others)} other good frames of these videos are "
                  + ("dropped with them" if args.exclude_videos else "kept"))


def excluded(source, frames, named, x, inside, work, key, how, args):
    """(len(x),) bool: what resembles one of the benchmark's frames, which `source` gave and whose
    fingerprint is `named`. x: embeddings of the fields of view (inside) or of whole frames."""
    rows = np.arange(len(frames))
    # stills: each has a field of its own
    boxes = fields_of_view(frames, rows[:, None], work, named, args) if inside else None
    file, readable, found = embed(frames, rows, boxes, work, "excluded", named, how, args)
    if not readable.all():
        bad = frames.path(int(readable.argmin()))
        raise ValueError(f"--exclude {source}: {bad} cannot be read, so its near-duplicates cannot be "
                         "found; repair it")
    others, least = Embeddings(file, rows, x.moments, args.device)[:], args.exclude_similarity
    return stage(work, "excluded", (key, args.seed, found, least), lambda: {
        "hit": resembling(x, others, least)})["hit"]


def curate(args):
    """All stages with the arguments of main; returns the report, or None on all processes but
    the first."""
    out = pathlib.Path(args.out)
    work = first_decides(lambda: check_writable(out))
    how = embedder(args)
    frames = first_decides(lambda: data.Frames(args.data or synthetic.ensure() / "unlabelled"))
    # a wrong name is said now, not after the passes over the frames
    benchmarks = [first_decides(lambda: open_excluded(source)) for source in args.exclude]
    key = first_decides(lambda: fingerprint(frames, True))
    videos = members(frames.video_of, len(frames.videos))
    boxes = fields_of_view(frames, videos, work, key, args)
    scores, code, limits = score(frames, boxes, work, key, args)
    x, good, key = drop_duplicates(frames, boxes, scores, code, work, key, how, args)
    if args.exclude:
        drop_excluded(frames, benchmarks, x, good, code, work, key, how, args)
    left = code[good] == 0
    key = key_of(key, hashlib.sha256(left.tobytes()).hexdigest())
    x, rows = Embeddings(x.file, x.rows[left], x.moments, args.device), good[left]
    if not len(rows):
        raise ValueError(f"{frames.root}: no frame is left after the filters and --exclude")
    levels = args.clusters or default_levels(len(x))
    inputs = key, levels, args.seed, args.resample
    tree = hierarchy(x, levels, args.seed, args.resample,
                     lambda name, compute: stage(work, name, inputs, compute),
                     lambda name: work / f"{name}-{key_of(*inputs)}.npz")
    if rank():
        return None
    rng, target = np.random.default_rng(args.seed), args.target or max(1, len(x) // 4)
    video = frames.video_of[rows]
    cap = args.per_video or max(1, -(-4 * target // len(np.unique(video))))
    pool = capped(video, tree[0], cap, rng)
    if target > len(pool):
        print(f"{target} frames asked, but only {len(pool)} are left under the cap of {cap} per "
              "video: all of them are chosen")
    chosen = rows[balanced_sample(tree, pool, target, rng)]
    return report(args, out, frames, code, tree, rows, chosen, {
        "embedding": how[0], "clusters": levels, "target": target, "cap per video": cap,
        "thresholds": limits, "scores": scores})


def flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, text, **how):
        parser.add_argument(name, help=text + " (default: %(default)s)" * ("default" in how), **how)

    add("--data", "folder of frames (sub-folder = video; uncompressed tar shards count as folders) or "
        "manifest; without it the synthetic videos, made on first use")
    add("--out", "folder of the results", default="curated")
    add("--target", "frames to choose (default: a quarter of those that pass the filters)", type=int)
    add("--per-video", "most frames of one video (default: four times an even share)", type=int)
    add("--checkpoint", "backbone whose class tokens are clustered; without it a fixed descriptor that "
        "needs no training")
    add("--precision", "number type of the backbone's products; auto: the device's fastest",
        choices=("auto", *vit.PRECISIONS), default="auto")
    add("--exclude", "benchmark frames (folder, manifest, list of paths or of names below the list's "
        "folder): whatever resembles one is never chosen (repeatable)",
        action="append", metavar="LIST_OR_FOLDER")
    add("--exclude-similarity", "cosine from which a frame resembles one of those (default: 0.85; by a "
        "checkpoint, to which polyps of two hospitals are alike, 0.9)", type=float)
    add("--exclude-videos", "drop the whole video of which one frame is excluded. Not by default: of 36 "
        "colonoscopies it drops 3 by the fixed descriptor, 13 by a ViT-S/14, against two polyp sets of "
        "other hospitals, where nearly every hit is false",
        action=argparse.BooleanOptionalAction, default=False)
    add("--duplicate", "cosine from which two frames of a video are one", type=float, default=0.9)
    add("--window", "groups of its video that a frame is compared with", type=int, default=32)
    add("--blur", "share of the median sharpness of its video (--sharp) below which a frame is blurred",
        type=float, default=0.4)
    add("--clusters", "clusters of each level from the leaves up (default: from the number of frames)",
        type=int, nargs="+", metavar="K")
    add("--resample", "rounds of resampling-clustering at each level; one where a level has fewer than "
        "four items to a cluster, as more would move nothing", type=int, default=3)
    add("--seed", "the result is a function of it, on one machine with one number of threads, whatever "
        "the number of processes", type=int, default=0)
    add("--workers", "processes that read images, for each process of torchrun",
        type=int, default=max(1, (os.cpu_count() or 1) - 1))
    add("--device", "where all but reading happens (default: a GPU if there is one)")
    for name, (allowed, words) in QUALITY.items():
        add(f"--{name}", f"else {words}", type=float, nargs=2, metavar=("MIN", "MAX"), default=allowed)
    return parser


def main(argv=None):
    parser = flags()
    args = parser.parse_args(argv)
    args.exclude = args.exclude or []
    if args.exclude_similarity is None:
        args.exclude_similarity = 0.9 if args.checkpoint else 0.85
    counts = [args.target, args.per_video, args.window, *(args.clusters or ())]
    if any(n is not None and n < 1 for n in counts) or min(args.workers, args.resample) < 0:
        parser.error("--target, --per-video, --window and --clusters must be positive, --workers and "
                     "--resample not negative")
    if args.clusters and args.clusters != sorted(args.clusters, reverse=True):
        parser.error("--clusters go from the leaves up: every number at most the one before it")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # the processes wait for the slowest one's images, which may take long
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.device = args.device or (gpu if torch.cuda.is_available() else "cpu")
    try:
        return curate(args)
    except ValueError as error:  # all processes have found the same: it is said once
        if rank():
            time.sleep(1)  # torchrun ends them all with the first that ends: the word is process 0's
        raise SystemExit(1 if rank() else str(error)) from error
    except (OSError, FloatingPointError) as error:  # a disk, say, of which one process knows
        raise SystemExit(str(error)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
