"""Frames: where they lie, how they are read, labelled and split.

    python data.py --data FRAMES --show sheet.png   one frame's crops and masks, as the network sees them
    python data.py --show sheet.png                 the same of a synthetic frame
"""
import argparse
import array
import collections
import contextlib
import csv
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images import (IMAGENET_MEAN, IMAGENET_STD, BadImage, Transient, decode,  # noqa: F401
                    eval_image, opened, read_image, read_mask, retried, say_once, shrink, square)
from shards import (SUFFIXES, BadShard, Sentence, is_shard, open_file, shard_index,  # noqa: F401
                    shard_members, split_shard, stamp, visible)


# -----------------------------------------------------------------------------------------------
# Frames without labels

SIDECARS = (".csv", ".txt", ".json", ".xml", ".md", ".html", ".log", ".ini", ".db", ".npy", ".npz",
            ".pt", ".tar")  # lie beside frames, and nobody would take them for any


class Frames:
    """Index of unlabelled frames: a folder's in sorted order, a manifest's in its own. A frame
    costs the bytes of its path + 12, so millions fit.

    root: a folder (every sub-folder is a video; a tar shard counts as one), a shard, or a
    manifest (csv with columns path, video, ...; paths relative to it, `shard.tar/member` in a
    shard). only: file of paths, names or stems, one a line; every line must match exactly one
    frame."""

    def __init__(self, root, only=None):
        self.root, passed = Path(root), collections.Counter()
        manifest = self.root if self.root.suffix == ".csv" else self.root / "manifest.csv"
        if manifest.is_file():
            self.root = manifest.parent
            entries = ((row["path"], row.get("video")) for row in read_csv(manifest, ("path",)))
        elif self.root.is_dir() or is_shard(self.root):
            entries = ((path, None) for path in scan(str(self.root), passed=passed))
        else:
            raise FileNotFoundError(f"{root}: no such folder or manifest of frames")
        hashes = self.collect(matching(entries, only, self.root) if only else entries)
        say_passed_over(root, passed)
        if not len(self):
            raise FileNotFoundError(f"{root}: no images here ({', '.join(SUFFIXES)})")
        if manifest.is_file():
            self.drop_repeated(manifest, hashes)

    def collect(self, entries):
        """Take up (path, video) pairs, of which there may be millions: never as many Python
        strings at once. Returns the hash of each path."""
        blob, number, shards = bytearray(), {}, set()  # shards by their names without ".tar"
        ends, of, hashes = array.array("q"), array.array("i"), array.array("q")
        for path, video in entries:
            name = os.fsencode(path)
            blob += name
            ends.append(len(blob))
            hashes.append(hash(name))
            of.append(number.setdefault(video or os.path.dirname(path), len(number)))
            shards.update(path.split(".tar/")[:1] if ".tar/" in path else ())
        for shard in sorted(os.path.join(self.root, f"{shard}.tar") for shard in shards):
            if is_shard(shard):
                shard_index(shard)  # here, with progress, not in every worker at its first frame
        self.blob, self.ends = bytes(blob), np.frombuffer(ends, np.int64)
        self.videos, self.video_of = list(number), np.frombuffer(of, np.int32)
        return np.frombuffer(hashes, np.int64)

    def drop_repeated(self, manifest, hashes):
        """A frame that two rows name counts once, and that is said."""
        kept = np.sort(np.unique(hashes, return_index=True)[1])
        if len(kept) == len(self):
            return
        again = np.setdiff1d(np.arange(len(self)), kept)
        say_once(f"{manifest}: {len(again)} rows name a frame that an earlier row names, such as "
                 f"{self.name(again[0])}; each frame counts once")
        names = [self.raw(i) for i in kept]
        self.blob, self.ends = b"".join(names), np.cumsum([len(name) for name in names])
        self.video_of = self.video_of[kept]

    def __len__(self):
        return len(self.ends)

    def raw(self, i):
        return self.blob[self.ends[i - 1] if i else 0:self.ends[i]]

    def name(self, i):
        return os.fsdecode(self.raw(i))

    def path(self, i):
        return os.path.join(self.root, self.name(i))

    def video(self, i):
        return self.videos[self.video_of[i]]


def scan(root, below="", passed=None):
    """Relative paths of the images under root, depth first, in sorted order; a tar shard stands
    for a folder.

    passed: a Counter that takes up the suffixes of the files that are no images (see
    say_passed_over)."""
    here = os.path.join(root, below) if below else root
    if is_shard(here):
        yield from (os.path.join(below, name) for name in shard_members(here))
        return
    with os.scandir(here) as entries:
        entries = sorted((e.name, e.is_dir() or is_shard(e.path))
                         for e in entries if visible(e.name))
    folders = [name for name, is_dir in entries if is_dir]
    if "images" in folders and "masks" in folders:
        folders.remove("masks")  # labels of the frames beside them, not frames
    for name, is_dir in entries:
        if not is_dir and name.lower().endswith(SUFFIXES):
            yield os.path.join(below, name)
        elif not is_dir and passed is not None:
            passed[os.path.splitext(name)[1].lower()] += 1
    for name in folders:
        yield from scan(root, os.path.join(below, name), passed)


def say_passed_over(root, passed):
    """Name, once, the kinds of files that lie among the images and are not read; passed: Counter
    of suffixes."""
    counts = [f"{n} {suffix or 'without a suffix'}" for suffix, n in passed.most_common()
              if suffix not in SIDECARS]
    if counts:
        say_once(f"{root}: passed over files that are not read as frames: {', '.join(counts)}. "
                 "Pictures of other kinds must be converted, videos cut into frames")


def matching(entries, only, root):
    """Those (path, video) of the entries that the lines of the file `only` name; raises after
    the last one if a line names none."""
    wanted, found = set(read_lines(only)), {}
    for path, video in entries:
        bare, base = os.path.splitext(path)[0], os.path.basename(path)
        named = wanted & {path, base, bare, stem(path), os.path.join(root, path)}
        for line in named & found.keys():
            if found[line] != path:
                raise ValueError(f"{only}: {line!r} means both {found[line]} and {path}: "
                                 "give the path")
        found |= dict.fromkeys(named, path)
        if named:
            yield path, video
    missing = sorted(wanted - found.keys())
    if missing:
        raise FileNotFoundError(f"{only}: {len(missing)} lines name no frame under {root}, such as "
                                f"{missing[0]!r}{not_utf8(missing[0])}")


# -----------------------------------------------------------------------------------------------
# Lists and tables, as people save them: with a mark of their encoding in front, blanks after
# commas, empty cells

def text_of(path):
    """An open text file. Bytes that are no UTF-8 stay what they are, since names of files need
    not be any either."""
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path}: is text in UTF-16: save it as UTF-8")
    return open(path, newline="", encoding="utf-8-sig", errors="surrogateescape")


def not_utf8(name):
    """What to add where a name from a list was not found."""
    return "" if name.isprintable() else " (the list is not in UTF-8: save it as UTF-8)"


def read_lines(path):
    with text_of(path) as file:
        return [line.strip() for line in file.read().splitlines() if line.strip()]


def read_csv(path, columns, delimiter=",", empty=()):
    """Yield the rows as dicts. ValueError if one of the columns is not there, or if a row has
    nothing in one of them that is not in `empty`."""
    with text_of(path) as file:
        rows = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
        names = rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        missing = [c for c in columns if c not in names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; the first line names "
                             f"{names or 'nothing'}")
        for row in rows:
            for column in columns:
                if row[column] is None or not row[column].strip() and column not in empty:
                    raise ValueError(f"{path}: line {rows.line_num} has no {column}")
            yield row


# -----------------------------------------------------------------------------------------------
# Labelled data and splits

@dataclass(frozen=True)
class Split:
    """Indices (int64) into a Labelled: hyper-parameters are chosen on val, test is what is
    reported."""
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Labelled:
    """A labelled data set in memory: paths, not pixels. Several splits are folds; none: it can
    only be tested on.

    What synthetic.py made says so in the first word of its name, so that no table of it passes
    for one of patients."""
    name: str
    paths: list
    labels: np.ndarray  # (n,) int64, or None
    classes: tuple
    groups: list  # patient, video or near-duplicates of each path; its own name if nothing is known
    masks: list  # path of each frame's mask, or None
    splits: list
    root: str = ""  # the folder that was read

    def __post_init__(self):
        if self.root and is_synthetic(self.root) and not self.name.startswith("synthetic"):
            object.__setattr__(self, "name", f"synthetic frames in the layout of {self.name}")
        groups = np.asarray(self.groups)
        for k, split in enumerate(self.splits):
            parts = split.train, split.val, split.test
            train, val, test = (set(groups[part]) for part in parts)
            crossing = train & val | train & test | val & test
            if crossing:
                raise ValueError(f"{self.root or self.name}: {len(crossing)} groups cross split {k}, "
                                 f"such as {min(crossing)}: all frames of a patient must be in one "
                                 "part of it")

    @property
    def grouping(self):
        """For a table's head: what intervals draw, and splits keep, together."""
        groups = len(set(self.groups))
        if groups < len(self.paths):
            return f"{groups} groups of {len(self.paths)} frames (patients, videos, near-duplicates)"
        return ("of no two frames it is known that they belong together, so frames count as "
                "independent (a groups.csv would say)")


def is_synthetic(root):
    """Whether synthetic.py wrote what lies under root: its made_by.json is there or above."""
    for folder in (Path(root).resolve(), *Path(root).resolve().parents):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            made_by = json.loads((folder / "made_by.json").read_text())
            if {"videos", "scale", "seed"} <= made_by.keys():
                return True
    return False


# -----------------------------------------------------------------------------------------------
# Which frames belong together

def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


PATIENT = re.compile(r"(?<![a-z])patient[ _-]*([a-z]*\d+|[a-z]+(?=[ _-]+\(?\d+\)?$))")


def patient(path, otherwise=None):
    """The id in LIMUC's UC_patient_<id>_<n>.bmp, synthetic.py's patient<id>_<n>.jpg and their
    like: "Patient 12 (3)", "patient-A7-3". Of any other name nothing is known: `otherwise`, or
    the stem."""
    found = PATIENT.search(stem(path).lower())
    return found[1] if found else otherwise or stem(path)


def groups_of(root, paths, known):
    """The group of each path: from a groups.csv (file, group) in root if there is one, else
    `known(path)`.

    file: a path below root, a name or a stem. ValueError if the list does not have all of the
    paths."""
    file, listed = Path(root) / "groups.csv", {}
    if not file.is_file():
        return [known(path) for path in paths]
    for row in read_csv(file, ("file", "group")):
        if listed.setdefault(row["file"], row["group"]) != row["group"]:
            raise ValueError(f"{file}: {row['file']} is in two groups, {listed[row['file']]} and "
                             f"{row['group']}")
    names = [(os.path.relpath(path, root), os.path.basename(path), stem(path)) for path in paths]
    found = [next((listed[name] for name in of if name in listed), None) for of in names]
    missing = [name for (name, *_), group in zip(names, found) if group is None]
    if missing:
        raise ValueError(f"{file}: {len(missing)} frames are not listed, such as {missing[0]}")
    return found


def hold_out(indices, groups, share=10, seed=0):
    """(rest, one in `share` of the groups) of the indices, seeded; groups: the patient or video
    of every frame."""
    groups = np.asarray(groups)[indices]
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    held = np.isin(groups, order[:max(1, len(order) // share)])
    return np.sort(indices[~held]), np.sort(indices[held])


def fold_splits(folds):
    """One split per fold: test = fold k, val = the next one, train = the rest. folds: (n,) fold
    of each item."""
    folds = np.asarray(folds)
    names = np.unique(folds)
    if len(names) < 3:
        raise ValueError(f"folds {names.tolist()}: three or more are needed for training, "
                         "validation and test frames")
    splits = []
    for test, val in zip(names, np.roll(names, -1)):
        parts = (folds != test) & (folds != val), folds == val, folds == test
        splits.append(Split(*map(np.flatnonzero, parts)))
    return splits


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
        off = (have - share) / share.clip(1)  # how far a fold is from an even share of each class
        then = (have + counts[g] - share) / share.clip(1)
        fold_of[g] = (then ** 2 - off ** 2).sum(1).argmin()
        have[fold_of[g]] += counts[g]
    return fold_of[inverse]


def splits_by_group(root, labels, groups, n_folds, classes):
    """The splits of n_folds balanced folds. ValueError naming root where there are too few
    groups for three."""
    folds, groups = balanced_folds(labels, groups, n_folds), np.asarray(groups)
    if len(np.unique(folds)) < 3:
        counts = ", ".join(f"{name}: {len(set(groups[labels == k]))}"
                           for k, name in enumerate(classes))
        raise ValueError(f"{root}: training, validation and test frames need three patients of each "
                         f"class, or other groups of frames; found {counts}")
    return fold_splits(folds)


# -----------------------------------------------------------------------------------------------
# Folders

def within(root, *names):
    """root itself or its first sub-folder of these names that exists."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return next((root / name for name in names if (root / name).is_dir()), root)


def found_in(root):
    return ", ".join(sorted(p.name for p in Path(root).iterdir())[:8]) or "nothing"


def folders_in(root):
    """Names of the folders in a folder, sorted, but hidden ones and those that a system made."""
    return sorted(p.name for p in Path(root).iterdir() if p.is_dir() and visible(p.name))


def images_in(folder):
    """Sorted paths of the images right in a folder, then of those in its tar shards; raises if
    there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(p for p in folder.iterdir() if visible(p.name) and not p.is_dir())
    paths = [str(p) for p in files if p.suffix.lower() in SUFFIXES]
    others = [p.suffix.lower() for p in files if p.suffix.lower() not in SUFFIXES]
    say_passed_over(folder, collections.Counter(others))
    for shard in filter(is_shard, files):
        paths += [f"{shard}/{name}" for name in shard_members(shard)]
    if not paths:
        raise FileNotFoundError(f"{folder}: no images in this folder")
    return paths


# -----------------------------------------------------------------------------------------------
# HyperKvasir

HYPER_KVASIR = "hyper-kvasir", "HyperKvasir", "hyperkvasir"
LANDMARKS = "cecum", "ileum", "retroflex-rectum", "pylorus", "retroflex-stomach", "z-line"
GRADES = tuple(f"ulcerative-colitis-grade-{g}" for g in (1, 2, 3))


def load_landmarks(root):
    """HyperKvasir's six anatomical landmarks in its official 5 folds (Borgli et al. 2020)."""
    return load_hyper_kvasir(root, "anatomical-landmarks", LANDMARKS,
                             "HyperKvasir anatomical landmarks")


def load_uc_grades(root):
    """HyperKvasir's ulcerative colitis grades 1, 2, 3 (labels 0, 1, 2); frames graded between
    two grades are left out."""
    return load_hyper_kvasir(root, "pathological-findings", GRADES, "HyperKvasir UC grades")


def load_hyper_kvasir(root, kind, names, title):
    """Those classes of the published tree in its official folds; a group of near-duplicates goes
    where its first frame is, and what stands under two classes is dropped."""
    root = within(root, *HYPER_KVASIR)
    found = sorted(root.glob(f"labeled-images/*/{kind}/*"))
    folders = {folder.name: folder for folder in found if folder.name in names}
    if not folders:
        raise FileNotFoundError(f"{root}: expected HyperKvasir's labeled-images/*/{kind}/<class>, "
                                f"found {found_in(root)}")
    classes = tuple(name for name in names if name in folders)
    frames = [(path, k) for k, name in enumerate(classes) for path in images_in(folders[name])]
    fold = official_folds(root / "official_splits/5_fold_split.csv", [path for path, _ in frames])
    twins = near_duplicates(root)
    frames = of_one_label(frames, [twins.get(stem(path), path) for path, _ in frames])
    paths, labels = [path for path, _ in frames], np.array([label for _, label in frames])
    groups = groups_of(root, paths, lambda path: twins.get(stem(path), patient(path)))
    first = {}
    folds = [first.setdefault(group, fold[stem(path)]) for group, path in zip(groups, paths)]
    title = f"{title}, official folds {', '.join(map(str, sorted(set(folds))))}"
    return Labelled(title, paths, labels, classes, groups, None, fold_splits(folds), str(root))


def official_folds(file, paths):
    """{stem: fold} of the official list, which must have all of the paths. Its class names
    differ from the folders' (polyp, polyps), so only the stem joins them."""
    fold = {}
    for row in read_csv(file, ("file-name", "split-index"), ";"):
        if not row["split-index"].strip().isdigit():
            raise ValueError(f"{file}: {row['file-name']} is in fold {row['split-index']!r}, "
                             "which is no number")
        fold[stem(row["file-name"])] = int(row["split-index"])
    unlisted = [path for path in paths if stem(path) not in fold]
    if unlisted:
        raise ValueError(f"{file}: {len(unlisted)} frames on disk are not listed, such as "
                         f"{unlisted[0]}")
    return fold


def of_one_label(frames, pictures):
    """Those (path, label) whose picture, of the same length, has no other label elsewhere: one
    frame under two labels says nothing."""
    labels = collections.defaultdict(set)
    for picture, (_, label) in zip(pictures, frames):
        labels[picture].add(label)
    return [frame for picture, frame in zip(pictures, frames) if len(labels[picture]) == 1]


# HyperKvasir has no patient ids, but these pairs are one picture; the first two pairs stand
# under grades 1 and 2.
UC_DUPLICATES = (
    ("a773a269-2c3b-4e0f-b08b-6f38be28f459", "3310f409-edcd-4e42-91a2-7ed7f4f1f819"),
    ("d9500395-1afa-4b21-9f93-92fa4c205052", "ba2d6327-80f2-4ba1-afb5-f432a0e56aa5"),
    ("42c02f16-5a04-4aa6-b8d4-f28495ffd82c", "5ab39c90-07e9-4598-afa6-adec0e9c23dc"),
    ("946cd5e6-1f6a-4188-9534-ee725f754106", "b0a65ced-68d6-4362-b3b7-4ca36fb93e53"))


def near_duplicates(root):
    """{stem: group} of near-duplicates: the pairs above, and those of an index.csv (file,
    near_dup_group) in root if there is one."""
    groups = {s: pair[0] for pair in UC_DUPLICATES for s in pair}
    if (root / "index.csv").is_file():
        for row in read_csv(root / "index.csv", ("file", "near_dup_group"), empty=("near_dup_group",)):
            if row["near_dup_group"]:
                groups[stem(row["file"])] = f"near-duplicate {row['near_dup_group']}"
    return groups


# -----------------------------------------------------------------------------------------------
# LIMUC

def load_limuc(root):
    """LIMUC, Mayo 0-3 (Polat et al. 2022): the ten official folds, each with the fixed test set;
    without the lists, folds by patient. A file name can stand under two classes (8 do), so the
    key is (class, name)."""
    root = within(root, "LIMUC")
    classes = tuple(f"Mayo {k}" for k in range(4))
    if not (root / "train_and_validation_sets").is_dir():
        return load_limuc_by_patient(root, classes)
    rest, test = ([path for c in classes for path in images_in(root / part / c)]
                  for part in ("train_and_validation_sets", "test_set"))
    paths, n = rest + test, len(rest)
    labels = np.array([classes.index(Path(path).parts[-2]) for path in paths])
    groups = groups_of(root, paths, patient)
    test, lists = np.arange(n, len(paths)), root / "cross_validation_folds_train_val_info"
    if lists.is_dir():
        index = {Path(path).parts[-2:]: i for i, path in enumerate(rest)}
        folders = sorted(lists.glob("fold_*"), key=lambda p: int(p.name.split("_")[1]))
        splits = [Split(read_fold(fold / "train.json", index), read_fold(fold / "val.json", index), test)
                  for fold in folders]
        title = "LIMUC, ten official folds"
    else:
        folds = balanced_folds(labels[:n], groups[:n], 10)
        splits = [Split(np.flatnonzero(folds != k), np.flatnonzero(folds == k), test)
                  for k in range(10)]
        title = "LIMUC, official test set, ten folds by patient"
    return Labelled(title, paths, labels, classes, groups, None, splits, str(root))


def load_limuc_by_patient(root, classes):
    folder = root / "patient_based_classified_images"
    paths = sorted(str(p) for p in folder.glob("*/Mayo ?/*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{root}: expected LIMUC's train_and_validation_sets/Mayo k and "
                                "test_set/Mayo k, or patient_based_classified_images/<patient>/"
                                f"Mayo k, found {found_in(root)}")
    labels = np.array([classes.index(Path(path).parts[-2]) for path in paths])
    groups = [Path(path).parts[-3] for path in paths]
    splits = splits_by_group(root, labels, groups, 10, classes)
    title = f"LIMUC, {len(splits)} folds by patient (no official lists)"
    return Labelled(title, paths, labels, classes, groups, None, splits, str(root))


def read_fold(path, index):
    """Indices of the (class, name) entries of a LIMUC list."""
    try:
        listed = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is no list as LIMUC publishes them ({error})") from error
    keys = [(c, name) for c, names in listed.items() for name in names]
    missing = [key for key in keys if key not in index]
    if missing:
        raise FileNotFoundError(f"{path}: {len(missing)} listed frames are missing, such as "
                                f"{'/'.join(missing[0])}")
    return np.array([index[key] for key in keys])


# -----------------------------------------------------------------------------------------------
# Polyps and their masks

def load_kvasir_seg(root):
    """Kvasir-SEG (Jha et al. 2020), the official 880 / 120 frames: test is the official val.txt,
    val a tenth of train.txt."""
    root = within(root, "Kvasir-SEG", "kvasir-seg")
    lists = within(root, "Data-split")
    paths, masks = paired(root)
    index = {stem(path): i for i, path in enumerate(paths)}
    train_list, test_list = lists / "train.txt", lists / "val.txt"
    official, test = (read_list(file, index, root / "images") for file in (train_list, test_list))
    both = np.intersect1d(official, test)
    if len(both):
        raise ValueError(f"{train_list} and {test_list}: {len(both)} frames stand in both, such as "
                         f"{stem(paths[both[0]])}")
    groups = groups_of(root, paths, patient)
    train, val = hold_out(official, groups)
    title = f"Kvasir-SEG, official {len(official)}/{len(test)}"
    return Labelled(title, paths, None, ("polyp",), groups, masks, [Split(train, val, test)],
                    str(root))


def read_list(file, index, folder):
    """Indices of the frames whose names or stems a text file lists, each once."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the official split list is missing (Data-split/ of "
                                "Kvasir-SEG's repository)")
    names = list(dict.fromkeys(stem(name) for name in read_lines(file)))
    missing = [name for name in names if name not in index]
    if missing:
        raise FileNotFoundError(f"{file}: {len(missing)} listed frames are missing from {folder}, "
                                f"such as {missing[0]}{not_utf8(missing[0])}")
    return np.array([index[name] for name in names], int)


def load_pranet(root, test=None):
    """PraNet's 1,450 training frames (900 Kvasir-SEG + 550 CVC-ClinicDB) and one of its five
    test sets (Fan et al. 2020); without a name Kvasir, or else the first that is there."""
    root = within(root, "data") if not (Path(root) / "TrainDataset").is_dir() else Path(root)
    if test is None:
        there = folders_in(root / "TestDataset") if (root / "TestDataset").is_dir() else []
        test = there[0] if there and "Kvasir" not in there else "Kvasir"
    sets = [root / "TrainDataset", root / "TestDataset" / test]
    if not sets[0].is_dir() or not sets[1].is_dir():
        raise FileNotFoundError(f"{root}: expected PraNet's TrainDataset and TestDataset/{test}, "
                                f"found {found_in(root)}")
    (paths, masks), (test_paths, test_masks) = map(paired, sets)
    known, tested = groups_of(sets[0], paths, patient), groups_of(sets[1], test_paths, patient)
    train, val = hold_out(np.arange(len(paths)), known)
    split = Split(train, val, np.arange(len(paths), len(paths) + len(test_paths)))
    groups = [f"train/{group}" for group in known] + [f"{test}/{group}" for group in tested]
    return Labelled(f"PraNet's split, test {test}", paths + test_paths, None, ("polyp",), groups,
                    masks + test_masks, [split], str(root))


def load_masks(root):
    """A folder of images/ and masks/: Kvasir-SEG if its official lists are there, or at least
    one of them."""
    folder = within(root, "Kvasir-SEG", "kvasir-seg")
    listed = any((folder / name).exists() for name in ("train.txt", "val.txt", "Data-split"))
    return load_kvasir_seg(root) if listed else load_pairs(root)


ENOUGH = 20  # frames from which a folder without lists is split


def load_pairs(root):
    """Any folder of images/ and masks/ without lists of splits. From 20 frames up it has a split
    of its own, by group (groups.csv, or the patients in the names) and seeded: a fifth is
    tested, a tenth of the rest validates."""
    root = within(root, "Kvasir-SEG", "kvasir-seg")
    paths, masks = paired(root)
    groups, splits = groups_of(root, paths, patient), []
    if len(paths) >= ENOUGH:
        if len(set(groups)) < 3:
            raise ValueError(f"{root}: training, validation and test frames need three groups of "
                             f"frames, found {', '.join(sorted(set(groups)))}")
        rest, test = hold_out(np.arange(len(paths)), groups, 5)
        splits = [Split(*hold_out(rest, groups), test)]
    title = f"{root.resolve().name}, frames with masks"
    title += ", a seeded split by group" if splits else ""
    return Labelled(title, paths, None, ("polyp",), groups, masks, splits, str(root))


def paired(root):
    """Paths of the frames in root/images (or image) and of the masks of the same stem, size and
    orientation in root/masks (or mask)."""
    images, masks = (within(root, name + "s", name) for name in ("image", "mask"))
    if root in (images, masks):
        raise FileNotFoundError(f"{root}: expected the folders images and masks, "
                                f"found {found_in(root)}")
    frame_of, mask_of = by_stem(images_in(images)), by_stem(images_in(masks))
    for name, path in frame_of.items():
        if name not in mask_of:
            raise FileNotFoundError(f"{path}: no mask of this stem in {masks}")
        check_pair(path, mask_of[name])
    return list(frame_of.values()), [mask_of[name] for name in frame_of]


def by_stem(paths):
    found = {}
    for path in paths:
        if found.setdefault(stem(path), path) != path:
            raise ValueError(f"{found[stem(path)]} and {path} have one stem, by which frames and "
                             "masks are joined: rename or remove one")
    return found


def check_pair(path, mask):
    """ValueError if a frame and its mask are not the same picture's."""
    (size, turned), (mask_size, mask_turned) = header(path), header(mask)
    if turned != mask_turned:
        raise ValueError(f"{mask}: EXIF turns the frame {path} (orientation {turned}) otherwise than "
                         f"its mask ({mask_turned}): save both upright")
    if size != mask_size:
        raise ValueError(f"{mask}: the mask is {mask_size[0]}x{mask_size[1]}, its frame {path} is "
                         f"{size[0]}x{size[1]}")


@retried
def header(path):
    with opened(path) as picture:
        return picture.size, picture.orientation


def refuse_one_sided(masks, name):
    """ValueError if a list of bool tensors, a set's training masks, has nothing to learn from:
    all empty or all full."""
    what = None
    if not any(mask.any() for mask in masks):
        what = "empty"
    elif all(mask.all() for mask in masks):
        what = "full"
    if what:
        raise ValueError(f"{name}: all {len(masks)} training masks are {what}: look at how they are "
                         "saved")


# -----------------------------------------------------------------------------------------------
# Classes of one's own

PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
         "test": "test", "testing": "test"}


def load_folders(root):
    """Any labelled set as <class>/<image> or <class>/<patient>/.../<image>: five folds, whole
    patients, balanced classes. Or train/, val/ (or valid/) and test/ with the same classes in
    each; without val a tenth of train validates.

    Groups: groups.csv, else the first folder below the class, else the patient in the name; else
    each frame its own."""
    root = within(root)
    classes = tuple(name for name in folders_in(root) if has_images(root / name))
    if set(map(str.lower, classes)) <= PARTS.keys() and len(classes) > 1:
        return load_parts(root, classes)
    if len(classes) < 2:
        raise FileNotFoundError(f"{root}: expected two or more class folders with images, "
                                f"found {found_in(root)}")
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if empty := sorted(folders - set(classes)):
        say_once(f"{root}: passed over {', '.join(empty)}: no images in them")
    paths, labels = class_frames(root, classes)
    groups = folder_groups(root, root, paths)
    splits = splits_by_group(root, labels, groups, 5, classes)
    title = f"{root.resolve().name}, {len(splits)} folds"
    return Labelled(title, paths, labels, classes, groups, None, splits, str(root))


def load_parts(root, parts):
    """A tree that is split already: <part>/<class>/<image>."""
    of = {PARTS[name.lower()]: root / name for name in parts}
    if not {"train", "test"} <= of.keys() or len(of) < len(parts):
        raise ValueError(f"{root}: its folders {', '.join(parts)} look like the parts of a split: "
                         "train and test are needed, val is welcome, each once")
    classes = {part: tuple(name for name in folders_in(folder) if has_images(folder / name))
               for part, folder in of.items()}
    if len(set(classes.values())) > 1 or len(classes["train"]) < 2:
        found = "; ".join(f"{part}: {', '.join(c) or 'none'}" for part, c in classes.items())
        raise ValueError(f"{root}: the parts of a split must hold the same two or more class "
                         f"folders, found {found}")
    paths, labels, groups, ends = [], [], [], {}
    for part, folder in of.items():
        found, own = class_frames(folder, classes["train"])
        ends[part] = np.arange(len(paths), len(paths) + len(found))
        groups += folder_groups(root, folder, found)
        paths, labels = paths + found, [*labels, *own]
    if "val" not in ends:
        ends["train"], ends["val"] = hold_out(ends["train"], groups)
    return Labelled(f"{root.resolve().name}, split by its own folders", paths, np.array(labels),
                    classes["train"], groups, None, [Split(**ends)], str(root))


def class_frames(root, classes):
    """Paths of all images below the class folders, and their labels (n,)."""
    passed, paths, labels = collections.Counter(), [], []
    for label, name in enumerate(classes):
        found = [str(root / name / path) for path in scan(str(root / name), passed=passed)]
        paths += found
        labels += [label] * len(found)
    say_passed_over(root, passed)
    return paths, np.array(labels)


def folder_groups(root, folder, paths):
    """The group of each frame at folder/<class>/[<patient>/.../]<image>."""
    def known(path):
        _, *between, _ = Path(path).relative_to(folder).parts
        own_name = os.path.splitext(os.path.relpath(path, root))[0]
        return between[0] if between else patient(path, otherwise=own_name)
    return groups_of(root, paths, known)


def has_images(folder):
    return next(scan(str(folder)), None) is not None


# -----------------------------------------------------------------------------------------------
# Whichever layout is there

def open_labelled(root, task):
    """The labelled data of a task ("landmarks", "polyps" or "mes"), whichever known layout lies
    in root or just below it."""
    limuc, kvasir = ("LIMUC",), ("Kvasir-SEG", "kvasir-seg")
    grades = "labeled-images/*/pathological-findings/ulcerative-colitis-grade-?"
    layouts = {  # task: (sub-folders to look in, what must be there, its loader); the first that fits
        "landmarks": [(HYPER_KVASIR, "labeled-images/*/anatomical-landmarks/*", load_landmarks)],
        "polyps": [(kvasir, "masks", load_masks), (kvasir, "mask", load_pairs),
                   (("data",), "TrainDataset", load_pranet)],
        "mes": [(limuc, "train_and_validation_sets", load_limuc),
                (limuc, "patient_based_classified_images", load_limuc),
                (HYPER_KVASIR, grades, load_uc_grades)],
    }
    if task not in layouts:
        raise ValueError(f"task {task!r} is none of {', '.join(layouts)}")
    for folders, sign, load in layouts[task]:
        if any(within(root, *folders).glob(sign)):
            return load(root)
    expected = "; ".join(f"{folders[0]}/{sign}" for folders, sign, _ in layouts[task])
    if task == "landmarks":  # or class folders, but not another layout's, such as images and masks
        everything = [layout for rows in layouts.values() for layout in rows]
        if not any(any(within(root, *folders).glob(sign)) for folders, sign, _ in everything):
            with contextlib.suppress(FileNotFoundError):
                return load_folders(root)
        expected += "; <class>/<image>; <class>/<patient>/<image>"
    raise FileNotFoundError(f"{root}: expected one of the layouts {expected} for {task}, "
                            f"found {found_in(root)}")


def main(argv=None):
    import augment  # lazily: the reader of frames needs neither crops nor pictures
    import figures
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help="folder of frames or manifest; without it synthetic frames")
    parser.add_argument("--show", default="sheet.png",
                        help="PNG to write: one frame's crops and masks")
    parser.add_argument("--frame", type=int, default=0, help="number of the frame")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other crops")
    parser.add_argument("--blur", default="as-executed", choices=augment.BLUR,
                        help="probabilities of the blur as DINOv2's code runs or reads")
    args = parser.parse_args(argv)
    if args.data is None:
        import synthetic  # the frames that come with the project, made here on first use
        args.data = synthetic.ensure() / "unlabelled"
    try:
        frames = Frames(args.data)
        if not 0 <= args.frame < len(frames):
            last = len(frames) - 1
            parser.error(f"--frame {args.frame}: {args.data} has the frames 0 to {last}")
        multicrop = augment.MultiCrop(frames, args.seed, blur=args.blur)
        figures.crops(multicrop, args.frame, args.show)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"{len(frames)} frames of {len(frames.videos)} videos in {args.data}; "
          f"frame {args.frame} is drawn in {args.show}")


if __name__ == "__main__":
    main()
