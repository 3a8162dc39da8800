"""Every picture of the project, drawn with Pillow alone: contact sheets, crops and masks, token maps, curves and bars.

    crops(multicrop, frame, "crops.png")                 # data.py --show: how one frame is cut, coloured and masked
    tokens(model, paths, "tokens.png")                   # vit.py --show: patch tokens as colours, attention
    contact_sheet("sheet.png", frames, groups)           # curate.py: what was kept and what was dropped, why
    synthetic_set(root, "synthetic.png")                 # synthetic.py --sheet
    panels("panels.png", frames, masks, preds, dice)     # probe_segment.py: frame, truth, prediction
    draw_curve(...), draw_bars(...)                      # probe_mes.py: loss and score against the step, frames per class
    overlay(image, mask, ["polyp 0.93"])                 # predict.py: what the heads say, on the frame itself
    timeline("timeline.png", "video 3", times, tracks)   # predict.py: what they say over a video
"""
import contextlib
import functools
import math
import pathlib

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

import augment
import data
import vit


# ---------------------------------------------------------------------------------------------------------------------
# Many frames on a page


def contact_sheet(path, frames, groups, side=96, columns=12):
    """A PNG with a caption and up to two rows of frames, drawn at even distances, for each (caption, frame numbers) in groups."""
    shown = [(caption, rows[np.linspace(0, len(rows) - 1, min(2 * columns, len(rows))).astype(int)]) for caption, rows in groups if len(rows)]
    heights = [16 + side * -(-len(rows) // columns) for _, rows in shown]
    page, top = Image.new("RGB", (columns * side, sum(heights)), "white"), 0
    draw = ImageDraw.Draw(page)
    for (caption, rows), height in zip(shown, heights):
        draw.text((3, top + 2), caption, fill="black")
        for place, i in enumerate(rows):
            with contextlib.suppress(data.BadImage):
                picture = data.read_image(frames.path(i), (side, side)).resize((side, side))
                page.paste(picture, (place % columns * side, top + 16 + place // columns * side))
        top += height
    with vit.replacing(path) as temporary:
        page.save(temporary)


def synthetic_set(root, path, size=112, columns=6):
    """A contact sheet of the set of synthetic.py under root: landmarks, Mayo grades, outlined polyps, one video, the second scope."""
    def spread(folder, n):  # n frames, as many patients as there are, the same at every call
        files = sorted(f for f in (root / folder).rglob("*.*") if f.suffix in (".jpg", ".bmp"))
        return [files[(2 * i + 1) * len(files) // (2 * n)] for i in range(n)]
    landmarks = root / "hyper-kvasir" / "labeled-images"
    places = {name: next(landmarks.glob(f"*/anatomical-landmarks/{name}")).relative_to(root) for name in data.LANDMARKS}
    places |= {f"Mayo {g}": f"LIMUC/train_and_validation_sets/Mayo {g}" for g in range(4)}
    cells = [(name, f) for name, folder in places.items() for f in spread(folder, columns // 2)]
    cells += [("polyps, outlined", f) for f in spread("Kvasir-SEG/images", columns)]
    cells += [("a video", f) for f in spread("unlabelled/video0000", columns)]
    cells += [("the second scope, landmarks as above", spread(f"scope2/{places[name]}", 1)[0]) for name in list(data.LANDMARKS)[:columns]]
    rows, high = -(-len(cells) // columns), size + 14
    page = Image.new("RGB", (columns * size, rows * high), "white")
    draw = ImageDraw.Draw(page)
    for i, (caption, file) in enumerate(cells):
        x, y = i % columns * size, i // columns * high
        if x == 0 or cells[i - 1][0] != caption:
            draw.text((x + 2, y + 1), caption, fill="black")
        frame = Image.open(file).convert("RGB")
        if "Kvasir-SEG" in file.parts:
            mask = Image.open(file.parents[1] / "masks" / file.name).convert("L").point(lambda v: 255 * (v > 127))
            frame.paste("white", mask=ImageChops.difference(mask, mask.filter(ImageFilter.MinFilter(5))))
        page.paste(frame.resize((size, size), Image.LANCZOS), (x, y + 14))
    page.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


# ---------------------------------------------------------------------------------------------------------------------
# One frame: its crops and masks


def crops(multicrop, frame, path):
    """Write a PNG of one frame: where its crops lie, each as it is cut and as the network sees it, and masks on the global ones."""
    frames, S = multicrop.frames, multicrop.sizes[0]
    batch = multicrop[[(0, 0, 0, frame)]]
    used = batch["index"].item()
    whole = data.read_image(frames.path(used))
    boxes, flips, _ = multicrop.draw(augment.stream(multicrop.seed, augment.CROPS, 0, frame), *whole.size)
    masks = augment.BlockMasks((S // 14, S // 14), 1, multicrop.seed)
    batch["masks"] = torch.from_numpy(np.stack([masks.one(0, view, share) for view, share in enumerate((0.22, 0.42))]))
    seen = augment.augment(batch, "cpu")
    cells = []  # per crop: (caption, as it is cut), (caption, as the network sees it)
    for kind in ("global", "local"):
        for cut, crop, colour in zip(batch[kind], seen[kind + "_crops"], batch[kind + "_colour"]):
            (top, left, h, w), flip = boxes[len(cells)], flips[len(cells)]
            crop = crop * torch.tensor(data.IMAGENET_STD).view(3, 1, 1) + torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)
            caption = f"{kind} {len(cells) + 1}\n{h}x{w} at {top},{left}" + "\nflipped" * bool(flip)
            cells.append(((caption, TF.to_pil_image(cut)), (recipe(colour), TF.to_pil_image(crop.clamp(0, 1)))))
    masked = [(f"masked\n{m.float().mean():.0%} of {len(m)} patches", hide(cell[1][1], m)) for m, cell in zip(batch["masks"], cells)]
    words = (f"{frames.name(used)}\n{whole.height}x{whole.width} pixels\n\nwhite: global crops\nyellow: local crops\n\n"
             "each as it is cut (height x width at top, left),\nthen as the network sees it, with what the\ncolour half did in its order")
    framed = outline(whole, boxes, S)
    legend = Image.new("RGB", framed.size, "white")
    ImageDraw.Draw(legend).text((0, 0), words, fill="black")
    rows = [[("frame", framed), *cells[0], masked[0]], [("", legend), *cells[1], masked[1]]]
    rows += [[cell[part] for cell in cells[2:]] for part in range(2)]
    page(rows).save(path)


def recipe(colour):
    """What drawn parameters (11,) do, one operation a line, in their order."""
    value = colour.tolist()
    words = [f"{('brightness', 'contrast', 'saturation', 'hue')[int(op)]} {value[int(op)]:.2f}"
             for op in value[4:8] if value[int(op)] != augment.IDENTITY[int(op)]]
    others = (("grayscale", augment.GRAYSCALE), (f"blur {value[augment.SIGMA]:.2f}", augment.SIGMA), ("solarize", augment.SOLARIZE))
    words += [word for word, column in others if value[column]]
    return "\n".join(words or ["no change"])


def outline(whole, boxes, height):
    """The frame at this height with its crops' boxes, the first two white."""
    scale = height / whole.height
    drawn = whole.resize((round(whole.width * scale), height), Image.Resampling.LANCZOS)
    for view, (top, left, h, w) in reversed(list(enumerate(boxes))):
        corners = [round(x * scale) for x in (left, top, left + w - 1, top + h - 1)]
        ImageDraw.Draw(drawn).rectangle(corners, outline="white" if view < 2 else "yellow", width=2 if view < 2 else 1)
    return drawn


def hide(crop, mask, patch=14):
    """The crop with its masked patches in one grey, as the mask token stands for all of them."""
    side = crop.width // patch
    grid = Image.fromarray(mask.view(side, side).numpy()).resize(crop.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", crop.size, (110, 110, 110)), crop, grid)


def page(rows, gap=14, line=12):
    """A white page of rows of (caption, image); every caption stands right above its image."""
    rows = [row for row in rows if row]
    heads = [line * max(caption.count("\n") + 1 for caption, _ in row) + 4 for row in rows]
    width = max(sum(image.width + gap for _, image in row) for row in rows) + gap
    height = sum(head + gap + max(image.height for _, image in row) for head, row in zip(heads, rows)) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), gap // 2
    for head, row in zip(heads, rows):
        x = gap
        for caption, image in row:
            draw.multiline_text((x, y + head - 4 - line * (caption.count("\n") + 1)), caption, fill="black", spacing=1)
            sheet.paste(image, (x, y + head))
            x += image.width + gap
        y += head + gap + max(image.height for _, image in row)
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# What a backbone sees


def principal_colours(tokens):
    """The three principal components of the tokens (n, D) as red, green and blue in [0, 1]: (n, 3). Like features, like colours."""
    tokens = tokens - tokens.mean(0)
    axes = torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -3:].flip(1)                 # (D, 3), the largest first
    components = tokens @ (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign())  # their sign is arbitrary: fix it
    low, high = components.quantile(torch.tensor([0.01, 0.99], device=tokens.device), dim=0)
    return ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def heat(attention):
    """Maps (..., h, w) -> (..., 3, h, w): black over red and yellow to white, from the weakest to the strongest hundredth of each map."""
    low, high = attention.flatten(-2).quantile(torch.tensor([0.01, 0.99], device=attention.device), dim=-1)[..., None, None]
    level = 3 * (attention - low) / (high - low).clamp(min=1e-12)
    return torch.stack([level, level - 1, level - 2], dim=-3).clamp(0, 1)


@torch.no_grad()
def tokens(model, paths, out, size=518, tile=280):
    """Write a PNG with one row per image: the image with its longer side at `size` px, its patch tokens' principal components
    (of all images together), and the class token's attention in the last block, averaged over the heads and of each head."""
    p, device, rows, seen = model.patch_size, model.pos_embed.device, [], []
    for path in paths:
        with Image.open(path) as picture:
            w, h = (max(round(side * size / max(picture.size) / p), 1) for side in picture.size)
            pixels = TF.to_image(picture.convert("RGB").resize((w * p, h * p), Image.Resampling.BICUBIC)) / 255     # (3, H, W)
        images = TF.normalize(pixels, data.IMAGENET_MEAN, data.IMAGENET_STD)[None].to(device)                # ImageNet's
        attention = vit.class_attention(model, images)[0].unflatten(-1, (h, w))                                         # (nh, h, w)
        side = math.ceil(math.sqrt(model.heads))
        heads = torch.cat([heat(attention), torch.ones(side**2 - model.heads, 3, h, w, device=device)])             # a square of maps
        rows.append([pixels, None, heat(attention.mean(0)), make_grid(heads, nrow=side, padding=1, pad_value=1)])
        seen.append(model(images)["patches"][0])                                                                  # (N, D)
    colours = principal_colours(torch.cat(seen)).split([len(t) for t in seen])
    titles = "image", "patch tokens: 3 principal components", "class token's attention: mean", f"... of each of {model.heads} heads"
    heights = [round((tile - 4) * row[0].shape[1] / max(row[0].shape[1:])) for row in rows]
    sheet = Image.new("RGB", (tile * len(titles), 16 + sum(heights) + 4 * len(rows)), "white")
    for x, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((tile * x + 4, 2), title, fill="black")
    for y, (row, colour, height) in enumerate(zip(rows, colours, heights)):
        H, W = row[0].shape[1:]
        row[1] = colour.T.unflatten(1, (H // p, W // p))                                                            # (3, h, w)
        for x, pixels in enumerate(row):
            picture = TF.to_pil_image(pixels.cpu()).resize((round(height * W / H), height), Image.Resampling.NEAREST if x else None)
            sheet.paste(picture, (tile * x + 2, 16 + sum(heights[:y]) + 4 * y))
    sheet.save(out)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def outlined(image, mask, colour, height=240):
    """The frame at `height` pixels with the border of a (H, W) mask drawn on it."""
    size = (round(image.width * height / image.height), height)
    area = Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    border = np.array(area.filter(ImageFilter.MaxFilter(3))) != np.array(area.filter(ImageFilter.MinFilter(3)))
    tile = np.array(image.resize(size, Image.Resampling.BICUBIC))
    tile[border] = colour
    return Image.fromarray(tile)


def panels(path, frames, masks, preds, dice, each=2):
    """Figure 3 as a PNG: frame, ground truth (cyan), prediction (yellow); the worst, the median and the best `each` by Dice."""
    order, middle = np.argsort(dice, kind="stable"), max(len(dice) - each, 0) // 2
    picks = dict.fromkeys([*order[:each], *order[middle : middle + each], *order[-each:]])
    rows = []
    for i in picks:
        image = data.read_image(frames[i])
        empty = torch.zeros_like(masks[i])
        tiles = [outlined(image, m, c) for m, c in ((empty, 0), (masks[i], (0, 255, 255)), (preds[i], (255, 230, 0)))]
        strip = Image.new("RGB", (sum(t.width + 4 for t in tiles), tiles[0].height + 16))
        for k, tile in enumerate(tiles):
            strip.paste(tile, (k * (tile.width + 4), 16))
        ImageDraw.Draw(strip).text((2, 2), f"Dice {dice[i]:.3f}   {pathlib.Path(frames[i]).stem}   frame | truth | prediction", fill="white")
        rows.append(strip)
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)))
    for r, top in zip(rows, np.cumsum([0] + [r.height for r in rows])):
        sheet.paste(r, (0, int(top)))
    sheet.save(path)


def overlay(image, mask=None, lines=(), note="not a medical device"):
    """A copy of a PIL image with what the heads say about it, as a new RGB image of its size.

    mask: (h, w) bool, array or tensor, stretched to the image; its border is drawn in yellow. lines: words for the top
    left, one a line. note: for the bottom right. Sizes follow the image's, so that a large frame stays readable."""
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    if mask is not None:
        area = Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(drawn.size, Image.Resampling.NEAREST)
        drawn.paste("#ffe600", mask=border(area, min(max(min(drawn.size) // 200, 1), 10)))
    draw, size = ImageDraw.Draw(drawn), max(min(drawn.size) // 24, 10)
    # White on a black rim is readable on mucosa, on a lamp's reflection and in the black corner alike
    style = dict(fill="white", stroke_fill="black", stroke_width=max(size // 8, 1), font=font(size))
    for row, words in enumerate(lines):
        draw.text((size // 2, size // 2 + row * size * 4 // 3), words, **style)
    draw.text((drawn.width - size // 2, drawn.height - size // 2), note, anchor="rd", **style)
    return drawn


def border(area, width):
    """The pixels of a mask (PIL, mode L, 0 or 255) that lie within `width` (up to 10) pixels of its outside, as such a mask."""
    # A box blur stays full exactly where the box holds no pixel of the outside, and its cost does not grow with the
    # box: 3 ms for 1,280 x 1,024 pixels, where Pillow's MinFilter takes a hundred
    inner = area.filter(ImageFilter.BoxBlur(width)).point(lambda value: 255 * (value == 255))
    return ImageChops.subtract(area, inner)


# ---------------------------------------------------------------------------------------------------------------------
# Curves and bars, drawn at twice the size and reduced, which smooths their edges

INK, GRID_INK, BLUE, ORANGE = "#222222", "#dddddd", "#1f5fa8", "#d1600a"
SCALE = 2


@functools.cache
def font(size):
    return ImageFont.load_default(size)  # it reads the font anew at every call


def text(draw, xy, words, size=15, anchor="mm", ink=INK):
    draw.text([SCALE * v for v in xy], words, fill=ink, font=font(SCALE * size), anchor=anchor)


def line(draw, points, ink=INK, width=1):
    draw.line([(SCALE * x, SCALE * y) for x, y in points], fill=ink, width=SCALE * width, joint="curve")


def ticks(low, high, most=6):
    """At most `most` round values (1, 2 or 5 times a power of ten apart) that lie in low..high."""
    rough = max(high - low, 1e-9) / most
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step + 0.0  # no -0


def axes(draw, box, x_range, y_range, label, x_words=None, y_words=None):
    """Frame, ticks and title of a panel in box (left, top, right, bottom), ticks at x_words {x: words} and y_words or at
    round numbers; returns the function (x, y) -> position.
    """
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
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width // SCALE, image.height // SCALE), Image.LANCZOS).save(path)
    print(f"figure: {path}")


def padded(values):
    """The range of the values with a tenth of room on both sides."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.1
    return low - room, high + room


def draw_curve(losses, online, exported, path, title):
    """Figure 1 as two panels over one step axis. Each argument: a list of (step, value)."""
    image, draw = canvas(820, 620)
    steps = 0, 1.02 * max(max(step for step, _ in losses + online + exported), 1)
    text(draw, (410, 22), title, size=18)
    place = axes(draw, (80, 80, 790, 290), steps, padded([v for _, v in losses]), "total pre-training loss")
    line(draw, [place(*p) for p in losses], BLUE, 2)
    place = axes(draw, (80, 350, 790, 560), steps, padded([v for _, v in online + exported]), "quadratic weighted kappa, validation groups")
    for points, ink, name, x in ((online, BLUE, "online probe", 520), (exported, ORANGE, "exported teachers", 645)):
        if points:
            line(draw, [place(*p) for p in points], ink, 2)
            for px, py in [place(*p) for p in points] + [(x - 8, 332)]:
                draw.ellipse([SCALE * (px - 4), SCALE * (py - 4), SCALE * (px + 4), SCALE * (py + 4)], fill=ink)
            text(draw, (x, 332), name, anchor="lm", ink=ink)
    text(draw, (435, 602), "step", size=16)
    save_figure(image, path)


def draw_bars(names, counts, path, title):
    """Figure 2: a bar for each name, with its count and its share."""
    image, draw = canvas(820, 520)
    text(draw, (410, 22), title, size=18)
    places = {i + 0.5: name for i, name in enumerate(names)}
    place = axes(draw, (90, 80, 790, 460), (0, len(names)), (0, 1.12 * max(*counts, 1)), "frames per class", places)
    for x, count in zip(places, counts):
        (left, top), (right, bottom) = place(x - 0.3, count), place(x + 0.3, 0)
        draw.rectangle([SCALE * left, SCALE * top, SCALE * right, SCALE * bottom], fill=BLUE)
        text(draw, ((left + right) / 2, top - 12), f"{count:,} ({count / sum(counts):.1%})")
    save_figure(image, path)


TRACK_INKS = "#1f5fa8", "#d1600a", "#2a8c4a", "#b0306a", "#7a5cc0", "#8a6d1a"


def timeline(path, title, times, tracks, seconds=True):
    """A PNG of what the heads say over one video: a panel for each track over one time axis.

    times: rising, one per frame; seconds, or frame numbers where `seconds` is False. tracks: a list of (name, values,
    classes). With classes None the values are numbers, drawn as a line from 0; else they are label numbers, and every
    stretch of one label is a bar in the row of its class. None or NaN, a frame that could not be read, leaves a gap."""
    times = np.asarray(times, float)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    span = times[0], times[-1] + step  # a frame stands until the next one
    heights = [24 * len(classes) if classes else 130 for _, _, classes in tracks]
    image, draw = canvas(1000, 84 + sum(height + 66 for height in heights))
    text(draw, (500, 20), title, size=18)
    top = 74
    for (name, values, classes), height in zip(tracks, heights):
        values = np.array([np.nan if value is None else value for value in values], float)
        known, box = values[~np.isnan(values)], (170, top, 970, top + height)
        if classes:  # the first class on top
            place = axes(draw, box, span, (len(classes) - 0.5, -0.5), name, clock(*span, seconds), dict(enumerate(classes)))
        else:
            low, high = known.min(initial=0), known.max(initial=0)
            place = axes(draw, box, span, (1.1 * low, 1.1 * high or 1), name, clock(*span, seconds))
        for frames in stretches(times, values, 4 * step, bool(classes)):
            label, ends = values[frames[0]], (times[frames[0]], times[frames[-1]] + step)
            if classes:
                (x0, y0), (x1, y1) = place(ends[0], label - 0.3), place(ends[1], label + 0.3)
                ink = TRACK_INKS[int(label) % len(TRACK_INKS)]
                draw.rectangle([SCALE * x0, SCALE * y0, SCALE * max(x1, x0 + 1), SCALE * y1], fill=ink)
            else:
                points = [place(times[i], values[i]) for i in frames]
                line(draw, [*points, place(ends[1], values[frames[-1]])], BLUE, 2)
        top += height + 66
    text(draw, (570, top - 10), "time (minutes:seconds)" if seconds else "frame", size=16)
    save_figure(image, path)


def clock(low, high, seconds):
    """Where to write which time: at most nine ticks {time: words}."""
    if not seconds:
        return {t: f"{t:,.0f}" for t in ticks(low, high, 9) if t == round(t)}
    step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800) if (high - low) / s < 9), 3600)
    return {t: f"{t // 60}:{t % 60:02d}" for t in range(math.ceil(low / step) * step, math.floor(high) + 1, step)}


def stretches(times, values, pause, same):
    """Runs of frame numbers (arrays) without a missing value and without `pause` seconds between two frames; of one
    value each where `same`."""
    missing = np.isnan(values)
    cut = missing[1:] | missing[:-1] | (np.diff(times) > pause)
    if same:
        cut |= values[1:] != values[:-1]
    runs = np.split(np.arange(len(values)), np.flatnonzero(cut) + 1)
    return [run for run in runs if not missing[run[0]]]
