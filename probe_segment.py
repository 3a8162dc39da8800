"""Polyp segmentation from frozen features: a linear, a boosted linear and a DPT head on every checkpoint.

    python probe_segment.py                                              synthetic frames, tested on the same and on a second scope
    python probe_segment.py runs/demo/best.pt                            the same with a checkpoint, against random initialisation
    python probe_segment.py A.pt B.pt --data data/Kvasir-SEG             the official 880 / 120 frames
    python probe_segment.py A.pt --data data/PraNet --heads dpt          TrainDataset / TestDataset/*: a row per test set

The backbone is never trained. Every training frame and its mirror image pass through it once; their tokens stay on disk in
float16, memory-mapped, so the heads are trained without any augmentation but the mirror. A frame is stretched to a square of
--size pixels, the logits are stretched back to the mask's own size, and a pixel is polyp where their sigmoid exceeds 0.5.
The learning rate is chosen on validation frames; test frames are predicted once, at the end.
"""
import functools
import math
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import figures
from frozen import (Kept, architecture, arguments, backbones, batches, block_tokens, bootstrap_interval,
                    check_finite, head_path, kept_file, markdown_table, one_sentence, open_sets,
                    precision_of, precision_words, read_batch, save_head, write_rows)
from heads import DPTHead, LinearHead, blocks_of, new_polyp_head, resize

HEADS = {"linear": "linear", "boosted": "boosted linear", "dpt": "DPT"}
LEARNING_RATES = {"linear": (1e-3, 1e-2), "boosted": (1e-3, 1e-2), "dpt": (2e-4, 1e-3)}  # the validation frames choose


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def dice_iou(pred, true):
    """Dice and IoU of one image, boolean (H, W): (1.0, 1.0) when both are empty, (0.0, 0.0) when one of them is."""
    pred, true = torch.as_tensor(pred), torch.as_tensor(true)
    if pred.shape != true.shape:
        raise ValueError(f"a prediction of {tuple(pred.shape)} pixels cannot be compared with a mask of {tuple(true.shape)}")
    overlap, union = (pred & true).sum().item(), (pred | true).sum().item()
    return (2 * overlap / (overlap + union), overlap / union) if union else (1.0, 1.0)


def pranet_dice_iou(probability, true):
    """Dice and IoU of one image as PraNet's evaluation reports them (2020): the means over 256 thresholds.

    probability float (H, W) is stretched to 0..255 by its own minimum and maximum and rounded, as if saved to a PNG; the
    prediction at threshold t = 0..255 is {value >= t}. No overlap counts 0, also when the mask is empty (as in their code).
    """
    low, high = probability.min(), probability.max()
    value = ((probability - low) / (high - low).clamp(min=1e-8) * 255).round().long()                 # (H, W) 0..255
    at_least = [torch.bincount(value[m], minlength=256).flip(0).cumsum(0).flip(0).double() for m in (true, ~true)]
    overlap, false_alarms = at_least                                                                  # (256,) pixels >= t
    dice = 2 * overlap / (overlap + false_alarms + true.sum()).clamp(min=1)
    return dice.mean().item(), (overlap / (false_alarms + true.sum()).clamp(min=1)).mean().item()


def logits(head, tokens, size, dtype=torch.float32):
    """(B, L, 1 + N, D) tokens of square images -> (B, *size) float32 logits.

    A head is small beside its backbone: its products are computed in bf16 on GPUs alone."""
    side = math.isqrt(tokens.shape[2] - 1)
    with torch.autocast("cuda", dtype, enabled=tokens.is_cuda and dtype == torch.bfloat16):
        low = head(tokens, (side, side))
    return resize(low.float(), size)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen tokens


@torch.no_grad()
def mirrored_tokens(model, paths, kind, size, mirror, dtype, batch=8):
    """Yield (b, 1 + mirror, L, 1 + N, D) float16: tokens of frames and, if `mirror`, of their
    mirror images."""
    (blocks, norm), device = blocks_of(kind, model.depth), next(model.parameters()).device
    read = functools.partial(read_batch, size=size, view="stretch")
    for images in batches(paths, read, batch, device):
        views = [images, images.flip(-1)][: 1 + mirror]
        tokens = [block_tokens(model, x.to(device), blocks, norm, dtype).cpu() for x in views]
        tokens = torch.stack(tokens, 1).half()
        check_finite(model, tokens)
        yield tokens


def frozen_tokens(model, paths, kind, size, mirror, folder="features", dtype=torch.float32):
    """What mirrored_tokens gives, computed once and then read from disk: see frozen.Kept.

    Raises ValueError when the disk is too small."""
    blocks, norm = blocks_of(kind, model.depth)
    shape = (1 + mirror, len(blocks), 1 + (size // model.patch_size) ** 2, model.dim)
    compute = functools.partial(mirrored_tokens, model, kind=kind, size=size, mirror=mirror, dtype=dtype)
    file = kept_file(folder, model, paths, f"tokens {blocks} {norm} {size} {mirror} {dtype}")
    return Kept(file, paths, compute, shape, "<f2")


# ---------------------------------------------------------------------------------------------------------------------
# Training and prediction


def read_mask(path, size=None):
    """(H, W) bool tensor; with `size`, shrunk to that square (see data.read_mask for how masks may be saved)."""
    return data.read_mask(path, size)


def segmentation_loss(logits, masks):
    """Binary cross-entropy per pixel plus soft Dice per image: (B, H, W) logits, (B, H, W) 0 or 1 -> scalar.

    One logit with a sigmoid, since a softmax over two would have the same solutions. One pixel of smoothing defines empty masks."""
    p = logits.sigmoid()
    dice = (2 * (p * masks).sum((1, 2)) + 1) / (p.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()


def fit_head(head, tokens, masks, lr, steps=500, batch=16, seed=0, dtype=torch.float32):
    """Train a head in place: AdamW, linear warm-up and then linear decay to 0 (the "poly" schedule of power 1).

    tokens (n, V, L, 1 + N, D) array, view 1 of V <= 2 being the mirror image; masks (n, S, S) bool tensor. Every step draws
    `batch` different frames, each as it is or mirrored. Leaves the head in evaluation mode and returns the last loss."""
    device, rng, warmup = next(head.parameters()).device, np.random.default_rng(seed), max(steps // 20, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    head.train()
    for _ in (bar := tqdm(range(steps), desc=f"head, lr {lr:g}", unit="step", disable=None)):
        frames = rng.choice(len(tokens), size=min(batch, len(tokens)), replace=False)
        views = rng.integers(tokens.shape[1], size=len(frames))
        x = torch.from_numpy(np.stack([tokens[i][v] for i, v in zip(frames, views)])).to(device).float()       # (B, L, 1 + N, D)
        y = torch.stack([masks[i].flip(-1) if v else masks[i] for i, v in zip(frames, views)]).to(device).float()  # (B, S, S)
        loss = segmentation_loss(logits(head, x, y.shape[1:], dtype), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    head.eval()
    return loss.item()


@torch.no_grad()
def validate(head, tokens, masks, dtype=torch.float32):
    """Mean Dice at 0.5 over frames, each at its mask's own size: tokens (n, 1, L, 1 + N, D) array, masks list of (H, W) bool."""
    device = next(head.parameters()).device
    maps = [logits(head, torch.from_numpy(np.array(t)).to(device).float(), m.shape, dtype)[0].cpu() for t, m in zip(tokens, masks)]
    return float(np.mean([dice_iou(z > 0, m)[0] for z, m in zip(maps, masks)]))


@torch.no_grad()
def predict(model, head, kind, image, shape, sizes, mirror=False, dtype=torch.float32):
    """Polyp probability (H, W) = shape of one PIL frame: the mean over square sizes and, if `mirror`, over its mirror image."""
    device, (blocks, norm), maps = next(head.parameters()).device, blocks_of(kind, model.depth), []
    for size in sizes:
        x = data.square(image, size, "stretch")[None].to(device)
        for flip in (False, True)[: 1 + mirror]:
            tokens = block_tokens(model, x.flip(-1) if flip else x, blocks, norm, dtype)
            p = logits(head, tokens.float(), shape, dtype)[0].sigmoid()
            maps.append(p.flip(-1) if flip else p)
    return torch.stack(maps).mean(0).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Results


def score(probability, true):
    """One frame's numbers: Dice, IoU, pixels in both, pixels in either, PraNet's mean Dice and mean IoU; and its prediction."""
    pred = probability > 0.5
    return (*dice_iou(pred, true), (pred & true).sum().item(), (pred | true).sum().item(), *pranet_dice_iou(probability, true)), pred


def summary(scores, groups, seed=0):
    """scores (n, 6) of `score` -> the columns of a row; the interval draws whole groups."""
    dice, iou, both, either, pranet_dice, pranet_iou = np.asarray(scores, dtype=float).T
    low, high = bootstrap_interval(lambda draw: dice[draw].mean(), groups, seed=seed)
    numbers = {"Dice": dice.mean(), "Dice low": low, "Dice high": high, "IoU": iou.mean(),
               "dataset IoU": both.sum() / either.sum() if either.sum() else 1.0,
               "PraNet mDice (256 thresholds)": pranet_dice.mean(), "PraNet mIoU (256 thresholds)": pranet_iou.mean()}
    return {k: float(v) for k, v in numbers.items()}


def prior(masks, val_masks):
    """The trivial answer, the same for every frame: where polyps were in training, cut where it scores best on validation.

    masks (n, S, S) bool, val_masks list of (H, W) -> (S, S) map that exceeds 0.5 in the chosen region."""
    mean = masks.float().mean(0)
    cuts = torch.linspace(0, 1, 21)[:-1] * mean.max()
    dice = [np.mean([dice_iou(resize(mean, m.shape) > cut, m)[0] for m in val_masks]) for cut in cuts]
    return mean + 0.5 - cuts[int(np.argmax(dice))]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_sets(args, labelled, other):
    """[(words for the table, labelled set, rows of its test frames)]: --data's own, each of PraNet's five, all of --generalise."""
    sets = [("same data", labelled, labelled.splits[0].test)]
    if labelled.name.startswith("PraNet"):  # a Kvasir-SEG beside it is no substitute: its training frames are among PraNet's test frames
        folder = next(f for f in (pathlib.Path(args.data) / sub for sub in ("TestDataset", "data/TestDataset")) if f.is_dir())
        loaded = {f.name: data.load_pranet(args.data, f.name) for f in sorted(folder.iterdir()) if f.is_dir()}
        sets = [(name, test_set, test_set.splits[0].test) for name, test_set in loaded.items()]
    return sets + ([("unrelated data", other, np.arange(len(other.paths)))] if other else [])


def choose_head(args, model, kind, labelled):
    """Train one head per learning rate on the training frames; returns the one that validation prefers, its rate and Dice."""
    size, split, device, dtype = args.sizes[kind], labelled.splits[0], torch.device(args.device), precision_of(args)
    train, val = (frozen_tokens(model, [labelled.paths[i] for i in rows], kind, size, mirror, args.features, dtype)
                  for rows, mirror in ((split.train, True), (split.val, False)))
    masks = torch.stack([read_mask(labelled.masks[i], size) for i in split.train])
    val_masks = [read_mask(labelled.masks[i]) for i in split.val]
    trained = []
    for lr in LEARNING_RATES[kind]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            head = new_polyp_head(kind, model.dim, model.depth, args.dpt_channels).to(device)
        fit_head(head, train, masks, lr, args.steps, args.batch, args.seed, dtype)
        trained.append((validate(head, val, val_masks, dtype), lr, head))
    dice, lr, head = max(trained, key=lambda t: t[0])
    return head, {"lr": lr, "validation Dice": dice}


def test_head(predicted, test_set, rows, path):
    """Score predicted(image, shape) -> probability on the test frames and draw the panels (no path, no panels): (n, 6)."""
    scores, preds, masks = [], [], [read_mask(test_set.masks[i]) for i in rows]
    frames = [test_set.paths[i] for i in rows]
    for frame, mask in zip(tqdm(frames, desc="test", unit="frame", disable=None), masks):
        numbers, pred = score(predicted(data.read_image(frame), mask.shape), mask)
        scores.append(numbers)
        preds.append(pred)
    scores = np.array(scores)
    if path:
        figures.panels(path, frames, masks, preds, scores[:, 0])
    return scores


def evaluate(args, labelled, sets, base):
    """The rows of both tables: every backbone, head and test set, then each checkpoint minus random initialisation."""
    rows, scores, arch_of = [], {}, {}

    def test(name, head, predicted, about, draw=True):
        for words, test_set, chosen in sets:
            slug = re.sub("[^a-z0-9]+", "-", f"{name} {head} {words}".lower()).strip("-")
            path = base.with_name(f"{base.stem}.{slug}.png") if draw else None
            scores[name, head, words] = s = test_head(predicted, test_set, chosen, path)
            groups = [test_set.groups[i] for i in chosen]
            rows.append({"table": "results", "backbone": name, "head": head, "tested on": words} | summary(s, groups, args.seed) | about
                        | {"frames tested": len(groups), "groups tested": len(set(groups)), "panels": path and path.name})

    split = labelled.splits[0]
    train_masks = torch.stack([read_mask(labelled.masks[i], 224) for i in split.train])
    data.refuse_one_sided(train_masks, labelled.name)  # a mean training mask of nothing would score 1.000
    where = prior(train_masks, [read_mask(labelled.masks[i]) for i in split.val])
    test("mean training mask", "none", lambda image, shape: resize(where, shape), {}, draw=False)
    for name, model in backbones(args.checkpoints, args.device, args.seed):
        arch_of[name] = architecture(model)
        for kind in args.heads:
            head, chosen = choose_head(args, model, kind, labelled)
            sizes = [round(args.sizes[kind] * s / 14) * 14 for s in (args.scales if kind == "boosted" else [1])]
            test(name, HEADS[kind], lambda image, shape: predict(model, head, kind, image, shape, sizes, kind == "boosted", precision_of(args)),
                 {"chosen on validation": chosen, "test sizes": sizes, "step": model.info["step"]})
            if name in map(str, args.checkpoints):
                tested = {k: v for k, v in next(r for r in reversed(rows) if r["tested on"] == sets[0][0]).items() if isinstance(v, float)}
                save_head(head_path(args, name, "polyps", kind), model, head, task="polyps", head=kind, classes=labelled.classes,
                          size=args.sizes[kind], view="stretch", setting=chosen | {"test sizes": sizes},
                          metrics={"validation": {"Dice": chosen["validation Dice"]}, "test": tested})
    pairs = [(str(c), f"random initialisation ({arch_of[str(c)]})") for c in args.checkpoints]
    return rows + differences(scores, pairs, sets, args.seed)


def differences(scores, pairs, sets, seed):
    """Mean Dice of each checkpoint minus its random initialisation's: the same groups are drawn for both (paired bootstrap)."""
    rows = []
    for name, random in pairs:
        for head, (words, test_set, chosen) in ((h, s) for b, h, w in scores if b == name for s in sets if s[0] == w):
            gain = scores[name, head, words][:, 0] - scores[random, head, words][:, 0]
            low, high = bootstrap_interval(lambda draw: gain[draw].mean(), [test_set.groups[i] for i in chosen], seed=seed)
            rows.append({"table": "difference", "backbone": name, "minus": random, "head": head, "tested on": words,
                         "Dice": float(gain.mean()), "Dice low": float(low), "Dice high": float(high)})
    return rows


def parse(argv):
    parser = arguments(__doc__, "polyps (Kvasir-SEG, or PraNet's tree)", None, "; None: 518 on a GPU, 224 on a CPU")
    parser.add_argument("--heads", nargs="+", choices=HEADS, help="which heads; None: all on a GPU, linear and boosted on a CPU")
    parser.add_argument("--boosted-size", type=int, help="as --size, for the boosted head; None: 644 on a GPU, 336 on a CPU")
    parser.add_argument("--scales", type=float, nargs="+", help="of the boosted head's size at test time; None: 1 1.32 1.73 on a GPU, 1 1.32 on a CPU")
    parser.add_argument("--dpt-channels", type=int, help="width of the DPT head's fusion; None: 256 (DINOv2's) on a GPU, 64 on a CPU")
    parser.add_argument("--steps", type=int, default=500, help="training steps of a head, for each learning rate tried")
    parser.add_argument("--batch", type=int, default=16, help="frames per step")
    args = parser.parse_args(argv)
    cpu = torch.device(args.device).type == "cpu"
    args.heads = args.heads or (["linear", "boosted"] if cpu else list(HEADS))
    args.size, args.boosted_size = args.size or (224 if cpu else 518), args.boosted_size or (336 if cpu else 644)
    args.scales = args.scales or ([1, 1.32] if cpu else [1, 1.32, 1.73])
    args.dpt_channels = args.dpt_channels or (64 if cpu else 256)
    if min(args.steps, args.batch) < 1 or args.dpt_channels < 2:
        raise SystemExit("--steps and --batch must be at least 1, --dpt-channels at least 2")
    args.sizes = {"linear": args.size, "boosted": args.boosted_size, "dpt": args.size}
    for flag in ("size", "boosted_size"):
        if getattr(args, flag) < 14 or getattr(args, flag) % 14:
            raise SystemExit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a multiple of the patch size, 14 pixels")
    return args


def main(argv=None):
    args = parse(argv)
    labelled, other = open_sets(args, "polyps")
    first = pathlib.Path(args.checkpoints[0]) if args.checkpoints else pathlib.Path("runs/random.pt")
    path = pathlib.Path(args.out or first.with_suffix(".polyps.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_sentence(), torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):  # enabled is False by default
        rows = evaluate(args, labelled, test_sets(args, labelled, other), path)
    split = labelled.splits[0]
    about = {"data": labelled.name, "unrelated data": other and f"{other.name}, all {len(other.paths)} frames",
             "split": f"{len(split.train)} training, {len(split.val)} validation, {len(split.test)} test frames",
             "metric": "Dice and IoU: means over frames at threshold 0.5 and the mask's own size; dataset IoU: all frames' pixels together; "
             "PraNet: mean over 256 thresholds after stretching each prediction to 0..1", "steps": args.steps, "batch": args.batch,
             "pixels": args.sizes, "precision": precision_words(args), "seed": args.seed, "paper value": "not available"}
    rows = [row | about for row in rows]
    print("\n## Polyps\n\n" + "\n".join(f"* {k}: {v}" for k, v in about.items() if v is not None))
    for table, title in (("results", "Results"), ("difference", "Checkpoint minus random initialisation, 95 % interval over groups")):
        if chosen := [row for row in rows if row["table"] == table]:
            print(f"\n### {title}\n\n{markdown_table(chosen, hidden={'table', 'step', 'panels', *about})}")
    write_rows(rows, path)
    print(f"\nrows: {path}; panels beside them")
    return rows


if __name__ == "__main__":
    main()
