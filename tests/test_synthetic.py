"""synthetic.py: exact masks, published layouts, patients that stay in one fold, and labels that
colour cannot tell."""
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import figures
import synthetic

ROOT = Path(synthetic.__file__).parent
TINY = dict(videos=2, frames=6, scale=.05, size=64)  # as conftest.py makes it


@pytest.fixture
def tiny(synthetic_set):
    return synthetic_set


def stills(kind, patient, place, n=2, size=64):
    """n frames (n, size, size, 3) of one patient at one place."""
    job = dict(seed=5, scope=1, kind=kind, patient=patient, place=place, images=[None] * n,
               masks=None, video=False, size=size)
    return np.stack([image for image, _ in synthetic.frames_of(job)])


# -----------------------------------------------------------------------------------------------
# Floors: colour statistics and thumbnails must not give the labels away

def hsv_histogram(images):  # (n, H, W, 3) -> (n, 512)
    hsv = [np.asarray(Image.fromarray(i).convert("HSV")).reshape(-1, 3) for i in images]
    cubes = [np.histogramdd(p, bins=8, range=[(0, 256)] * 3)[0] for p in hsv]
    return np.stack([cube.ravel() / cube.sum() for cube in cubes])


def logistic_regression(train_x, train_y, x, n_classes, l2=1e-2):
    mean, std = train_x.mean(0), train_x.std(0) + 1e-3
    train_x, x = (torch.tensor((a - mean) / std, dtype=torch.float32) for a in (train_x, x))
    layer = torch.nn.Linear(x.shape[1], n_classes)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train_x), torch.tensor(train_y))
        loss = loss + l2 * layer.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return layer(x).argmax(1).numpy()


def nearest_thumbnail(train_images, train_y, images):
    def thumb(a):
        x = torch.from_numpy(a).permute(0, 3, 1, 2).float()
        return F.interpolate(x, (16, 16), mode="area").flatten(1)
    return train_y[torch.cdist(thumb(images), thumb(train_images)).argmin(1).numpy()]


def balanced_accuracy(true, pred):
    return np.mean([(pred[true == c] == c).mean() for c in np.unique(true)])


def quadratic_kappa(true, pred, n=4):
    seen = np.zeros((n, n))
    np.add.at(seen, (true, pred), 1)
    weight = (np.arange(n)[:, None] - np.arange(n)) ** 2
    expected = np.outer(seen.sum(1), seen.sum(0)) / len(true)
    return 1 - (weight * seen).sum() / (weight * expected).sum()


def floors(images, labels, patients, n_classes, score):
    train = patients % 3 > 0  # by patient
    a, b = hsv_histogram(images[train]), hsv_histogram(images[~train])
    by_colour = logistic_regression(a, labels[train], b, n_classes)
    by_thumbnail = nearest_thumbnail(images[train], labels[train], images[~train])
    return {"HSV histogram": score(labels[~train], by_colour),
            "thumbnails": score(labels[~train], by_thumbnail)}


def test_colour_and_thumbnails_do_not_tell_landmarks():
    names, rows = list(synthetic.LANDMARKS), []
    for patient in range(42):
        first = 3 * (patient % 2)
        for label in range(first, first + 3):  # the landmarks of one tract
            rows += [(image, label, patient // 2) for image in stills(names[label], patient, 0)]
    images, labels, patients = (np.stack(column) for column in zip(*rows))
    for name, value in floors(images, labels, patients, 6, balanced_accuracy).items():
        share = (value - 1 / 6) / (1 - 1 / 6)
        print(f"landmarks, {name}: balanced accuracy {value:.3f}, {share:.0%} of the way from chance "
              "to perfect")
        assert share < .6, name


def test_colour_and_thumbnails_do_not_tell_mayo_grades():
    rng, rows = np.random.default_rng(0), []
    for patient in range(45):
        for place, grade in enumerate(rng.choice(4, 4, p=synthetic.MAYO_SHARE)):
            rows += [(image, grade, patient) for image in stills(f"mayo-{grade}", patient, place)]
    images, labels, patients = (np.stack(column) for column in zip(*rows))
    for name, value in floors(images, labels, patients, 4, quadratic_kappa).items():
        print(f"Mayo, {name}: quadratic kappa {value:.3f}")
        assert value < .6, name


# -----------------------------------------------------------------------------------------------
# Frames

def test_the_mask_is_the_polyp_that_the_rays_meet():
    """Rays against the ellipsoid in closed form (no marching), nothing in between being
    nearer."""
    overlap = []
    for patient in range(24):
        rng = synthetic.generator(1, patient)
        job = dict(scope=1, kind="polyp", images=[None], masks=[None], video=False)
        s, [(origin, turn)] = synthetic.scene_views(job, rng)
        if s.polyp.stalk:
            continue
        dirs, t, _, _, mask, _ = synthetic.look_around(s, origin, turn, 256, 1)
        q = s.polyp
        o = (q.frame @ (origin - q.centre)) / q.axes  # the ellipsoid as a unit sphere
        d = (q.frame @ dirs.reshape(3, -1)) / q.axes[:, None]
        b, a, c = (o[:, None] * d).sum(0), (d * d).sum(0), (o * o).sum() - 1
        root = b * b - a * c
        hit = ((-b - root.clamp(min=0).sqrt()) / a).view(256, 256)
        _, shown, _ = synthetic.rays(256, 1)
        meets = (root.view(256, 256) > 0) & (hit > 0) & shown
        expected = meets & (t > hit - .02)  # without what a fold hides
        overlap.append(((mask & expected).sum() / (mask | expected).sum()).item())
        assert .015 < mask.float().mean() < .31
    assert len(overlap) >= 10 and np.median(overlap) > .93 and min(overlap) > .8, overlap


def test_polyps_of_all_sizes(tiny):
    masks = (tiny / "Kvasir-SEG/masks").iterdir()
    shares = [np.mean(np.asarray(Image.open(f)) > 127) for f in masks]
    # Drawn at 64 pixels, so a little over the bounds of 2 and 30 %
    assert min(shares) > .01 and max(shares) < .35
    assert max(shares) > 2 * min(shares)


def test_frames_of_a_video_are_near_duplicates_and_videos_are_not():
    def strip(kind, patient):
        job = dict(seed=0, scope=1, kind=kind, patient=patient, place=0, images=[None] * 4,
                   masks=None, video=True, size=64)
        return [image.astype(np.float32) for image, _ in synthetic.frames_of(job)]
    kinds = ("colon", "cecum", "mayo-1", "pylorus", "polyp", "colon")
    strips = [strip(kind, patient) for patient, kind in enumerate(kinds)]
    within = [np.abs(a - b).mean() for s in strips for a, b in zip(s, s[1:])]
    across = [np.abs(a[0] - b[0]).mean() for i, a in enumerate(strips) for b in strips[:i]]
    assert np.median(within) < .4 * np.median(across)
    assert min(within) > .5  # it moves, and the sensor is noisy


def test_a_frame_depends_on_the_seed_and_nothing_else():
    torch.manual_seed(1)
    first = stills("z-line", 3, 0)
    torch.manual_seed(2), np.random.seed(0)
    assert np.array_equal(stills("z-line", 3, 0), first)
    assert not np.array_equal(stills("z-line", 4, 0), first)


def test_the_second_scope_sees_the_same_scene_otherwise():
    job = dict(scope=1, kind="cecum", images=[None], masks=None, video=False)
    rng = synthetic.generator(8)
    s, [view] = synthetic.scene_views(job, rng)
    maps, look = synthetic.skin(rng, 96), synthetic.appearance(rng)
    one, two = (synthetic.render(s, look, maps, *view, synthetic.generator(0), 64, scope)[0]
                for scope in (1, 2))
    one, two = one.astype(int), two.astype(int)
    assert (one[0, 0] == 0).all() and (two[0, 0] == 0).all()  # both are black in the corners
    seen = (one.max(2) > 0) & (two.max(2) > 0)
    warm = [np.mean(i[seen][:, 0]) / np.mean(i[seen][:, 2]) for i in (one, two)]
    assert warm[1] < .95 * warm[0]  # a cooler lamp
    assert (one.max(2) > 0).sum() != (two.max(2) > 0).sum()  # another frame


# -----------------------------------------------------------------------------------------------
# What spoils real video


def spoiled(artefacts, kind="polyp", size=128, n=6):
    """n frames of one video and their masks with these artefacts, int (n, size, size, 3),
    bool."""
    job = dict(seed=5, scope=1, kind=kind, patient=3, place=0, images=[None] * n, video=True,
               masks=[None] * n if kind == "polyp" else None, size=size, artefacts=artefacts)
    images, masks = zip(*synthetic.frames_of(job))
    return np.stack(images).astype(int), np.stack(masks)


def test_artefacts_are_off_by_default_and_lie_over_the_same_frames():
    job = dict(seed=5, scope=1, kind="polyp", patient=3, place=0, images=[None] * 6, video=True,
               masks=[None] * 6, size=128)
    plain, masks = zip(*synthetic.frames_of(job))  # a job without the key, as all were
    images, same = spoiled(())
    assert np.array_equal(images, plain) and np.array_equal(same, masks)
    text, same = spoiled(("text",))
    changed = (text != images).any((0, 3))
    assert changed.any() and not changed[:, 64:].any() and np.array_equal(same, masks)
    assert np.array_equal(spoiled(synthetic.ARTEFACTS)[0], spoiled(synthetic.ARTEFACTS)[0])


def test_the_position_display_hides_what_lies_under_it():
    (plain, masks), (images, left) = spoiled(()), spoiled(("box",))
    changed = np.argwhere((images != plain).any((0, 3)))
    (top, start), (bottom, end) = changed.min(0), changed.max(0)
    assert .2 * 128 < bottom - top < .4 * 128 and start < 10 and bottom > 117  # at the lower left
    under = np.zeros((128, 128), bool)
    under[top : bottom + 1, start : end + 1] = True
    assert not (left & under).any() and np.array_equal(left[:, ~under], masks[:, ~under])
    assert np.median(images[:, under]) == 0  # a black box


def test_a_layout_shows_the_picture_smaller_on_a_border_that_is_flat():
    (plain, masks), (images, moved) = spoiled(()), spoiled(("layout",))
    shown = (images != images[0, 0, 0]).any((0, 3))
    (top, left), (bottom, right) = np.argwhere(shown).min(0), np.argwhere(shown).max(0) + 1
    assert .4 * 128 < bottom - top <= .92 * 128 and images[0, 0, 0].max() < 23
    small = [np.array(Image.fromarray(i.astype(np.uint8)).resize((right - left, bottom - top), Image.BOX))
             for i in plain]
    assert np.abs(images[:, top:bottom, left:right] - np.stack(small)).mean() < 6
    share = (right - left) * (bottom - top) / 128 ** 2
    assert abs(moved.mean() / masks.mean() / share - 1) < .1


def comb(images):
    """How much every line differs from its neighbours, over how much lines two apart differ."""
    between = np.abs(images[:, 1:-1] - (images[:, :-2] + images[:, 2:]) / 2).mean((1, 2, 3))
    return between / np.abs(images[:, 2:] - images[:, :-2]).mean((1, 2, 3))


def test_interlacing_combs_the_frames_that_move():
    plain, images = spoiled(())[0], spoiled(("interlacing",))[0]
    assert comb(plain).max() < comb(images).max() / 1.5
    assert np.array_equal(images[:, ::2], plain[:, ::2])  # the even lines are of the frame itself


def test_motion_blur_smooths_some_frames_more_than_others():
    def edges(images):
        return np.abs(np.diff(images, axis=2)).mean((1, 2, 3))

    ratio = edges(spoiled(("blur",))[0]) / edges(spoiled(())[0])
    assert ratio.max() < 1.01 and ratio.min() < .8 * ratio.max()


def test_water_bends_and_pales_the_picture_within_its_frame():
    plain, images = spoiled(())[0], spoiled(("water",))[0]
    _, shown, _ = synthetic.rays(128, 1)
    assert not images[:, ~shown.numpy()].any()
    change = np.abs(images - plain)[:, shown.numpy()].mean()
    assert 3 < change < 60
    moves = np.abs(np.diff(images - plain, axis=0)).mean()  # the ripples travel
    assert moves > .5


def test_a_set_with_artefacts_says_so(tiny, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(synthetic, "make", lambda *arguments: made.append(arguments[-1]))
    synthetic.main([str(tmp_path / "a"), "--artefacts", "text", "box"])
    synthetic.main([str(tmp_path / "all"), "--artefacts"])
    synthetic.main([str(tmp_path / "plain")])
    assert made == [("box", "text"), synthetic.ARTEFACTS, ()]
    made_by = json.loads((tmp_path / "a/made_by.json").read_text())
    assert made_by["artefacts"] == ["box", "text"]
    assert "artefacts" not in json.loads((tmp_path / "plain/made_by.json").read_text())
    with pytest.raises(SystemExit, match="made with other flags"):
        synthetic.main([str(tmp_path / "a")])


# -----------------------------------------------------------------------------------------------
# Layouts

def patient_of(path):
    return path.stem.rsplit("_", 1)[0]


@pytest.mark.parametrize("scope", (".", "scope2"))
def test_hyper_kvasir(tiny, scope):
    tree = tiny / scope / "hyper-kvasir"
    lines = (tree / "official_splits/5_fold_split.csv").read_text().splitlines()
    assert lines[0] == "file-name;class-name;split-index"
    rows = [line.split(";") for line in lines[1:]]
    files = {f.name: f for f in tree.glob("labeled-images/*/*/*/*.jpg")}
    assert sorted(files) == sorted(name for name, _, _ in rows) and len(rows) == len(files)
    official = {folder: name for folder, (_, name) in synthetic.LANDMARKS.items()}
    folds = {}
    for name, class_name, fold in rows:
        assert class_name == official.get(files[name].parent.name, files[name].parent.name)
        folds.setdefault(patient_of(files[name]), set()).add(fold)
    assert all(len(f) == 1 for f in folds.values())  # no patient in two folds
    for class_name in {row[1] for row in rows}:
        order = [row[2] for row in rows if row[1] == class_name]
        assert order == sorted(order) and set(order) == set("01234")  # contiguous blocks
    grades = (f"ulcerative-colitis-grade-{g}" for g in (1, 2, 3))
    assert {f.parent.name for f in files.values()} == {*synthetic.LANDMARKS, *grades}


@pytest.mark.parametrize("scope", (".", "scope2"))
def test_kvasir_seg(tiny, scope):
    tree = tiny / scope / "Kvasir-SEG"
    train, val = ((tree / f"{part}.txt").read_text().split() for part in ("train", "val"))
    for folder in ("images", "masks"):
        names = sorted(f.name for f in (tree / folder).iterdir())
        assert names == sorted(f"{stem}.jpg" for stem in train + val)
    assert not {s.split("_")[0] for s in train} & {s.split("_")[0] for s in val}
    image, mask = (Image.open(tree / f"{kind}/{val[0]}.jpg") for kind in ("images", "masks"))
    assert image.size == mask.size


@pytest.mark.parametrize("scope", (".", "scope2"))
def test_limuc(tiny, scope):
    tree = tiny / scope / "LIMUC"
    parts = {part: {(f.parent.name, f.name) for f in (tree / part).glob("*/*.bmp")}
             for part in ("train_and_validation_sets", "test_set")}
    patients = {part: {name.rsplit("_", 1)[0] for _, name in files}
                for part, files in parts.items()}
    assert not patients["test_set"] & patients["train_and_validation_sets"]
    for k in range(10):
        folder = tree / f"cross_validation_folds_train_val_info/fold_{k}"
        lists = [json.loads((folder / f"{name}.json").read_text()) for name in ("train", "val")]
        train, val = ({(grade, name) for grade, names in listed.items() for name in names}
                      for listed in lists)
        assert train | val == parts["train_and_validation_sets"] and not train & val
        assert not {n.rsplit("_", 1)[0] for _, n in train} & {n.rsplit("_", 1)[0] for _, n in val}
        assert {grade for grade, _ in val} == {f"Mayo {g}" for g in range(4)}
    counts = Counter(grade for files in parts.values() for grade, _ in files)
    share = [counts[f"Mayo {g}"] / counts.total() for g in range(4)]
    assert np.abs(np.array(share) - synthetic.MAYO_SHARE).max() < .03


def test_unlabelled_videos(tiny):
    lines = (tiny / "unlabelled/manifest.csv").read_text().splitlines()
    assert lines[0] == "path,video" and len(lines) == 1 + TINY["videos"] * TINY["frames"]
    for path, video in (line.split(",") for line in lines[1:]):
        assert Path(path).parent.name == video and (tiny / "unlabelled" / path).exists()


# -----------------------------------------------------------------------------------------------
# Making the set once

def test_the_same_seed_gives_the_same_files_with_any_number_of_workers(tiny, tmp_path):
    again = synthetic.ensure(tmp_path / "again", **TINY, workers=2)
    names = sorted(str(f.relative_to(tiny)) for f in tiny.rglob("*") if f.is_file())
    assert names == sorted(str(f.relative_to(again)) for f in again.rglob("*") if f.is_file())
    assert all((tiny / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_a_process_that_is_killed_leaves_no_half_set(tmp_path, monkeypatch):
    root = tmp_path / "set"
    code = (f"import synthetic; synthetic.ensure({str(root)!r}, videos=50, frames=50, scale=1, "
            "size=32, workers=1)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    making = tmp_path / ".set.making"
    for _ in range(600):
        if any(making.rglob("*.jpg")):
            break
        time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert any(making.rglob("*.jpg")) and not root.exists()
    monkeypatch.setattr(synthetic, "labelled_jobs", lambda *_: [])  # the videos alone
    made = synthetic.ensure(root, videos=1, frames=2, scale=.01, size=32, workers=0)
    assert (made / "made_by.json").exists() and not making.exists()
    assert len(list((made / "unlabelled").rglob("*.jpg"))) == 2


def test_ensure_leaves_a_made_set_and_foreign_files_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "make", lambda *_: pytest.fail("made twice"))
    assert synthetic.ensure(tiny, videos=9) == tiny
    with pytest.raises(SystemExit, match="made with other flags"):
        synthetic.main([str(tiny), "--videos", "9"])
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        synthetic.ensure(tmp_path)
    with pytest.raises(SystemExit, match="did not make: name another folder"):
        synthetic.main([str(tmp_path)])


def test_the_command_ends_with_what_there_is_and_what_comes_next(tiny, tmp_path, capsys):
    few = ["--videos", "2", "--frames-per-video", "6", "--scale", ".05", "--size", "64"]
    synthetic.main([str(tiny), *few, "--sheet", str(tmp_path / "sheet.png")])
    frames = [f for f in tiny.rglob("*.*") if f.suffix in (".jpg", ".bmp") and "masks" not in f.parts]
    words = capsys.readouterr().out
    assert f"{tiny}: {len(frames)} frames\nnext: python pretrain.py" in words
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file"):  # a sheet that cannot be written is one sentence
        synthetic.main([str(tiny), *few, "--sheet", str(tmp_path / "file" / "sheet.png")])


def test_contact_sheet(tiny, tmp_path):
    figures.synthetic_set(tiny, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] == 6 * (112 + 2) + 2
