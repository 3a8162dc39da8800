"""augment.py: the multi-crop against torchvision's, masks and samplers that no process count moves."""
import functools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as V2

import augment
import bench
import data
from made_frames import bad_files, folder, picture, save  # noqa: F401

SMALL = dict(global_size=56, local_size=28, local_crops=3)  # enough for order and repetition


def steps(multicrop, sampler, masks=None, workers=0):
    masks = masks or augment.BlockMasks((4, 4), sampler.batch * sampler.world, multicrop.seed)
    return list(augment.loader(multicrop, sampler, masks, workers))


def fields(value):
    """The tensors of a batch's entry: itself, or a Colour's."""
    return value if isinstance(value, tuple) else (value,)


def same(a, b):
    """Two batches hold the same values under the same keys."""
    pairs = [pair for k in a for pair in zip(fields(a[k]), fields(b[k]), strict=True)]
    equal = [torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs]
    return a.keys() == b.keys() and all(equal)


# -----------------------------------------------------------------------------------------------
# The crops, their first half

def test_boxes_are_distributed_as_torchvisions():
    width, height, n, ratio = 150, 120, 4000, (3 / 4, 4 / 3)
    torch.manual_seed(0)
    for scale in ((0.32, 1.0), (0.05, 0.32)):
        frame, rng = torch.empty(3, height, width), np.random.default_rng(0)
        theirs = [T.RandomResizedCrop.get_params(frame, scale, ratio) for _ in range(n)]
        ours = [augment.crop_box(rng.random(40), width, height, scale) for _ in range(n)]
        for a, b in zip(features(ours), features(theirs)):
            assert distance(a, b) < 1.95 * math.sqrt(2 / n)  # at a level of 0.001


def distance(a, b):
    """Kolmogorov and Smirnov's: the largest difference of two samples' distributions."""
    grid = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), grid, "right") / len(x) for x in (a, b)]
    return np.abs(below[0] - below[1]).max()


def features(boxes):
    """What is compared of boxes: area, log aspect, and the centre's place in the frame."""
    top, left, h, w = np.array(boxes, float).T
    return h * w, np.log(w / h), top + h / 2, left + w / 2


def test_boxes_fit_into_frames_of_any_shape():
    rng = np.random.default_rng(0)
    for width, height in ((1, 1), (3, 200), (200, 3), (2, 1), (31, 30)):
        for _ in range(50):
            top, left, h, w = augment.crop_box(rng.random(40), width, height, (0.05, 0.32))
            assert 0 <= top and 0 <= left and 1 <= h <= height - top and 1 <= w <= width - left
    # no attempt fits: the middle, of aspect 3 / 4
    assert augment.crop_box(np.ones(40), 3, 200, (0.05, 0.32)) == (98, 0, 4, 3)


def test_crops_equal_pils_to_one_grey_level(tmp_path):
    """Exact decoding on a frame that is much larger than its crops, JPEG and PNG."""
    flipped = 0
    for frame, name in enumerate(("a.jpg", "b.png")):
        path = save(tmp_path / name, picture(3, 540, 700), quality=92)
        image, frames = Image.open(path).convert("RGB"), data.Frames(tmp_path)
        multicrop = augment.MultiCrop(frames, global_size=98, local_size=42, exact_decode=True)
        for epoch in range(3):
            draw = functools.partial(augment.stream, 0, augment.CROPS, epoch, frame)
            crops, _ = multicrop.crops(frame, draw())
            boxes, flips, _ = multicrop.draw(draw(), *image.size)
            flipped += flips.sum()
            for crop, box, flip, size in zip(crops, boxes, flips, multicrop.sizes, strict=True):
                top, left, h, w = box
                theirs = image.crop((left, top, left + w, top + h))
                theirs = theirs.resize((size, size), Image.BICUBIC)
                theirs = theirs.transpose(Image.FLIP_LEFT_RIGHT) if flip else theirs
                assert crop.shape == (3, size, size) and crop.dtype == torch.uint8
                theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
                assert (crop.int() - theirs).abs().max() <= 1
    assert 15 < flipped < 45  # of 60


@pytest.mark.parametrize("name, factor", [("a.jpg", 2), ("a.jpg", 4), ("a.png", 2)])
def test_reduced_decoding_is_close_and_happens(tmp_path, name, factor):
    save(tmp_path / name, picture(4, 300 * factor, 380 * factor), quality=92)
    multicrop = augment.MultiCrop(data.Frames(tmp_path), global_size=126, local_size=56)
    factors, mean, at_99, *_ = bench.reduced_error(multicrop)
    assert factors == f"{factor}: 1" and float(mean) < 0.5 and int(at_99) <= 2


def test_a_frame_without_room_is_decoded_whole(folder, monkeypatch):
    seen, decode = [], data.decode
    monkeypatch.setattr(data, "decode",
                        lambda image, factor=1: seen.append(factor) or decode(image, factor))
    large, small = dict(global_size=112), dict(global_size=14, local_size=7)
    for exact, sizes in ((False, large), (True, SMALL), (False, small)):
        augment.MultiCrop(data.Frames(folder), exact_decode=exact, **sizes)[[(0, 0, 0, 0)]]
    assert seen[:2] == [1, 1] and seen[2] > 1


# -----------------------------------------------------------------------------------------------
# The colours, second half

def uniform(values, low, high):
    """The values look uniform on [low, high]: range, mean and deviation, each to about 5
    standard errors."""
    n, width = len(values), high - low
    assert low - 1e-6 <= values.min() < low + 0.02 * width
    assert high - 0.02 * width < values.max() <= high + 1e-6
    assert abs(values.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * n)
    assert abs(values.std() - width / math.sqrt(12)) < 0.02 * width


def drawn(n=20_000, **options):
    """Colour of n frames, each field (n, 4, ...): two global and two local crops."""
    multicrop = augment.MultiCrop(None, local_crops=2, **options)
    rng = augment.stream(0, augment.CROPS)
    colours = [multicrop.colour(u) for u in rng.random((n, 4, 13))]
    return augment.Colour(*map(np.stack, zip(*colours)))


def test_colours_have_dinov2s_distribution():
    colour = drawn()
    n = len(colour.factors)

    def near(share, p):
        return abs(share - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-12

    for view, (blur, solarize) in enumerate(((0, 0), (0.9, 0.2), (0.5, 0), (0.5, 0))):
        c = colour.each(lambda field: field[:, view])
        jitter = (c.factors != augment.IDENTITY).any(1)
        assert near(jitter.mean(), 0.8)
        for which, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)):
            uniform(c.factors[jitter, which], low, high)
        orders, expected = Counter(map(tuple, c.order[jitter])), jitter.sum() / 24
        assert len(orders) == 24
        assert all(abs(k - expected) < 5 * math.sqrt(expected) for k in orders.values())
        assert near(c.grayscale.mean(), 0.2) and near(c.solarize.mean(), solarize)
        assert near((c.sigma > 0).mean(), blur)
        if blur:
            uniform(c.sigma[c.sigma > 0], 0.1, 2)
    # crops are drawn apart: nothing of one says anything of another
    factors, grayscale, sigma = colour.factors, colour.grayscale, colour.sigma
    columns = [*factors[:, :2, 0].T, *factors[:, :2, 3].T, *grayscale[:, :2].T, *sigma[:, 1:3].T]
    assert np.abs(np.corrcoef(columns) - np.eye(8)).max() < 0.04


def test_switches_of_the_colours():
    written = drawn(4000, blur="as-written").sigma
    assert [round((written[:, v] > 0).mean(), 1) for v in range(3)] == [1.0, 0.1, 0.5]
    plain = drawn(1000)
    for option in ("hue", "grayscale", "solarize"):
        off = drawn(1000, **{option: False})
        if option == "hue":
            turned, plain_hue = off.factors[..., augment.HUE], plain.factors[..., augment.HUE]
            assert (turned == 0).all() and (plain_hue != 0).any()
            off.factors[..., augment.HUE] = plain_hue
        else:
            assert not getattr(off, option).any() and getattr(plain, option).any()
            off = off._replace(**{option: getattr(plain, option)})
        assert all(map(np.array_equal, off, plain))  # nothing else changes


def colours(n, **values):
    """A Colour of n crops that changes nothing but what is named, a factor or a field, to (n,)
    values."""
    colour = augment.Colour(
        factors=torch.tensor([augment.IDENTITY] * n).float(),
        order=torch.arange(4).expand(n, 4), grayscale=torch.zeros(n, dtype=torch.bool),
        sigma=torch.zeros(n), solarize=torch.zeros(n, dtype=torch.bool))
    for name, value in values.items():
        if name in JITTER:
            colour.factors[:, JITTER.index(name)] = value
        else:
            getattr(colour, name).copy_(value)
    return colour


JITTER = "brightness", "contrast", "saturation", "hue"
OPERATIONS = {  # name -> (range of its parameter, torchvision's)
    "brightness": ((0.6, 1.4), V2.adjust_brightness),
    "contrast": ((0.6, 1.4), V2.adjust_contrast),
    "saturation": ((0.8, 1.2), V2.adjust_saturation),
    "hue": ((-0.1, 0.1), V2.adjust_hue),
    "sigma": ((0.3, 2.0), lambda x, sigma: V2.gaussian_blur(x, [9, 9], [sigma, sigma])),
    "grayscale": ((1, 1), lambda x, _: V2.rgb_to_grayscale(x, 3)),
    "solarize": ((1, 1), lambda x, _: V2.solarize(x, 128 / 255))}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name):
    (low, high), theirs = OPERATIONS[name]
    x = torch.rand(8, 3, 31, 30, generator=torch.Generator().manual_seed(0))
    x[0, :, :9], x[1, 1], x[2, :, 3:9] = 0.4, x[1, 0], x[2, :1, 3:9]  # flat, two channels alike, grey
    values = torch.linspace(low, high, 8)
    values[5] = 1 if name in JITTER[:3] else 0  # this one is left alone
    ours = x.clone()
    augment.photometric(ours, colours(8, **{name: values}))
    for i, value in enumerate(values.tolist()):
        expected, bound = x[i] if i == 5 else theirs(x[i], value), 2e-5 if name == "hue" else 2e-6
        torch.testing.assert_close(ours[i], expected, atol=bound, rtol=0)
        assert i == 5 or name in ("brightness", "hue") or not torch.equal(ours[i], x[i])


def test_batched_jitter_is_torchvisions_in_each_crops_own_order():
    """All of the second half: jitter in its drawn order, grayscale, blur, solarize, normalise."""
    rng = np.random.default_rng(0)
    crops = torch.from_numpy(rng.integers(0, 256, (48, 3, 33, 40), dtype=np.uint8))
    u = np.random.default_rng(1).random((48, 13))
    colour = augment.draw_colour(u, np.full(48, 0.5), np.full(48, 0.3)).each(torch.from_numpy)
    ours = augment.distort(crops, colour)
    for crop, row, result in zip(crops, map(augment.Colour._make, zip(*colour)), ours):
        x = crop.float() / 255
        for which in row.order.tolist():
            if row.factors[which] != augment.IDENTITY[which]:
                x = OPERATIONS[JITTER[which]][1](x, row.factors[which].item())
        for name in ("grayscale", "sigma", "solarize"):
            if getattr(row, name):
                x = OPERATIONS[name][1](x, getattr(row, name).item())
        x = V2.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        apart = (result - x).abs()
        # at the threshold of solarize a value may fall on either side
        assert (apart > 1e-3).float().mean() < 2e-3
        assert apart.median() < 1e-5
    assert len({tuple(order) for order in colour.order.tolist()}) > 15
    whole = crops.float() / 255
    augment.photometric(whole, colour)  # all samples in one call, as on a GPU
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    torch.testing.assert_close((whole - mean) / std, ours, atol=1e-5, rtol=0)


def test_crops_look_like_those_of_torchvisions_transforms(tmp_path):
    """The whole multi-crop against the same augmentations composed of PIL transforms: means over
    many crops of one frame."""
    n = 80
    for i in range(2):
        save(tmp_path / f"{i}.png", picture(10 + i))
    frames = data.Frames(tmp_path)
    multicrop, masks = augment.MultiCrop(frames, seed=3), augment.BlockMasks((16, 16), n)
    torch.manual_seed(0)
    classical = bench.pil_multicrop()
    theirs = [classical(frames.path(k % 2)) for k in range(n)]
    batch = augment.collate(multicrop[[(0, k, k, k % 2) for k in range(n)]], masks)
    ours = augment.augment(batch, "cpu")
    first, second = ours["global_crops"].split(n)
    views = [(first, [t[0] for t in theirs], 1), (second, [t[1] for t in theirs], 1),
             (ours["local_crops"], [crop for t in theirs for crop in t[2:]], 3)]
    for a, b, akin in views:  # local crops are akin, eight of a frame: a third of the evidence
        for a, b in zip(looks(a), looks(torch.stack(b))):
            error = math.sqrt(a.var() / len(a) + b.var() / len(b)) * akin
            assert abs(a.mean() - b.mean()) < 4 * error


def looks(crops):
    """Brightness, contrast, saturation and sharpness of each crop, (n,) each."""
    mean, deviation = crops.mean((1, 2, 3)), crops.std((1, 2, 3))
    edges = (crops.diff(dim=-1).abs().mean((1, 2, 3)) / deviation).log()
    return mean, deviation, (crops.amax(1) - crops.amin(1)).mean((1, 2)), edges


# -----------------------------------------------------------------------------------------------
# Masks

@pytest.mark.parametrize("side, n, short", [(16, 1600, 0.07), (37, 320, 0.13)])
def test_masks_are_dinov2s(side, n, short):
    """Asked for a uniform share from 0.1 to 0.5; what that gives is known of DINOv2's."""
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
    """By itself: with probability 1/2, by a uniform share of the range. In a step: half of the
    rows, one in every stratum."""
    masks, n = augment.BlockMasks((16, 16), batch, seed=1), 3000
    shares = np.stack([masks.shares(step) for step in range(n)])  # (n, 2B)
    assert ((shares > 0).sum(1) == batch).all()
    for row in shares.T:
        assert abs((row > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(n)
        u = (np.sort(row[row > 0]) - 0.1) / 0.4
        uneven = np.abs(u - np.arange(len(u)) / len(u)).max()
        assert uneven < 1.95 / math.sqrt(len(u))  # Kolmogorov and Smirnov at a level of 0.001
    pairs = (batch + 1) // 2
    for view in shares.reshape(n, 2, batch).swapaxes(0, 1) if batch % 2 == 0 else ():
        strata = ((view[view > 0] - 0.1) / 0.4 * pairs).astype(int).reshape(n, pairs)
        assert (np.sort(strata, 1) == np.arange(pairs)).all()


def test_two_images_share_what_they_hide():
    shares = augment.BlockMasks((16, 16), 10, seed=1).shares(7)
    shares = shares.reshape(2, 5, 2)  # view, pair, image
    assert ((shares > 0).sum(2) == 1).all()
    np.testing.assert_allclose(shares.sum((0, 2)), 0.6)
    shares = augment.BlockMasks((16, 16), 11, seed=1).shares(7)
    last = shares.reshape(2, 11)[:, 10]  # nobody shares with the eleventh
    assert (last > 0).sum() == 1


def test_every_process_hides_as_many_patches():
    """8 processes of 64 images: 4,878 patches each; drawn over all of them without pairs, +- 459."""
    masks = augment.BlockMasks((16, 16), 512)
    first, sixth = range(64), range(320, 384)
    hidden = np.array([[masks(step, slots).sum() for slots in (first, sixth)] for step in range(50)])
    assert abs(hidden.mean() - 4878) < 5 and hidden.std() < 6 and np.ptp(hidden) < 40
    small = augment.BlockMasks((16, 16), 8)  # two images each
    assert np.ptp([small(step, [2, 3]).sum() for step in range(50)]) < 12


def test_half_of_the_global_crops_of_a_step_are_masked():
    masks = augment.BlockMasks((16, 16), 16, seed=1)
    steps = [masks(step, range(16)) for step in range(20)]
    assert all(m.shape == (32, 256) and m.dtype == torch.bool for m in steps)
    assert all((m.any(1).view(16, 2).sum(1) == 1).all() for m in steps)  # one of 2i and 2i + 1
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
        assert 0 < added == mask.sum() == len(rows) * len(columns) <= 80
        assert len(rows) < 16 and len(columns) < 12
        assert np.ptp(rows) == len(rows) - 1 and np.ptp(columns) == len(columns) - 1
    ratio = np.log([h / w for h, w in shapes])
    assert -1.5 < ratio.min() < -1 and 1 < ratio.max() < 1.5
    assert abs(ratio[np.prod(shapes, 1) < 40].mean()) < 0.05
    assert min(np.prod(shapes, 1)) <= 4 and max(np.prod(shapes, 1)) > 70


def test_a_block_adds_no_more_than_is_left():
    rng = np.random.default_rng(0)
    for left in (1, 2, 3, 17):
        mask = np.zeros((16, 16), bool)
        mask[4:12, 4:12] = True
        added = [augment.add_block(mask, left, rng) for _ in range(20)]
        assert max(added) <= left and mask.sum() == 64 + sum(added)
    assert augment.add_block(np.ones((16, 16), bool), 5, rng) == 0


# -----------------------------------------------------------------------------------------------
# Order, repetition, resume

@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("workers", (1, 3))
def test_batches_do_not_depend_on_the_number_of_workers(folder, workers):
    multicrop = augment.MultiCrop(data.Frames(folder), seed=5, **SMALL)
    sampler = augment.EpochSampler(12, 5, seed=5, stop=4)  # into the second epoch
    alone, many = steps(multicrop, sampler), steps(multicrop, sampler, workers=workers)
    assert len(alone) == len(many) == 4 and all(same(a, b) for a, b in zip(alone, many))
    assert all(same(augment.augment(a, "cpu"), augment.augment(b, "cpu")) for a, b in zip(alone, many))


def test_a_run_goes_on_from_any_step(folder):
    multicrop = augment.MultiCrop(data.Frames(folder), seed=5, **SMALL)
    whole = steps(multicrop, augment.EpochSampler(12, 5, seed=5, stop=6))
    for start in (1, 4):
        sampler = augment.EpochSampler(12, 5, seed=5, start=start, stop=6)
        rest = steps(multicrop, sampler, workers=1)
        assert len(rest) == 6 - start and all(same(a, b) for a, b in zip(whole[start:], rest))
    for key in ("masks", "global"):
        assert len({batch[key].numpy().tobytes() for batch in whole}) == 6


def test_two_processes_see_the_batch_of_one(folder):
    multicrop = augment.MultiCrop(data.Frames(folder), seed=5, **SMALL)
    one = steps(multicrop, augment.EpochSampler(12, 4, seed=5, stop=4))
    two = [steps(multicrop, augment.EpochSampler(12, 2, seed=5, rank=rank, world=2, stop=4))
           for rank in range(2)]
    for whole, *parts in zip(one, *two):
        assert torch.equal(whole["index"], torch.cat([p["index"] for p in parts]))
        for key in ("global", "local", "global_colour", "local_colour", "masks"):
            for all_of_it, *shares in zip(*map(fields, [whole[key], *(p[key] for p in parts)])):
                views = len(all_of_it) // 4  # crop-major: crop 1 of all images, then crop 2
                joined = torch.cat([share.unflatten(0, (views, 2)) for share in shares], 1)
                assert torch.equal(all_of_it, joined.flatten(0, 1)), key


def test_crops_differ_by_epoch_frame_crop_and_seed(folder):
    frames = data.Frames(folder)
    batch = augment.MultiCrop(frames, **SMALL)[[(0, 0, 0, 0), (0, 1, 1, 0), (0, 2, 0, 1)]]
    other = augment.MultiCrop(frames, seed=1, **SMALL)[[(0, 0, 0, 0)]]
    seen = [*batch["local"], *other["local"]]
    assert len({crop.numpy().tobytes() for crop in seen}) == len(seen) == 12
    drawn = [batch["global_colour"], batch["local_colour"], other["local_colour"]]
    assert len({str(crop) for colour in drawn for crop in zip(*colour)}) == 18


def test_a_batch_has_the_promised_shapes(folder):
    frames, masks = data.Frames(folder), augment.BlockMasks((4, 4), 2)
    multicrop = augment.MultiCrop(frames, **SMALL)
    batch, = steps(multicrop, augment.EpochSampler(12, 2, stop=1), masks)
    assert batch["global"].shape == (4, 3, 56, 56) and batch["local"].shape == (6, 3, 28, 28)
    assert batch["global"].dtype == torch.uint8
    out = augment.augment(batch, "cpu")
    shapes = {key: tuple(value.shape) for key, value in out.items()}
    masked = out["masks"].flatten().nonzero().squeeze(1)
    assert shapes == {"global_crops": (4, 3, 56, 56), "local_crops": (6, 3, 28, 28),
                      "masks": (4, 16), "masked": (len(masked),)}
    assert out["global_crops"].dtype == torch.float32 and out["masks"].dtype == torch.bool
    assert torch.equal(out["masked"], masked) and len(masked)
    assert "masked" not in augment.augment({k: batch[k] for k in batch if k != "masked"}, "cpu")
    none = augment.MultiCrop(frames, global_size=56, local_size=28, local_crops=0)
    batch, = steps(none, augment.EpochSampler(12, 2, stop=1), masks)
    assert len(batch["local"]) == 0
    assert augment.augment(batch, "cpu")["global_crops"].shape == (4, 3, 56, 56)


@pytest.mark.parametrize("n, batch, world", [(10, 3, 2), (13, 20, 1), (24, 2, 4)])
def test_every_frame_once_per_epoch_and_none_dropped(n, batch, world):
    def line(world, batch, start=0, stop=60):
        ranks = [list(augment.EpochSampler(n, batch, 2, rank, world, start, stop))
                 for rank in range(world)]
        return [key for step in zip(*ranks) for keys in step for key in keys]
    keys = line(world, batch)
    assert [slot for _, slot, _, _ in keys[:batch * world]] == list(range(batch * world))
    order = [(epoch, frame) for _, _, epoch, frame in keys]
    epochs = [[frame for e, frame in order if e == epoch] for epoch in range(len(order) // n)]
    assert all(sorted(frames) == list(range(n)) for frames in epochs)
    assert [e for e, _ in order] == sorted(e for e, _ in order)
    assert len(set(map(tuple, epochs))) == len(epochs)  # each epoch in its own order
    assert line(1, batch * world) == keys
    assert line(world, batch, start=7) == keys[7 * batch * world:]
    assert len(augment.EpochSampler(n, batch, start=7, stop=60)) == 53
    other = next(iter(augment.EpochSampler(n, batch * world, 3, stop=1)))  # another seed
    assert order[:batch * world] != [(e, f) for _, _, e, f in other]


# -----------------------------------------------------------------------------------------------
# Bad frames

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
    # the same understudy wherever it is asked for, but not the same in every epoch
    assert same(batch, multicrop[keys])
    assert multicrop[[(9, 0, 0, 3)]]["index"] == batch["index"][1]
    assert len({multicrop[[(0, 0, epoch, 3)]]["index"].item() for epoch in range(8)}) > 4
    skipped = augment.Skipped(mixed)
    skipped.update(batch), skipped.update(batch)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and mixed.path(3) in said
    assert "1 unreadable so far, of 150" in said


def test_more_than_one_percent_stop_the_run_with_the_list(mixed, capsys):
    Path(mixed.path(9)).write_bytes(b"")
    multicrop, skipped = augment.MultiCrop(mixed, seed=1, **SMALL), augment.Skipped(mixed)
    skipped.update(multicrop[[(0, 0, 0, 3)]])
    with pytest.raises(SystemExit) as stopped:
        skipped.update(multicrop[[(0, 0, 0, 9)]])
    assert all(text in str(stopped.value) for text in ("2 of 150", mixed.path(3), mixed.path(9)))
    a_quarter = augment.Skipped(mixed, world=4)  # each sees a fourth: one of 38 is too many
    with pytest.raises(SystemExit):
        a_quarter.update(multicrop[[(0, 0, 0, 3)]])
    capsys.readouterr()


def test_nothing_but_bad_frames(tmp_path):
    bad_files(tmp_path)
    with pytest.raises(data.BadImage, match="no readable frame in 20 draws(.|\n)*truncated.jpg"):
        augment.MultiCrop(data.Frames(tmp_path), **SMALL)[[(0, 0, 0, 0)]]
