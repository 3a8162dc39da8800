"""Polyp segmentation from frozen features: a linear, a boosted linear and a DPT head on every
checkpoint.

    python probe_segment.py                                      synthetic frames, random weights
    python probe_segment.py runs/demo/best.pt                    a checkpoint against random weights
    python probe_segment.py A.pt B.pt --data data/Kvasir-SEG     the official 880 / 120 frames
    python probe_segment.py A.pt --data data/PraNet --heads dpt  a row for each of five test sets
    python probe_segment.py A.pt --data FOLDER --shots 20        a head from twenty labelled frames

The backbone is never trained. Every training frame and its mirror image pass through it once;
their tokens stay on disk in float16, memory-mapped, so the heads are trained without any
augmentation but the mirror. A frame is stretched to a square of --size pixels, the logits are
stretched back to the mask's own size, and a pixel is polyp where their sigmoid exceeds 0.5. The
learning rate is chosen on validation frames; test frames are predicted once, at the end.
"""
import functools
import math
import pathlib
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import figures
from data import read_mask
from frozen import (Kept, backbones, batches, block_tokens, check_finite, head_path, kept_file,
                    one_sentence, read_batch, save_head)
from heads import DPTHead, LinearHead, blocks_of, new_polyp_head, resize  # noqa: F401
from results import (DRAWS, Measured, Tested, arguments, comparisons, differences, in_words,
                     interval_of, open_sets, precision_of, prepare, report)

HEADS = {"linear": "linear", "boosted": "boosted linear", "dpt": "DPT"}
# those that the validation frames choose from
LEARNING_RATES = {"linear": (1e-3, 1e-2), "boosted": (1e-3, 1e-2), "dpt": (2e-4, 1e-3)}
# of the linear head: few labels leave none to choose with, so the rate that all of them prefer
FEW_SHOT = dict(lr=1e-2)


# ---------------------------------------------------------------------------------------------
# Metrics


def dice_iou(pred, true):
    """Dice and IoU of one image, boolean (H, W): (1.0, 1.0) when both are empty, (0.0, 0.0) when
    one of them is."""
    pred, true = torch.as_tensor(pred), torch.as_tensor(true)
    if pred.shape != true.shape:
        raise ValueError(f"a prediction of {tuple(pred.shape)} pixels cannot be compared with a "
                         f"mask of {tuple(true.shape)}")
    overlap, union = (pred & true).sum().item(), (pred | true).sum().item()
    return (2 * overlap / (overlap + union), overlap / union) if union else (1.0, 1.0)


def pranet_dice_iou(probability, true):
    """Dice and IoU of one image as PraNet's evaluation reports them (2020): the means over 256
    thresholds.

    probability float (H, W) is stretched to 0..255 by its own minimum and maximum and rounded,
    as if saved to a PNG; the prediction at threshold t = 0..255 is {value >= t}. No overlap
    counts 0, also when the mask is empty (as in their code)."""
    low, high = probability.min(), probability.max()
    value = ((probability - low) / (high - low).clamp(min=1e-8) * 255).round().long()    # (H, W)

    def at_least(pixels):  # how many of them are >= t, for every t: (256,)
        return torch.bincount(value[pixels], minlength=256).flip(0).cumsum(0).flip(0).double()

    overlap, false_alarms, polyp = at_least(true), at_least(~true), true.sum()
    dice = 2 * overlap / (overlap + false_alarms + polyp).clamp(min=1)
    return dice.mean().item(), (overlap / (false_alarms + polyp).clamp(min=1)).mean().item()


class Score(NamedTuple):
    """One frame's numbers."""
    dice: float
    iou: float
    both: int           # pixels in prediction and truth
    either: int
    pranet_dice: float
    pranet_iou: float


def score(probability, true):
    """(Score, prediction) of a frame: probability float and true bool (H, W)."""
    pred = probability > 0.5
    both, either = (pred & true).sum().item(), (pred | true).sum().item()
    return Score(*dice_iou(pred, true), both, either, *pranet_dice_iou(probability, true)), pred


def summary(scores, groups, seed=0):
    """scores (n, 6), a Score a row -> the columns of a table's row; the interval draws
    groups."""
    dice, iou, both, either, pranet_dice, pranet_iou = np.asarray(scores, dtype=float).T
    interval = interval_of(measure(scores, groups), seed)
    numbers = {"Dice": dice.mean(), **interval, "IoU": iou.mean(),
               "dataset IoU": both.sum() / either.sum() if either.sum() else 1.0,
               "PraNet mDice (256 thresholds)": pranet_dice.mean(),
               "PraNet mIoU (256 thresholds)": pranet_iou.mean()}
    return {k: float(v) for k, v in numbers.items()}


def measure(scores, groups):
    """Mean Dice over any draw of the frames."""
    dice = np.asarray(scores, dtype=float)[:, 0]
    return Measured(groups, lambda draw: {"Dice": float(dice[draw].mean())})


# ---------------------------------------------------------------------------------------------
# Frozen tokens


@torch.no_grad()
def mirrored_tokens(model, paths, kind, size, mirror, dtype, batch=8):
    """Yield (b, 1 + mirror, L, 1 + N, D) float16: tokens of frames and, if `mirror`, of their
    mirror images."""
    (blocks, norm), device = blocks_of(kind, model.depth), next(model.parameters()).device
    read = functools.partial(read_batch, size=size, view="stretch")
    for images in batches(paths, read, batch, device):
        images = images.to(device)
        views = [images, images.flip(-1)][: 1 + mirror]
        tokens = [block_tokens(model, x, blocks, norm, dtype) for x in views]
        tokens = torch.stack(tokens, 1).half()
        check_finite(model, tokens)
        yield tokens.cpu()


def frozen_tokens(model, paths, kind, size, mirror, folder="features", dtype=torch.float32):
    """What mirrored_tokens gives, computed once and then read from disk: see frozen.Kept.

    Raises ValueError when the disk is too small."""
    blocks, norm = blocks_of(kind, model.depth)
    shape = (1 + mirror, len(blocks), 1 + (size // model.patch_size) ** 2, model.dim)
    compute = functools.partial(mirrored_tokens, model, kind=kind, size=size, mirror=mirror,
                                dtype=dtype)
    file = kept_file(folder, model, paths, f"tokens {blocks} {norm} {size} {mirror} {dtype}")
    return Kept(file, paths, compute, shape, "<f2")


# ---------------------------------------------------------------------------------------------
# Training and prediction


def logits(head, tokens, size, dtype=torch.float32):
    """(B, L, 1 + N, D) tokens of square images -> (B, *size) float32 logits.

    A head is small beside its backbone: its products are computed in bf16 on GPUs alone."""
    side = math.isqrt(tokens.shape[2] - 1)
    with torch.autocast("cuda", dtype, enabled=tokens.is_cuda and dtype == torch.bfloat16):
        low = head(tokens, (side, side))
    return resize(low.float(), size)


def segmentation_loss(logits, masks):
    """Binary cross-entropy per pixel plus soft Dice per image: (B, H, W) logits, (B, H, W) 0 or
    1 -> scalar.

    One logit with a sigmoid, since a softmax over two would have the same solutions. One pixel
    of smoothing defines empty masks."""
    p = logits.sigmoid()
    dice = (2 * (p * masks).sum((1, 2)) + 1) / (p.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()


def fit_head(head, tokens, masks, lr, steps=500, batch=16, seed=0, dtype=torch.float32):
    """Train a head in place: AdamW, linear warm-up and then linear decay to 0 (the "poly"
    schedule of power 1).

    tokens: n arrays (V, L, 1 + N, D), view 1 of V <= 2 being the mirror image; masks (n, S, S)
    bool tensor. Every step draws `batch` different frames, each as it is or mirrored. Leaves the
    head in evaluation mode and returns the last loss."""
    device, rng = next(head.parameters()).device, np.random.default_rng(seed)
    warmup = max(steps // 20, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    head.train()
    for _ in (bar := tqdm(range(steps), desc=f"head, lr {lr:g}", unit="step", disable=None)):
        frames = rng.choice(len(tokens), size=min(batch, len(tokens)), replace=False)
        views = rng.integers(len(tokens[0]), size=len(frames))
        x = np.stack([tokens[i][v] for i, v in zip(frames, views)])          # (B, L, 1 + N, D)
        y = [masks[i].flip(-1) if v else masks[i] for i, v in zip(frames, views)]
        x = torch.from_numpy(x).to(device).float()
        y = torch.stack(y).to(device).float()                                # (B, S, S)
        loss = segmentation_loss(logits(head, x, y.shape[1:], dtype), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    head.eval()
    return loss.item()


@torch.no_grad()
def frame_dice(head, tokens, masks, dtype=torch.float32):
    """(n,) Dice at 0.5 of frames, each at its mask's own size: tokens of n arrays
    (1, L, 1 + N, D), masks list of (H, W) bool."""
    device, dice = next(head.parameters()).device, []
    for x, mask in zip(tokens, masks):
        z = logits(head, torch.from_numpy(np.array(x)).to(device).float(), mask.shape, dtype)
        dice.append(dice_iou(z[0].cpu() > 0, mask)[0])
    return np.array(dice)


@torch.no_grad()
def predict(model, head, kind, image, shape, sizes, mirror=False, dtype=torch.float32):
    """Polyp probability (H, W) = shape of one PIL frame: the mean over square sizes and, if
    `mirror`, over its mirror image."""
    device, (blocks, norm), maps = next(head.parameters()).device, blocks_of(kind, model.depth), []
    for size in sizes:
        x = data.square(image, size, "stretch")[None].to(device)
        for flip in (False, True)[: 1 + mirror]:
            tokens = block_tokens(model, x.flip(-1) if flip else x, blocks, norm, dtype)
            p = logits(head, tokens.float(), shape, dtype)[0].sigmoid()
            maps.append(p.flip(-1) if flip else p)
    return torch.stack(maps).mean(0).cpu()


def prior(masks, val_masks):
    """The trivial answer, the same for every frame: where polyps were in training, cut where it
    scores best on validation.

    masks (n, S, S) bool, val_masks list of (H, W) -> (S, S) map that exceeds 0.5 in the chosen
    region."""
    mean = masks.float().mean(0)
    cuts = torch.linspace(0, 1, 21)[:-1] * mean.max()
    dice = [np.mean([dice_iou(resize(mean, m.shape) > cut, m)[0] for m in val_masks])
            for cut in cuts]
    return mean + 0.5 - cuts[int(np.argmax(dice))]


# ---------------------------------------------------------------------------------------------
# From heads to rows


def masks_of(labelled, rows, size=None):
    """The masks of these frames: a list at their own sizes, or with `size` one (n, S, S)
    tensor."""
    masks = [read_mask(labelled.masks[i], size) for i in rows]
    return masks if size is None else torch.stack(masks)


def tokens_of(args, model, kind, labelled, rows, mirror):
    return frozen_tokens(model, [labelled.paths[i] for i in rows], kind, args.sizes[kind], mirror,
                         args.features, precision_of(args))


def trained_head(args, model, kind, tokens, masks, lr, seed):
    """A new head, fitted; its first weights are drawn with --seed, its batches with `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        head = new_polyp_head(kind, model.dim, model.depth, args.dpt_channels).to(args.device)
    fit_head(head, tokens, masks, lr, args.steps, args.batch, seed, precision_of(args))
    return head


def choose_head(args, model, kind, labelled):
    """Train one head per learning rate on the training frames; returns the one that validation
    prefers, with its rate and Dice."""
    split = labelled.splits[0]
    train = tokens_of(args, model, kind, labelled, split.train, mirror=True)
    val = tokens_of(args, model, kind, labelled, split.val, mirror=False)
    masks = masks_of(labelled, split.train, args.sizes[kind])
    val_masks, trained = masks_of(labelled, split.val), []
    for lr in LEARNING_RATES[kind]:
        head = trained_head(args, model, kind, train, masks, lr, args.seed)
        found = frame_dice(head, val, val_masks, precision_of(args)).mean()
        trained.append((float(found), lr, head))
    dice, lr, head = max(trained, key=lambda t: t[0])
    return head, {"lr": lr, "validation Dice": dice}


def test_head(predicted, labelled, rows, path):
    """Score predicted(image, shape) -> probability on the test frames and draw the panels (no
    path, no panels): (n, 6), a Score a row."""
    scores, preds, masks = [], [], masks_of(labelled, rows)
    frames = [labelled.paths[i] for i in rows]
    for frame, mask in zip(tqdm(frames, desc="test", unit="frame", disable=None), masks):
        numbers, pred = score(predicted(data.read_image(frame), mask.shape), mask)
        scores.append(numbers)
        preds.append(pred)
    scores = np.array(scores)
    if path:
        figures.panels(path, frames, masks, preds, scores[:, 0])
    return scores


def panels_path(args, *words):
    slug = re.sub("[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    return args.json.with_name(f"{args.json.stem}.{slug}.png")


def result_row(args, about, tested, scores):
    groups = groups_of(tested)
    return ({"table": "results"} | about | {"tested on": tested.words}
            | summary(scores, groups, args.seed)
            | {"frames tested": len(groups), "groups tested": len(set(groups))})


def groups_of(tested):
    return np.asarray(tested.labelled.groups)[tested.rows[0]]


def evaluate(args, labelled, sets, models):
    """Every row of the tables: the trivial answer, every backbone's heads on every test set, the
    few-label table, the differences between backbones. Heads of checkpoints are written."""
    split, rows, measured = labelled.splits[0], [], {}
    train_masks = masks_of(labelled, split.train, 224)
    data.refuse_one_sided(train_masks, labelled.name)  # nothing for nothing would score 1.000
    where = prior(train_masks, masks_of(labelled, split.val))
    for tested in sets:
        scores = test_head(lambda image, shape: resize(where, shape), tested.labelled,
                           tested.rows[0], path=None)
        about = {"backbone": "mean training mask", "head": "none"}
        rows.append(result_row(args, about, tested, scores))
    for name, model in models:
        model.to(args.device)
        for kind in () if args.shots else args.heads:
            head, chosen = choose_head(args, model, kind, labelled)
            sizes = test_sizes(args, kind)
            predicted = functools.partial(predict, model, head, kind, sizes=sizes,
                                          mirror=kind == "boosted", dtype=precision_of(args))
            about = {"backbone": name, "head": HEADS[kind]}
            more = {"setting": f"lr {chosen['lr']:g}", "chosen on validation": chosen,
                    "test sizes": sizes, "step": model.info["step"]}
            of_head = []
            for tested in sets:
                panels = panels_path(args, name, HEADS[kind], tested.words)
                scores = test_head(predicted, tested.labelled, tested.rows[0], panels)
                measured[name, HEADS[kind], tested.words] = measure(scores, groups_of(tested))
                of_head.append(result_row(args, about, tested, scores) | more
                               | {"panels": panels.name})
            rows += of_head
            chosen = chosen | {"test sizes": sizes}
            save_polyp_head(args, name, model, kind, head, chosen, of_head[0])
        rows += few_shot(args, labelled, name, model)
        model.to("cpu")
    return rows + differences(measured, comparisons(args, models), args.seed)


def test_sizes(args, kind):
    scales = args.scales if kind == "boosted" else [1]
    return [round(args.sizes[kind] * scale / 14) * 14 for scale in scales]


def save_polyp_head(args, backbone, model, kind, head, setting, row):
    """Write a checkpoint's head; no random initialisation's. row: its numbers on test frames."""
    if backbone in args.checkpoints:
        test = {k: v for k, v in row.items() if isinstance(v, float)}
        save_head(head_path(args, backbone, "polyps", kind), model, head, task="polyps", head=kind,
                  classes=("polyp",), size=args.sizes[kind], view="stretch", setting=setting,
                  metrics={"validation": {"Dice": setting.get("validation Dice")}, "test": test})


def online_dice(args, model, labelled, frames=200):
    """A quick score that reads no test frame: mean Dice on the validation frames of split 0, of a
    linear head of fixed rate fitted on so many of its training frames, the same for every model."""
    split = labelled.splits[0]
    drawn = np.random.default_rng(args.seed).permutation(split.train)[:frames]
    return fixed_head_dice(args, model, labelled, drawn, split.val, mirror=False)


def fixed_head_dice(args, model, labelled, fit, score, mirror=True):
    """Mean Dice on the frames `score` of a linear head of fixed rate fitted on the frames `fit`,
    with `mirror` also on their mirror images."""
    head = fixed_head(args, model, labelled, fit, mirror)
    return float(head_dice(args, model, head, labelled, score).mean())


def fixed_head(args, model, labelled, fit, mirror=True):
    """A linear head of fixed rate, fitted on these frames."""
    tokens = tokens_of(args, model, "linear", labelled, fit, mirror)
    masks = masks_of(labelled, fit, args.sizes["linear"])
    return trained_head(args, model, "linear", tokens, masks, FEW_SHOT["lr"], args.seed)


def head_dice(args, model, head, labelled, rows):
    """(n,) Dice of a linear head on frames, from kept tokens."""
    tokens = tokens_of(args, model, "linear", labelled, rows, mirror=False)
    return frame_dice(head, tokens, masks_of(labelled, rows), precision_of(args))


def few_shot(args, labelled, backbone, model):
    """A row per number of --shots: mean Dice and its standard deviation over DRAWS draws of so
    many training frames, the linear head at a fixed rate. Larger draws contain the smaller ones,
    and every backbone gets the same."""
    if not args.shots:
        return []
    split, rows, size = labelled.splits[0], [], args.sizes["linear"]
    tokens = tokens_of(args, model, "linear", labelled, split.train, mirror=True)
    test = tokens_of(args, model, "linear", labelled, split.test, mirror=False)
    masks, test_masks = masks_of(labelled, split.train, size), masks_of(labelled, split.test)
    for shots in args.shots:
        dice = []
        for d in range(DRAWS):
            drawn = np.random.default_rng((args.seed, d)).permutation(len(split.train))[:shots]
            head = trained_head(args, model, "linear", [tokens[i] for i in drawn], masks[drawn],
                                FEW_SHOT["lr"], seed=d)
            dice.append(float(frame_dice(head, test, test_masks, precision_of(args)).mean()))
            if d == 0 and shots == args.shots[-1]:
                setting = FEW_SHOT | {"labelled frames": len(drawn)}
                save_polyp_head(args, backbone, model, "linear", head, setting, {"Dice": dice[0]})
        rows.append({"table": "few-shot", "backbone": backbone, "step": model.info["step"],
                     "head": "linear", "labelled frames": len(drawn), "draws": DRAWS,
                     "Dice": float(np.mean(dice)), "Dice sd": float(np.std(dice)),
                     "setting": in_words(FEW_SHOT, " (fixed)")})
    return rows


# ---------------------------------------------------------------------------------------------
# The command


def pranet_sets(root):
    """PraNet's five test sets. A Kvasir-SEG beside them would be no substitute: its training
    frames are among PraNet's test frames."""
    places = (pathlib.Path(root) / sub for sub in ("TestDataset", "data/TestDataset"))
    folder = next(place for place in places if place.is_dir())
    names = sorted(f.name for f in folder.iterdir() if f.is_dir())
    loaded = [data.load_pranet(root, name) for name in names]
    return [Tested(name, found, [found.splits[0].test]) for name, found in zip(names, loaded)]


def parse(argv):
    parser = arguments(__doc__, "polyps (Kvasir-SEG, PraNet's tree, a folder of images and masks)",
                       None, "; None: 518 on a GPU, 224 on a CPU")
    flag = parser.add_argument
    flag("--heads", nargs="+", choices=HEADS,
         help="which heads; None: all on a GPU, linear and boosted on a CPU")
    flag("--boosted-size", type=int,
         help="as --size, for the boosted head; None: 644 on a GPU, 336 on a CPU")
    flag("--scales", type=float, nargs="+", help="of the boosted head's size at test time; None: 1 "
         "1.32 1.73 on a GPU, 1 1.32 on a CPU")
    flag("--dpt-channels", type=int,
         help="width of the DPT head's fusion; None: 256 (DINOv2's) on a GPU, 64 on a CPU")
    flag("--steps", type=int, default=500,
         help="training steps of a head, for each learning rate tried")
    flag("--batch", type=int, default=16, help="frames per step")
    args = parser.parse_args(argv)
    cpu = torch.device(args.device).type == "cpu"
    for name, on_cpu, on_gpu in (("heads", ["linear", "boosted"], list(HEADS)), ("size", 224, 518),
                                 ("boosted_size", 336, 644), ("scales", [1, 1.32], [1, 1.32, 1.73]),
                                 ("dpt_channels", 64, 256)):
        if getattr(args, name) is None:
            setattr(args, name, on_cpu if cpu else on_gpu)
    if min(args.steps, args.batch) < 1 or args.dpt_channels < 2:
        raise SystemExit("--steps and --batch must be at least 1, --dpt-channels at least 2")
    args.sizes = {"linear": args.size, "boosted": args.boosted_size, "dpt": args.size}
    if args.boosted_size < 14 or args.boosted_size % 14:
        raise SystemExit(f"--boosted-size {args.boosted_size}: give a multiple of the patch size, "
                         "14 pixels")
    if min(test_sizes(args, "boosted")) < 14:
        raise SystemExit(f"--scales {min(args.scales):g}: {args.boosted_size} pixels times that "
                         "are less than a patch of 14")
    return args


METRIC = ("Dice and IoU: means over frames at threshold 0.5 and the mask's own size; dataset IoU: "
          "all frames' pixels together; PraNet: mean over 256 thresholds after stretching each "
          "prediction to 0..1")


def main(argv=None):
    args = parse(argv)
    prepare(args, "polyps")
    labelled, sets = open_sets(args, "polyps")
    if labelled.name.startswith("PraNet"):
        sets[:1] = pranet_sets(args.data)
    models = backbones(args)
    # so that a run repeats exactly on a GPU; enabled is False by default
    deterministic = torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False)
    with one_sentence(), deterministic:
        rows = evaluate(args, labelled, sets, models)
    about = {"metric": METRIC, "steps": args.steps, "batch": args.batch, "pixels": args.sizes,
             "view": "stretch"}
    return report(args, "Polyps", rows, labelled, sets, about)


if __name__ == "__main__":
    main()
