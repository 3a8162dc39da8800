"""data.py and images.py: what is read and how, manifests, every public layout and its splits."""
import json
import os
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

import data
from made_frames import bad_files, folder, picture, save  # noqa: F401

REAL = Path(data.__file__).parent.parent / "shared" / "data"


# -----------------------------------------------------------------------------------------------
# Reading

def test_what_cannot_be_read_is_named(tmp_path):
    for path in bad_files(tmp_path / "bad"):
        with pytest.raises(data.BadImage, match=f"^{path}: .+"):
            data.read_image(path)


@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("RGBA", "a.png"), ("P", "a.png"),
                                        ("1", "a.bmp"), ("CMYK", "a.jpg")])
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    image = data.read_image(save(tmp_path / name, picture(0).convert(mode)))
    assert image.mode == "RGB" and image.size == (150, 120)


def test_a_larger_frame_is_decoded_smaller(tmp_path):
    for name in ("a.jpg", "a.png"):
        path = save(tmp_path / name, picture(0, 481, 642), quality=95)
        needs = None, (322, 100), (321, 240), (160, 120), (1, 1)
        sizes = [data.read_image(path, draft=need).size for need in needs]
        assert sizes == [(642, 481), (642, 481), (321, 241), (161, 121), (81, 61)]


def test_eval_image_is_dinov2s_evaluation_transform(tmp_path):
    path = save(tmp_path / "a.png", picture(1, 300, 401))
    for size in (224, 98):
        resize = T.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC)
        classical = T.Compose([resize, T.CenterCrop(size), T.ToTensor(),
                               T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
        assert torch.equal(data.eval_image(path, size), classical(Image.open(path)))


def test_frames_of_a_folder(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "frames")
    for name in ("seg/images/x.PNG", "seg/masks/x.png", ".hidden/y.png", "video0/._00.jpg"):
        save(root / name, format="PNG")
    (root / "notes.txt").write_text("not a frame")
    frames = data.Frames(root)
    first = [frames.name(i) for i in range(3)]
    assert first == ["seg/images/x.PNG", "video0/00.jpg", "video0/03.jpg"] and len(frames) == 13
    assert [frames.video(i) for i in (0, 1, 12)] == ["seg/images", "video0", "video2"]
    assert Path(frames.path(12)) == root / "video2/11.jpg"


def test_frames_of_a_manifest(folder, tmp_path):
    rows = f"{folder.name}/video1/01.jpg,b,0", f"{folder.name}/video0/00.jpg,a,1"
    (folder.parent / "list.csv").write_text("\n".join(["path,video,label", *rows, "\n"]))
    (tmp_path / "manifest.csv").write_text("path\nz/1.jpg\ny/é.jpg\n")
    frames = data.Frames(folder.parent / "list.csv")
    assert [frames.video(i) for i in range(len(frames))] == ["b", "a"]
    assert data.read_image(frames.path(1)).size == (150, 120)
    frames = data.Frames(tmp_path)
    listed = [(frames.name(i), frames.video(i)) for i in range(len(frames))]
    assert listed == [("z/1.jpg", "z"), ("y/é.jpg", "y")]


def test_only_the_named_frames(folder, tmp_path):
    lines = tmp_path / "only.txt"
    lines.write_text(f"07\n01.jpg\nvideo0/03.jpg\n\nvideo2/11\n{folder}/video1/04.jpg\n07.jpg\n")
    frames = data.Frames(folder, only=lines)
    names = [frames.name(i) for i in range(len(frames))]
    numbers = [name.removesuffix(".jpg").removeprefix("video") for name in names]
    assert numbers == ["0/03", "1/01", "1/04", "1/07", "2/11"]
    assert frames.video(4) == "video2"
    lines.write_text("01\nnowhere\n")
    with pytest.raises(FileNotFoundError, match="only.txt: 1 lines name no frame .*'nowhere'"):
        data.Frames(folder, only=lines)
    twice = shutil.copytree(folder, tmp_path / "twice")
    shutil.copy(twice / "video1/01.jpg", twice / "video2/01.jpg")
    lines.write_text("01\n")
    with pytest.raises(ValueError, match="'01' means both video1/01.jpg and video2/01.jpg"):
        data.Frames(twice, only=lines)


def test_no_frames_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.Frames(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no images"):
        data.Frames(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no images"):
        data.Frames(tmp_path)
    (tmp_path / "manifest.csv").write_text("file,video\na.jpg,a\n")
    with pytest.raises(ValueError, match="manifest.csv: no column path"):
        data.Frames(tmp_path)


def test_a_long_manifest_takes_bytes_per_frame(tmp_path):
    n = 20_000
    rows = [f"video{i // 100:05d}/{i % 100:06d}.jpg,video{i // 100:05d}" for i in range(n)]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,video", *rows]))
    del rows
    tracemalloc.start()
    frames = data.Frames(tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert frames.name(n - 1) == "video00199/000099.jpg" and frames.video(n - 1) == "video00199"
    assert held / n < 45 and peak / n < 90, (held / n, peak / n)  # of which 21 are the path itself


# -----------------------------------------------------------------------------------------------
# Layouts

def groups_stay_apart(labelled):
    for split in labelled.splits:
        parts = [split.train, split.val, split.test]
        assert all(len(part) for part in parts)
        assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            one, other = ({labelled.groups[i] for i in parts[k]} for k in (a, b))
            assert not one & other


def hyper_kvasir(root, names, each=10):
    """The published tree: names maps folder -> class name in the csv; the list is in contiguous
    blocks, five folds."""
    rows = []
    for folder, official in names.items():
        kind = "anatomical-landmarks" if folder in data.LANDMARKS else "pathological-findings"
        for i in range(each):
            save(root / f"labeled-images/lower-gi-tract/{kind}/{folder}/{folder}-{i:02d}.jpg")
            rows.append(f"{folder}-{i:02d}.jpg;{official};{5 * i // each}")
    rows.append("not-at-hand.jpg;polyp;0")  # the list covers 23 classes
    write_split(root, rows)
    return rows


def write_split(root, rows):
    (root / "official_splits").mkdir(exist_ok=True)
    listed = root / "official_splits/5_fold_split.csv"
    listed.write_text("\n".join(["file-name;class-name;split-index", *rows]) + "\n")


def classes_of(labelled):
    return [labelled.classes[label] for label in labelled.labels]


def test_hyper_kvasir_landmarks(tmp_path):
    root = tmp_path / "hyper-kvasir"
    alike = "ileum", "retroflex-rectum", "retroflex-stomach"
    names = {name: name if name in alike else f"normal-{name}" for name in data.LANDMARKS}
    rows = hyper_kvasir(root, names)
    findings = root / "labeled-images/lower-gi-tract/pathological-findings"
    save(findings / "polyps/p.jpg")  # another class, not of this task
    labelled = data.open_labelled(tmp_path, "landmarks")
    assert labelled.classes == data.LANDMARKS
    assert np.bincount(labelled.labels).tolist() == [10] * 6
    assert classes_of(labelled) == [Path(path).parent.name for path in labelled.paths]
    groups_stay_apart(labelled)
    tested = np.concatenate([s.test for s in labelled.splits])
    assert sorted(tested) == list(range(60))  # the folds cover all
    for k, split in enumerate(labelled.splits):
        assert {int(Path(labelled.paths[i]).stem[-2:]) // 2 for i in split.test} == {k}
        assert {int(Path(labelled.paths[i]).stem[-2:]) // 2 for i in split.val} == {(k + 1) % 5}
    write_split(root, rows[:-2])
    with pytest.raises(ValueError, match="1 frames on disk are not listed, .*z-line-09.jpg"):
        data.load_landmarks(root)
    (root / "official_splits/5_fold_split.csv").unlink()
    with pytest.raises(FileNotFoundError, match="5_fold_split.csv"):
        data.load_landmarks(root)


def test_ulcerative_colitis_grades_and_their_doubled_frames(tmp_path):
    names = *data.GRADES, "ulcerative-colitis-grade-1-2"
    rows = hyper_kvasir(tmp_path, {name: name for name in names})
    plain = data.open_labelled(tmp_path, "mes")
    assert plain.classes == data.GRADES and len(plain.paths) == 30
    assert sorted(set(plain.labels)) == [0, 1, 2]
    findings = tmp_path / "labeled-images/lower-gi-tract/pathological-findings"
    grades = [(1, 2), (1, 2), (2, 2), (2, 2)]
    for pair, places in zip(data.UC_DUPLICATES, grades, strict=True):
        for name, grade, fold in zip(pair, places, (1, 4)):
            save(findings / f"ulcerative-colitis-grade-{grade}/{name}.jpg")
            rows.append(f"{name}.jpg;ulcerative-colitis-grade-{grade};{fold}")
    write_split(tmp_path, rows)
    labelled = data.load_uc_grades(tmp_path)
    stems = [Path(path).stem for path in labelled.paths]
    assert len(stems) == 34 and not {s for pair in data.UC_DUPLICATES[:2] for s in pair} & {*stems}
    for pair in data.UC_DUPLICATES[2:]:  # one picture, one fold
        tested = [[stems.index(name) in split.test for split in labelled.splits]
                  for name in pair]
        assert tested[0] == tested[1] and sum(tested[0]) == 1
    groups_stay_apart(labelled)


def kvasir_seg(root, n=20, mode="L", suffix=".jpg"):
    for i in range(n):
        save(root / f"images/frame{i:02d}{suffix}")
        save(root / f"masks/frame{i:02d}{suffix}", Image.new(mode, (16, 12)))
    for name, part in (("train", range(n - 5)), ("val", range(n - 5, n))):
        (root / f"{name}.txt").write_text("".join(f"frame{i:02d}\n" for i in part))


def test_kvasir_seg(tmp_path):
    root = tmp_path / "Kvasir-SEG"
    kvasir_seg(root)
    labelled = data.open_labelled(tmp_path, "polyps")
    split, = labelled.splits
    tested = sorted(Path(labelled.paths[i]).stem for i in split.test)
    assert tested == [f"frame{i}" for i in range(15, 20)]
    assert len(split.train) == 14 and len(split.val) == 1 and labelled.labels is None
    assert [mask.replace("/masks/", "/images/") for mask in labelled.masks] == labelled.paths
    groups_stay_apart(labelled)
    lists = root / "Data-split"
    lists.mkdir()
    for name in ("train.txt", "val.txt"):
        shutil.move(root / name, lists / name)
    assert data.load_kvasir_seg(root).paths == labelled.paths
    with open(lists / "val.txt", "a") as file:
        file.write("frame99\n")
    with pytest.raises(FileNotFoundError, match="val.txt: 1 listed frames are missing .* frame99"):
        data.load_kvasir_seg(root)
    (lists / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="val.txt"):
        data.load_kvasir_seg(root)


def test_a_mask_of_another_size_or_none(tmp_path):
    kvasir_seg(tmp_path)
    save(tmp_path / "masks/frame07.jpg", Image.new("L", (16, 13)))
    with pytest.raises(ValueError, match="masks/frame07.jpg: the mask is 16x13, its .* is 16x12"):
        data.load_kvasir_seg(tmp_path)
    (tmp_path / "masks/frame07.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="images/frame07.jpg: no mask"):
        data.load_kvasir_seg(tmp_path)
    shutil.rmtree(tmp_path / "masks")
    (tmp_path / "masks").mkdir()
    with pytest.raises(FileNotFoundError, match="masks: no images in this folder"):
        data.load_kvasir_seg(tmp_path)


def test_pranet(tmp_path):
    for part, n in (("TrainDataset", 20), ("TestDataset/Kvasir", 4), ("TestDataset/CVC-300", 3)):
        kvasir_seg(tmp_path / "data" / part, n, suffix=".png")
    labelled = data.open_labelled(tmp_path, "polyps")
    split, = labelled.splits
    parts = split.train, split.val, split.test
    assert len(labelled.paths) == 24 and list(map(len, parts)) == [18, 2, 4]
    assert all("TestDataset/Kvasir/images" in labelled.paths[i] for i in split.test)
    other = data.load_pranet(tmp_path, "CVC-300")
    assert len(other.splits[0].test) == 3
    names = [data.stem(other.paths[i]) for i in other.splits[0].test]
    rows = ["file,group", *(f"{name},one sequence" for name in names)]
    (tmp_path / "data/TestDataset/CVC-300/groups.csv").write_text("\n".join(rows))
    groups = data.load_pranet(tmp_path, "CVC-300").groups
    assert groups[20:] == 3 * ["CVC-300/one sequence"] and groups[:20] == other.groups[:20]
    with pytest.raises(FileNotFoundError, match="TestDataset/ETIS"):
        data.load_pranet(tmp_path, "ETIS-LaribPolypDB")


def limuc(root, by_patient=False, lists=True):
    """15 patients with two frames of each grade; patients 12 to 14 are the test set. Returns the
    ten lists."""
    def names(patients, grade):  # UC_patient_3_9 stands under all four classes
        numbers = [(p, 9 if (p, i) == (3, 1) else 2 * grade + i) for p in patients for i in range(2)]
        return [f"UC_patient_{p}_{n}.bmp" for p, n in numbers]

    for p in range(15):
        part = "test_set" if p >= 12 else "train_and_validation_sets"
        place = f"patient_based_classified_images/{p}" if by_patient else part
        for grade in range(4):
            for name in names([p], grade):
                save(root / place / f"Mayo {grade}" / name)
    def listed(patients):
        return {f"Mayo {grade}": names(patients, grade) for grade in range(4)}

    folds = [{"train": listed(sorted(set(range(12)) - {k, k + 1})), "val": listed([k, k + 1])}
             for k in range(10)]
    for k, fold in enumerate(folds if lists else []):
        for part, frames in fold.items():
            path = root / f"cross_validation_folds_train_val_info/fold_{k}/{part}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(frames))
    return folds


def test_limuc_official_folds(tmp_path):
    folds = limuc(tmp_path / "LIMUC")
    labelled = data.open_labelled(tmp_path, "mes")
    assert len(labelled.paths) == 120 and len(labelled.splits) == 10
    assert labelled.classes == ("Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3")
    assert classes_of(labelled) == [Path(path).parent.name for path in labelled.paths]
    for fold, split in zip(folds, labelled.splits):
        for part in ("train", "val"):
            listed = {(c, name) for c, names in fold[part].items() for name in names}
            rows = getattr(split, part)
            assert {Path(labelled.paths[i]).parts[-2:] for i in rows} == listed
            assert len(rows) == len(listed)
        assert all("test_set" in labelled.paths[i] for i in split.test) and len(split.test) == 24
    groups_stay_apart(labelled)
    rows = [f"{os.path.relpath(path, tmp_path / 'LIMUC')},p{group}"
            for path, group in zip(labelled.paths, labelled.groups)]
    (tmp_path / "LIMUC/groups.csv").write_text("\n".join(["file,group", *rows]))
    assert data.load_limuc(tmp_path).groups == [f"p{group}" for group in labelled.groups]
    doubled = [i for i, path in enumerate(labelled.paths) if path.endswith("UC_patient_3_9.bmp")]
    assert sorted(labelled.labels[doubled]) == [0, 1, 2, 3]
    (tmp_path / "LIMUC/train_and_validation_sets/Mayo 2/UC_patient_3_9.bmp").unlink()
    with pytest.raises(FileNotFoundError, match="json: 1 listed .* Mayo 2/UC_patient_3_9.bmp"):
        data.load_limuc(tmp_path)


def test_limuc_without_lists_is_split_by_patient(tmp_path):
    limuc(tmp_path / "a", lists=False)
    limuc(tmp_path / "b", by_patient=True)
    official, ours = data.load_limuc(tmp_path / "a"), data.load_limuc(tmp_path / "b")
    groups_stay_apart(official), groups_stay_apart(ours)
    assert len(official.splits) == len(ours.splits) == 10 and len(ours.paths) == 120
    assert all("test_set" in official.paths[i] for i in official.splits[0].test)
    assert sorted(np.concatenate([s.test for s in ours.splits])) == list(range(120))
    shutil.rmtree(tmp_path / "a/train_and_validation_sets")
    with pytest.raises(FileNotFoundError, match="<patient>/Mayo k, found test_set"):
        data.load_limuc(tmp_path / "a")


def test_folds_are_balanced_and_no_patient_crosses():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 600)
    labels = rng.choice(4, 600, p=(0.54, 0.27, 0.11, 0.08))
    folds = data.balanced_folds(labels, groups, 5)
    assert all(len(set(folds[groups == g])) == 1 for g in range(60))
    counts = np.array([np.bincount(labels[folds == k], minlength=4) for k in range(5)])
    shares = counts * 5 / np.bincount(labels)
    assert np.abs(shares - 1).max() < 0.25
    with pytest.raises(ValueError, match="set: 1 groups cross split 0, such as p7"):
        split = data.Split(np.array([0]), np.array([1]), np.array([2]))
        data.Labelled("set", ["a", "b", "c"], None, (), ["p7", "p8", "p7"], None, [split])


def test_class_folders_of_ones_own(tmp_path):
    for c in ("antrum", "fundus"):
        for p in range(6):
            for name in (f"{c}{p}.png", f"{c}{p}b.png"):
                save(tmp_path / c / f"patient {p}" / name)
    labelled = data.open_labelled(tmp_path, "landmarks")
    assert labelled.classes == ("antrum", "fundus")
    assert len(labelled.splits) == 5 and len(labelled.paths) == 24
    groups_stay_apart(labelled)


def test_unknown_layouts_are_named(tmp_path):
    (tmp_path / "photos").mkdir()
    signs = {"landmarks": "anatomical-landmarks", "polyps": "Kvasir-SEG/masks", "mes": "LIMUC"}
    for task, sign in signs.items():
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}: expected .*{sign}.* found photos"):
            data.open_labelled(tmp_path, task)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.open_labelled(tmp_path / "nowhere", "mes")


# -----------------------------------------------------------------------------------------------
# The official lists and frames

def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not at hand beside this checkout")
    return path


def test_official_limuc_lists(tmp_path):
    """All ten lists against a tree of empty files of the listed names: 9,590 entries, 478
    patients, 8 names under two classes."""
    lists = real("LIMUC", "cross_validation_folds_train_val_info")
    for part in ("train", "val"):
        for c, names in json.loads((lists / "fold_0" / f"{part}.json").read_text()).items():
            (tmp_path / "train_and_validation_sets" / c).mkdir(parents=True, exist_ok=True)
            for name in names:
                (tmp_path / "train_and_validation_sets" / c / name).touch()
    for grade in range(4):
        (tmp_path / "test_set" / f"Mayo {grade}").mkdir(parents=True)
        (tmp_path / "test_set" / f"Mayo {grade}" / f"UC_patient_99999_{grade}.bmp").touch()
    os.symlink(lists, tmp_path / lists.name)
    labelled = data.load_limuc(tmp_path)
    assert np.bincount(labelled.labels[:-4]).tolist() == [5180, 2588, 1077, 745]
    assert len(set(labelled.groups[:-4])) == 478 and len(labelled.splits) == 10
    assert all(len(split.train) + len(split.val) == 9590 for split in labelled.splits)
    assert sum(n == 2 for n in Counter(Path(path).name for path in labelled.paths).values()) == 8
    groups_stay_apart(labelled)


def test_official_uc_grades(tmp_path):
    """616 frames less the four that stand under two grades, with the list of near-duplicates
    beside them and without."""
    root = real("hyper-kvasir")
    labelled = data.load_uc_grades(root)
    assert np.bincount(labelled.labels).tolist() == [158, 350, 104] and len(labelled.splits) == 4
    groups_stay_apart(labelled)
    for name in ("labeled-images", "official_splits"):
        os.symlink(root / name, tmp_path / name)
    bare = data.load_uc_grades(tmp_path)
    assert [Path(p).name for p in bare.paths] == [Path(p).name for p in labelled.paths]
    assert all(np.array_equal(a.test, b.test) for a, b in zip(bare.splits, labelled.splits))


def test_official_kvasir_seg():
    labelled = data.open_labelled(real("Kvasir-SEG"), "polyps")
    split, = labelled.splits
    assert [len(part) for part in (split.train, split.val, split.test)] == [792, 88, 120]
    only = data.Frames(REAL / "Kvasir-SEG/images", only=REAL / "Kvasir-SEG/train.txt")
    listed = {labelled.paths[i] for i in np.concatenate([split.train, split.val])}
    assert {only.path(i) for i in range(len(only))} == listed


# -----------------------------------------------------------------------------------------------
# The command line

def test_show_draws_a_sheet(folder, tmp_path, capsys):
    data.main(["--data", str(folder), "--frame", "3", "--show", str(tmp_path / "sheet.png")])
    assert "12 frames of 3 videos" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    colours = np.unique(sheet.astype(int) @ [65536, 256, 1])
    assert sheet.shape[1] > 4 * 224 and len(colours) > 10_000
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        data.main(["--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        data.main(["--data", str(folder), "--frame", "12"])
    assert "--frame 12: " in capsys.readouterr().err


def test_without_data_the_synthetic_frames_are_shown(folder, tmp_path, monkeypatch):
    import synthetic
    (tmp_path / "set").mkdir()
    shutil.copytree(folder, tmp_path / "set/unlabelled")
    monkeypatch.setattr(synthetic, "ensure", lambda: tmp_path / "set")
    data.main(["--show", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
