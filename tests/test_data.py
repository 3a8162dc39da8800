"""data.py: the multi-crop's distribution against torchvision's, masks and samplers that no process count changes, every layout."""
import json
import math
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
from torchvision.transforms.v2 import functional as V2

import augment
import bench
import data

REAL = Path(data.__file__).parent.parent / "shared" / "data"
SMALL = dict(global_size=56, local_size=28, local_crops=3)  # the tests of order and repetition need no more


def picture(seed, height=120, width=150):
    """A PIL frame with structure at every scale, as an endoscope's has."""
    rng = np.random.default_rng(seed)
    grids = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (3, 12, 48)]
    layers = [np.asarray(grid.resize((width, height), Image.BICUBIC), np.float32) for grid in grids]
    return Image.fromarray((0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2]).clip(0, 255).astype(np.uint8))


def save(path, image=None, **options):
    """Write an image, by default a tiny one that the path's name determines, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image or Image.new("RGB", (16, 12), tuple(np.frombuffer(path.stem.encode().rjust(3), np.uint8)[-3:].tolist()))
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 JPEG frames in three videos."""
    root = tmp_path_factory.mktemp("frames")
    for i in range(12):
        save(root / f"video{i % 3}" / f"{i:02d}.jpg", picture(i), quality=95)
    return root


def steps(multicrop, sampler, masks=None, workers=0):
    masks = masks or augment.BlockMasks((4, 4), sampler.batch * sampler.world, multicrop.seed)
    return list(augment.loader(multicrop, sampler, masks, workers))


def same(a, b):
    """Two batches hold the same values under the same keys."""
    equal = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
    return a.keys() == b.keys() and all(equal)


# ---------------------------------------------------------------------------------------------------------------- reading

def bad_files(root):
    """One file of every kind that cannot be read."""
    root.mkdir(exist_ok=True)
    whole = save(root / "whole.jpg", picture(0)).read_bytes()
    (root / "whole.jpg").unlink()
    (root / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.png").write_text("no image")
    save(root / "absurd.png", Image.new("1", (9000, 9000)))
    return sorted(root.iterdir()) + [root / "missing.jpg", root]


def test_what_cannot_be_read_is_named(tmp_path):
    for path in bad_files(tmp_path / "bad"):
        with pytest.raises(data.BadImage, match=f"^{path}: .+"):
            data.read_image(path)


@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("RGBA", "a.png"), ("P", "a.png"), ("1", "a.bmp"), ("CMYK", "a.jpg")])
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    image = data.read_image(save(tmp_path / name, picture(0).convert(mode)))
    assert image.mode == "RGB" and image.size == (150, 120)


def test_a_larger_frame_is_decoded_smaller(tmp_path):
    for name in ("a.jpg", "a.png"):
        path = save(tmp_path / name, picture(0, 481, 642), quality=95)
        sizes = [data.read_image(path, draft=draft).size for draft in (None, (322, 100), (321, 240), (160, 120), (1, 1))]
        assert sizes == [(642, 481), (642, 481), (321, 241), (161, 121), (81, 61)]


def test_eval_image_is_dinov2s_evaluation_transform(tmp_path):
    path = save(tmp_path / "a.png", picture(1, 300, 401))
    for size in (224, 98):
        classical = T.Compose([T.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC), T.CenterCrop(size), T.ToTensor(),
                               T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
        assert torch.equal(data.eval_image(path, size), classical(Image.open(path)))


def test_frames_of_a_folder(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "frames")
    for name in ("seg/images/x.PNG", "seg/masks/x.png", ".hidden/y.png", "video0/._00.jpg"):
        save(root / name, format="PNG")
    (root / "notes.txt").write_text("not a frame")
    frames = data.Frames(root)
    assert [frames.name(i) for i in range(3)] == ["seg/images/x.PNG", "video0/00.jpg", "video0/03.jpg"] and len(frames) == 13
    assert [frames.video(i) for i in (0, 1, 12)] == ["seg/images", "video0", "video2"]
    assert Path(frames.path(12)) == root / "video2/11.jpg"


def test_frames_of_a_manifest(folder, tmp_path):
    (folder.parent / "list.csv").write_text(f"path,video,label\n{folder.name}/video1/01.jpg,b,0\n{folder.name}/video0/00.jpg,a,1\n\n")
    (tmp_path / "manifest.csv").write_text("path\nz/1.jpg\ny/é.jpg\n")
    frames = data.Frames(folder.parent / "list.csv")
    assert [frames.video(i) for i in range(len(frames))] == ["b", "a"] and data.read_image(frames.path(1)).size == (150, 120)
    frames = data.Frames(tmp_path)
    assert [(frames.name(i), frames.video(i)) for i in range(len(frames))] == [("z/1.jpg", "z"), ("y/é.jpg", "y")]


def test_only_the_named_frames(folder, tmp_path):
    lines = tmp_path / "only.txt"
    lines.write_text(f"07\n01.jpg\nvideo0/03.jpg\n\nvideo2/11\n{folder}/video1/04.jpg\n07.jpg\n")
    frames = data.Frames(folder, only=lines)
    names = [frames.name(i) for i in range(len(frames))]
    assert names == ["video0/03.jpg", "video1/01.jpg", "video1/04.jpg", "video1/07.jpg", "video2/11.jpg"]
    assert frames.video(4) == "video2"
    lines.write_text("01\nnowhere\n")
    with pytest.raises(FileNotFoundError, match="only.txt: 1 lines name no frame under .*'nowhere'"):
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


# ----------------------------------------------------------------------------------------------- the crops, their first half

def test_boxes_are_distributed_as_torchvisions():
    width, height, n = 150, 120, 4000
    torch.manual_seed(0)
    for scale in ((0.32, 1.0), (0.05, 0.32)):
        theirs = np.array([T.RandomResizedCrop.get_params(torch.empty(3, height, width), scale, (3 / 4, 4 / 3)) for _ in range(n)], float)
        rng = np.random.default_rng(0)
        ours = np.array([augment.crop_box(rng.random(40), width, height, scale) for _ in range(n)], float)
        for a, b in zip(features(ours), features(theirs)):
            grid = np.sort(np.concatenate([a, b]))
            apart = np.abs(np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")).max() / n
            assert apart < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov at a level of 0.001


def features(boxes):
    """Area, log aspect, and the place of the box's centre in the frame: the columns whose distributions are compared."""
    top, left, h, w = boxes.T
    return h * w, np.log(w / h), top + h / 2, left + w / 2


def test_boxes_fit_into_frames_of_any_shape():
    rng = np.random.default_rng(0)
    for width, height in ((1, 1), (3, 200), (200, 3), (2, 1), (31, 30)):
        for _ in range(50):
            top, left, h, w = augment.crop_box(rng.random(40), width, height, (0.05, 0.32))
            assert 0 <= top and 0 <= left and 1 <= h <= height - top and 1 <= w <= width - left
    assert augment.crop_box(np.ones(40), 3, 200, (0.05, 0.32)) == (98, 0, 4, 3)  # no attempt fits: the middle, of aspect 3 / 4


def test_crops_equal_pils_to_one_grey_level(tmp_path):
    """Exact decoding on a frame that is much larger than its crops, JPEG and PNG."""
    flipped = 0
    for name in ("a.jpg", "b.png"):
        image = Image.open(save(tmp_path / name, picture(3, 540, 700), quality=92)).convert("RGB")
        multicrop = augment.MultiCrop(data.Frames(tmp_path), global_size=98, local_size=42, exact_decode=True)
        for epoch in range(3):
            frame = int(name == "b.png")
            crops, _ = multicrop.crops(frame, augment.stream(0, augment.CROPS, epoch, frame))
            boxes, flips, _ = multicrop.draw(augment.stream(0, augment.CROPS, epoch, frame), *image.size)
            flipped += flips.sum()
            for crop, (top, left, h, w), flip, size in zip(crops, boxes, flips, multicrop.sizes, strict=True):
                theirs = image.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
                theirs = theirs.transpose(Image.FLIP_LEFT_RIGHT) if flip else theirs
                assert crop.shape == (3, size, size) and crop.dtype == torch.uint8
                assert (crop.int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() <= 1
    assert 15 < flipped < 45  # of 60


@pytest.mark.parametrize("name, factor", [("a.jpg", 2), ("a.jpg", 4), ("a.png", 2)])
def test_reduced_decoding_is_close_and_happens(tmp_path, name, factor):
    save(tmp_path / name, picture(4, 300 * factor, 380 * factor), quality=92)
    multicrop = augment.MultiCrop(data.Frames(tmp_path), global_size=126, local_size=56)
    factors, mean, at_99, *_ = bench.reduced_error(multicrop)
    assert factors == f"{factor}: 1" and float(mean) < 0.5 and int(at_99) <= 2


def test_a_frame_without_room_is_decoded_whole(folder, monkeypatch):
    seen, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda image, factor=1: seen.append(factor) or decode(image, factor))
    for exact, sizes in ((False, dict(global_size=112)), (True, SMALL), (False, dict(global_size=14, local_size=7))):
        augment.MultiCrop(data.Frames(folder), exact_decode=exact, **sizes)[[(0, 0, 0, 0)]]
    assert seen[:2] == [1, 1] and seen[2] > 1


# -------------------------------------------------------------------------------------------------- the colours, second half

def uniform(values, low, high):
    """The values look uniform on [low, high]: range, mean and deviation (each to about 5 standard errors)."""
    n, width = len(values), high - low
    assert low - 1e-6 <= values.min() < low + 0.02 * width and high - 0.02 * width < values.max() <= high + 1e-6
    assert abs(values.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * n)
    assert abs(values.std() - width / math.sqrt(12)) < 0.02 * width


def drawn(n=20_000, **options):
    """Colour parameters of n frames: (n, 4, 11), two global and two local crops."""
    multicrop = augment.MultiCrop(None, local_crops=2, **options)
    rng = augment.stream(0, augment.CROPS)
    return np.stack([multicrop.colour(u) for u in rng.random((n, 4, 13))])


def test_colour_parameters_have_dinov2s_distribution():
    colour = drawn()
    n = len(colour)
    near = lambda share, p: abs(share - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-12  # noqa: E731
    for view, (blur, solarize) in enumerate(((0, 0), (0.9, 0.2), (0.5, 0), (0.5, 0))):
        c = colour[:, view]
        jitter = (c[:, :4] != augment.IDENTITY).any(1)
        assert near(jitter.mean(), 0.8)
        for column, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)):
            uniform(c[jitter, column], low, high)
        orders = Counter(map(tuple, c[jitter, 4:8].astype(int)))
        assert len(orders) == 24 and all(abs(k - jitter.sum() / 24) < 5 * math.sqrt(jitter.sum() / 24) for k in orders.values())
        assert near((c[:, augment.GRAYSCALE] > 0).mean(), 0.2) and near((c[:, augment.SOLARIZE] > 0).mean(), solarize)
        assert near((c[:, augment.SIGMA] > 0).mean(), blur)
        if blur:
            uniform(c[c[:, augment.SIGMA] > 0, augment.SIGMA], 0.1, 2)
    pairs = np.corrcoef(colour.reshape(n, -1)[:, [0, 3, 8, 11, 14, 19, 20, 21, 31]].T) - np.eye(9)  # crops are drawn apart
    assert np.abs(pairs).max() < 0.04


def test_switches_of_the_colours():
    assert [round((drawn(4000, blur="as-written")[:, v, augment.SIGMA] > 0).mean(), 1) for v in range(3)] == [1.0, 0.1, 0.5]
    plain = drawn(1000)
    for option, column in (("hue", augment.HUE), ("grayscale", augment.GRAYSCALE), ("solarize", augment.SOLARIZE)):
        off = drawn(1000, **{option: False})
        assert (off[..., column] == 0).all() and (plain[..., column] != 0).any()
        assert np.array_equal(np.delete(off, column, -1), np.delete(plain, column, -1))  # and nothing else changes


def parameters(n, **columns):
    """(n, 11) parameters that change nothing but the named columns."""
    colour = torch.zeros(n, 11)
    colour[:, :4], colour[:, 4:8] = torch.tensor(augment.IDENTITY), torch.arange(4.0)
    for column, values in columns.items():
        colour[:, getattr(augment, column)] = torch.as_tensor(values, dtype=torch.float32)
    return colour


OPERATIONS = {
    "BRIGHTNESS": ((0.6, 1.4), V2.adjust_brightness), "CONTRAST": ((0.6, 1.4), V2.adjust_contrast),
    "SATURATION": ((0.8, 1.2), V2.adjust_saturation), "HUE": ((-0.1, 0.1), V2.adjust_hue),
    "SIGMA": ((0.3, 2.0), lambda x, sigma: V2.gaussian_blur(x, [9, 9], [sigma, sigma])),
    "GRAYSCALE": ((1, 1), lambda x, _: V2.rgb_to_grayscale(x, 3)), "SOLARIZE": ((1, 1), lambda x, _: V2.solarize(x, 128 / 255))}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name):
    (low, high), theirs = OPERATIONS[name]
    x = torch.rand(8, 3, 31, 30, generator=torch.Generator().manual_seed(0))
    x[0, :, :9], x[1, 1], x[2, :, 3:9] = 0.4, x[1, 0], x[2, :1, 3:9]  # flat, two channels alike, grey
    values = torch.linspace(low, high, 8)
    values[5] = dict(GRAYSCALE=0, SOLARIZE=0, SIGMA=0, HUE=0).get(name, 1)  # this one is left alone
    ours = x.clone()
    augment.photometric(ours, parameters(8, **{name: values}))
    for i, value in enumerate(values.tolist()):
        expected = x[i] if i == 5 else theirs(x[i], value)
        torch.testing.assert_close(ours[i], expected, atol=2e-5 if name == "HUE" else 2e-6, rtol=0)
        assert i == 5 or name in ("BRIGHTNESS", "HUE") or not torch.equal(ours[i], x[i])


def test_batched_jitter_is_torchvisions_in_each_samples_own_order():
    """All of the second half: jitter in its drawn order, grayscale, blur, solarize, normalise."""
    crops = torch.randint(0, 256, (48, 3, 33, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(1)
    colour = torch.from_numpy(augment.draw_colour(rng.random((48, 13)), np.full(48, 0.5), np.full(48, 0.3)))
    ours = augment.distort(crops, colour)
    chain = list(OPERATIONS.values())[:4]
    for crop, row, result in zip(crops, colour.tolist(), ours):
        x = crop.float() / 255
        for op in map(int, row[4:8]):
            if row[op] != augment.IDENTITY[op]:
                x = chain[op][1](x, row[op])
        for column in ("GRAYSCALE", "SIGMA", "SOLARIZE"):
            if row[getattr(augment, column)]:
                x = OPERATIONS[column][1](x, row[getattr(augment, column)])
        x = V2.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        apart = (result - x).abs()
        assert (apart > 1e-3).float().mean() < 2e-3  # a value at the threshold of solarize may fall on either side
        assert apart.median() < 1e-5
    assert len({tuple(row[4:8]) for row in colour.tolist()}) > 15
    whole = crops.float() / 255
    augment.photometric(whole, colour)  # all samples in one call, as on a GPU
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    torch.testing.assert_close((whole - mean) / std, ours, atol=1e-5, rtol=0)


def test_crops_look_like_those_of_torchvisions_transforms(tmp_path):
    """The whole multi-crop against the same augmentations composed of PIL transforms: means over many crops of one frame."""
    n = 80
    for i in range(2):
        save(tmp_path / f"{i}.png", picture(10 + i))
    frames = data.Frames(tmp_path)
    multicrop = augment.MultiCrop(frames, seed=3)
    torch.manual_seed(0)
    classical = bench.pil_multicrop()
    theirs = [classical(frames.path(k % 2)) for k in range(n)]
    batch = augment.collate(multicrop[[(0, k, k, k % 2) for k in range(n)]], augment.BlockMasks((16, 16), n))
    crops = augment.augment(batch, "cpu")
    first, second = crops["global_crops"].split(n)
    for name, ours, his in (("global 1", first, [t[0] for t in theirs]), ("global 2", second, [t[1] for t in theirs]),
                            ("local", crops["local_crops"], [crop for t in theirs for crop in t[2:]])):
        for kind, a, b in zip(("mean", "deviation", "colour", "edges"), looks(ours), looks(torch.stack(his))):
            error = math.sqrt(a.var() / len(a) + b.var() / len(b)) * (3 if name == "local" else 1)  # crops of a frame are akin
            assert abs(a.mean() - b.mean()) < 4 * error, (name, kind, a.mean(), b.mean(), error)


def looks(crops):
    """Brightness, contrast, saturation and sharpness of each crop, (n,) each."""
    edges = (crops.diff(dim=-1).abs().mean((1, 2, 3)) / crops.std((1, 2, 3))).log()
    return crops.mean((1, 2, 3)), crops.std((1, 2, 3)), (crops.amax(1) - crops.amin(1)).mean((1, 2)), edges


# ------------------------------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize("side, n, short", [(16, 1600, 0.07), (37, 320, 0.13)])
def test_masks_are_dinov2s(side, n, short):
    """Asked for a uniform share from 0.1 to 0.5; how many patches that gives is known of DINOv2's."""
    masks = augment.BlockMasks((side, side), n // 2, seed=1)
    shares = np.concatenate([masks.shares(step) for step in range(2)])
    shares = shares[shares > 0]
    assert len(shares) == n
    counts = np.array([masks.one(0, k, share).sum() for k, share in enumerate(shares)])
    asked = (side * side * shares).astype(int)
    assert (0 < counts).all() and (counts <= asked).all()
    assert abs((counts < asked).mean() - short) < 4 * math.sqrt(short * (1 - short) / n) + 0.005
    assert abs(counts.mean() / side ** 2 - 0.298) < 0.004
    assert not masks.one(0, 0, 0).any()


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 11])
def test_every_row_is_masked_as_in_dinov2(batch):
    """By itself: with probability 1/2, by a uniform share of the range. In a step: half of the rows, one in every stratum."""
    masks, n = augment.BlockMasks((16, 16), batch, seed=1), 3000
    shares = np.stack([masks.shares(step) for step in range(n)])  # (n, 2B)
    assert ((shares > 0).sum(1) == batch).all()
    for row in shares.T:
        assert abs((row > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
        u = (np.sort(row[row > 0]) - 0.1) / 0.4
        assert np.abs(u - np.arange(len(u)) / len(u)).max() < 1.95 / math.sqrt(len(u))  # Kolmogorov-Smirnov, level 0.001
    pairs = (batch + 1) // 2
    for view in shares.reshape(n, 2, batch).swapaxes(0, 1) if batch % 2 == 0 else ():
        strata = ((view[view > 0] - 0.1) / 0.4 * pairs).astype(int).reshape(n, pairs)
        assert (np.sort(strata, 1) == np.arange(pairs)).all()


def test_two_images_share_what_they_hide():
    shares = augment.BlockMasks((16, 16), 10, seed=1).shares(7).reshape(2, 5, 2)  # view, pair, image
    assert ((shares > 0).sum(2) == 1).all()
    np.testing.assert_allclose(shares.sum((0, 2)), 0.6)
    last = augment.BlockMasks((16, 16), 11, seed=1).shares(7).reshape(2, 11)[:, 10]  # nobody shares with the eleventh
    assert (last > 0).sum() == 1


def test_every_process_hides_as_many_patches():
    """8 processes of 64 images: 4,878 patches each; drawn over the batch of all without pairs, +- 459."""
    masks = augment.BlockMasks((16, 16), 512)
    hidden = np.array([[masks(step, range(64 * rank, 64 * rank + 64)).sum() for rank in (0, 5)] for step in range(50)])
    assert abs(hidden.mean() - 4878) < 5 and hidden.std() < 6 and np.ptp(hidden) < 40
    small = augment.BlockMasks((16, 16), 8)  # two images each
    assert np.ptp([small(step, [2, 3]).sum() for step in range(50)]) < 12


def test_half_of_the_global_crops_of_a_step_are_masked():
    masks = augment.BlockMasks((16, 16), 16, seed=1)
    steps = [masks(step, range(16)) for step in range(20)]
    assert all(m.shape == (32, 256) and m.dtype == torch.bool for m in steps)
    assert all((m.any(1).view(16, 2).sum(1) == 1).all() for m in steps)  # one of the rows 2i and 2i + 1
    assert abs(torch.stack(steps).float().mean() - 0.149) < 0.004
    assert len({tuple(m.any(1).tolist()) for m in steps}) == 20
    some = masks(3, [2, 9])
    assert torch.equal(some, steps[3][[2, 9, 18, 25]])  # whichever process holds them


def test_blocks_are_blocks():
    rng, shapes = np.random.default_rng(0), []
    for _ in range(1000):
        mask = np.zeros((16, 12), bool)
        added = augment.add_block(mask, 80, rng)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        shapes.append((len(rows), len(columns)))
        assert 0 < added == mask.sum() == len(rows) * len(columns) <= 80 and len(rows) < 16 and len(columns) < 12
        assert np.ptp(rows) == len(rows) - 1 and np.ptp(columns) == len(columns) - 1
    ratio = np.log([h / w for h, w in shapes])
    assert -1.5 < ratio.min() < -1 and 1 < ratio.max() < 1.5 and abs(ratio[np.prod(shapes, 1) < 40].mean()) < 0.05
    assert min(np.prod(shapes, 1)) <= 4 and max(np.prod(shapes, 1)) > 70


def test_a_block_adds_no_more_than_is_left():
    rng = np.random.default_rng(0)
    for left in (1, 2, 3, 17):
        mask = np.zeros((16, 16), bool)
        mask[4:12, 4:12] = True
        added = [augment.add_block(mask, left, rng) for _ in range(20)]
        assert max(added) <= left and mask.sum() == 64 + sum(added)
    assert augment.add_block(np.ones((16, 16), bool), 5, rng) == 0


# ------------------------------------------------------------------------------------------------- order, repetition, resume

@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("workers", (1, 3))
def test_batches_do_not_depend_on_the_number_of_workers(folder, workers):
    multicrop = augment.MultiCrop(data.Frames(folder), seed=5, **SMALL)
    sampler = augment.EpochSampler(12, 5, seed=5, stop=4)  # into the second epoch
    alone, many = steps(multicrop, sampler), steps(multicrop, sampler, workers=workers)
    assert len(alone) == len(many) == 4 and all(same(a, b) for a, b in zip(alone, many))
    assert all(torch.equal(augment.augment(a, "cpu")["local_crops"], augment.augment(b, "cpu")["local_crops"]) for a, b in zip(alone, many))


def test_a_run_goes_on_from_any_step(folder):
    multicrop = augment.MultiCrop(data.Frames(folder), seed=5, **SMALL)
    whole = steps(multicrop, augment.EpochSampler(12, 5, seed=5, stop=6))
    for start in (1, 4):
        rest = steps(multicrop, augment.EpochSampler(12, 5, seed=5, start=start, stop=6), workers=1)
        assert len(rest) == 6 - start and all(same(a, b) for a, b in zip(whole[start:], rest))
    assert len({b["masks"].numpy().tobytes() for b in whole}) == len({b["global"].numpy().tobytes() for b in whole}) == 6


def test_two_processes_see_the_batch_of_one(folder):
    multicrop = augment.MultiCrop(data.Frames(folder), seed=5, **SMALL)
    one = steps(multicrop, augment.EpochSampler(12, 4, seed=5, stop=4))
    two = [steps(multicrop, augment.EpochSampler(12, 2, seed=5, rank=rank, world=2, stop=4)) for rank in range(2)]
    for whole, *parts in zip(one, *two):
        assert torch.equal(whole["index"], torch.cat([p["index"] for p in parts]))
        for key in ("global", "local", "global_colour", "local_colour", "masks"):
            views = len(whole[key]) // 4  # crop-major: crop 1 of all images, then crop 2
            joined = torch.cat([p[key].unflatten(0, (views, 2)) for p in parts], 1).flatten(0, 1)
            assert torch.equal(whole[key], joined), key


def test_crops_differ_by_epoch_frame_crop_and_seed(folder):
    frames = data.Frames(folder)
    batch = augment.MultiCrop(frames, **SMALL)[[(0, 0, 0, 0), (0, 1, 1, 0), (0, 2, 0, 1)]]
    other = augment.MultiCrop(frames, seed=1, **SMALL)[[(0, 0, 0, 0)]]
    seen = [*batch["local"], *other["local"]]
    assert len({crop.numpy().tobytes() for crop in seen}) == len(seen) == 12
    assert len({row.numpy().tobytes() for row in torch.cat([batch["global_colour"], batch["local_colour"], other["local_colour"]])}) == 18


def test_a_batch_has_the_promised_shapes(folder):
    multicrop, masks = augment.MultiCrop(data.Frames(folder), **SMALL), augment.BlockMasks((4, 4), 2)
    batch, = steps(multicrop, augment.EpochSampler(12, 2, stop=1), masks)
    assert batch["global"].shape == (4, 3, 56, 56) and batch["local"].shape == (6, 3, 28, 28) and batch["global"].dtype == torch.uint8
    out = augment.augment(batch, "cpu")
    assert out["global_crops"].shape == (4, 3, 56, 56) and out["local_crops"].shape == (6, 3, 28, 28) and out["masks"].shape == (4, 16)
    assert out["global_crops"].dtype == torch.float32 and out["masks"].dtype == torch.bool
    assert torch.equal(out["masked"], out["masks"].flatten().nonzero().squeeze(1)) and len(out["masked"])
    assert "masked" not in augment.augment({k: v for k, v in batch.items() if k != "masked"}, "cpu")
    none = augment.MultiCrop(data.Frames(folder), global_size=56, local_size=28, local_crops=0)
    batch, = steps(none, augment.EpochSampler(12, 2, stop=1), masks)
    assert augment.augment(batch, "cpu")["global_crops"].shape == (4, 3, 56, 56) and len(batch["local"]) == 0


@pytest.mark.parametrize("n, batch, world", [(10, 3, 2), (13, 20, 1), (24, 2, 4)])
def test_every_frame_once_per_epoch_and_none_dropped(n, batch, world):
    def line(world, batch, start=0, stop=60):
        ranks = [list(augment.EpochSampler(n, batch, 2, rank, world, start, stop)) for rank in range(world)]
        return [key for step in zip(*ranks) for keys in step for key in keys]
    keys = line(world, batch)
    assert [slot for _, slot, _, _ in keys[:batch * world]] == list(range(batch * world))
    order = [(epoch, frame) for _, _, epoch, frame in keys]
    epochs = [[frame for e, frame in order if e == epoch] for epoch in range(len(order) // n)]
    assert all(sorted(frames) == list(range(n)) for frames in epochs) and [e for e, _ in order] == sorted(e for e, _ in order)
    assert len(set(map(tuple, epochs))) == len(epochs)  # each epoch in its own order
    assert line(1, batch * world) == keys and line(world, batch, start=7) == keys[7 * batch * world:]
    assert len(augment.EpochSampler(n, batch, start=7, stop=60)) == 53
    assert order != [(e, f) for _, _, e, f in augment.EpochSampler(n, batch * world, 3, stop=1).__iter__().__next__()]


# -------------------------------------------------------------------------------------------------------------- bad frames

@pytest.fixture
def mixed(tmp_path):
    """150 frames, of which number 3 is truncated."""
    for i in range(150):
        save(tmp_path / f"{i:03d}.png")
    (tmp_path / "003.png").write_bytes((tmp_path / "003.png").read_bytes()[:40])
    return data.Frames(tmp_path)


def test_a_bad_frame_is_replaced_counted_and_named(mixed, capsys):
    multicrop = augment.MultiCrop(mixed, seed=1, **SMALL)
    keys = [(0, slot, 0, frame) for slot, frame in enumerate((2, 3, 4))]
    batch = multicrop[keys]
    assert batch["index"][[0, 2]].tolist() == [2, 4] and batch["index"][1] != 3
    assert [frame for frame, _ in batch["bad"]] == [3] and mixed.path(3) in batch["bad"][0][1]
    assert same(batch, multicrop[keys]) and multicrop[[(9, 0, 0, 3)]]["index"] == batch["index"][1]  # the same, wherever it is asked for
    assert len({multicrop[[(0, 0, epoch, 3)]]["index"].item() for epoch in range(8)}) > 4  # but no frame is always the understudy
    skipped = augment.Skipped(mixed)
    skipped.update(batch), skipped.update(batch)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and mixed.path(3) in said and "1 unreadable so far, of 150" in said


def test_more_than_one_percent_stop_the_run_with_the_list(mixed, capsys):
    Path(mixed.path(9)).write_bytes(b"")
    multicrop, skipped = augment.MultiCrop(mixed, seed=1, **SMALL), augment.Skipped(mixed)
    skipped.update(multicrop[[(0, 0, 0, 3)]])
    with pytest.raises(SystemExit) as stopped:
        skipped.update(multicrop[[(0, 0, 0, 9)]])
    assert all(text in str(stopped.value) for text in ("2 of 150", mixed.path(3), mixed.path(9)))
    a_quarter = augment.Skipped(mixed, world=4)  # of four processes each sees a fourth: one of 38 is too many
    with pytest.raises(SystemExit):
        a_quarter.update(multicrop[[(0, 0, 0, 3)]])
    capsys.readouterr()


def test_nothing_but_bad_frames(tmp_path):
    bad_files(tmp_path)
    with pytest.raises(data.BadImage, match="no readable frame in 20 draws(.|\n)*truncated.jpg"):
        augment.MultiCrop(data.Frames(tmp_path), **SMALL)[[(0, 0, 0, 0)]]


# ------------------------------------------------------------------------------------------------------------------ layouts

def groups_stay_apart(labelled):
    for split in labelled.splits:
        parts = [split.train, split.val, split.test]
        assert all(len(part) for part in parts)
        assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not {labelled.groups[i] for i in parts[a]} & {labelled.groups[i] for i in parts[b]}


def hyper_kvasir(root, names, each=10):
    """The published tree: names maps folder -> class name in the csv; the list is in contiguous blocks, five folds."""
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
    (root / "official_splits/5_fold_split.csv").write_text("\n".join(["file-name;class-name;split-index", *rows]) + "\n")


def test_hyper_kvasir_landmarks(tmp_path):
    root = tmp_path / "hyper-kvasir"
    names = {n: n if n in ("ileum", "retroflex-rectum", "retroflex-stomach") else f"normal-{n}" for n in data.LANDMARKS}
    rows = hyper_kvasir(root, names)
    save(root / "labeled-images/lower-gi-tract/pathological-findings/polyps/p.jpg")  # another class, not of this task
    labelled = data.open_labelled(tmp_path, "landmarks")
    assert labelled.classes == data.LANDMARKS and np.bincount(labelled.labels).tolist() == [10] * 6
    assert all(labelled.classes[label] == Path(path).parent.name for path, label in zip(labelled.paths, labelled.labels))
    groups_stay_apart(labelled)
    assert sorted(np.concatenate([s.test for s in labelled.splits])) == list(range(60))  # the folds cover all
    for k, split in enumerate(labelled.splits):
        assert {int(Path(labelled.paths[i]).stem[-2:]) // 2 for i in split.test} == {k}
        assert {int(Path(labelled.paths[i]).stem[-2:]) // 2 for i in split.val} == {(k + 1) % 5}
    write_split(root, rows[:-2])
    with pytest.raises(ValueError, match="1 frames on disk are not listed, such as .*z-line-09.jpg"):
        data.load_landmarks(root)
    (root / "official_splits/5_fold_split.csv").unlink()
    with pytest.raises(FileNotFoundError, match="5_fold_split.csv"):
        data.load_landmarks(root)


def test_ulcerative_colitis_grades_and_their_doubled_frames(tmp_path):
    rows = hyper_kvasir(tmp_path, {name: name for name in (*data.GRADES, "ulcerative-colitis-grade-1-2")})
    plain = data.open_labelled(tmp_path, "mes")
    assert plain.classes == data.GRADES and len(plain.paths) == 30 and sorted(set(plain.labels)) == [0, 1, 2]
    grades = [(1, 2), (1, 2), (2, 2), (2, 2)]
    for pair, places in zip(data.UC_DUPLICATES, grades, strict=True):
        for name, grade, fold in zip(pair, places, (1, 4)):
            save(tmp_path / f"labeled-images/lower-gi-tract/pathological-findings/ulcerative-colitis-grade-{grade}/{name}.jpg")
            rows.append(f"{name}.jpg;ulcerative-colitis-grade-{grade};{fold}")
    write_split(tmp_path, rows)
    labelled = data.load_uc_grades(tmp_path)
    stems = [Path(path).stem for path in labelled.paths]
    assert len(stems) == 34 and not {s for pair in data.UC_DUPLICATES[:2] for s in pair} & set(stems)
    for pair in data.UC_DUPLICATES[2:]:  # one picture, one fold
        tested = [[stems.index(name) in split.test for split in labelled.splits] for name in pair]
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
    assert sorted(Path(labelled.paths[i]).stem for i in split.test) == [f"frame{i}" for i in range(15, 20)]
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
    with pytest.raises(FileNotFoundError, match="val.txt: 1 listed frames are missing from .*images, such as frame99"):
        data.load_kvasir_seg(root)
    (lists / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="val.txt"):
        data.load_kvasir_seg(root)


def test_a_mask_of_another_size_or_none(tmp_path):
    kvasir_seg(tmp_path)
    save(tmp_path / "masks/frame07.jpg", Image.new("L", (16, 13)))
    with pytest.raises(ValueError, match="masks/frame07.jpg: the mask is 16x13, its frame .*images/frame07.jpg is 16x12"):
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
    assert len(labelled.paths) == 24 and [len(part) for part in (split.train, split.val, split.test)] == [18, 2, 4]
    assert all("TestDataset/Kvasir/images" in labelled.paths[i] for i in split.test)
    assert len(data.load_pranet(tmp_path, "CVC-300").splits[0].test) == 3
    with pytest.raises(FileNotFoundError, match="TestDataset/ETIS"):
        data.load_pranet(tmp_path, "ETIS-LaribPolypDB")


def limuc(root, by_patient=False, lists=True):
    """15 patients with two frames of each grade; patients 12 to 14 are the test set. Returns the ten lists."""
    def names(patients, grade):  # UC_patient_3_9 stands under all four classes
        return [f"UC_patient_{p}_{2 * grade + i if (p, i) != (3, 1) else 9}.bmp" for p in patients for i in range(2)]

    for p in range(15):
        part = "test_set" if p >= 12 else "train_and_validation_sets"
        place = f"patient_based_classified_images/{p}" if by_patient else part
        for grade in range(4):
            for name in names([p], grade):
                save(root / place / f"Mayo {grade}" / name)
    parts = [{"train": sorted(set(range(12)) - {k, k + 1}), "val": [k, k + 1]} for k in range(10)]
    folds = [{part: {f"Mayo {g}": names(patients, g) for g in range(4)} for part, patients in fold.items()} for fold in parts]
    for k, fold in enumerate(folds if lists else []):
        for part, listed in fold.items():
            path = root / f"cross_validation_folds_train_val_info/fold_{k}/{part}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(listed))
    return folds


def test_limuc_official_folds(tmp_path):
    folds = limuc(tmp_path / "LIMUC")
    labelled = data.open_labelled(tmp_path, "mes")
    assert len(labelled.paths) == 120 and len(labelled.splits) == 10 and labelled.classes == ("Mayo 0", "Mayo 1", "Mayo 2", "Mayo 3")
    assert [labelled.classes[label] for label in labelled.labels] == [Path(path).parent.name for path in labelled.paths]
    for fold, split in zip(folds, labelled.splits):
        for part in ("train", "val"):
            listed = {(c, name) for c, names in fold[part].items() for name in names}
            assert {Path(labelled.paths[i]).parts[-2:] for i in getattr(split, part)} == listed and len(getattr(split, part)) == len(listed)
        assert all("test_set" in labelled.paths[i] for i in split.test) and len(split.test) == 24
    groups_stay_apart(labelled)
    doubled = [i for i, path in enumerate(labelled.paths) if path.endswith("UC_patient_3_9.bmp")]
    assert sorted(labelled.labels[doubled]) == [0, 1, 2, 3]
    (tmp_path / "LIMUC/train_and_validation_sets/Mayo 2/UC_patient_3_9.bmp").unlink()
    with pytest.raises(FileNotFoundError, match="json: 1 listed frames are missing, such as Mayo 2/UC_patient_3_9.bmp"):
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
    with pytest.raises(FileNotFoundError, match="patient_based_classified_images/<patient>/Mayo k, found test_set"):
        data.load_limuc(tmp_path / "a")


def test_folds_are_balanced_and_no_patient_crosses():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 600)
    labels = rng.choice(4, 600, p=(0.54, 0.27, 0.11, 0.08))
    folds = data.balanced_folds(labels, groups, 5)
    assert all(len(set(folds[groups == g])) == 1 for g in range(60))
    shares = np.array([np.bincount(labels[folds == k], minlength=4) for k in range(5)]) * 5 / np.bincount(labels)
    assert np.abs(shares - 1).max() < 0.25
    with pytest.raises(ValueError, match="set: 1 groups cross split 0, such as p7"):
        data.Labelled("set", ["a", "b", "c"], None, (), ["p7", "p8", "p7"], None, [data.Split(np.array([0]), np.array([1]), np.array([2]))])


def test_class_folders_of_ones_own(tmp_path):
    for c in ("antrum", "fundus"):
        for p in range(6):
            save(tmp_path / c / f"patient {p}" / f"{c}{p}.png"), save(tmp_path / c / f"patient {p}" / f"{c}{p}b.png")
    labelled = data.open_labelled(tmp_path, "landmarks")
    assert labelled.classes == ("antrum", "fundus") and len(labelled.splits) == 5 and len(labelled.paths) == 24
    groups_stay_apart(labelled)


def test_unknown_layouts_are_named(tmp_path):
    (tmp_path / "photos").mkdir()
    for task, expected in (("landmarks", "anatomical-landmarks"), ("polyps", "Kvasir-SEG/masks"), ("mes", "LIMUC")):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}: expected .*{expected}.* found photos"):
            data.open_labelled(tmp_path, task)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.open_labelled(tmp_path / "nowhere", "mes")


# -------------------------------------------------------------------------------------------- the official lists and frames

def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not at hand beside this checkout")
    return path


def test_official_limuc_lists(tmp_path):
    """All ten lists against a tree of empty files of the listed names: 9,590 entries, 478 patients, 8 names under two classes."""
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
    assert np.bincount(labelled.labels[:-4]).tolist() == [5180, 2588, 1077, 745] and len(set(labelled.groups[:-4])) == 478
    assert all(len(split.train) + len(split.val) == 9590 for split in labelled.splits) and len(labelled.splits) == 10
    assert sum(n == 2 for n in Counter(Path(path).name for path in labelled.paths).values()) == 8
    groups_stay_apart(labelled)


def test_official_uc_grades(tmp_path):
    """616 frames less the four that stand under two grades, with the list of near-duplicates beside them and without."""
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
    assert {only.path(i) for i in range(len(only))} == {labelled.paths[i] for i in np.concatenate([split.train, split.val])}


# ----------------------------------------------------------------------------------------------------------- the command line

def test_show_draws_a_sheet(folder, tmp_path, capsys):
    data.main(["--data", str(folder), "--frame", "3", "--show", str(tmp_path / "sheet.png")])
    assert "12 frames of 3 videos" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] > 4 * 224 and len(np.unique(sheet.astype(int) @ [65536, 256, 1])) > 10_000
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
