"""Multi-crop: two large and some small crops of every frame, their colours, the masks, and in which order the frames come.

Half of it runs on the loader's workers (decode, crop, flip, to uint8), half on the training device (colour, blur, solarize,
normalise), batched:

    frames = data.Frames("data/frames")                  # a folder (sub-folder = video) or a manifest.csv
    multicrop = MultiCrop(frames, seed=0)                # sizes, scales, blur, switches: see the class
    sampler = EpochSampler(len(frames), batch, seed=0, rank=0, world=1, start=step, stop=steps)
    masks = BlockMasks((16, 16), batch * world, seed=0)  # patch grid of a global crop, images per step of all processes
    skipped = Skipped(frames, world=1)
    for batch in loader(multicrop, sampler, masks, workers=4, pin=False):     # one batch per step, of this process
        skipped.update(batch)                            # logs unreadable frames; more than 1 % stop the run
        crops = augment(batch, device)                   # {"global_crops", "local_crops", "masks", ...}: normalised floats

A batch on its way: "global" (2B,3,S,S) uint8, "local" (L*B,3,s,s) uint8, "global_colour" (2B,11) and "local_colour" (L*B,11)
the drawn parameters of the second half, "masks" (2B,N) bool, "masked" (M,) rows of the hidden patches among 2B*N, "index" (B,) numbers in `frames`, "step", "bad" [(number, message)].
All randomness is a function of (seed, epoch, frame, crop) or, for masks, (seed, step, row of the batch of all processes).
"""
import functools
import itertools
import math
import os
import signal
import sys
import threading

import numpy as np
import torch
import torch.nn.functional as F

import data

# ------------------------------------------------------------------------------------------- multi-crop: the workers' half

CROPS, ORDER, REPLACE, MASK_ORDER, MASK = range(5)  # streams of random numbers
TRIES = 10  # attempts at a rectangle, as torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of the drawn parameters, then the order of the four
GRAYSCALE, SIGMA, SOLARIZE = 8, 9, 10
IDENTITY = (1, 1, 1, 0)  # factors that change nothing
BLUR = {"as-executed": (0.0, 0.9, 0.5), "as-written": (1.0, 0.1, 0.5)}  # first global, second global, local crops


def stream(seed, purpose, *counter):
    """Generator that is a pure function of its integers: Philox, keyed by (seed, purpose), at up to three counters."""
    counter = (0, *counter, *[0] * (3 - len(counter)))
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=counter))


def crop_box(u, width, height, scale, ratio=(3 / 4, 4 / 3)):
    """(top, left, h, w) of torchvision's RandomResizedCrop from the uniform numbers u (40,)."""
    for a, b, c, d in u.reshape(TRIES, 4).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * a)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * b)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(c * (height - h + 1)), int(d * (width - w + 1)), h, w
    w = min(width, round(height * ratio[1]))  # the largest central rectangle of an allowed aspect
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_colour(u, blur, solarize, hue=True, grayscale=True):
    """Parameters of the device's half from uniforms: (n, 13) -> (n, 11) float32. Factor 1 and hue 0 leave an image as it is.

    blur, solarize: (n,) probabilities. DINOv2's colour distortion: jitter (.4, .4, .2, .1) p .8, grayscale p .2.
    """
    out = np.zeros((len(u), 11), np.float32)
    jitter = u[:, :1] < 0.8
    out[:, :HUE] = np.where(jitter, 1 + np.array([0.4, 0.4, 0.2]) * (2 * u[:, 1:4] - 1), 1)
    out[:, HUE] = np.where(jitter[:, 0] & hue, 0.1 * (2 * u[:, 4] - 1), 0)
    out[:, 4:8] = u[:, 5:9].argsort(1)  # the operation at each of the four places: a uniform permutation
    out[:, GRAYSCALE] = grayscale & (u[:, 9] < 0.2)
    out[:, SIGMA] = np.where(u[:, 10] < blur, 0.1 + 1.9 * u[:, 11], 0)
    out[:, SOLARIZE] = u[:, 12] < solarize
    return out


class MultiCrop(torch.utils.data.Dataset):
    """The workers' half of DINOv2's multi-crop: 2 global and `local_crops` local crops of each frame, resized to uint8.

    Asked for the keys of one step (see EpochSampler), it returns the batch described at the top of this file, less the masks.
    An unreadable frame is replaced by another one, drawn from (seed, epoch, frame), and reported under "bad".
    exact_decode: never let the decoder data.shrink a frame that is much larger than its crops. Where it does, boxes lie on its grid of 2, 4
    or 8 pixels, as if the frame were stored that size, and a crop is the whole frame's to 0.3 grey levels on average and to 1 in 99 %
    of its values (measured by `bench.py input`).
    """

    def __init__(self, frames, seed=0, global_size=224, local_size=98, local_crops=8, global_scale=(0.32, 1.0),
                 local_scale=(0.05, 0.32), blur="as-executed", hue=True, grayscale=True, solarize=True, exact_decode=False):
        self.frames, self.seed, self.exact_decode = frames, seed, exact_decode
        self.sizes = (global_size,) * 2 + (local_size,) * local_crops
        self.scales = (global_scale,) * 2 + (local_scale,) * local_crops
        first, second, local = BLUR[blur]
        self.colour = functools.partial(draw_colour, blur=np.array([first, second] + [local] * local_crops),
                                        solarize=np.array([0, 0.2 * solarize] + [0] * local_crops), hue=hue, grayscale=grayscale)

    def __getitem__(self, keys):
        n, shared = len(keys), torch.utils.data.get_worker_info() is not None
        pixels = [torch.empty(views * n, 3, size, size, dtype=torch.uint8)
                  for views, size in ((2, self.sizes[0]), (len(self.sizes) - 2, self.sizes[-1]))]
        if shared:
            pixels = [p.share_memory_() for p in pixels]  # the batch then crosses to the training process without a copy
        places = [view for p in pixels if len(p) for view in p.split(n)]  # V x (B, 3, S, S)
        colour = np.empty((len(places), n, 11), np.float32)
        index, bad = [], []
        for b, (_, _, epoch, frame) in enumerate(keys):
            used, crops, colour[:, b], failed = self.readable(epoch, frame)
            for place, crop in zip(places, crops):
                place[b] = crop
            index.append(used)
            bad += failed
        colour = torch.from_numpy(colour)
        return {"global": pixels[0], "local": pixels[1],
                "global_colour": colour[:2].flatten(0, 1), "local_colour": colour[2:].flatten(0, 1),
                "index": torch.tensor(index), "step": keys[0][0], "slots": [slot for _, slot, _, _ in keys], "bad": bad}

    def readable(self, epoch, frame):
        """(number of the frame used, its crops, their colour parameters, [(number, message) of frames that failed before it])."""
        failed = []
        substitutes = stream(self.seed, REPLACE, epoch, frame).integers(len(self.frames), size=20).tolist()
        for candidate in [frame] + substitutes:
            try:
                draw = data.retried(lambda: self.crops(candidate, stream(self.seed, CROPS, epoch, frame)))
                return candidate, *draw(), failed
            except data.BadImage as error:
                failed.append((candidate, str(error)))
        raise data.BadImage("no readable frame in 20 draws:\n  " + "\n  ".join(message for _, message in failed))

    def crops(self, frame, rng):
        """List of (3, S, S) uint8 crops of a frame, and (V, 11) parameters of their second half."""
        with data.opened(self.frames.path(frame)) as image:
            boxes, flips, colour = self.draw(rng, *image.size)
            factor = 1 if self.exact_decode else self.spare(boxes)
            pixels = data.decode(image, factor)
        return cut(pixels, [[round(x / factor) for x in box] for box in boxes], self.sizes, flips), colour

    def spare(self, boxes):
        """How much smaller the frame may be decoded so that no crop needs to be enlarged: 1, 2, 4 or 8."""
        return data.shrink(min(min(h, w) / size for (_, _, h, w), size in zip(boxes, self.sizes)))

    def draw(self, rng, width, height):
        """Boxes [(top, left, h, w)], flips (V,) bool and colour parameters (V, 11) of the crops of a frame of this size."""
        u = rng.random((len(self.sizes), 4 * TRIES + 14))
        boxes = [crop_box(row[:4 * TRIES], width, height, scale) for row, scale in zip(u, self.scales)]
        return boxes, u[:, 4 * TRIES] < 0.5, self.colour(u[:, 4 * TRIES + 1:])


def cut(image, boxes, sizes, flips):
    """Crops (3, S, S) uint8 of a PIL image, bicubic with antialias, as PIL resizes to one grey level."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last as the fast resize wants them
    crops = []
    for (top, left, h, w), size, flip in zip(boxes, sizes, flips):
        crop = F.interpolate(pixels[:, :, top:top + h, left:left + w], (size, size), mode="bicubic", antialias=True)[0]
        crops.append(crop.flip(-1) if flip else crop)
    return crops


class EpochSampler:
    """Batches of keys (step, slot, epoch, frame) for one of `world` processes, from step `start` up to `stop`.

    The frames of all epochs stand in one endless line, each epoch in its own order, and step t takes the t-th piece of
    batch * world of them; a process takes its contiguous slice of the piece. So every frame is seen once per epoch, nothing is
    dropped, a piece does not depend on the number of processes, and any step can be the first. seen: how many frames of the line
    lie behind step `start`, where the pieces before it had another size.
    """

    def __init__(self, n, batch, seed=0, rank=0, world=1, start=0, stop=None, seen=None):
        self.n, self.batch, self.seed, self.rank, self.world, self.start, self.stop = n, batch, seed, rank, world, start, stop
        self.seen = start * batch * world if seen is None else seen

    def __iter__(self):
        order = functools.lru_cache(2)(lambda epoch: stream(self.seed, ORDER, epoch).permutation(self.n))
        for step in itertools.count(self.start) if self.stop is None else range(self.start, self.stop):
            keys, seen = [], self.seen + (step - self.start) * self.batch * self.world
            for slot in range(self.rank * self.batch, (self.rank + 1) * self.batch):
                epoch, place = divmod(seen + slot, self.n)
                keys.append((step, slot, epoch, int(order(epoch)[place])))
            yield keys

    def __len__(self):
        if self.stop is None:
            raise TypeError("a sampler without a last step has no length")
        return max(0, self.stop - self.start)


class BlockMasks:
    """iBOT's block masks (Zhou et al. 2022), drawn over the global crops of all processes.

    Row v * batch + slot is crop v of image `slot`. grid: (h, w) patches; batch: images per step of all processes.

    DINOv2's collate masks a random half of one process's rows and asks the i-th of them for U(b_i, b_i+1) of the
    patches, b = linspace(0.1, 0.5, n + 1). Drawn like that over all processes, one may hide a tenth more than another
    and all wait for it; drawn per process, the masks would depend on how many there are. So every two images share
    what they hide: of the rows 2i and 2i + 1 of a view a coin masks one, and if the first view's asks for u of the
    range, the second view's asks for 1 - u:

        images           0      1         2      3
        first crops      u1     -         -      u2
        second crops     -      1 - u1    -      1 - u2

    A process holds neighbouring images, so it hides the same number at every step, but for blocks that find no place.
    Each row by itself is masked as in DINOv2: with probability 1/2, by a uniform share of the range. u comes from one
    stratum of [0, 1] per two images, the strata in a shuffled order. An odd last image shares with nobody: a coin
    masks one of its two crops.
    """

    def __init__(self, grid, batch, seed=0, ratio=(0.1, 0.5)):
        self.grid, self.batch, self.seed, self.ratio = grid, batch, seed, ratio

    def __call__(self, step, slots):
        """(2B, N) bool for the two global crops of these slots, crop-major."""
        shares = self.shares(step)
        rows = [view * self.batch + slot for view in range(2) for slot in slots]
        return torch.from_numpy(np.stack([self.one(step, row, shares[row]) for row in rows]))

    def shares(self, step):
        """(2 * batch,) the share of its patches that each row of this step is asked to hide; 0: none."""
        n, (low, high) = (self.batch + 1) // 2, self.ratio                           # pairs of images
        rng = stream(self.seed, MASK_ORDER, step)
        u = (rng.permutation(n) + rng.random(n)) / n                                 # (n,) one in each n-th of [0, 1]
        coins = rng.integers(2, size=(2, n))
        out = np.zeros((2, n, 2))                                                    # view, pair, image of the pair
        for view, asked in enumerate((u, 1 - u)):
            out[view, np.arange(n), coins[view]] = low + (high - low) * asked
        out = out.reshape(2, 2 * n)
        if self.batch % 2:
            out[1, -2] = out[0, -1]  # the second crop of the last image is hidden where the first of its partner would be
        return out[:, :self.batch].reshape(-1)

    def one(self, step, row, share):
        """(N,) bool: blocks of random area and aspect until this share of the patches is reached or no block fits."""
        mask, rng = np.zeros(self.grid, bool), stream(self.seed, MASK, step, row)
        left = int(mask.size * share)
        while left > 0:
            added = add_block(mask, left, rng)
            if not added:
                break
            left -= added
        return mask.reshape(-1)


def add_block(mask, left, rng):
    """Mask one block that adds 1 to `left` patches, in 10 tries; returns how many it added (0: none fitted)."""
    height, width = mask.shape
    left = min(left, height // 2 * width)
    for a, b, c, d in rng.random((10, 4)).tolist():
        area = 4 + (left - 4) * a  # from 4 down where fewer are left, as in DINOv2
        aspect = math.exp(math.log(0.3) * (1 - 2 * b))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, start = int(c * (height - h + 1)), int(d * (width - w + 1))
        block = mask[top:top + h, start:start + w]
        added = h * w - int(np.count_nonzero(block))
        if 0 < added <= left:
            block[:] = True
            return added
    return 0


def collate(batch, masks):
    """Add to a batch of MultiCrop the masks of its step, and which rows of its patches they hide: counted here, where
    the answer costs nothing. Asked of a GPU it would hold up the training process in every step."""
    masks = masks(batch["step"], batch.pop("slots"))                                 # (2B, N)
    return batch | {"masks": masks, "masked": masks.flatten().nonzero().squeeze(1)}  # (M,)


def loader(multicrop, sampler, masks, workers=4, pin=False, lifeline=None):
    """DataLoader of one batch per step. lifeline: (reader, writer) of a multiprocessing.Pipe, see outlive_signals."""
    return torch.utils.data.DataLoader(
        multicrop, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin,
        collate_fn=functools.partial(collate, masks=masks),
        worker_init_fn=lifeline and functools.partial(outlive_signals, *lifeline))


def outlive_signals(reader, writer, worker):
    """In a worker: no signal ends it, for one to the whole group of processes would take the batches from a trainer
    that has yet to save. It ends when the trainer closes `writer`, or dies: then no end of the pipe is open for writing."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    writer.close()
    threading.Thread(target=lambda: (reader.poll(None), os._exit(0)), daemon=True).start()


class Skipped:
    """Counts and names the frames that could not be read; more than 1 % of the frames stops the run.

    Of several processes each judges by its share: 1 % of the frames that it has read, from its first full share on.
    """

    def __init__(self, frames, world=1):
        self.frames, self.world, self.read, self.bad = frames, world, 0, {}

    def update(self, batch):
        """Count a batch; returns the messages of frames that failed for the first time. Raises SystemExit when they are too many."""
        new = {frame: message for frame, message in batch["bad"] if frame not in self.bad}
        self.read += len(batch["index"])
        for frame, message in new.items():
            self.bad[frame] = message
            print(f"skipped frame {message} ({len(self.bad)} unreadable so far, of {len(self.frames)})", file=sys.stderr)
        if len(self.bad) > 0.01 * min(len(self.frames), max(self.read, len(self.frames) / self.world)):
            raise SystemExit(f"{len(self.bad)} of {len(self.frames)} frames cannot be read, more than 1 %; repair or remove them:\n  "
                             + "\n  ".join(self.bad.values()))
        return list(new.values())


# -------------------------------------------------------------------------------------------- multi-crop: the device's half

def augment(batch, device):
    """The second half of the multi-crop: a batch of `loader` -> {"global_crops", "local_crops", "masks", "masked"} on the device.

    global_crops (2B, 3, S, S), local_crops (L*B, 3, s, s): floats, normalised with ImageNet's mean and deviation.
    """
    out = {key: batch[key].to(device, non_blocking=True) for key in ("masks", "masked") if key in batch}
    for kind in ("global", "local"):
        out[kind + "_crops"] = distort(batch[kind].to(device, non_blocking=True), batch[kind + "_colour"])
    return out


def distort(crops, colour):
    """(B, 3, H, W) uint8 and drawn parameters (B, 11) on the CPU -> (B, 3, H, W) normalised floats on the crops' device."""
    x = crops.float().div_(255)
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    some = 1 if x.device.type == "cpu" else max(1, len(x))  # on a CPU a single crop stays in the cache from step to step
    for part, parameters in zip(x.split(some), colour.split(some)):
        photometric(part, parameters)
        part.sub_(mean).div_(std)
    return x


def photometric(x, colour):
    """In place on (B, 3, H, W) in [0, 1]: jitter in each sample's own order, grayscale, blur, solarize. colour: (B, 11) on the
    CPU, so that choosing the samples of an operation never waits for the device."""
    drawn, colour = colour.numpy(), colour.to(x.device, non_blocking=True)
    changes = drawn[:, :4] != IDENTITY
    for place in range(4, 8):
        for op, fn in enumerate((brightness, contrast, saturation, hue)):
            on_rows(fn, x, changes[:, op] & (drawn[:, place] == op), colour[:, op])
    on_rows(to_gray, x, drawn[:, GRAYSCALE] > 0)
    on_rows(gaussian_blur, x, drawn[:, SIGMA] > 0, colour[:, SIGMA])
    on_rows(solarize, x, drawn[:, SOLARIZE] > 0)


def on_rows(fn, x, chosen, *parameters):
    """x[chosen] = fn(x[chosen], parameters[chosen]) for a function that works in place."""
    if len(x) and chosen.all():
        fn(x, *(p.view(-1, 1, 1, 1) for p in parameters))
    elif chosen.any():
        rows = torch.from_numpy(chosen.nonzero()[0]).to(x.device, non_blocking=True)
        part = x[rows]
        fn(part, *(p[rows].view(-1, 1, 1, 1) for p in parameters))
        x[rows] = part


def gray(x):
    """(B, 3, H, W) -> (B, 1, H, W): luma with torchvision's weights."""
    return (x[:, :1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def to_gray(x):
    x.copy_(gray(x).expand_as(x))


def brightness(x, factor):
    x.mul_(factor).clamp_(0, 1)


def contrast(x, factor):
    mean = gray(x).mean((2, 3), keepdim=True)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x, factor):
    luma = gray(x)
    x.mul_(factor).add_(luma.mul_(1 - factor)).clamp_(0, 1)


def hue(x, shift):
    """Turn the hue by `shift` turns: with h in [0, 6), channel = low + chroma * clamp(|(h + k) mod 6 - 3| - 1, 0, 1) for
    k = 0, 4, 2 in R, G, B. Written with sign and lerp, because a data-dependent `where` is the slowest operation on a CPU."""
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)  # (B, 1, H, W)
    chroma = high - low
    green = (b - r).add_(chroma, alpha=2)
    blue = (r - g).add_(chroma, alpha=4)
    h = torch.lerp(blue, green, (g - high).sign_().add_(1))  # weight 1 where g is the highest, otherwise 0
    h = torch.lerp(h, g - b, (r - high).sign_().add_(1))
    turns = h.div_(chroma.clamp(min=1e-12).mul_(6)).add_(shift)
    thirds = torch.tensor([1.0, 5 / 3, 4 / 3], device=x.device).view(3, 1, 1)  # 1 + k / 6, so that all turns are positive
    ramp = (turns + thirds).frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)  # (B, 3, H, W)
    torch.addcmul(low, ramp, chroma, out=x)


def gaussian_blur(x, sigma, reach=4):
    """Separable Gaussian of 2 * reach + 1 taps with reflected borders; sigma in pixels, one per sample (B, 1, 1, 1)."""
    taps = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.softmax(-taps ** 2 / (2 * sigma ** 2), -1)  # (B, 1, 1, 9)
    for dim, border in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded, size = F.pad(x, border, mode="reflect"), x.shape[dim]
        x.zero_()
        for k in range(2 * reach + 1):
            x.addcmul_(padded.narrow(dim, k, size), kernel[..., k:k + 1])


def solarize(x):
    """Invert what is at least 128 of 255."""
    x.add_((x >= 128 / 255) * (1 - 2 * x))
