"""One picture: found in a folder or a tar shard, opened, turned upright, brought to 8 bits,
decoded; and masks.

    image = read_image("a.jpg")                    # PIL RGB, upright
    image = read_image("a.jpg", (224, 224))        # the same, perhaps at 1/2, 1/4 or 1/8 of its size
    mask = read_mask("a.png", 224)                 # (224, 224) bool
    pixels = eval_image("a.jpg", 224)              # (3, 224, 224) normalised floats
"""
import contextlib
import errno
import functools
import os
import sys
import time

import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from shards import BadShard, Sentence, open_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
said = set()


def say_once(text, about=None):
    """Print a line to stderr, unless one about this was printed before; of several processes the
    first speaks."""
    if (about or text) not in said and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
    said.add(about or text)


# -----------------------------------------------------------------------------------------------
# Reading: one function opens every picture, so that its faults, its turning and its depth are
# seen to in one place

MAX_PIXELS = 64_000_000  # more than any endoscope's frame; decoding it would stall or kill a worker
# the machine's or the network's faults, not the file's (not every system knows all of them)
TRANSIENT = {getattr(errno, name) for name in (
    "EIO", "EMFILE", "ENFILE", "ENOMEM", "ESTALE", "EAGAIN", "EBUSY", "ENOBUFS", "ENOTCONN",
    "ECONNRESET", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH",
    "EREMOTEIO") if hasattr(errno, name)}
ATTEMPTS, PAUSE = 3, 1.0  # seconds between two


class BadImage(Sentence, ValueError):
    """An image that cannot be used; the message names the file."""


class Transient(Sentence, OSError):
    """A disk, a network drive or the memory failed three times, a second apart: no fault of the
    frame that is named.

    No BadImage, since a healthy frame must not be counted as unreadable, or remembered as such.
    Whoever reads ends with this sentence: a run of training saves first, and all its processes
    end together; work that is kept on disk marks nothing as done that was read with it."""


def retried(read):
    """Decorator of a function that reads: after a Transient it is called again, a second later,
    three times in all."""
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
    """The Picture in a file or in a shard, its header read and not decoded yet. Whatever goes
    wrong inside is a BadImage that names the file, or a Transient."""
    try:
        with Image.open(open_file(path)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            if getattr(image, "is_animated", False):
                say_once(f"{path}: holds several pictures; of such files the first is read",
                         about="several pictures")
            yield Picture(image)
    except (BadShard, Transient):
        raise
    except Exception as error:  # Pillow lets through whatever its decoders raise
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in TRANSIENT:
            what = getattr(error, "strerror", None) or "not enough memory"
            raise Transient(
                f"{path}: {what}. The machine fails, not the frame, so nothing was noted against it: "
                "see to the disk, the network or the limits, then give the command again") from error
        raise BadImage(f"{path}: {error or type(error).__name__}") from error


TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
         6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # what undoes EXIF's orientation


class Picture:
    """An opened image: `size` (width, height) is the upright one's, `image` Pillow's, as it is
    stored."""

    def __init__(self, image):
        self.image, self.orientation = image, orientation(image)
        self.size = image.size[::-1] if self.orientation >= 5 else image.size

    def upright(self, stored):
        return stored.transpose(TURNS[self.orientation]) if self.orientation > 1 else stored


def orientation(image):
    """EXIF's 1 (upright) to 8 of an opened image, from its header alone."""
    if image.format == "TIFF":
        return 1  # Pillow turns these by itself
    tags = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
    if image.format == "PNG" and not image.info.keys() & tags:
        return 1  # getexif() would decode all pixels to look for a tag behind them
    with contextlib.suppress(Exception):  # a damaged tag must not cost the frame
        found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in TURNS else 1
    return 1


def decode(picture, factor=1):
    """Upright RGB pixels of a Picture, its stored sides divided by `factor` (1, 2, 4 or 8) and
    rounded up."""
    image = picture.image
    deep = ";16" in str(getattr(image, "tile", ""))  # known until the pixels are there
    if factor > 1 and image.format == "JPEG":
        # the decoder's own scaled inverse DCT, on the axes as they are stored
        image.draft("RGB", (image.width // factor, image.height // factor))
        factor = 1
    load(picture)
    image = eight_bits(image, deep)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return picture.upright(image.reduce(factor) if factor > 1 else image)


def load(picture):
    picture.image.load()
    if picture.image.format == "PNG" and orientation(picture.image) != picture.orientation:
        raise ValueError("its EXIF orientation stands behind its pixels, where no header shows it: "
                         "save it anew")


def eight_bits(image, deep):
    """A loaded image with 8 bits a channel; ValueError where the range of its values cannot be
    known.

    deep: it had 16 (of which Pillow keeps the upper 8 where there are colours). 12 bits stored
    in 16 would be black."""
    if image.mode == "F":
        raise ValueError("holds floating-point numbers, of which nobody knows what is white: "
                         "convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ValueError(f"holds values from {low} to {high}, not 0 to 65535: "
                             "convert it to 8 bits")
        dark, image = high <= 4095, Image.fromarray(((values + 128) // 257).astype(np.uint8))
    else:
        dark = deep and max(high for _, high in image.convert("RGB").getextrema()) <= 4095 // 256
    if dark:
        raise ValueError("of its 16 bits none above the twelfth is used, so it would be black: "
                         "stretch it to all 16")
    return image


@retried
def read_image(path, draft=None):
    """Upright PIL RGB image. draft: (width, height) that the caller needs at least: a much
    larger frame is decoded at 1/2, 1/4 or 1/8.

    16 bits are divided by 257; of several pictures the first is read. Raises BadImage for a
    missing, unreadable, empty, truncated or absurdly large file and for one whose range is
    unknown (see eight_bits), Transient for a failing disk."""
    with opened(path) as picture:
        room = min(np.divide(picture.size, draft)) if draft else 1
        return decode(picture, shrink(room))


def shrink(room):
    """The largest factor of the JPEG decoder that does not exceed `room`."""
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(room, 1))


def eval_image(path, size=224, view="crop"):
    """(3, size, size) normalised floats of a file, as `square` makes them."""
    return square(read_image(path), size, view)


def square(image, size, view="crop"):
    """PIL RGB image -> (3, size, size) normalised floats. view "crop": short side to
    size*256/224, bicubic, then the centre (DINOv2's evaluation transform); "stretch": all of the
    frame, for what must not lose its borders."""
    if view == "crop":
        image = TF.resize(image, round(size * 256 / 224), InterpolationMode.BICUBIC)
        image = TF.center_crop(image, size)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


# -----------------------------------------------------------------------------------------------
# Masks: saved as 0 and 255, as 0 and 1, in colours, in a palette, in an alpha channel, with 16
# bits, as JPEG. What cannot be told from what it might mean otherwise is refused: a mask read as
# empty would not be noticed in a mean

LOSSY = {"JPEG", "MPO"}  # values near 0 and near 255 where 0 and 255 were meant


@retried
def read_mask(path, size=None):
    """(H, W) bool tensor, upright, True on the object; with `size`, shrunk to that square.

    0 and one other value, whichever, are the two halves of a lossless mask; of a lossy one
    everything above 127 is the object, and it is empty if nothing reaches 16. BadImage if the
    values mean neither."""
    with opened(path) as picture:
        load(picture)
        values = mask_values(picture.image)
        mask = Image.fromarray(black_and_white(values, picture.image.format in LOSSY))
        mask = picture.upright(mask)
    mask = mask if size is None else mask.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(mask) > 127)


def mask_values(image):
    """(H, W) array of a loaded mask: its grey values, or where it has colours whatever in them
    tells two halves apart."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))                        # (H, W, 4)
        varies = np.ptp(rgba, (0, 1)) > 0                               # (4,)
        if varies[3] and varies[:3].any():
            raise ValueError("as a mask it says one thing in its colours and one in its alpha "
                             "channel: save one of them")
        if varies[3] or not (varies.any() or rgba[0, 0, 3]):  # the latter: empty, nothing to be seen
            return rgba[..., 3]
    if image.mode == "P":
        index = np.asarray(image)
        used = np.unique(index)
        bright = np.array(image.getpalette("RGB")).reshape(-1, 3).max(1) >= 16  # (colours,)
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
    if image.format in LOSSY and np.ptp(rgb, 2).max() < 64:  # grey, but for what compression does
        return np.asarray(image.convert("L"))
    return rgb.max(2)  # red is as much of an object as white


def black_and_white(values, lossy):
    """(H, W) uint8, above 127 on the object. ValueError where the largest value is neither the
    other half of 0 nor white."""
    low, high = values.min(), values.max()
    if lossy:
        if high < 16:
            return np.zeros(values.shape, np.uint8)
        white = high >= 192
    else:
        if low == 0 and ((values == 0) | (values == high)).all():
            return np.where(values > 0, np.uint8(255), np.uint8(0))
        top = {"u1": 255, "u2": 65535, "i4": 65535}.get(values.dtype.str[1:], 0)  # 0: float, unknown
        white = low >= 0 and 0.9 * top <= high <= top
    if not white:
        raise ValueError(f"as a mask it has values from {low} to {high}, which are neither 0 and one "
                         "other value nor black to white: save 255 on the object and 0 elsewhere")
    return values if values.dtype == np.uint8 else (values // 257).astype(np.uint8)
