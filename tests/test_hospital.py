"""Frames as hospitals have them: what was once read wrongly in silence, and what must be said."""
import dataclasses
import errno
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import augment
import data
import images
import probe_segment

RAMP = np.tile(np.arange(256, dtype=np.uint16), (64, 1))  # (64, 256)
SQUARE = np.zeros((64, 64), np.uint8)
SQUARE[16:48, 16:48] = 1  # 1,024 of 4,096 pixels


def saved(path, array, mode=None, **options):
    """Write an array or a PIL image, and the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.fixture
def unsaid(monkeypatch):
    """Nothing has been said yet."""
    monkeypatch.setattr(images, "said", set())


def scene(width=160, height=120, seed=0):
    """A picture of smooth colours that looks different from every side."""
    grid = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


# -----------------------------------------------------------------------------------------------
# Masks


def coloured(inside, outside=(0, 0, 0)):
    return np.where(SQUARE[..., None] > 0, np.uint8(inside), np.uint8(outside))


def palette(*colours, array=SQUARE):
    image = Image.frombytes("P", array.shape[::-1], array.tobytes())
    image.putpalette([value for colour in colours for value in colour])
    return image


MASKS = {
    "0 and 1": SQUARE, "0 and 127": SQUARE * 127, "0 and 255": SQUARE * 255,
    "one bit": Image.fromarray(SQUARE > 0),
    "red": coloured((255, 0, 0)), "blue": coloured((0, 0, 200)), "dark red": coloured((128, 0, 0)),
    "palette, white at 0": palette((255, 255, 255), (0, 0, 0), array=1 - SQUARE),
    "palette, colour at 1": palette((0, 0, 0), (128, 0, 0)),
    "palette by number": palette((0, 0, 0), (1, 1, 1)),
    "quantized": Image.fromarray(coloured((255, 255, 255))).quantize(2),
    "alpha over white": np.dstack([np.full((64, 64, 3), 255, np.uint8), SQUARE * 255]),
    "alpha over black, 0 and 1": np.dstack([np.zeros((64, 64, 3), np.uint8), SQUARE]),
    "white, opaque": np.dstack([coloured((255, 255, 255)), np.full((64, 64), 255, np.uint8)]),
    "16 bits, 1": SQUARE.astype(np.uint16), "16 bits, white": SQUARE.astype(np.uint16) * 65535,
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_found_however_it_is_saved(tmp_path, kind):
    path = saved(tmp_path / "a.png", MASKS[kind])
    for read in (data.read_mask, probe_segment.read_mask):
        assert torch.equal(read(path), torch.from_numpy(SQUARE > 0))
        assert read(path, 32).sum() == 256  # shrunk to a square


def test_masks_of_floating_point_and_with_soft_edges(tmp_path):
    assert data.read_mask(saved(tmp_path / "a.tif", SQUARE.astype(np.float32))).sum() == 1024
    soft = Image.fromarray(SQUARE * 255).resize((61, 61), Image.Resampling.BILINEAR)
    found = data.read_mask(saved(tmp_path / "b.png", soft))
    assert torch.equal(found, torch.from_numpy(np.array(soft) > 127))
    deep = np.array(soft).astype(np.uint16) * 257
    assert torch.equal(data.read_mask(saved(tmp_path / "c.png", deep)), found)


def test_lossy_masks_stay_above_127(tmp_path):
    path = saved(tmp_path / "a.jpg", SQUARE * 255, "RGB", quality=75)
    above = np.array(Image.open(path).convert("L")) > 127
    assert torch.equal(data.read_mask(path), torch.from_numpy(above))
    red = data.read_mask(saved(tmp_path / "b.jpg", coloured((255, 0, 0)), quality=90))
    assert red.sum() == pytest.approx(1024, abs=70)
    assert not data.read_mask(saved(tmp_path / "c.jpg", SQUARE * 9)).any()  # empty, and noise
    with pytest.raises(data.BadImage, match="d.jpg: as a mask it has values from .* to 1"):
        data.read_mask(saved(tmp_path / "d.jpg", SQUARE * 127))


def test_single_empty_and_full_masks_are_legal(tmp_path):
    for k, (value, found) in enumerate(((0, 0), (255, 4096))):
        full = np.full((64, 64), value, np.uint8)
        quantized = Image.fromarray(full).convert("RGB").quantize(4)
        for name, image in (("a", full), ("b", quantized)):
            assert data.read_mask(saved(tmp_path / f"{name}{k}.png", image)).sum() == found
    clear = np.dstack([np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), np.uint8)])
    assert not data.read_mask(saved(tmp_path / "clear.png", clear)).any()


THREE = SQUARE + np.eye(64, dtype=np.uint8)  # 0, 1 and 2
REFUSED = {
    "0, 1 and 2": THREE, "1 alone": np.ones((64, 64), np.uint8), "1 and 2": SQUARE + np.uint8(1),
    "16 bits to 300": np.arange(4096, dtype=np.uint16).reshape(64, 64) % 301,
    "colours and alpha": np.dstack([coloured((255, 255, 255)), SQUARE * 255]),
    "two bright colours": palette((255, 255, 255), (255, 0, 0)),
    "classes by number": palette((0, 0, 0), (1, 1, 1), (2, 2, 2), array=THREE),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_that_could_mean_two_things_is_refused_by_name(tmp_path, kind):
    with pytest.raises(data.BadImage, match="a.png: as a mask it "):
        data.read_mask(saved(tmp_path / "a.png", REFUSED[kind]))
    ramp = np.linspace(0, 0.5, 4096, dtype=np.float32).reshape(64, 64)
    with pytest.raises(data.BadImage, match="a.tif: as a mask it has values from 0.0 to 0.5"):
        data.read_mask(saved(tmp_path / "a.tif", ramp))


# -----------------------------------------------------------------------------------------------
# Depth


def test_16_bits_are_divided_by_257(tmp_path):
    for name in ("a.png", "a.tif"):
        pixels = np.asarray(data.read_image(saved(tmp_path / name, RAMP * 257)))
        assert np.array_equal(pixels, np.repeat(RAMP.astype(np.uint8)[..., None], 3, 2))
    wide = saved(tmp_path / "i.tif", (RAMP * 257).astype(np.int32))  # of 32 bits 16 are used
    assert np.array_equal(np.asarray(data.read_image(wide)), pixels)


def test_what_has_no_known_range_is_refused_by_name(tmp_path):
    for name, array, why in (("f.tif", RAMP / np.float32(255), "floating-point"),
                             ("twelve.png", RAMP * 16, "twelfth"),
                             ("i.tif", RAMP.astype(np.int32) * 70000, "from 0 to 17850000"),
                             ("minus.tif", RAMP.astype(np.int32) - 3, "values from -3 to 252")):
        with pytest.raises(data.BadImage, match=f"{name}: .*{why}"):
            data.read_image(saved(tmp_path / name, array))


def png16(path, rgb):
    """A PNG of 16 bits a channel, which Pillow reads and does not write: (H, W, 3) uint16."""
    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width, _ = rgb.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def test_colours_of_16_bits_and_of_12_stored_in_16(tmp_path):
    rgb = np.repeat(RAMP[..., None] * 257, 3, 2)
    found = np.asarray(data.read_image(png16(tmp_path / "a.png", rgb)))
    assert np.array_equal(found[..., 1], RAMP)
    with pytest.raises(data.BadImage, match="b.png: .*twelfth"):
        data.read_image(png16(tmp_path / "b.png", rgb // 16))


def test_of_several_pictures_the_first_is_read_and_that_is_said_once(tmp_path, capsys, unsaid):
    pages = [scene(seed=k) for k in range(3)]
    for name in ("a.tif", "b.tif", "c.gif"):
        saved(tmp_path / name, pages[0], save_all=True, append_images=pages[1:])
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(np.asarray(data.read_image(tmp_path / name)), np.asarray(pages[0]))
    assert data.read_image(tmp_path / "c.gif").size == (160, 120)
    assert capsys.readouterr().err == (f"{tmp_path}/a.tif: holds several pictures; of such files "
                                       "the first is read\n")


# -----------------------------------------------------------------------------------------------
# EXIF


def tagged(path, image, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(path, image, exif=exif, **options)


UPRIGHT = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: x.swapaxes(0, 1)[::-1]}


@pytest.mark.parametrize("suffix", ("jpg", "png", "webp", "tif"))
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_frame_is_turned_as_its_exif_says(tmp_path, suffix, orientation):
    image, options = scene(), {"lossless": True} if suffix == "webp" else {}
    plain = saved(tmp_path / f"plain.{suffix}", image, **options)
    path = tagged(tmp_path / f"turned.{suffix}", image, orientation, **options)
    for factor in (1, 2, 4, 8):
        with data.opened(plain) as a, data.opened(path) as b:
            width, height = b.size
            expected, found = (np.asarray(data.decode(picture, factor)) for picture in (a, b))
        assert np.array_equal(found, UPRIGHT[orientation](expected))
        assert found.shape == (-(-height // factor), -(-width // factor), 3)
    assert (width, height) == data.read_image(path).size
    assert (width, height) == ((120, 160) if orientation >= 5 else (160, 120))


@pytest.mark.parametrize("orientation", (3, 6))
def test_crops_and_masks_are_turned_as_well(tmp_path, orientation):
    stored = tagged(tmp_path / "a/a.jpg", scene(400, 300), orientation, quality=95)
    saved(tmp_path / "b/a.png", UPRIGHT[orientation](np.asarray(Image.open(stored))))
    for exact in (True, False):
        sizes = dict(global_size=56, local_size=28, local_crops=2, exact_decode=exact)
        crops, upright = (augment.MultiCrop(data.Frames(tmp_path / folder), **sizes)[[(0, 0, 0, 0)]]
                          for folder in "ab")
        assert (crops["global"].int() - upright["global"].int()).abs().float().mean() < 2
    mask = SQUARE.T * np.arange(64, dtype=np.uint8)[:, None].clip(0, 1)
    path = tagged(tmp_path / "mask.png", mask, orientation)
    assert np.array_equal(data.read_mask(path).numpy(), UPRIGHT[orientation](mask > 0))


def test_a_header_read_stays_one(tmp_path, monkeypatch):
    """getexif() of a PNG without EXIF decodes all of it. A tag behind the pixels is named."""
    path = saved(tmp_path / "a.png", scene())
    loads, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load",
                        lambda self: loads.append(1) or load(self))
    with data.opened(path) as picture:
        assert picture.size == (160, 120) and not loads
    whole, late = path.read_bytes(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    scene().save(late, "png", exif=exif)
    late = late.getvalue()
    at = late.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(late[at:at + 4], "big")
    path.write_bytes(whole[:-12] + late[at:end] + whole[-12:])  # before IEND
    with pytest.raises(data.BadImage, match="a.png: its EXIF orientation stands behind"):
        data.read_image(path)


def test_a_damaged_tag_does_not_cost_the_frame(tmp_path):
    path = saved(tmp_path / "a.jpg", scene(), exif=b"Exif\0\0rubbish")
    assert data.read_image(path).size == (160, 120)


# -----------------------------------------------------------------------------------------------
# Faults of the machine


def failing(monkeypatch, times, error):
    """Image.open fails so many times; returns the list of its calls."""
    calls, real = [], Image.open

    def fails(file, *args):
        calls.append(file)
        if len(calls) <= times:
            raise error
        return real(file, *args)
    monkeypatch.setattr(Image, "open", fails)
    monkeypatch.setattr(images, "PAUSE", 0)
    return calls


FAULTS = [getattr(errno, name) for name in ("EIO", "EMFILE", "ENFILE", "ENOMEM", "ESTALE")]


@pytest.mark.parametrize("error", [OSError(n, os.strerror(n)) for n in FAULTS] + [MemoryError()])
def test_a_fault_of_the_machine_is_no_bad_frame(tmp_path, monkeypatch, error):
    path = saved(tmp_path / "a.png", SQUARE * 255)
    frames = data.Frames(tmp_path)
    sizes = dict(global_size=56, local_size=28, local_crops=1)
    def crops(_):
        return augment.MultiCrop(frames, **sizes)[[(0, 0, 0, 0)]]

    whole = crops(path)
    with monkeypatch.context() as patch:
        calls = failing(patch, 2, error)
        again = crops(path)  # the same ones: no random number was used up
        assert len(calls) == 3 and not again["bad"]
        assert torch.equal(again["global"], whole["global"])
    for read in (data.read_image, data.read_mask, data.eval_image, crops):
        with monkeypatch.context() as patch:
            calls = failing(patch, 3, error)
            with pytest.raises(data.Transient, match="a.png: .* The machine fails, not"):
                read(path)
            assert len(calls) == 3


def test_the_sentence_survives_a_worker(tmp_path):
    """Where a worker fails, the loader raises the same class, with a traceback for a text."""
    import torch.utils.data as tud

    class Failing(tud.Dataset):
        def __getitem__(self, kind):
            raise kind("a.png: Input/output error. The machine fails")
    for kind in (data.Transient, data.BadImage):
        with pytest.raises(kind) as caught:
            list(tud.DataLoader(Failing(), batch_size=None, sampler=[kind], num_workers=1))
        assert str(caught.value) == "a.png: Input/output error. The machine fails"


# -----------------------------------------------------------------------------------------------
# Folders and lists of unlabelled frames


def tiny(*paths):
    for k, path in enumerate(paths):
        saved(path, np.full((8, 8, 3), k % 256, np.uint8))


def names(frames):
    return [frames.name(i) for i in range(len(frames))]


def test_what_systems_leave_behind_is_no_frame(tmp_path):
    tiny(tmp_path / "a/1.png")
    for name in ("__MACOSX", "@eaDir/1.png", "lost+found", "#recycle", "$RECYCLE.BIN", ".hidden"):
        tiny(tmp_path / "a" / name / "2.png")
    assert names(data.Frames(tmp_path)) == ["a/1.png"]


def test_what_is_passed_over_is_counted_and_named_once(tmp_path, capsys, unsaid):
    tiny(tmp_path / "a/1.png", tmp_path / "a/2.jpe", tmp_path / "a/3.JFIF", tmp_path / "a/4.gif")
    for name in ("b.heic", "c.heic", "d.dcm", "a/e.mp4", "a/IM0001", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"?")
    for _ in range(2):
        assert names(data.Frames(tmp_path)) == ["a/1.png", "a/2.jpe", "a/3.JFIF", "a/4.gif"]
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{tmp_path}: passed over files that are not read as frames: 2 .heic,")
    assert all(part in said for part in ("1 .dcm", "1 .mp4", "1 without a suffix"))
    assert ".txt" not in said
    assert data.images_in(tmp_path / "a") and "a: passed over" in capsys.readouterr().err


def test_manifests_as_people_write_them(tmp_path, capsys, unsaid):
    tiny(tmp_path / "a/1.png", tmp_path / "a/2.png")
    manifest = tmp_path / "list.csv"
    manifest.write_bytes(b"\xef\xbb\xbfpath, video\na/1.png, first\na/2.png, second\n")
    frames = data.Frames(manifest)
    assert names(frames) == ["a/1.png", "a/2.png"] and frames.videos == ["first", "second"]
    manifest.write_text("path,video\na/1.png,x\na/2.png,y\na/1.png,z\n")
    frames = data.Frames(manifest)
    assert names(frames) == ["a/1.png", "a/2.png"]
    assert [frames.video(i) for i in range(2)] == ["x", "y"]
    assert capsys.readouterr().err == (f"{manifest}: 1 rows name a frame that an earlier row names, "
                                       "such as a/1.png; each frame counts once\n")
    for rows in ("video,path\na\n", "video,path\na,\n", "video,path\na, \n"):
        manifest.write_text("video,path\nx,a/1.png\n" + rows.split("\n", 1)[1])
        with pytest.raises(ValueError, match="list.csv: line 3 has no path"):
            data.Frames(manifest)


def test_lists_in_every_encoding(tmp_path):
    tiny(tmp_path / "a/Tür.png", tmp_path / "a/b.png")
    lines = tmp_path / "lines.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        lines.write_text("Tür.png\r\n", encoding=encoding)
        assert names(data.Frames(tmp_path / "a", only=lines)) == ["Tür.png"]
    lines.write_text("Tür.png\n", encoding="latin-1")
    with pytest.raises(FileNotFoundError, match="lines.txt: 1 lines name no .* not in UTF-8"):
        data.Frames(tmp_path / "a", only=lines)
    lines.write_text("Tür.png\n", encoding="utf-16")
    with pytest.raises(ValueError, match="lines.txt: is text in UTF-16"):
        data.Frames(tmp_path / "a", only=lines)


def test_names_that_are_no_utf8_are_read_from_folders_and_lists(tmp_path):
    (tmp_path / "a").mkdir()
    name = os.fsdecode(b"T\xfcr.png")
    saved(tmp_path / "b.png", np.zeros((8, 8, 3), np.uint8)).rename(tmp_path / "a" / name)
    (tmp_path / "list.csv").write_bytes(b"path\na/T\xfcr.png\n")
    for frames in (data.Frames(tmp_path / "a"), data.Frames(tmp_path / "list.csv")):
        assert data.read_image(frames.path(0)).size == (8, 8)


# -----------------------------------------------------------------------------------------------
# Classes of one's own


def parts_of(labelled, split=0):
    """{part: groups of its frames}."""
    split = labelled.splits[split]
    return {part: {labelled.groups[i] for i in getattr(split, part)}
            for part in ("train", "val", "test")}


def sizes(split):
    return [len(part) for part in (split.train, split.val, split.test)]


def test_patients_of_flat_class_folders_stay_together(tmp_path):
    tiny(*(tmp_path / f"a/patient{p}_{i}.jpg" for p in range(5) for i in range(4)),
         *(tmp_path / f"b/patient{p}_{i}.jpg" for p in range(10, 15) for i in range(4)))
    labelled = data.load_folders(tmp_path)
    assert len(set(labelled.groups)) == 10 and labelled.root == str(tmp_path)
    assert labelled.grouping == "10 groups of 40 frames (patients, videos, near-duplicates)"


def test_patients_in_file_names():
    for name, who in (("UC_patient_12_3.bmp", "12"), ("patient0_11.jpg", "0"), ("Patient 12 (3).jpg", "12"),
                      ("patient-A7-3.png", "a7"), ("patient_ab_3.png", "ab"), ("x patient7.jpg", "7")):
        assert data.patient(f"a/{name}") == who
    for name in ("outpatient_clinic_3", "0001", "patients", "P12_3"):
        assert data.patient(f"a/{name}.jpg") == name and data.patient(f"a/{name}.jpg", "?") == "?"


def test_the_first_folder_below_the_class_is_the_patient(tmp_path):
    for c in "ab":
        for p in range(5):
            tiny(*(tmp_path / c / f"p{p}/exam{e}/{i}.png" for e in range(2) for i in range(2)))
    labelled = data.load_folders(tmp_path)
    assert set(labelled.groups) == {f"p{p}" for p in range(5)} and len(labelled.splits) == 5


def test_where_nothing_groups_the_frames_that_is_said(tmp_path):
    tiny(*(tmp_path / c / f"{i:02d}.png" for c in "ab" for i in range(6)))
    labelled = data.load_folders(tmp_path)
    assert len(set(labelled.groups)) == 12 and "frames count as independent" in labelled.grouping
    rows = [f"{c}/{i:02d}.png,g{i % 3}" for c in "ab" for i in range(6)]
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *rows]))
    labelled = data.load_folders(tmp_path)
    assert set(labelled.groups) == {"g0", "g1", "g2"}
    assert len(labelled.splits) == 3 and labelled.name.endswith("3 folds")
    (tmp_path / "groups.csv").write_text("file,group\n00,g0\n")
    with pytest.raises(ValueError, match="groups.csv: 10 frames are not listed, .* a/01.png"):
        data.load_folders(tmp_path)
    (tmp_path / "groups.csv").write_text("file,group\n00,g0\n00,g1\n")
    with pytest.raises(ValueError, match="groups.csv: 00 is in two groups, g0 and g1"):
        data.load_folders(tmp_path)


def test_folders_that_are_no_classes(tmp_path, capsys, unsaid):
    for name in ("a", "b", "__MACOSX", "lost+found", "@eaDir"):
        tiny(*(tmp_path / name / f"{i}.png" for i in range(5)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "features").mkdir()
    (tmp_path / "features/cache.pt").write_bytes(b"")
    labelled = data.open_labelled(tmp_path, "landmarks")
    assert labelled.classes == ("a", "b") and np.bincount(labelled.labels).tolist() == [5, 5]
    said = capsys.readouterr().err
    assert "passed over @eaDir, __MACOSX, empty, features, lost+found: no images" in said


def test_a_tree_that_is_split_already_keeps_its_split(tmp_path):
    for part, n in (("train", 20), ("test", 4)):
        tiny(*(tmp_path / part / c / f"{i:02d}.png" for c in "ab" for i in range(n)))
    labelled = data.load_folders(tmp_path)
    split, = labelled.splits
    assert labelled.classes == ("a", "b") and sizes(split) == [36, 4, 8]
    assert {labelled.paths[i].split("/")[-3] for i in split.test} == {"test"}
    folders = [path.split("/")[-2] for path in labelled.paths]
    assert [labelled.classes[label] for label in labelled.labels] == folders
    tiny(*(tmp_path / "valid" / c / "0.png" for c in "ab"))
    split, = data.load_folders(tmp_path).splits
    assert sizes(split) == [40, 2, 8]
    tiny(tmp_path / "valid/c/0.png")
    with pytest.raises(ValueError, match="the parts of a split must hold the same .* val: a, b, c"):
        data.load_folders(tmp_path)
    for path in (tmp_path / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="train, valid look like the parts of a split: train and"):
        data.load_folders(tmp_path)


def test_a_patient_on_both_sides_of_a_given_split_is_named(tmp_path):
    for part, first in (("train", 0), ("test", 9)):  # patient 9 in both
        for c in "ab":
            tiny(*(tmp_path / part / c / f"patient{p}_0.png" for p in range(first, first + 10)))
    with pytest.raises(ValueError, match=f"{tmp_path}: 1 groups cross split 0, such as 9: all"):
        data.load_folders(tmp_path)


def test_too_few_patients_are_counted_by_class(tmp_path):
    for c in "ab":
        tiny(*(tmp_path / c / f"p{c}{p}/{i}.png" for p in range(2) for i in range(4)))
    with pytest.raises(ValueError, match=f"{tmp_path}: .* three patients .* found a: 2, b: 2"):
        data.load_folders(tmp_path)


# -----------------------------------------------------------------------------------------------
# Frames and masks


def pairs(root, n, suffix=".png", prefix=""):
    for i in range(n):
        saved(root / f"images/{prefix}{i:02d}{suffix}", scene(32, 24, seed=i))
        saved(root / f"masks/{prefix}{i:02d}.png", SQUARE[:24, :32] * 255)
    return root


def test_any_folder_of_images_and_masks(tmp_path):
    labelled = data.open_labelled(pairs(tmp_path / "ours", 40), "polyps")
    split, = labelled.splits
    assert sizes(split) == [29, 3, 8] and labelled.root == str(tmp_path / "ours")
    assert labelled.name == "ours, frames with masks, a seeded split by group"
    assert np.array_equal(split.test, data.load_pairs(tmp_path / "ours").splits[0].test)
    rows = [f"{i:02d},{i // 5}" for i in range(40)]
    (tmp_path / "ours/groups.csv").write_text("\n".join(["file,group", *rows]))
    parts = parts_of(data.open_labelled(tmp_path / "ours", "polyps"))
    assert [len(groups) for groups in parts.values()] == [6, 1, 1]
    assert len(set.union(*parts.values())) == 8
    few = data.open_labelled(pairs(tmp_path / "few", 19), "polyps")  # can be tested on
    assert few.splits == [] and len(few.paths) == 19 and few.name == "few, frames with masks"
    for folder in ("images", "masks"):
        (tmp_path / "few" / folder).rename(tmp_path / "few" / folder[:-1])
    few = data.open_labelled(tmp_path / "few", "polyps")
    assert few.masks[3] == str(tmp_path / "few/mask/03.png")


def test_two_files_of_one_stem_are_named(tmp_path):
    pairs(tmp_path, 3)
    saved(tmp_path / "images/01.jpg", scene(32, 24))
    with pytest.raises(ValueError, match="images/01.* and .*images/01.* have one stem"):
        data.open_labelled(tmp_path, "polyps")
    (tmp_path / "images/01.jpg").rename(tmp_path / "masks/01.jpg")
    with pytest.raises(ValueError, match="masks/01.* and .*masks/01.* have one stem"):
        data.open_labelled(tmp_path, "polyps")


@pytest.mark.parametrize("orientation", (3, 6))
def test_a_frame_that_exif_turns_and_a_mask_that_it_does_not(tmp_path, orientation):
    pairs(tmp_path, 3)
    tagged(tmp_path / "images/01.png", scene(32, 24), orientation)
    with pytest.raises(ValueError, match=rf"01.png: EXIF turns .* \(orientation {orientation}\)"):
        data.open_labelled(tmp_path, "polyps")
    tagged(tmp_path / "masks/01.png", SQUARE[:24, :32] * 255, orientation)
    assert len(data.open_labelled(tmp_path, "polyps").paths) == 3


def test_lists_of_kvasir_seg_as_people_save_them(tmp_path):
    pairs(tmp_path, 20)
    twice = "".join(f"{i:02d}.jpg\n" for i in [*range(15), 3])
    (tmp_path / "train.txt").write_text(twice, encoding="utf-8-sig")
    (tmp_path / "val.txt").write_text("".join(f"{i:02d}\n" for i in range(15, 20)))
    split, = data.open_labelled(tmp_path, "polyps").splits
    assert sizes(split) == [14, 1, 5]
    with open(tmp_path / "train.txt", "a") as file:
        file.write((tmp_path / "val.txt").read_text())
    with pytest.raises(ValueError, match="train.txt and .*val.txt: 5 frames stand in both, .* 15"):
        data.open_labelled(tmp_path, "polyps")


def test_pranet_with_another_test_set(tmp_path):
    for part, n in (("TrainDataset", 20), ("TestDataset/ETIS-LaribPolypDB", 3)):
        pairs(tmp_path / part, n)
    labelled = data.open_labelled(tmp_path, "polyps")
    assert labelled.name == "PraNet's split, test ETIS-LaribPolypDB"
    assert len(labelled.splits[0].test) == 3


def test_training_masks_that_are_all_alike_are_refused():
    empty, full, some = torch.zeros(4, 4) > 0, torch.ones(4, 4) > 0, torch.eye(4) > 0
    for masks, word in (([empty, empty], "empty"), ([full, full], "full")):
        with pytest.raises(ValueError, match=f"ours: all 2 training masks are {word}"):
            data.refuse_one_sided(masks, "ours")
    for masks in ([empty, some], [full, empty], torch.stack([full, some])):
        data.refuse_one_sided(masks, "ours")


# -----------------------------------------------------------------------------------------------
# Where data come from


def test_synthetic_data_say_so_in_their_first_word(tmp_path):
    trees = {"": False, "synthetic/deep": True}
    for folder, synthetic in trees.items():
        tiny(*(tmp_path / folder / "frames" / c / f"{i}.png" for c in "ab" for i in range(5)))
        pairs(tmp_path / folder / "polyps", 20)
    made_by = dict(videos=40, frames=20, scale=1.0, size=256, seed=0)
    (tmp_path / "synthetic/made_by.json").write_text(json.dumps(made_by))
    (tmp_path / "made_by.json").write_text('{"camera": "of another program"}')
    for folder, synthetic in trees.items():
        here = tmp_path / folder
        for labelled in (data.load_folders(here / "frames"), data.load_pairs(here / "polyps")):
            assert labelled.name.startswith("synthetic frames in the layout of ") == synthetic
            assert labelled.root.startswith(str(tmp_path))
            again = dataclasses.replace(labelled, splits=[])
            assert again.name == labelled.name


def test_an_empty_fold_number_in_the_official_list(tmp_path):
    tree = tmp_path / "labeled-images/lower-gi-tract/anatomical-landmarks"
    tiny(*(tree / c / f"{c}{i}.png" for c in ("cecum", "ileum") for i in range(5)))
    rows = [f"{c}{i}.png;{c};{i}" for c in ("cecum", "ileum") for i in range(5)]
    listed = tmp_path / "official_splits/5_fold_split.csv"
    listed.parent.mkdir()
    for row, why in (("ileum4.png;ileum;", "line 11 has no split-index"),
                     ("ileum4.png;ileum", "line 11 has no split-index"),
                     ("ileum4.png;ileum;x", "ileum4.png is in fold 'x', which is no number")):
        listed.write_text("\n".join(["file-name;class-name;split-index", *rows[:-1], row]))
        with pytest.raises(ValueError, match=f"5_fold_split.csv: {why}"):
            data.load_landmarks(tmp_path)


def test_groups_of_official_folds(tmp_path):
    """HyperKvasir knows no patients. Who does says so, and each goes where its first frame is."""
    tree = tmp_path / "labeled-images/lower-gi-tract/anatomical-landmarks"
    rows = []
    for c in ("cecum", "ileum"):
        tiny(*(tree / c / f"{c}{i}.png" for i in range(5)))
        rows += [f"{c}{i}.png;{c};{i}" for i in range(5)]
    listed = tmp_path / "official_splits/5_fold_split.csv"
    listed.parent.mkdir()
    listed.write_text("\n".join(["file-name;class-name;split-index", *rows]))
    assert len(set(data.load_landmarks(tmp_path).groups)) == 10
    own = [f"{c}{i},{c}{min(i, 3)}" for c in ("cecum", "ileum") for i in range(5)]
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *own]))
    labelled = data.load_landmarks(tmp_path)
    assert len(set(labelled.groups)) == 8 and labelled.name.endswith("official folds 0, 1, 2, 3")


def test_a_damaged_limuc_list_is_named(tmp_path):
    for part, p in (("train_and_validation_sets", 1), ("test_set", 2)):
        tiny(*(tmp_path / part / f"Mayo {g}" / f"UC_patient_{p}_1.bmp" for g in range(4)))
    path = tmp_path / "cross_validation_folds_train_val_info/fold_0/train.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"Mayo 0": ["UC_pat')
    with pytest.raises(ValueError, match="fold_0/train.json: is no list as LIMUC publishes them"):
        data.load_limuc(tmp_path)


def test_too_few_frames_can_be_tested_on_but_not_split(tmp_path):
    with pytest.raises(SystemExit, match="few: 19 frames are too few to split"):
        root = pairs(tmp_path / "few", 19)
        probe_segment.main(["--data", str(root), "--out", str(tmp_path / "r.json")])


def test_a_set_of_empty_masks_is_refused_before_any_training(tmp_path):
    for path in (pairs(tmp_path / "set", 20) / "masks").iterdir():
        saved(path, np.zeros((24, 32), np.uint8))
    with pytest.raises(SystemExit, match="set, .*: all 15 training masks are empty"):
        probe_segment.main(["--data", str(tmp_path / "set"), "--out", str(tmp_path / "r.json")])
