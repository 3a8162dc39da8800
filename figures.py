"""Every picture of the project, drawn with Pillow alone: contact sheets, crops and masks, token
maps, curves and bars.

    crops(multicrop, frame, out)          # data.py --show: how a frame is cut, coloured, masked
    tokens({"a.pt": model}, paths, out)   # vit.py --show: patch tokens as colours, attention
    contact_sheet(out, frames, groups)    # curate.py: what was kept and what was dropped, why
    synthetic_set(root, out)              # synthetic.py --sheet
    panels(out, frames, masks, ...)       # probe_segment.py: frame, truth, prediction
    overlay(image, mask, lines)           # predict.py: what the heads say, on the frame itself
    timeline(out, title, times, tracks)   # predict.py: what they say over a video
    draw_curve(...), draw_bars(...)       # probe_mes.py: loss and score, frames per class
"""
import contextlib
import functools
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

import augment
import data
import vit


# -----------------------------------------------------------------------------------------------
# Pages of pictures


def grid(rows, gap=2, width=None):
    """A white page of rows of (caption, image); a caption, of any number of lines, stands right
    above its image.

    Pictures stand `gap` pixels apart, in columns of `width` pixels where it is given (else a row
    closes up). A row whose captions are all empty takes no room for them; the page is as wide as
    its pictures and captions need."""
    cells, top, right = [], gap, 0  # cells: (caption, image, left, top of the image)
    for row in filter(None, rows):
        top += max(caption_height(caption) for caption, _ in row)
        left = gap
        for caption, image in row:
            cells.append((caption, image, left, top))
            words = max(font(10).getlength(line) for line in caption.split("\n"))
            right = max(right, left + max(width or image.width, math.ceil(words)))
            left += (width or image.width) + gap
        top += max(image.height for _, image in row) + gap
    page = Image.new("RGB", (right + gap, top), "white")
    draw = ImageDraw.Draw(page)
    for caption, image, left, top in cells:
        above = left, top - caption_height(caption)
        draw.multiline_text(above, caption, fill="black", font=font(10), spacing=1)
        page.paste(image, (left, top))
    return page


def caption_height(caption, line=12):
    return line * (caption.count("\n") + 1) + 4 if caption else 0


@functools.cache
def font(size):
    return ImageFont.load_default(size)  # it reads the font anew at every call


def save(picture, path, **options):
    """Write the picture whole or not at all, into a folder that is made if need be."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with vit.replacing(path) as temporary:
        picture.save(temporary, **options)


def in_rows(cells, columns):
    return [cells[i : i + columns] for i in range(0, len(cells), columns)]


def thumbnail(path, side):
    """A frame at side x side pixels; white where it cannot be read, because a sheet of many must
    not fail for one."""
    with contextlib.suppress(data.BadImage):
        return data.read_image(path, (side, side)).resize((side, side), Image.Resampling.LANCZOS)
    return Image.new("RGB", (side, side), "white")


def contact_sheet(path, frames, groups, side=96, columns=12):
    """A PNG with up to two rows of frames, drawn at even distances, for each (caption, frame
    numbers) of groups."""
    rows = []
    for caption, numbers in groups:
        shown = np.linspace(0, len(numbers) - 1, min(2 * columns, len(numbers))).astype(int)
        cells = [("", thumbnail(frames.path(numbers[i]), side)) for i in shown]
        cells[:1] = [(caption, image) for _, image in cells[:1]]
        rows += in_rows(cells, columns)
    save(grid(rows), path)


def synthetic_set(root, path, side=112, columns=6):
    """A contact sheet of the set of synthetic.py under root: landmarks, Mayo grades, polyps with
    the border of their mask, one video, and the landmarks through the second scope."""
    def spread(folder, n):  # n frames, as many patients as there are, the same at every call
        files = sorted(f for f in (root / folder).rglob("*.*") if f.suffix in (".jpg", ".bmp"))
        return [files[(2 * i + 1) * len(files) // (2 * n)] for i in range(n)]

    landmarks = root / "hyper-kvasir" / "labeled-images"
    places = {name: next(landmarks.glob(f"*/anatomical-landmarks/{name}")).relative_to(root)
              for name in data.LANDMARKS}
    places |= {f"Mayo {g}": f"LIMUC/train_and_validation_sets/Mayo {g}" for g in range(4)}
    shown = {name: spread(folder, columns // 2) for name, folder in places.items()}
    shown["polyps, outlined"] = spread("Kvasir-SEG/images", columns)
    shown["a video"] = spread("unlabelled/video0000", columns)
    shown["the second scope, landmarks as above"] = [spread(f"scope2/{places[name]}", 1)[0]
                                                     for name in list(data.LANDMARKS)[:columns]]
    cells = []
    for caption, files in shown.items():
        for i, file in enumerate(files):
            frame = data.read_image(file)
            if "Kvasir-SEG" in file.parts:
                mask = data.read_mask(file.parents[1] / "masks" / file.name)
                frame = outlined(frame, mask.numpy(), "white", max(frame.width // 120, 2))
            frame = frame.resize((side, side), Image.Resampling.LANCZOS)
            cells.append((caption if i == 0 else "", frame))
    sheet = grid(in_rows(cells, columns))
    # 96 colours are a third of the bytes, for a README
    save(sheet.quantize(96, dither=Image.Dither.NONE), path, optimize=True)


# -----------------------------------------------------------------------------------------------
# One frame: its crops and masks


def crops(multicrop, frame, path):
    """Write a PNG of one frame: where its crops lie, each as it is cut and as the network sees
    it, and masks on the global ones."""
    frames, S = multicrop.frames, multicrop.sizes[0]
    batch = multicrop[[(0, 0, 0, frame)]]
    used = batch["index"].item()
    whole = data.read_image(frames.path(used))
    rng = augment.stream(multicrop.seed, augment.CROPS, 0, frame)  # the very draw of the batch
    boxes, flips, _ = multicrop.draw(rng, *whole.size)
    masks = augment.BlockMasks((S // 14, S // 14), 1, multicrop.seed)
    # In training a coin masks half of the crops; here both are shown masked
    shown = [masks.one(0, view, share) for view, share in enumerate((0.22, 0.42))]
    batch["masks"] = torch.from_numpy(np.stack(shown))
    seen = augment.augment(batch, "cpu")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    cells = []  # per crop: (caption, as it is cut), (caption, as the network sees it)
    for kind in ("global", "local"):
        drawn = map(augment.Colour._make, zip(*batch[f"{kind}_colour"]))  # crop by crop
        for cut, crop, colour in zip(batch[kind], seen[f"{kind}_crops"], drawn):
            (top, left, h, w), flip = boxes[len(cells)], flips[len(cells)]
            caption = f"{kind} {len(cells) + 1}\n{h}x{w} at {top},{left}"
            caption += "\nflipped" if flip else ""
            final = TF.to_pil_image((crop * std + mean).clamp(0, 1))
            cells.append(((caption, TF.to_pil_image(cut)), (operations(colour), final)))
    masked = []
    for mask, (_, (_, final)) in zip(batch["masks"], cells):
        share = f"masked\n{mask.float().mean():.0%} of {len(mask)} patches"
        masked.append((share, hide(final, mask)))
    framed = boxed(whole, boxes, S)
    words = (f"{frames.name(used)}\n{whole.height}x{whole.width} pixels\n\n"
             "white: global crops\nyellow: local crops\n\n"
             "each as it is cut\n(height x width at top, left),\nthen as the network sees it,\n"
             "with what the colour half did\nin its order")
    legend = Image.new("RGB", framed.size, "white")
    ImageDraw.Draw(legend).text((0, 0), words, fill="black", font=font(10))
    rows = [[("frame", framed), *cells[0], masked[0]], [("", legend), *cells[1], masked[1]]]
    rows += [[cell[part] for cell in cells[2:]] for part in range(2)]
    save(grid(rows, gap=14), path)


def operations(colour):
    """What the drawn Colour of one crop does, one operation a line, in their order."""
    names = "brightness", "contrast", "saturation", "hue"
    words = [f"{names[which]} {colour.factors[which]:.2f}" for which in colour.order.tolist()
             if colour.factors[which] != augment.IDENTITY[which]]
    words += ["grayscale"] * bool(colour.grayscale)
    words += [f"blur {colour.sigma:.2f}"] * bool(colour.sigma)
    words += ["solarize"] * bool(colour.solarize)
    return "\n".join(words or ["no change"])


def boxed(whole, boxes, height):
    """The frame at this height with its crops' boxes (top, left, h, w), the first two white, the
    others yellow."""
    scale = height / whole.height
    drawn = whole.resize((round(whole.width * scale), height), Image.Resampling.LANCZOS)
    for view, (top, left, h, w) in reversed(list(enumerate(boxes))):  # the global ones on top
        corners = [round(x * scale) for x in (left, top, left + w - 1, top + h - 1)]
        ink, width = ("white", 2) if view < 2 else ("yellow", 1)
        ImageDraw.Draw(drawn).rectangle(corners, outline=ink, width=width)
    return drawn


def hide(crop, mask, patch=14):
    """The crop with its masked patches in one grey, as the mask token stands for all of them."""
    side = crop.width // patch
    area = Image.fromarray(mask.view(side, side).numpy())
    grey = Image.new("RGB", crop.size, (110, 110, 110))
    return Image.composite(grey, crop, area.resize(crop.size, Image.Resampling.NEAREST))


# -----------------------------------------------------------------------------------------------
# What a backbone sees


def principal_colours(tokens, lit=None):
    """The three principal components of tokens (n, D) as red, green and blue in [0, 1]: (n, 3).
    Like features, like colours (DINOv2, figure 1).

    lit (n,) bool: the tokens that count, where an endoscope's frame is not black; the others come
    out black. Counted in, they would be so unlike the rest that one component told only that."""
    lit = torch.ones(len(tokens), dtype=torch.bool) if lit is None or not lit.any() else lit
    tokens = tokens - tokens[lit].mean(0)
    some = tokens[lit]
    axes = torch.linalg.eigh(some.T @ some).eigenvectors[:, -3:].flip(1)      # (D, 3)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))              # (1, 3)
    components = tokens @ (axes * largest.sign())  # an eigenvector's sign is arbitrary: fix it
    # Without the hundredth at both ends: one odd token would take the range of colours for itself
    ends = torch.tensor([0.01, 0.99], device=tokens.device)
    low, high = components[lit].quantile(ends, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours * lit[:, None].to(colours.device)


def heat(attention):
    """Maps (..., h, w) -> colours (..., 3, h, w): black over red and yellow to white, from the
    weakest to the strongest hundredth of each map."""
    ends = torch.tensor([0.01, 0.99], device=attention.device)
    low, high = attention.flatten(-2).quantile(ends, dim=-1)[..., None, None]  # (..., 1, 1) each
    level = 3 * (attention - low) / (high - low).clamp(min=1e-12)
    return torch.stack([level, level - 1, level - 2], dim=-3).clamp(0, 1)


def tokens(models, paths, out, size=518, tile=280, masks=()):
    """Write a PNG with a row per image, which the networks get with its longer side at `size`
    px: the image, and for each of models {name: model} its patch tokens' principal components
    and the class token's attention in the last block, averaged over the heads; for one model
    alone also that of each head.

    A model's components are those of all images together, so that a colour means the same in all
    rows. masks: bool (H, W) arrays, one per image, whose borders are drawn on it."""
    images = [data.read_image(path) for path in paths]
    shown = [fit(image, tile) for image in images]
    if masks:
        shown = [outlined(image, mask, YELLOW, 2) for image, mask in zip(shown, masks, strict=True)]
    columns = [("image", shown)]

    def add(title, maps):  # as large as their images, every patch a plain square
        pictures = [TF.to_pil_image(colours.cpu()) for colours in maps]
        columns.append((title, [picture.resize(image.size, Image.Resampling.NEAREST)
                                for picture, image in zip(pictures, shown)]))

    for name, model in models.items():
        title = f"{name[-44:]}\n" if len(models) > 1 else ""  # as much as fits above a picture
        patches, lit, attention = zip(*(look(model, image, size) for image in images))
        colours = principal_colours(torch.cat([p.flatten(0, 1) for p in patches]),
                                    torch.cat([mask.flatten() for mask in lit]))
        parts = colours.split([mask.numel() for mask in lit])  # of each image (N, 3)
        add(f"{title}patch tokens: 3 principal components",
            [part.T.unflatten(1, mask.shape) for part, mask in zip(parts, lit)])
        add(f"{title}class token's attention: mean", [heat(maps.mean(0)) for maps in attention])
    if len(models) == 1:
        side = math.ceil(math.sqrt(model.heads))
        add(f"... of each of {model.heads} heads",
            [make_grid(heat(maps), nrow=side, padding=1, pad_value=1) for maps in attention])
    rows = [[(title if i == 0 else "", pictures[i]) for title, pictures in columns]
            for i in range(len(images))]
    save(grid(rows, gap=4, width=tile), out)


@torch.no_grad()
def look(model, image, size):
    """What the model makes of a PIL image whose longer side is resized to `size` px, both sides to
    multiples of the patch: patch tokens (h, w, D), which patches are not black (h, w; bool, on the
    CPU), and the class token's attention (nh, h, w)."""
    p = model.patch_size
    w, h = (max(round(side * size / max(image.size) / p), 1) for side in image.size)
    pixels = TF.to_image(image.resize((w * p, h * p), Image.Resampling.BICUBIC)) / 255  # (3, H, W)
    lit = F.avg_pool2d(pixels.amax(0, keepdim=True), p)[0] > 0.1
    pixels = TF.normalize(pixels, data.IMAGENET_MEAN, data.IMAGENET_STD)
    pixels = pixels[None].to(model.pos_embed.device)                                    # (1, 3, H, W)
    patches = model(pixels)["patches"][0].unflatten(0, (h, w))                          # (h, w, D)
    return patches, lit, vit.class_attention(model, pixels)[0].unflatten(-1, (h, w))


def fit(image, tile):
    """The picture with its longer side at `tile` pixels."""
    size = [max(round(side * tile / max(image.size)), 1) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


# -----------------------------------------------------------------------------------------------
# Masks

CYAN, YELLOW = "#00ffff", "#ffe600"


def outlined(image, mask, colour, width=1):
    """A copy of a PIL image as RGB with the border of mask (h, w; bool, array or tensor,
    stretched to it) drawn on it."""
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    area = Image.fromarray(np.asarray(mask, np.uint8) * 255)
    area = area.resize(drawn.size, Image.Resampling.NEAREST)
    if found := area.getbbox():
        # The border is what lies within `width` pixels of the outside. A box blur stays full exactly
        # where its box holds no pixel of the outside, and costs the same for every width (Pillow's
        # MinFilter fifty times as much); beyond 10 pixels its rounding could hide one. Only what is
        # near the mask is looked at: a live picture has 40 ms for everything
        width = min(width, 10)
        box = [max(edge - width - 1, 0) for edge in found[:2]]
        box += [min(edge + width + 1, end) for edge, end in zip(found[2:], drawn.size)]
        area = area.crop(box)
        inner = area.filter(ImageFilter.BoxBlur(width)).point(lambda value: 255 * (value == 255))
        drawn.paste(colour, box, ImageChops.subtract(area, inner))
    return drawn


def panels(path, frames, masks, preds, dice, each=2, height=240):
    """Figure 3 as a PNG: frame, ground truth (cyan), prediction (yellow); the worst, the median
    and the best `each` frames by Dice."""
    order, middle = np.argsort(dice, kind="stable"), max(len(dice) - each, 0) // 2
    picks = dict.fromkeys([*order[:each], *order[middle : middle + each], *order[-each:]])
    rows = []
    for i in picks:
        frame = data.read_image(frames[i])
        width = round(frame.width * height / frame.height)
        frame = frame.resize((width, height), Image.Resampling.BICUBIC)
        rows.append([(f"Dice {dice[i]:.3f}   {pathlib.Path(frames[i]).stem}", frame),
                     ("truth", outlined(frame, masks[i], CYAN, 2)),
                     ("prediction", outlined(frame, preds[i], YELLOW, 2))])
    save(grid(rows, gap=4), path)


def overlay(image, mask=None, lines=(), note="not a medical device"):
    """A copy of a PIL image with what the heads say about it, as a new RGB image of its size.

    mask: (h, w) bool, array or tensor, stretched to the image; its border is drawn in yellow.
    lines: words for the top left, one a line. note: for the bottom right. Sizes follow the
    image's, so that a large frame stays readable."""
    mask = np.zeros((1, 1), bool) if mask is None else mask
    drawn = outlined(image, mask, YELLOW, max(min(image.size) // 200, 1))
    draw, size = ImageDraw.Draw(drawn), max(min(drawn.size) // 24, 10)
    # White on a black rim is readable on mucosa, on a lamp's reflection and in the black corner
    # alike
    style = dict(font=font(size), fill="white", stroke_fill="black", stroke_width=max(size // 8, 1))
    for row, words in enumerate(lines):
        draw.text((size // 2, size // 2 + row * size * 4 // 3), words, **style)
    draw.text((drawn.width - size // 2, drawn.height - size // 2), note, anchor="rd", **style)
    return drawn


# -----------------------------------------------------------------------------------------------
# Curves and bars, drawn at twice the size and reduced, which smooths their edges

INK, GRID_INK, BLUE, ORANGE = "#222222", "#dddddd", "#1f5fa8", "#d1600a"
SCALE = 2


def text(draw, xy, words, size=15, anchor="mm", ink=INK):
    draw.text([SCALE * v for v in xy], words, fill=ink, font=font(SCALE * size), anchor=anchor)


def line(draw, points, ink=INK, width=1):
    points = [(SCALE * x, SCALE * y) for x, y in points]
    draw.line(points, fill=ink, width=SCALE * width, joint="curve")


def rectangle(draw, left, top, right, bottom, ink):
    draw.rectangle([SCALE * v for v in (left, top, right, bottom)], fill=ink)


def ticks(low, high, most=6):
    """At most `most` round values (1, 2 or 5 times a power of ten apart) that lie in
    low..high."""
    rough = max(high - low, 1e-9) / most
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return np.arange(first, last + 1) * step + 0.0  # + 0.0: no -0


def axes(draw, box, x_range, y_range, label, x_words=None, y_words=None):
    """Frame, ticks and title of a panel in box (left, top, right, bottom); ticks stand at
    x_words {x: words} and y_words, or at round numbers. Returns the function (x, y) ->
    position."""
    left, top, right, bottom = box

    def place(x, y):
        return (left + (x - x_range[0]) / (x_range[1] - x_range[0]) * (right - left),
                bottom - (y - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - top))

    for y, words in (y_words or {y: f"{y:,.10g}" for y in ticks(*y_range)}).items():
        line(draw, [(left, place(0, y)[1]), (right, place(0, y)[1])], GRID_INK)
        text(draw, (left - 8, place(0, y)[1]), words, anchor="rm")
    for x, words in (x_words or {x: f"{x:,.0f}" for x in ticks(*x_range)}).items():
        line(draw, [(place(x, 0)[0], bottom), (place(x, 0)[0], bottom + 5)])
        text(draw, (place(x, 0)[0], bottom + 18), words)
    line(draw, [(left, top), (left, bottom), (right, bottom)])
    text(draw, (left, top - 18), label, size=16, anchor="lm")
    return place


def canvas(width, height):
    image = Image.new("RGB", (SCALE * width, SCALE * height), "white")
    return image, ImageDraw.Draw(image)


def save_figure(image, path):
    size = image.width // SCALE, image.height // SCALE
    save(image.resize(size, Image.Resampling.LANCZOS), path)


def padded(values):
    """The range of the values with a tenth of room on both sides."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.1
    return low - room, high + room


def draw_curve(losses, online, exported, path, title, dice=()):
    """Figure 1 as panels over one step axis: loss, kappa, and Dice where there is any. Each of
    losses, online, exported, dice: a list of (step, value)."""
    image, draw = canvas(820, 890 if dice else 620)
    everything = [*losses, *online, *exported, *dice]
    steps = 0, 1.02 * max(max(step for step, _ in everything), 1)
    text(draw, (410, 22), title, size=18)
    place = axes(draw, (80, 80, 790, 290), steps, padded([v for _, v in losses]),
                 "total pre-training loss")
    line(draw, [place(*p) for p in losses], BLUE, 2)
    panel(draw, 350, steps, "quadratic weighted kappa, validation groups",
          [(online, BLUE, "online probe", 520), (exported, ORANGE, "exported teachers", 645)])
    if dice:
        panel(draw, 620, steps, "Dice of a linear head, validation frames",
              [(dice, ORANGE, "exported teachers", 645)])
    text(draw, (435, 872 if dice else 602), "step", size=16)
    save_figure(image, path)


def panel(draw, top, steps, label, series):
    """Points and lines; series: (points, ink, name, where its name stands)."""
    values = [v for points, *_ in series for _, v in points]
    place = axes(draw, (80, top, 790, top + 210), steps, padded(values), label)
    for points, ink, name, x in series:
        if points:
            line(draw, [place(*p) for p in points], ink, 2)
            for px, py in [place(*p) for p in points] + [(x - 8, top - 18)]:
                draw.ellipse([SCALE * v for v in (px - 4, py - 4, px + 4, py + 4)], fill=ink)
            text(draw, (x, top - 18), name, anchor="lm", ink=ink)


def draw_bars(names, counts, path, title):
    """Figure 2: a bar for each name, with its count and its share."""
    image, draw = canvas(820, 520)
    text(draw, (410, 22), title, size=18)
    places = {i + 0.5: name for i, name in enumerate(names)}
    high, box = 1.12 * max(*counts, 1), (90, 80, 790, 460)
    place = axes(draw, box, (0, len(names)), (0, high), "frames per class", places)
    for x, count in zip(places, counts):
        (left, top), (right, bottom) = place(x - 0.3, count), place(x + 0.3, 0)
        rectangle(draw, left, top, right, bottom, BLUE)
        text(draw, ((left + right) / 2, top - 12), f"{count:,} ({count / sum(counts):.1%})")
    save_figure(image, path)


TRACK_INKS = "#1f5fa8", "#d1600a", "#2a8c4a", "#b0306a", "#7a5cc0", "#8a6d1a"


def timeline(path, title, times, tracks, seconds=True):
    """A PNG of what the heads say over one video: a panel for each track over one time axis.

    times: rising, one per frame; seconds, or frame numbers where `seconds` is False. tracks: a
    list of (name, values, classes). With classes None the values are numbers, drawn as a line
    from 0; else they are label numbers, and every stretch of one label is a bar in the row of
    its class. None or NaN, a frame that could not be read, leaves a gap."""
    times = np.asarray(times, float)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    span = times[0], times[-1] + step  # a frame stands until the next one
    heights = [24 * len(classes) if classes else 130 for _, _, classes in tracks]
    image, draw = canvas(1000, 84 + sum(height + 66 for height in heights))
    names = [name for _, _, classes in tracks for name in classes or ()]
    left = 30 + max([40, *(font(15).getlength(str(name)) for name in names)])  # room for their words
    text(draw, (500, 20), title, size=18)
    top = 74
    for (name, values, classes), height in zip(tracks, heights):
        values = np.array([np.nan if value is None else value for value in values], float)
        known, box = values[~np.isnan(values)], (left, top, 970, top + height)
        if classes:  # the first class on top
            y_range = len(classes) - 0.5, -0.5
        else:
            y_range = 1.1 * known.min(initial=0), 1.1 * known.max(initial=0) or 1
        y_words = {i: str(name) for i, name in enumerate(classes)} if classes else None
        place = axes(draw, box, span, y_range, name, clock(*span, seconds), y_words)
        for frames in stretches(times, values, 4 * step, bool(classes)):
            label, ends = values[frames[0]], (times[frames[0]], times[frames[-1]] + step)
            if classes:
                (x0, y0), (x1, y1) = place(ends[0], label - 0.3), place(ends[1], label + 0.3)
                ink = TRACK_INKS[int(label) % len(TRACK_INKS)]
                rectangle(draw, x0, y0, max(x1, x0 + 1), y1, ink)
            else:
                points = [place(times[i], values[i]) for i in frames]
                line(draw, [*points, place(ends[1], values[frames[-1]])], BLUE, 2)
        top += height + 66
    text(draw, ((left + 970) / 2, top - 10), "time (minutes:seconds)" if seconds else "frame", size=16)
    save_figure(image, path)


def clock(low, high, seconds):
    """Where to write which time: at most nine ticks {time: words}."""
    if not seconds:
        return {t: f"{t:,.0f}" for t in ticks(low, high, 9) if t == round(t)}
    steps = 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800
    step = next((step for step in steps if (high - low) / step < 9), 3600)
    shown = range(math.ceil(low / step) * step, math.floor(high) + 1, step)
    return {t: f"{t // 60}:{t % 60:02d}" for t in shown}


def stretches(times, values, pause, same):
    """Runs of frame numbers (arrays) without a missing value and without `pause` seconds between
    two frames; of one value each where `same`."""
    missing = np.isnan(values)
    cut = missing[1:] | missing[:-1] | (np.diff(times) > pause)
    if same:
        cut |= values[1:] != values[:-1]
    runs = np.split(np.arange(len(values)), np.flatnonzero(cut) + 1)
    return [run for run in runs if not missing[run[0]]]
