"""Frames: where they lie, how they are read, labelled and split.

    python data.py --data FRAMES --show sheet.png        the crops and masks of one frame, as the network sees them
    python data.py --show sheet.png                      the same of a synthetic frame (the set is made on first use)
"""
import argparse
import array
import contextlib
import csv
import errno
import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from shards import SUFFIXES, BadShard, is_shard, open_file, shard_index, shard_members, stamp  # noqa: F401

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
said = set()


def say_once(text, about=None):
    """Print a line to stderr, unless one about this was printed before; of several processes the first speaks."""
    if (about or text) not in said and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
    said.add(about or text)


# ---------------------------------------------------------------------------------------------------------------------
# Reading: one function opens every picture, so that its faults, its turning and its depth are seen to in one place

MAX_PIXELS = 64_000_000  # larger than any endoscope's frame; decoding it would stall or kill a worker
TRANSIENT = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}  # the machine's faults, not the file's
ATTEMPTS, PAUSE = 3, 1.0  # seconds between two


class Sentence:
    """An error whose text is its own sentence, also where a loader's worker has wrapped its traceback around it."""

    def __str__(self):
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class BadImage(Sentence, ValueError):
    """An image that cannot be used; the message names the file."""


class Transient(Sentence, OSError):
    """A disk, a network drive or the memory failed three times, a second apart: no fault of the frame that is named.

    No BadImage, since a healthy frame must not be counted as unreadable, or remembered as such. Whoever reads ends
    with this sentence: a run of training saves first, and all its processes end together; work that is kept on disk
    marks nothing as done that was read with it.
    """


def retried(read):
    """Decorator of a function that reads: after a Transient it is called again, a second later, three times in all."""
    @functools.wraps(read)
    def reading(*args, **kwargs):
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(Transient):
                return read(*args, **kwargs)
            time.sleep(PAUSE)
        return read(*args, **kwargs)
    return reading


@contextlib.contextmanager
def opened(path):
    """The Picture in a file or in a shard, its header read and not decoded yet. Whatever goes wrong inside is a
    BadImage that names the file, or a Transient."""
    try:
        with Image.open(open_file(path)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            if getattr(image, "is_animated", False):
                say_once(f"{path}: holds several pictures; of such files the first is read", "several pictures")
            yield Picture(image)
    except (BadShard, Transient):
        raise
    except Exception as error:  # Pillow lets through whatever its decoders raise
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in TRANSIENT:
            what = getattr(error, "strerror", None) or "not enough memory"
            raise Transient(f"{path}: {what}. The machine fails, not the frame, so nothing was noted against it: "
                            "see to the disk, the network or the limits, then give the command again") from error
        raise BadImage(f"{path}: {error or type(error).__name__}") from error


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF's orientation -> what turns the stored picture upright


class Picture:
    """An opened image: `size` (width, height) is the upright one's, `image` Pillow's, as it is stored."""

    def __init__(self, image):
        self.image, self.orientation = image, orientation(image)
        self.size = self.width, self.height = image.size[::-1] if self.orientation >= 5 else image.size

    def upright(self, stored):
        return stored.transpose(TURNS[self.orientation]) if self.orientation > 1 else stored


def orientation(image):
    """EXIF's 1 (upright) to 8 of an opened image, from its header alone."""
    if image.format == "TIFF":
        return 1  # Pillow turns these by itself
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}:
        return 1  # getexif() would decode all pixels to look for a tag behind them
    with contextlib.suppress(Exception):  # a damaged tag must not cost the frame
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in TURNS else 1
    return 1


def decode(picture, factor=1):
    """Upright RGB pixels of a Picture, its stored sides divided by `factor` (1, 2, 4 or 8) and rounded up."""
    image = picture.image
    deep = ";16" in str(getattr(image, "tile", ""))  # known until the pixels are there
    if factor > 1 and image.format == "JPEG":
        image.draft("RGB", (image.width // factor, image.height // factor))  # the decoder's own scaled inverse DCT
        factor = 1
    load(picture)
    image = eight_bits(image, deep)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return picture.upright(image.reduce(factor) if factor > 1 else image)


def load(picture):
    picture.image.load()
    if picture.image.format == "PNG" and orientation(picture.image) != picture.orientation:
        raise ValueError("its EXIF orientation stands behind its pixels, where no header shows it: save it anew")


def eight_bits(image, deep):
    """A loaded image with 8 bits a channel; ValueError where the range of its values cannot be known.

    deep: it had 16 (of which Pillow keeps the upper 8 where there are colours). 12 bits stored in 16 would be black.
    """
    if image.mode == "F":
        raise ValueError("holds floating-point numbers, of which nobody knows what is white: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"holds values from {values.min()} to {values.max()}, not 0 to 65535: convert it to 8 bits")
        image, deep = Image.fromarray(((values + 128) // 257).astype(np.uint8)), values.max() <= 4095
    elif deep:
        deep = max(high for _, high in image.convert("RGB").getextrema()) <= 4095 // 256
    if deep:
        raise ValueError("of its 16 bits none above the twelfth is used, so it would be black: stretch it to all 16")
    return image


@retried
def read_image(path, draft=None):
    """Upright PIL RGB image. draft: (width, height) that the caller needs at least: a much larger frame is decoded at
    1/2, 1/4 or 1/8.

    16 bits are divided by 257; of several pictures the first is read. Raises BadImage for a missing, unreadable, empty,
    truncated or absurdly large file and for one whose range is unknown (see eight_bits), Transient for a failing disk.
    """
    with opened(path) as picture:
        room = min(picture.width / draft[0], picture.height / draft[1]) if draft else 1
        return decode(picture, shrink(room))


def shrink(room):
    """The largest factor of the JPEG decoder that does not exceed `room`."""
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(room, 1))


def eval_image(path, size=224, view="crop"):
    """(3, size, size) normalised floats of a file, as `square` makes them."""
    return square(read_image(path), size, view)


def square(image, size, view="crop"):
    """PIL RGB image -> (3, size, size) normalised floats. view "crop": short side to size*256/224, bicubic, then the
    centre (DINOv2's evaluation transform); "stretch": all of the frame, for what must not lose its borders."""
    if view == "crop":
        image = TF.center_crop(TF.resize(image, round(size * 256 / 224), InterpolationMode.BICUBIC), size)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------------------------------------------------------------------------------------
# Masks: saved as 0 and 255, as 0 and 1, in colours, in a palette, in an alpha channel, with 16 bits, as JPEG. What
# cannot be told from what it might mean otherwise is refused: a mask read as empty would not be noticed in a mean

LOSSY = {"JPEG", "MPO"}  # values near 0 and near 255 where 0 and 255 were meant


@retried
def read_mask(path, size=None):
    """(H, W) bool tensor, upright, True on the object; with `size`, shrunk to that square.

    0 and one other value, whichever, are the two halves of a lossless mask; of a lossy one everything above 127 is the
    object, and it is empty if nothing reaches 16. BadImage if the values mean neither.
    """
    with opened(path) as picture:
        load(picture)
        mask = picture.upright(Image.fromarray(black_and_white(mask_values(picture.image), picture.image.format in LOSSY)))
    mask = mask if size is None else mask.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(mask) > 127)


def mask_values(image):
    """(H, W) array of a loaded mask: its grey values, or where it has colours whatever in them tells two halves apart."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))                                     # (H, W, 4)
        varies = np.ptp(rgba, (0, 1)) > 0                                            # (4,)
        if varies[3] and varies[:3].any():
            raise ValueError("as a mask it says one thing in its colours and one in its alpha channel: save one of them")
        if varies[3] or not (varies.any() or rgba[0, 0, 3]):  # nothing to be seen: an empty one of such a set
            return rgba[..., 3]
    if image.mode == "P":
        index = np.asarray(image)
        used = np.unique(index)
        bright = np.array(image.getpalette("RGB")).reshape(-1, 3).max(1) >= 16       # (colours,)
        if not bright[used].any():
            return index  # classes by number, in colours that were never meant to be seen
        if len(used) == 2:
            if bright[used].all():
                raise ValueError("as a mask it has two bright colours: make the background black")
            return bright[index] * np.uint8(255)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("L", "F") or image.mode.startswith("I"):
        return np.asarray(image)
    rgb = np.asarray(image.convert("RGB"))
    grey = image.format in LOSSY and np.ptp(rgb, 2).max() < 64  # what chroma compression does to a grey picture
    return np.asarray(image.convert("L")) if grey else rgb.max(2)  # red is as much of an object as white


def black_and_white(values, lossy):
    """(H, W) uint8, above 127 on the object. ValueError where the largest value is neither the other half of 0 nor white."""
    low, high = values.min(), values.max()
    if lossy:
        if high < 16:
            return np.zeros(values.shape, np.uint8)
        white = high >= 192
    else:
        if low == 0 and ((values == 0) | (values == high)).all():
            return np.where(values > 0, np.uint8(255), np.uint8(0))
        top = {"u1": 255, "u2": 65535, "i4": 65535}.get(values.dtype.str[1:], 0)  # of float nobody knows it
        white = low >= 0 and 0.9 * top <= high <= top
    if not white:
        raise ValueError(f"as a mask it has values from {low} to {high}, which are neither 0 and one other value nor "
                         "black to white: save 255 on the object and 0 elsewhere")
    return values if values.dtype == np.uint8 else (values.astype(np.int64) // 257).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- frames

class Frames:
    """Index of unlabelled frames: a folder's in sorted order, a manifest's in its own. A frame costs the bytes of its path + 12,
    so millions fit.

    root: a folder (every sub-folder is a video; a tar shard counts as one), a shard, or a manifest (csv with columns
    path, video, ...; paths relative to it, `shard.tar/member` in a shard).
    only: file of paths, names or stems, one a line; every line must match exactly one frame.
    """

    def __init__(self, root, only=None):
        self.root = Path(root)
        manifest = self.root if self.root.suffix == ".csv" else self.root / "manifest.csv"
        if manifest.is_file():
            self.root = manifest.parent
            entries = ((row["path"], row.get("video")) for row in read_csv(manifest, ("path",)))
        elif self.root.is_dir() or is_shard(self.root):
            entries = ((path, None) for path in scan(str(self.root)))
        else:
            raise FileNotFoundError(f"{root}: no such folder or manifest of frames")
        blob, ends, number, of = bytearray(), array.array("q"), {}, array.array("i")  # never a million Python strings at once
        shards = set()  # as the paths name them, without ".tar"
        for path, video in matching(entries, only, self.root) if only else entries:
            blob += os.fsencode(path)
            ends.append(len(blob))
            of.append(number.setdefault(video or os.path.dirname(path), len(number)))
            shards.update(path.split(".tar/")[:1] if ".tar/" in path else ())
        if not ends:
            raise FileNotFoundError(f"{root}: no images here ({', '.join(SUFFIXES)})")
        for shard in sorted(os.path.join(self.root, f"{shard}.tar") for shard in shards):
            if is_shard(shard):
                shard_index(shard)  # those that a manifest names: here, with progress, not in every worker at its first frame
        self.blob, self.ends = bytes(blob), np.frombuffer(ends, np.int64)
        self.videos, self.video_of = list(number), np.frombuffer(of, np.int32)

    def __len__(self):
        return len(self.ends)

    def name(self, i):
        return os.fsdecode(self.blob[self.ends[i - 1] if i else 0:self.ends[i]])

    def path(self, i):
        return os.path.join(self.root, self.name(i))

    def video(self, i):
        return self.videos[self.video_of[i]]


def scan(root, below=""):
    """Relative paths of the images under root, depth first, in sorted order; a tar shard stands for a folder."""
    here = os.path.join(root, below) if below else root
    if is_shard(here):
        yield from (os.path.join(below, name) for name in shard_members(here))
        return
    with os.scandir(here) as entries:
        entries = sorted((e.name, e.is_dir() or is_shard(e.path)) for e in entries if not e.name.startswith("."))
    folders = [name for name, is_dir in entries if is_dir]
    if "images" in folders and "masks" in folders:
        folders.remove("masks")  # labels of the frames beside them, not frames
    for name, is_dir in entries:
        if not is_dir and name.lower().endswith(SUFFIXES):
            yield os.path.join(below, name)
    for name in folders:
        yield from scan(root, os.path.join(below, name))


def matching(entries, only, root):
    """Those (path, video) of the entries that the lines of the file `only` name; raises after the last one if a line names none."""
    wanted, found = set(read_lines(only)), {}
    for path, video in entries:
        base = os.path.basename(path)
        named = {path, base, os.path.splitext(base)[0], os.path.splitext(path)[0], os.path.join(root, path)} & wanted
        for line in named & found.keys():
            raise ValueError(f"{only}: {line!r} means both {found[line]} and {path}: give the path")
        found |= dict.fromkeys(named, path)
        if named:
            yield path, video
    missing = sorted(wanted - found.keys())
    if missing:
        raise FileNotFoundError(f"{only}: {len(missing)} lines name no frame under {root}, such as {missing[0]!r}")


def read_lines(path):
    return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]


def read_csv(path, columns, delimiter=","):
    """Yield the rows as dicts; raises if one of the columns is not there."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        missing = [c for c in columns if c not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; the first line names {rows.fieldnames or 'nothing'}")
        yield from rows


# ------------------------------------------------------------------------------------------------ labelled data and splits

@dataclass(frozen=True)
class Split:
    """Indices (int64) into a Labelled: hyper-parameters are chosen on val, test is what is reported."""
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Labelled:
    """A labelled data set in memory: paths, not pixels. Several splits are folds."""
    name: str
    paths: list
    labels: np.ndarray  # (n,) int64, or None
    classes: tuple
    groups: list  # patient, video or near-duplicate group of each path; the stem where nothing is known
    masks: list  # path of each frame's mask, or None
    splits: list

    def __post_init__(self):
        groups = np.asarray(self.groups)
        for k, split in enumerate(self.splits):
            parts = [set(groups[part]) for part in (split.train, split.val, split.test)]
            crossing = (parts[0] & parts[1]) | (parts[0] & parts[2]) | (parts[1] & parts[2])
            assert not crossing, f"{self.name}: {len(crossing)} groups cross split {k}, such as {min(crossing)}"


def images_in(folder):
    """Sorted paths of the images right in a folder, then of those in its tar shards; raises if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    paths += [f"{shard}/{name}" for shard in sorted(folder.glob("*.tar")) for name in shard_members(shard)]
    if not paths:
        raise FileNotFoundError(f"{folder}: no images in this folder")
    return paths


def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def fold_splits(folds):
    """One split per fold: test = fold k, val = the next one, train = the rest. folds: (n,) fold of each item."""
    folds = np.asarray(folds)
    names = np.unique(folds)
    if len(names) < 3:
        raise ValueError(f"folds {names.tolist()}: three or more are needed for train, val and test")
    test_val = zip(names, np.roll(names, -1))
    return [Split(*(np.flatnonzero(part) for part in ((folds != t) & (folds != v), folds == v, folds == t))) for t, v in test_val]


def balanced_folds(labels, groups, n_folds, seed=0):
    """(n,) fold of each item: whole groups, dealt so that the folds' class counts stay even."""
    labels, groups = np.asarray(labels), np.asarray(groups)
    names, inverse = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), labels.max() + 1))
    np.add.at(counts, (inverse, labels), 1)
    share = counts.sum(0) / n_folds
    have, fold_of = np.zeros((n_folds, counts.shape[1])), np.zeros(len(names), int)
    order = np.random.default_rng(seed).permutation(len(names))
    for g in order[np.argsort(-counts[order].sum(1), kind="stable")]:  # the largest groups first
        cost = (((have + counts[g] - share) / share.clip(1)) ** 2 - ((have - share) / share.clip(1)) ** 2).sum(1)
        fold_of[g] = cost.argmin()
        have[fold_of[g]] += counts[g]
    return fold_of[inverse]


def within(root, *names):
    """root itself or its first sub-folder of these names that exists."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return next((root / name for name in names if (root / name).is_dir()), root)


HYPER_KVASIR = "hyper-kvasir", "HyperKvasir", "hyperkvasir"
LANDMARKS = "cecum", "ileum", "retroflex-rectum", "pylorus", "retroflex-stomach", "z-line"
GRADES = tuple(f"ulcerative-colitis-grade-{g}" for g in (1, 2, 3))


def load_landmarks(root):
    """HyperKvasir's six anatomical landmarks in its official 5 folds (Borgli et al. 2020)."""
    return load_hyper_kvasir(root, "anatomical-landmarks", LANDMARKS, "HyperKvasir anatomical landmarks")


def load_uc_grades(root):
    """HyperKvasir's ulcerative colitis grades 1, 2, 3 (labels 0, 1, 2); frames graded between two grades are left out."""
    return load_hyper_kvasir(root, "pathological-findings", GRADES, "HyperKvasir UC grades")


def load_hyper_kvasir(root, kind, names, title):
    root = within(root, *HYPER_KVASIR)
    folders = {p.name: p for p in sorted(root.glob(f"labeled-images/*/{kind}/*")) if p.name in names}
    if not folders:
        raise FileNotFoundError(f"{root}: expected HyperKvasir's labeled-images/*/{kind}/<class>, found {found_in(root)}")
    classes = tuple(name for name in names if name in folders)
    labelled = [(path, label) for label, name in enumerate(classes) for path in images_in(folders[name])]
    split_file = root / "official_splits" / "5_fold_split.csv"
    # the list's class names differ from the folders' (polyp / polyps): only the stem joins them
    fold = {stem(row["file-name"]): int(row["split-index"]) for row in read_csv(split_file, ("file-name", "split-index"), ";")}
    unlisted = [path for path, _ in labelled if stem(path) not in fold]
    if unlisted:
        raise ValueError(f"{split_file}: {len(unlisted)} frames on disk are not listed, such as {unlisted[0]}")
    group, graded = near_duplicates(root), {}
    for path, label in labelled:
        graded.setdefault(group.get(stem(path), path), set()).add(label)
    groups = [group.get(stem(path), patient(path)) for path, _ in labelled]
    # one frame under two labels says nothing: drop it
    keep = [i for i, (path, _) in enumerate(labelled) if len(graded[group.get(stem(path), path)]) == 1]
    paths, labels, groups = [labelled[i][0] for i in keep], np.array([labelled[i][1] for i in keep]), [groups[i] for i in keep]
    first = {}
    folds = [first.setdefault(g, fold[stem(path)]) for g, path in zip(groups, paths)]  # a group goes where its first frame is
    title = f"{title}, official folds {', '.join(map(str, sorted(set(folds))))}"
    return Labelled(title, paths, labels, classes, groups, None, fold_splits(folds))


# HyperKvasir has no patient ids, but these pairs of frames are one picture; the first two pairs stand under grades 1 and 2.
UC_DUPLICATES = (("a773a269-2c3b-4e0f-b08b-6f38be28f459", "3310f409-edcd-4e42-91a2-7ed7f4f1f819"),
                 ("d9500395-1afa-4b21-9f93-92fa4c205052", "ba2d6327-80f2-4ba1-afb5-f432a0e56aa5"),
                 ("42c02f16-5a04-4aa6-b8d4-f28495ffd82c", "5ab39c90-07e9-4598-afa6-adec0e9c23dc"),
                 ("946cd5e6-1f6a-4188-9534-ee725f754106", "b0a65ced-68d6-4362-b3b7-4ca36fb93e53"))


def near_duplicates(root):
    """{stem: group} of near-duplicates: the pairs above, and those of an index.csv (file, near_dup_group) in root if there is one."""
    groups = {s: pair[0] for pair in UC_DUPLICATES for s in pair}
    if (root / "index.csv").is_file():
        rows = read_csv(root / "index.csv", ("file", "near_dup_group"))
        groups |= {stem(row["file"]): f"near-duplicate {row['near_dup_group']}" for row in rows if row["near_dup_group"]}
    return groups


def load_limuc(root):
    """LIMUC, Mayo 0-3 (Polat et al. 2022): the ten official folds, each with the fixed test set; without the lists, folds by
    patient. A file name can stand under two classes (8 do), so the key is (class, name)."""
    root = within(root, "LIMUC")
    classes = tuple(f"Mayo {k}" for k in range(4))
    if not (root / "train_and_validation_sets").is_dir():
        return load_limuc_by_patient(root, classes)
    key_of = lambda path: tuple(Path(path).parts[-2:])
    paths = [path for c in classes for path in images_in(root / "train_and_validation_sets" / c)]
    n = len(paths)
    paths += [path for c in classes for path in images_in(root / "test_set" / c)]
    labels = np.array([classes.index(key_of(path)[0]) for path in paths])
    groups = [patient(path) for path in paths]
    test, lists = np.arange(n, len(paths)), root / "cross_validation_folds_train_val_info"
    if lists.is_dir():
        index = {key_of(path): i for i, path in enumerate(paths[:n])}
        splits = [Split(*(read_fold(fold / f"{part}.json", index) for part in ("train", "val")), test)
                  for fold in sorted(lists.glob("fold_*"), key=lambda p: int(p.name.split("_")[1]))]
        return Labelled("LIMUC, ten official folds", paths, labels, classes, groups, None, splits)
    folds = balanced_folds(labels[:n], groups[:n], 10)
    splits = [Split(np.flatnonzero(folds != k), np.flatnonzero(folds == k), test) for k in range(10)]
    return Labelled("LIMUC, official test set, ten folds by patient", paths, labels, classes, groups, None, splits)


def load_limuc_by_patient(root, classes):
    folder = root / "patient_based_classified_images"
    paths = sorted(str(p) for p in folder.glob("*/Mayo ?/*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{root}: expected LIMUC's train_and_validation_sets/Mayo k and test_set/Mayo k, or "
                                f"patient_based_classified_images/<patient>/Mayo k, found {found_in(root)}")
    labels = np.array([classes.index(Path(path).parts[-2]) for path in paths])
    groups = [Path(path).parts[-3] for path in paths]
    splits = fold_splits(balanced_folds(labels, groups, 10))
    return Labelled("LIMUC, ten folds by patient (no official lists)", paths, labels, classes, groups, None, splits)


def patient(path):
    """The id in LIMUC's UC_patient_<id>_<n>.bmp or synthetic.py's patient<id>_<n>.jpg; of any other name the stem: nothing is known."""
    name = stem(path)
    return name.removeprefix("UC_").removeprefix("patient").removeprefix("_").rsplit("_", 1)[0] if "patient" in name else name


def read_fold(path, index):
    """Indices of the (class, name) entries of a LIMUC list."""
    keys = [(c, name) for c, names in json.loads(path.read_text()).items() for name in names]
    missing = [key for key in keys if key not in index]
    if missing:
        raise FileNotFoundError(f"{path}: {len(missing)} listed frames are missing, such as {'/'.join(missing[0])}")
    return np.array([index[key] for key in keys])


def load_kvasir_seg(root):
    """Kvasir-SEG (Jha et al. 2020), the official 880 / 120 frames: test is the official val.txt, val a tenth of train.txt."""
    root = within(root, "Kvasir-SEG", "kvasir-seg")
    lists = within(root, "Data-split")
    paths, masks = paired(root)
    index = {stem(path): i for i, path in enumerate(paths)}
    parts = []
    for file in (lists / "train.txt", lists / "val.txt"):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the official split list is missing (Data-split/ of the Kvasir-SEG repository)")
        names = read_lines(file)
        missing = [name for name in names if stem(name) not in index]
        if missing:
            raise FileNotFoundError(f"{file}: {len(missing)} listed frames are missing from {root / 'images'}, such as {missing[0]}")
        parts.append(np.array([index[stem(name)] for name in names]))
    groups = [patient(p) for p in paths]
    train, val = hold_out(parts[0], groups)
    title = f"Kvasir-SEG, official {len(parts[0])}/{len(parts[1])}"
    return Labelled(title, paths, None, ("polyp",), groups, masks, [Split(train, val, parts[1])])


def hold_out(indices, groups, seed=0):
    """(rest, a tenth of the groups) of the indices, seeded; groups: the patient or video of every frame."""
    groups = np.asarray(groups)[indices]
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    held = np.isin(groups, order[:max(1, len(order) // 10)])
    return np.sort(indices[~held]), np.sort(indices[held])


def paired(root, images="images", masks="masks"):
    """Paths of a folder's images and of the masks of the same stem and size."""
    paths = images_in(root / images)
    mask_of = {stem(path): path for path in images_in(root / masks)}
    for path in paths:
        if stem(path) not in mask_of:
            raise FileNotFoundError(f"{path}: no mask of this stem in {root / masks}")
        mask = mask_of[stem(path)]
        with opened(path) as a, opened(mask) as b:
            sizes = a.size, b.size
        if sizes[0] != sizes[1]:
            raise ValueError(f"{mask}: the mask is {sizes[1][0]}x{sizes[1][1]}, its frame {path} is {sizes[0][0]}x{sizes[0][1]}")
    return paths, [mask_of[stem(path)] for path in paths]


def load_pranet(root, test="Kvasir"):
    """PraNet's 1,450 training frames (900 Kvasir-SEG + 550 CVC-ClinicDB) and one of its five test sets (Fan et al. 2020)."""
    root = within(root, "data") if not (Path(root) / "TrainDataset").is_dir() else Path(root)
    sets = [root / "TrainDataset", root / "TestDataset" / test]
    if not sets[0].is_dir() or not sets[1].is_dir():
        raise FileNotFoundError(f"{root}: expected PraNet's TrainDataset and TestDataset/{test}, found {found_in(root)}")
    (paths, masks), (test_paths, test_masks) = (paired(s, "images" if (s / "images").is_dir() else "image",
                                                       "masks" if (s / "masks").is_dir() else "mask") for s in sets)
    train, val = hold_out(np.arange(len(paths)), [patient(p) for p in paths])
    split = Split(train, val, np.arange(len(paths), len(paths) + len(test_paths)))
    groups = [f"train/{patient(p)}" for p in paths] + [f"{test}/{patient(p)}" for p in test_paths]
    return Labelled(f"PraNet's split, test {test}", paths + test_paths, None, ("polyp",), groups, masks + test_masks, [split])


def load_folders(root):
    """Any labelled set as <class>/<image> or <class>/<patient>/<image>: five folds, whole patients, balanced classes."""
    root = within(root)
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    found = [(path, label) for label, c in enumerate(classes) for path in scan(str(root / c))]
    if len({label for _, label in found}) < 2:
        raise FileNotFoundError(f"{root}: expected two or more class folders with images, found {found_in(root)}")
    paths = [str(root / classes[label] / path) for path, label in found]
    groups = [os.path.dirname(path) or stem(path) for path, _ in found]
    labels = np.array([label for _, label in found])
    return Labelled(f"{root.name}, five folds", paths, labels, classes, groups, None, fold_splits(balanced_folds(labels, groups, 5)))


def open_labelled(root, task):
    """The labelled data of a task ("landmarks", "polyps" or "mes"), whichever known layout lies in root or just below it."""
    layouts = {
        "landmarks": ((HYPER_KVASIR, "labeled-images/*/anatomical-landmarks/*", load_landmarks),),
        "polyps": ((("Kvasir-SEG", "kvasir-seg"), "masks", load_kvasir_seg), (("data",), "TrainDataset", load_pranet)),
        "mes": ((("LIMUC",), "train_and_validation_sets", load_limuc), (("LIMUC",), "patient_based_classified_images", load_limuc),
                (HYPER_KVASIR, "labeled-images/*/pathological-findings/ulcerative-colitis-grade-?", load_uc_grades)),
    }
    if task not in layouts:
        raise ValueError(f"task {task!r} is none of {', '.join(layouts)}")
    for folders, sign, load in layouts[task]:
        if any(within(root, *folders).glob(sign)):
            return load(root)
    expected = "; ".join(f"{folders[0]}/{sign}" for folders, sign, _ in layouts[task])
    if task == "landmarks":  # or class folders, if they are not those of another layout (images and masks, say)
        if not any(any(within(root, *folders).glob(sign)) for rows in layouts.values() for folders, sign, _ in rows):
            with contextlib.suppress(FileNotFoundError):
                return load_folders(root)
        expected += "; <class>/<image>; <class>/<patient>/<image>"
    raise FileNotFoundError(f"{root}: expected one of the layouts {expected} for {task}, found {found_in(root)}")


def found_in(root):
    return ", ".join(sorted(p.name for p in Path(root).iterdir())[:8]) or "nothing"


def main(argv=None):
    import augment  # lazily: the reader of frames needs neither crops nor pictures
    import figures
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help="folder of frames or manifest; the synthetic frames if not given")
    parser.add_argument("--show", default="sheet.png", help="PNG to write: one frame's crops and masks")
    parser.add_argument("--frame", type=int, default=0, help="number of the frame")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other crops")
    parser.add_argument("--blur", default="as-executed", choices=augment.BLUR, help="probabilities of the blur as DINOv2's code runs or reads")
    args = parser.parse_args(argv)
    if args.data is None:
        import synthetic  # the frames that come with the project, made here on first use
        args.data = synthetic.ensure() / "unlabelled"
    try:
        frames = Frames(args.data)
        if not 0 <= args.frame < len(frames):
            parser.error(f"--frame {args.frame}: {args.data} has the frames 0 to {len(frames) - 1}")
        figures.crops(augment.MultiCrop(frames, args.seed, blur=args.blur), args.frame, args.show)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"{len(frames)} frames of {len(frames.videos)} videos in {args.data}; frame {args.frame} is drawn in {args.show}")


if __name__ == "__main__":
    main()
