"""Multi-crop (SwAV, Caron et al. 2020; DINO, DINOv2): two large and some small crops of every
frame, their colours, the masks, and in which order the frames come.

Half of it runs on the loader's workers (decode, crop, flip, to uint8), half on the training
device (colour, blur, solarize, normalise), batched:

    frames = data.Frames("data/frames")            # a folder (sub-folder: video) or manifest.csv
    multicrop = MultiCrop(frames, seed=0)          # sizes, scales, blur, switches: see the class
    sampler = EpochSampler(len(frames), batch, seed=0, rank=0, world=1, start=step, stop=steps)
    masks = BlockMasks((16, 16), batch * world, seed=0)  # patches of a crop, images of a step
    skipped = Skipped(frames, world=1)
    for batch in loader(multicrop, sampler, masks, workers=4, pin=False):  # one per step
        skipped.update(batch)                      # stops where too many cannot be read
        crops = augment(batch, device)             # {"global_crops", "local_crops", "masks"}

A batch on its way: "global" (2B, 3, S, S) and "local" (L*B, 3, s, s) uint8; "global_colour" and
"local_colour", the drawn Colour of each; "masks" (2B, N) bool and "masked" (M,), the numbers of
the hidden patches among the 2B*N; "index" (B,) numbers in `frames`, "step", "bad" [(number,
message)].

All randomness is a function of (seed, epoch, frame, crop) or, for masks, of (seed, step, row of
the batch of all processes). So no draw depends on how many workers or processes there are, or on
where a run was stopped."""
import functools
import itertools
import math
import os
import signal
import sys
import threading
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data

# -----------------------------------------------------------------------------------------------
# What is drawn, on the workers

CROPS, ORDER, REPLACE, MASK_ORDER, MASK = range(5)  # purposes, each with random numbers of its own
TRIES = 10  # attempts at a rectangle, as in torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the four of the colour jitter
IDENTITY = (1, 1, 1, 0)  # their factors that change nothing: three multiply, the hue is turned
# Probabilities of the blur for the first global, the second global and the local crops. DINOv2's
# code hands 1 - p to a function that expects p, and its released weights were trained like that:
# "as executed"
BLUR = {"as-executed": (0.0, 0.9, 0.5), "as-written": (1.0, 0.1, 0.5)}


def stream(seed, purpose, *counter):
    """Generator that is a pure function of its integers: Philox, keyed by (seed, purpose), at up
    to three counters.

    A counter-based generator jumps anywhere at no cost, where a seeded one would have to be
    wound forward: step 100,000 can be drawn without the 99,999 before it."""
    counter = (0, *counter, *[0] * (3 - len(counter)))  # in the first, Philox counts its draws
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=counter))


def crop_box(u, width, height, scale, ratio=(3 / 4, 4 / 3)):
    """(top, left, h, w) of torchvision's RandomResizedCrop from the uniform numbers u (40,).

    scale: range of the share of the frame's area; ratio: range of w / h, drawn on a log scale.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for a, b, c, d in u.reshape(TRIES, 4).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * a)
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * b)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:  # large areas often do not fit
            return int(c * (height - h + 1)), int(d * (width - w + 1)), h, w
    # none fitted: the largest central rectangle of an allowed aspect
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


class Colour(NamedTuple):
    """What happens to the colours of n crops: drawn on the workers (arrays), carried out on the
    device (tensors).

    One crop of the n, say, with the words for it:

        factors    [1.21, 0.93, 1.00, -0.04]   brightness x 1.21, contrast x 0.93, saturation kept,
                                               hue turned back by 0.04 of a turn,
        order      [2, 0, 3, 1]                in the order saturation, brightness, hue, contrast;
        grayscale  False                       not made grey,
        sigma      0.70                        blurred by a Gaussian of 0.7 pixels (0: not blurred),
        solarize   False                       its bright half not inverted
    """
    factors: np.ndarray                                                 # (n, 4) float32
    order: np.ndarray                                                   # (n, 4) int64
    grayscale: np.ndarray                                               # (n,) bool
    sigma: np.ndarray                                                   # (n,) float32
    solarize: np.ndarray                                                # (n,) bool

    def each(self, change):
        """The same change to every field."""
        return Colour(*map(change, self))


def draw_colour(u, blur_p, solarize_p, turn_hues=True, make_grey=True):
    """Colour of n crops from uniform numbers u (n, 13) and the crops' probabilities (n,) of blur
    and solarize.

    DINOv2's colour distortion: jitter (.4, .4, .2, .1) with probability .8, grayscale .2. Each
    column of u has one use, whatever is switched off, so that a switch changes nothing else."""
    jitter = u[:, :1] < 0.8                                             # (n, 1)
    shift = 2 * u[:, 1:5] - 1                                           # (n, 4) in [-1, 1]
    factors = np.where(jitter, IDENTITY + shift * (0.4, 0.4, 0.2, 0.1), IDENTITY)
    if not turn_hues:
        factors[:, HUE] = 0
    return Colour(
        factors=factors.astype(np.float32),
        order=u[:, 5:9].argsort(1),                                     # a uniform permutation
        grayscale=(u[:, 9] < 0.2) & make_grey,
        sigma=np.where(u[:, 10] < blur_p, 0.1 + 1.9 * u[:, 11], 0).astype(np.float32),
        solarize=u[:, 12] < solarize_p)


class MultiCrop(torch.utils.data.Dataset):
    """The workers' half of DINOv2's multi-crop: 2 global and `local_crops` local crops of each
    frame, resized to uint8.

    Asked for the keys of one step (see EpochSampler), it returns the batch described at the top
    of this file, less the masks. An unreadable frame is replaced by another one, drawn from
    (seed, epoch, frame), and reported under "bad".

    global_scale, local_scale: ranges of the share of the frame's area in a crop. blur: a row of
    BLUR. hue, grayscale, solarize: False switches one off, where colours carry the diagnosis.
    exact_decode: never let the decoder shrink a frame that is much larger than its crops
    (data.shrink). Where it does, boxes lie on its grid of 2, 4 or 8 pixels, as if the frame were
    stored that size, and a crop is the whole frame's to 0.3 grey levels on average and to 1 in
    99 % of its values (measured by `bench.py input`)."""

    def __init__(self, frames, seed=0, global_size=224, local_size=98, local_crops=8,
                 global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), blur="as-executed",
                 hue=True, grayscale=True, solarize=True, exact_decode=False):
        self.frames, self.seed, self.exact_decode = frames, seed, exact_decode
        self.sizes = (global_size,) * 2 + (local_size,) * local_crops   # V: views of a frame
        self.scales = (global_scale,) * 2 + (local_scale,) * local_crops
        first, second, local = BLUR[blur]
        self.colour = functools.partial(
            draw_colour, blur_p=np.array([first, second] + [local] * local_crops),
            solarize_p=np.array([0, 0.2 * solarize] + [0] * local_crops),
            turn_hues=hue, make_grey=grayscale)

    def __getitem__(self, keys):
        B, L = len(keys), len(self.sizes) - 2
        batch = {"global": pixels(2 * B, self.sizes[0]), "local": pixels(L * B, self.sizes[-1])}
        # crop-major: crop 1 of all images, then crop 2 of all, so that a view is a plain slice
        parts = [crops.split(B) for crops in batch.values() if len(crops)]
        views = list(itertools.chain(*parts))                           # V x (B, 3, S, S)
        colours, index, bad = [], [], []
        for b, (_, _, epoch, frame) in enumerate(keys):
            used, crops, colour, failed = self.readable(epoch, frame)
            for view, crop in zip(views, crops):
                view[b] = crop
            colours.append(colour)
            index.append(used)
            bad += failed
        stacked = (np.stack(field, 1) for field in zip(*colours))       # (V, B, ...) each
        colour = Colour(*map(torch.from_numpy, stacked))
        return batch | {
            "global_colour": colour.each(lambda field: field[:2].flatten(0, 1)),
            "local_colour": colour.each(lambda field: field[2:].flatten(0, 1)),
            "index": torch.tensor(index), "step": keys[0][0], "bad": bad,
            "slots": [slot for _, slot, _, _ in keys]}

    def readable(self, epoch, frame):
        """(number of the frame used, its crops, their colours, [(number, message) of frames that
        failed before it]).

        A data.Transient passes: a frame that a failing disk withholds is not a bad one.
        """
        def draw(candidate):
            return self.crops(candidate, stream(self.seed, CROPS, epoch, frame))

        # drawn, not the next ones: the neighbours of a bad frame would be seen twice as often
        rng = stream(self.seed, REPLACE, epoch, frame)
        substitutes, failed = rng.integers(len(self.frames), size=20).tolist(), []
        for candidate in [frame] + substitutes:
            try:
                return candidate, *data.retried(draw)(candidate), failed
            except data.BadImage as error:
                failed.append((candidate, str(error)))
        messages = "\n  ".join(message for _, message in failed)
        raise data.BadImage(f"no readable frame in 20 draws:\n  {messages}")

    def crops(self, frame, rng):
        """List of (3, S, S) uint8 crops of a frame, and their Colour."""
        with data.opened(self.frames.path(frame)) as picture:
            boxes, flips, colour = self.draw(rng, *picture.size)  # before anything is decoded
            factor = 1 if self.exact_decode else self.spare(boxes)
            image = data.decode(picture, factor)
        boxes = [[round(x / factor) for x in box] for box in boxes]
        return cut(image, boxes, self.sizes, flips), colour

    def spare(self, boxes):
        """How much smaller the frame may be decoded so that no crop needs to be enlarged: 1, 2,
        4 or 8."""
        room = (min(h, w) / size for (_, _, h, w), size in zip(boxes, self.sizes))
        return data.shrink(min(room))

    def draw(self, rng, width, height):
        """Boxes [(top, left, h, w)], flips (V,) bool and Colour of the crops of a frame of this
        size."""
        u = rng.random((len(self.sizes), 4 * TRIES + 14))  # a row per crop: boxes, flip, colour
        boxes = [crop_box(row[:4 * TRIES], width, height, scale)
                 for row, scale in zip(u, self.scales)]
        return boxes, u[:, 4 * TRIES] < 0.5, self.colour(u[:, 4 * TRIES + 1:])


def pixels(n, size):
    """(n, 3, size, size) uint8, not yet filled; in a worker in shared memory, which the training
    process then reads without a copy."""
    empty = torch.empty(n, 3, size, size, dtype=torch.uint8)
    return empty if torch.utils.data.get_worker_info() is None else empty.share_memory_()


def cut(image, boxes, sizes, flips):
    """Crops (3, S, S) uint8 of a PIL image, bicubic with antialias, as PIL resizes to one grey
    level."""
    # channels last in memory, as the image has them: that resizes fastest
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]    # (1, 3, H, W)
    crops = []
    for (top, left, h, w), size, flip in zip(boxes, sizes, flips):
        part = whole[:, :, top:top + h, left:left + w]
        crop = F.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]
        crops.append(crop.flip(-1) if flip else crop)
    return crops


# -----------------------------------------------------------------------------------------------
# The order of the frames

class EpochSampler:
    """Batches of keys (step, slot, epoch, frame) for one of `world` processes, from step `start`
    up to `stop`.

    The frames of all epochs stand in one endless line, each epoch in its own order, and step t
    takes the t-th piece of batch * world of them; a process takes its contiguous slice of the
    piece. So every frame is seen once per epoch, nothing is dropped, a piece does not depend on
    the number of processes, and any step can be the first. seen: how many frames of the line lie
    behind step `start`, where the pieces before it had another size.

        epoch 0             epoch 1               of 5 frames, by 2 processes of 2 each:
        3  0  4  1  2       1  4  2  0  3         process 0 of step 1 takes the frames 2 and 1,
        [step 0   ] [step 1       ] [step 2       process 1 takes 4 and 2; slot: place in the piece
    """

    def __init__(self, n, batch, seed=0, rank=0, world=1, start=0, stop=None, seen=None):
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self.start, self.stop = start, stop
        self.seen = start * batch * world if seen is None else seen

    def __iter__(self):
        # a piece may reach into the next epoch, so two orders are kept at hand
        order = functools.lru_cache(2)(
            lambda epoch: stream(self.seed, ORDER, epoch).permutation(self.n))
        mine = range(self.rank * self.batch, (self.rank + 1) * self.batch)
        endless = self.stop is None
        for step in itertools.count(self.start) if endless else range(self.start, self.stop):
            keys, seen = [], self.seen + (step - self.start) * self.batch * self.world
            for slot in mine:
                epoch, place = divmod(seen + slot, self.n)
                keys.append((step, slot, epoch, int(order(epoch)[place])))
            yield keys

    def __len__(self):
        if self.stop is None:
            raise TypeError("a sampler without a last step has no length")
        return max(0, self.stop - self.start)


# -----------------------------------------------------------------------------------------------
# Masks

class BlockMasks:
    """iBOT's block masks (Zhou et al. 2022), drawn over the global crops of all processes.

    Row v * batch + slot is crop v of image `slot`. grid: (h, w) patches; batch: images per step
    of all processes.

    DINOv2's collate masks a random half of one process's rows and asks the i-th of them for
    U(b_i, b_i+1) of the patches, b = linspace(0.1, 0.5, n + 1). Drawn like that over all
    processes, one may hide a tenth more than another and all wait for it; drawn per process, the
    masks would depend on how many there are. So every two images share what they hide: of the
    rows 2i and 2i + 1 of a view a coin masks one, and if the first view's asks for u of the
    range, the second view's asks for 1 - u:

        images           0      1         2      3
        first crops      u1     -         -      u2
        second crops     -      1 - u1    -      1 - u2

    A process holds neighbouring images, so it hides the same number at every step, but for
    blocks that find no place. Each row by itself is masked as in DINOv2: with probability 1/2,
    by a uniform share of the range. u comes from one stratum of [0, 1] per two images, the
    strata in a shuffled order. An odd last image shares with nobody: a coin masks one of its two
    crops."""

    def __init__(self, grid, batch, seed=0, ratio=(0.1, 0.5)):
        self.grid, self.batch, self.seed, self.ratio = grid, batch, seed, ratio

    def __call__(self, step, slots):
        """(2B, N) bool for the two global crops of these slots, crop-major."""
        shares = self.shares(step)
        rows = [view * self.batch + slot for view in range(2) for slot in slots]
        return torch.from_numpy(np.stack([self.one(step, row, shares[row]) for row in rows]))

    def shares(self, step):
        """(2 * batch,) the share of its patches that each row of this step is asked to hide; 0:
        none."""
        n, (low, high) = (self.batch + 1) // 2, self.ratio              # pairs of images
        rng = stream(self.seed, MASK_ORDER, step)
        u = (rng.permutation(n) + rng.random(n)) / n  # (n,) one in each n-th of [0, 1]
        coins = rng.integers(2, size=(2, n))
        out = np.zeros((2, n, 2))  # view, pair, image of the pair
        for view, asked in enumerate((u, 1 - u)):
            out[view, np.arange(n), coins[view]] = low + (high - low) * asked
        out = out.reshape(2, 2 * n)
        if self.batch % 2:  # the last image's second crop stands in for its partner's first
            out[1, -2] = out[0, -1]
        return out[:, :self.batch].reshape(-1)

    def one(self, step, row, share):
        """(N,) bool: blocks of random area and aspect until this share of the patches is reached
        or no block fits."""
        mask, rng = np.zeros(self.grid, bool), stream(self.seed, MASK, step, row)
        left = int(mask.size * share)
        while left > 0:
            added = add_block(mask, left, rng)
            if not added:
                break
            left -= added
        return mask.reshape(-1)


def add_block(mask, left, rng):
    """Mask one block that adds 1 to `left` patches, in 10 tries; returns how many it added (0:
    none fitted)."""
    height, width = mask.shape
    left = min(left, height // 2 * width)  # no block of more than half the image
    for a, b, c, d in rng.random((10, 4)).tolist():
        area = 4 + (left - 4) * a  # from 4 down where fewer are left, as in DINOv2
        aspect = math.exp(math.log(0.3) * (1 - 2 * b))  # 0.3 to 1 / 0.3, uniform on a log scale
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, start = int(c * (height - h + 1)), int(d * (width - w + 1))
        block = mask[top:top + h, start:start + w]
        # blocks may overlap: what counts is what this one adds
        added = h * w - int(np.count_nonzero(block))
        if 0 < added <= left:
            block[:] = True
            return added
    return 0


# -----------------------------------------------------------------------------------------------
# The loader

def collate(batch, masks):
    """Add to a batch of MultiCrop the masks of its step, and which rows of its patches they
    hide: counted here, where the answer costs nothing. Asked of a GPU it would hold up the
    training process in every step."""
    masks = masks(batch["step"], batch.pop("slots"))                    # (2B, N)
    return batch | {"masks": masks, "masked": masks.flatten().nonzero().squeeze(1)}  # (M,)


def loader(multicrop, sampler, masks, workers=4, pin=False, lifeline=None):
    """DataLoader of one batch per step. lifeline: (reader, writer) of a multiprocessing.Pipe,
    see outlive_signals."""
    return torch.utils.data.DataLoader(
        multicrop, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin,
        collate_fn=functools.partial(collate, masks=masks),
        worker_init_fn=lifeline and functools.partial(outlive_signals, *lifeline))


def outlive_signals(reader, writer, worker):
    """In a worker: no signal ends it, for one to the whole group of processes would take the
    batches from a trainer that has yet to save. It ends when the trainer closes `writer`, or
    dies: then no end of the pipe is open for writing."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    writer.close()
    threading.Thread(target=lambda: (reader.poll(None), os._exit(0)), daemon=True).start()


class Skipped:
    """Counts and names the frames that could not be read; more than 1 % of the frames stops the
    run.

    Of several processes each judges by its share: 1 % of the frames that it has read, from its
    first full share on."""

    def __init__(self, frames, world=1):
        self.frames, self.world, self.read, self.bad = frames, world, 0, {}

    def update(self, batch):
        """Count a batch; returns the messages of frames that failed for the first time. Raises
        SystemExit when they are too many."""
        new = {frame: message for frame, message in batch["bad"] if frame not in self.bad}
        self.read += len(batch["index"])
        for frame, message in new.items():
            self.bad[frame] = message
            print(f"skipped frame {message} ({len(self.bad)} unreadable so far, "
                  f"of {len(self.frames)})", file=sys.stderr)
        share = max(self.read, len(self.frames) / self.world)
        if len(self.bad) > 0.01 * min(len(self.frames), share):
            raise SystemExit(f"{len(self.bad)} of {len(self.frames)} frames cannot be read, more "
                             "than 1 %; repair or remove them:\n  " + "\n  ".join(self.bad.values()))
        return list(new.values())


# -----------------------------------------------------------------------------------------------
# The device's half

def augment(batch, device):
    """The second half of the multi-crop: a batch of `loader` -> {"global_crops", "local_crops",
    "masks", "masked"} on the device.

    global_crops (2B, 3, S, S), local_crops (L*B, 3, s, s): floats, normalised with ImageNet's
    mean and deviation."""
    masks = [key for key in ("masks", "masked") if key in batch]
    out = {key: batch[key].to(device, non_blocking=True) for key in masks}
    for kind in ("global", "local"):
        crops = batch[kind].to(device, non_blocking=True)
        out[f"{kind}_crops"] = distort(crops, batch[f"{kind}_colour"])
    return out


def distort(crops, colour):
    """(B, 3, H, W) uint8 and their drawn Colour on the CPU -> (B, 3, H, W) normalised floats on
    the crops' device."""
    x = crops.float().div_(255)
    mean, std = (channels(v, x.device) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    # on a CPU one crop after the other, since a single one stays in the cache through it all
    some = 1 if x.device.type == "cpu" else max(1, len(x))
    for i in range(0, len(x), some):
        part = x[i:i + some]
        photometric(part, colour.each(lambda field: field[i:i + some]))
        part.sub_(mean).div_(std)
    return x


@functools.lru_cache
def channels(values, device):
    """(3, 1, 1): one number per channel, brought to a device once, since each upload would hold
    up the step."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def photometric(x, colour):
    """In place on (B, 3, H, W) in [0, 1]: jitter in each crop's own order, grayscale, blur,
    solarize.

    colour: a Colour of tensors on the CPU. Which crops an operation takes is decided there:
    asking the device for it would wait for all that it has still to do."""
    drawn = colour.each(lambda field: field.numpy())
    factors = colour.factors.to(x.device, non_blocking=True)
    sigma = colour.sigma.to(x.device, non_blocking=True)
    changes = drawn.factors != IDENTITY                                 # (B, 4)
    # brightness and contrast do not commute, for one, so DINOv2 shuffles the four: at each
    # place, those that it falls to
    for place in range(4):
        for which, change in enumerate((brighten, stretch_contrast, saturate, turn_hue)):
            chosen = changes[:, which] & (drawn.order[:, place] == which)
            on_rows(change, x, chosen, factors[:, which])
    on_rows(make_grey, x, drawn.grayscale)
    on_rows(gaussian_blur, x, drawn.sigma > 0, sigma)
    on_rows(invert_bright, x, drawn.solarize)


def on_rows(change, x, chosen, *parameters):
    """x[chosen] = change(x[chosen], parameters[chosen]) for a function that works in place;
    chosen: (B,) array."""
    if len(x) and chosen.all():
        change(x, *(p.view(-1, 1, 1, 1) for p in parameters))
    elif chosen.any():
        rows = torch.from_numpy(chosen.nonzero()[0]).to(x.device, non_blocking=True)
        part = x[rows]
        change(part, *(p[rows].view(-1, 1, 1, 1) for p in parameters))
        x[rows] = part


# Each operation works in place on x (B, 3, H, W) in [0, 1], with a parameter per crop (B, 1, 1,
# 1), and equals torchvision's on floats: the tests compare them one by one


def luma(x):
    """(B, 3, H, W) -> (B, 1, H, W): brightness as the eye weighs the channels, with
    torchvision's weights."""
    return (x[:, :1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def brighten(x, factor):
    """Blend with black: x * factor."""
    x.mul_(factor).clamp_(0, 1)


def stretch_contrast(x, factor):
    """Blend with the crop's mean luma: factor 0 would be one flat grey."""
    mean = luma(x).mean((2, 3), keepdim=True)                           # (B, 1, 1, 1)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturate(x, factor):
    """Blend each pixel with its own luma: factor 0 would be a grey picture."""
    grey = luma(x)
    x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def turn_hue(x, shift):
    """Turn the hue by `shift` turns, keeping the highest and the lowest channel of a pixel
    (HSV's value and chroma).

    With h in [0, 6), each channel = low + chroma * clamp(|(h + k) mod 6 - 3| - 1, 0, 1) for k =
    0, 4, 2 in R, G, B: a ramp that is 1 over a third of the circle, 0 over the opposite third
    and linear between. h itself is read off the two lower channels, by a formula that depends on
    which channel is the highest; written with sign and lerp, because a data-dependent `where` is
    the slowest operation on a CPU."""
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)        # (B, 1, H, W)
    chroma = high - low
    green = (b - r).add_(chroma, alpha=2)  # chroma * h if g is the highest
    blue = (r - g).add_(chroma, alpha=4)
    h = torch.lerp(blue, green, (g - high).sign_().add_(1))  # weight 1 where g is the highest
    h = torch.lerp(h, g - b, (r - high).sign_().add_(1))
    # a grey pixel has no hue, and no chroma to show it: any answer will do
    turns = h.div_(chroma.clamp(min=1e-12).mul_(6)).add_(shift)
    thirds = channels((1.0, 5 / 3, 4 / 3), x.device)  # 1 + k / 6, so that all turns are positive
    ramp = (turns + thirds).frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)  # (B, 3, H, W)
    torch.addcmul(low, ramp, chroma, out=x)


def make_grey(x):
    x.copy_(luma(x).expand_as(x))


def gaussian_blur(x, sigma, reach=4):
    """Gaussian of 2 * reach + 1 taps with reflected borders; sigma in pixels. It is separable: a
    row of nine taps along the width, then the same along the height, instead of 81."""
    taps = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.softmax(-taps ** 2 / (2 * sigma ** 2), -1)           # (B, 1, 1, 9), of sum 1
    for dim, border in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded, size = F.pad(x, border, mode="reflect"), x.shape[dim]
        x.zero_()
        for k in range(2 * reach + 1):
            x.addcmul_(padded.narrow(dim, k, size), kernel[..., k:k + 1])


def invert_bright(x):
    """Solarize: invert what is at least 128 of 255."""
    x.add_((x >= 128 / 255) * (1 - 2 * x))
