"""Frames as hospitals have them: what was once read wrongly in silence, and what must be said in one sentence."""
import errno
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import augment
import data
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


def scene(width=160, height=120, seed=0):
    """A picture of smooth colours that looks different from every side."""
    grid = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return grid.resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def coloured(inside, outside=(0, 0, 0)):
    return np.where(SQUARE[..., None] > 0, np.uint8(inside), np.uint8(outside))


def palette(*colours, array=SQUARE):
    image = Image.frombytes("P", array.shape[::-1], array.tobytes())
    image.putpalette([value for colour in colours for value in colour])
    return image


MASKS = {
    "0 and 1": SQUARE, "0 and 127": SQUARE * 127, "0 and 255": SQUARE * 255, "one bit": Image.fromarray(SQUARE > 0),
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
    assert torch.equal(data.read_mask(saved(tmp_path / "b.png", soft)), torch.from_numpy(np.array(soft) > 127))
    deep = np.array(soft).astype(np.uint16) * 257
    assert torch.equal(data.read_mask(saved(tmp_path / "c.png", deep)), data.read_mask(tmp_path / "b.png"))


def test_lossy_masks_stay_above_127(tmp_path):
    path = saved(tmp_path / "a.jpg", SQUARE * 255, "RGB", quality=75)
    assert torch.equal(data.read_mask(path), torch.from_numpy(np.array(Image.open(path).convert("L")) > 127))
    assert data.read_mask(saved(tmp_path / "b.jpg", coloured((255, 0, 0)), quality=90)).sum() == pytest.approx(1024, abs=70)
    assert not data.read_mask(saved(tmp_path / "c.jpg", SQUARE * 9)).any()  # an empty one, and noise
    with pytest.raises(data.BadImage, match="d.jpg: as a mask it has values from .* to 1"):
        data.read_mask(saved(tmp_path / "d.jpg", SQUARE * 127))


def test_single_empty_and_full_masks_are_legal(tmp_path):
    for k, (value, found) in enumerate(((0, 0), (255, 4096))):
        full = np.full((64, 64), value, np.uint8)
        assert data.read_mask(saved(tmp_path / f"{k}.png", full)).sum() == found
        assert data.read_mask(saved(tmp_path / f"{k}p.png", Image.fromarray(full).convert("RGB").quantize(4))).sum() == found
    clear = np.dstack([np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), np.uint8)])
    assert not data.read_mask(saved(tmp_path / "clear.png", clear)).any()


REFUSED = {
    "0, 1 and 2": SQUARE + np.eye(64, dtype=np.uint8), "1 alone": np.ones((64, 64), np.uint8), "1 and 2": SQUARE + np.uint8(1),
    "16 bits to 300": np.arange(4096, dtype=np.uint16).reshape(64, 64) % 301,
    "colours and alpha": np.dstack([coloured((255, 255, 255)), SQUARE * 255]),
    "two bright colours": palette((255, 255, 255), (255, 0, 0)),
    "classes by number": palette((0, 0, 0), (1, 1, 1), (2, 2, 2), array=SQUARE + np.eye(64, dtype=np.uint8)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mask_that_could_mean_two_things_is_refused_by_name(tmp_path, kind):
    with pytest.raises(data.BadImage, match="a.png: as a mask it "):
        data.read_mask(saved(tmp_path / "a.png", REFUSED[kind]))
    with pytest.raises(data.BadImage, match="a.tif: as a mask it has values from 0.0 to 0.5"):
        data.read_mask(saved(tmp_path / "a.tif", np.linspace(0, 0.5, 4096, dtype=np.float32).reshape(64, 64)))


# ---------------------------------------------------------------------------------------------------------------------
# Depth


def test_16_bits_are_divided_by_257(tmp_path):
    for name in ("a.png", "a.tif"):
        pixels = np.asarray(data.read_image(saved(tmp_path / name, RAMP * 257)))
        assert np.array_equal(pixels, np.repeat(RAMP.astype(np.uint8)[..., None], 3, 2))
    wide = saved(tmp_path / "i.tif", (RAMP * 257).astype(np.int32))  # 32 bits, of which 16 are used
    assert np.array_equal(np.asarray(data.read_image(wide)), pixels)


def test_what_has_no_known_range_is_refused_by_name(tmp_path):
    for name, array, why in (("f.tif", RAMP / np.float32(255), "floating-point"), ("twelve.png", RAMP * 16, "twelfth"),
                             ("i.tif", RAMP.astype(np.int32) * 70000, "values from 0 to 17850000"),
                             ("minus.tif", RAMP.astype(np.int32) - 3, "values from -3 to 252")):
        with pytest.raises(data.BadImage, match=f"{name}: .*{why}"):
            data.read_image(saved(tmp_path / name, array))


def png16(path, rgb):
    """A PNG of 16 bits a channel, which Pillow reads and does not write: (H, W, 3) uint16."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    height, width, _ = rgb.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def test_colours_of_16_bits_and_of_12_stored_in_16(tmp_path):
    rgb = np.repeat(RAMP[..., None] * 257, 3, 2)
    assert np.array_equal(np.asarray(data.read_image(png16(tmp_path / "a.png", rgb)))[..., 1], RAMP)
    with pytest.raises(data.BadImage, match="b.png: .*twelfth"):
        data.read_image(png16(tmp_path / "b.png", rgb // 16))


def test_of_several_pictures_the_first_is_read_and_that_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "said", set())
    pages = [scene(seed=k) for k in range(3)]
    for name in ("a.tif", "b.tif", "c.gif"):
        saved(tmp_path / name, pages[0], save_all=True, append_images=pages[1:])
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(np.asarray(data.read_image(tmp_path / name)), np.asarray(pages[0]))
    assert data.read_image(tmp_path / "c.gif").size == (160, 120)
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path}/a.tif: holds several pictures; of such files the first is read"]


# ---------------------------------------------------------------------------------------------------------------------
# EXIF


def tagged(path, image, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(path, image, exif=exif, **options)


UPRIGHT = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
           5: lambda x: x.swapaxes(0, 1), 6: lambda x: x.swapaxes(0, 1)[:, ::-1], 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
           8: lambda x: x.swapaxes(0, 1)[::-1]}


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
    assert (width, height) == ((120, 160) if orientation >= 5 else (160, 120)) == data.read_image(path).size


@pytest.mark.parametrize("orientation", (3, 6))
def test_crops_and_masks_are_turned_as_well(tmp_path, orientation):
    tagged(tmp_path / "a/a.jpg", scene(400, 300), orientation, quality=95)
    saved(tmp_path / "b/a.png", UPRIGHT[orientation](np.asarray(Image.open(tmp_path / "a/a.jpg"))))
    for exact in (True, False):
        crops = [augment.MultiCrop(data.Frames(tmp_path / folder), global_size=56, local_size=28, local_crops=2, exact_decode=exact)
                 [[(0, 0, 0, 0)]] for folder in "ab"]
        assert (crops[0]["global"].int() - crops[1]["global"].int()).abs().float().mean() < 2
    path = tagged(tmp_path / "mask.png", SQUARE.T * np.arange(64, dtype=np.uint8)[:, None].clip(0, 1), orientation)
    stored = np.asarray(Image.open(path)) > 0
    assert np.array_equal(data.read_mask(path).numpy(), UPRIGHT[orientation](stored))


def test_a_header_read_stays_one(tmp_path, monkeypatch):
    """getexif() of a PNG without EXIF decodes all of it; one whose tag stands behind the pixels is named."""
    path = saved(tmp_path / "a.png", scene())
    loads, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: loads.append(1) or load(self))
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
    with pytest.raises(data.BadImage, match="a.png: its EXIF orientation stands behind its pixels"):
        data.read_image(path)


def test_a_damaged_tag_does_not_cost_the_frame(tmp_path):
    path = saved(tmp_path / "a.jpg", scene(), exif=b"Exif\0\0rubbish")
    assert data.read_image(path).size == (160, 120)


# ---------------------------------------------------------------------------------------------------------------------
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
    monkeypatch.setattr(data, "PAUSE", 0)
    return calls


@pytest.mark.parametrize("error", [OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
                                   for name in ("EIO", "EMFILE", "ENFILE", "ENOMEM", "ESTALE")] + [MemoryError()])
def test_a_fault_of_the_machine_is_no_bad_frame(tmp_path, monkeypatch, error):
    path = saved(tmp_path / "a.png", SQUARE * 255)
    frames = data.Frames(tmp_path)
    sizes = dict(global_size=56, local_size=28, local_crops=1)
    whole = augment.MultiCrop(frames, **sizes)[[(0, 0, 0, 0)]]
    with monkeypatch.context() as patch:
        calls = failing(patch, 2, error)
        again = augment.MultiCrop(frames, **sizes)[[(0, 0, 0, 0)]]
        assert len(calls) == 3 and not again["bad"] and torch.equal(again["global"], whole["global"])  # the same crops
    for read in (data.read_image, data.read_mask, data.eval_image, lambda path: augment.MultiCrop(frames, **sizes)[[(0, 0, 0, 0)]]):
        with monkeypatch.context() as patch:
            calls = failing(patch, 3, error)
            with pytest.raises(data.Transient, match="a.png: .* The machine fails, not the frame"):
                read(path)
            assert len(calls) == 3


def test_the_sentence_survives_a_worker(tmp_path):
    """Where a worker fails, the loader raises the same class, with the worker's traceback for a text."""
    import torch.utils.data as tud

    class Failing(tud.Dataset):
        def __getitem__(self, kind):
            raise kind("a.png: Input/output error. The machine fails")
    for kind in (data.Transient, data.BadImage):
        with pytest.raises(kind) as caught:
            list(tud.DataLoader(Failing(), batch_size=None, sampler=[kind], num_workers=1))
        assert str(caught.value) == "a.png: Input/output error. The machine fails"
