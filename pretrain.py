"""Pre-training: DINOv2 self-supervision on unlabelled endoscopy frames, from a folder of images
to a teacher.

    python pretrain.py --arch vitt14 --recipe demo       # a laptop: minutes, on synthetic frames
    torchrun --nproc-per-node gpu pretrain.py --arch vitb14 --data FRAMES   # a process per GPU, DDP
    torchrun ... pretrain.py --data FRAMES --recipe adapt --init dinov2_vitb14_pretrain.pth
    torchrun ... pretrain.py --data FRAMES --recipe scratch-long --arch vitg14 --shard       # FSDP2

A killed run goes on where it stopped when the same command is given again. The run folder
(runs/<arch>-<recipe>) holds args.json, log.jsonl, last.pt (everything needed to go on),
teacher_<step>.pt and best.pt (for the probes). Every random draw is a function of (seed, step,
process or frame), so the state of the random numbers is the step.
"""
import argparse
import contextlib
import datetime
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import augment
import data
import synthetic
import vit
from checkpoint import (Saver, anywhere, check_agreement, check_room, digest, keep_nonfinite,
                        on_rank_0, plain, reset_best, resume, run_folder, stored_size, together)
from dino import (DINOv2, answer, clip_gradients, cosine_schedule, everywhere,  # noqa: F401
                  make_schedules, param_groups, train_step)
from watch import OVERFLOWS, Log, measured_on, open_probe, probe

# --- recipes and flags -------------------------------------------------------------------------

# scratch and scratch-long are DINOv2's vitl16_short and vitl14/vitg14 configurations, except
# that local crops are 98 px (96 is no multiple of 14) and ViT-L keeps its MLP (the SwiGLU L of
# the long configuration was never released).
# adapt goes on from released weights with hundreds of steps of few frames: demo's values, and a
# backbone that learns at a twentieth of its new heads' rate. Chosen on validation frames among ten
# settings (docs/log.md). Meta's two-stage warm start (arXiv 2606.05107, FINO), for long runs with
# tens of thousands of prototypes: --lr 2e-4 --min-lr -1 --freeze-backbone 0.4 --backbone-ramp 0.04.
# demo is ours, for hundreds of frames and steps. With DINOv2's values so short a run never leaves
# the plateau where teacher and student are uniform: Sinkhorn spreads each of 2B rows over K / 2B
# prototypes, so K is small; the teacher is sharp and follows fast; the crops are large and keep
# their colour, so that two crops of one frame have something in common to be found.
# one-gpu lies between the two, for a card of 16 GB. Counted: 6.5 GiB for ViT-S and 13.5 for ViT-B,
# for which --checkpoint-activations is wise. Nobody has run it for more than twelve steps.
NAMES = "scratch", "scratch-long", "adapt", "one-gpu", "demo"
SHRINK_ON_CPU = "steps", "batch", "prototypes", "global_size", "local_size"  # to demo's values,
ON_CPU = {"demo": {}, "adapt": {"global_size": 112, "local_size": 56}}  # but in these recipes


def interval(text):
    """A number of steps as an int, or minutes as they are written: "10m"."""
    if float(text.removesuffix("m")) <= 0:
        raise ValueError
    return text if text.endswith("m") else int(text)


SHAPES = "frames", "optimisation", "losses"  # groups of flags that shape the training

ON, OFF = True, False
PAIR = (float, float)

# Every flag once: name, type or choices, default (a list: that of each recipe in NAMES), help.
# The parser, --help, its table of recipes and RECIPES are made from this. A checkpoint that is
# older than a flag goes on with the flag's default.
FLAGS = {
    "what to train": [
        ("arch", vit.ARCHS, "vitb14", "Vision Transformer; vitt14 is the small one for CPUs"),
        ("recipe", NAMES, None, "column of the table below: the default of many flags; if not "
         "given, scratch on a GPU and demo without one"),
        ("init", str, None, "warm start from a backbone: ours, released DINOv2 weights or their "
         "name (dinov2_vits14), or a DINOv2 training checkpoint (then with its heads, where they "
         "fit); its position embedding stays as it is stored. --recipe adapt is made for it"),
        ("seed", int, 0, "the run is a function of it, bit for bit on CPUs"),
    ],
    "frames": [
        ("data", str, None, "folder of frames (sub-folder = video) or manifest.csv of curate.py; "
         "without it synthetic frames are made and used"),
        ("frames", str, None, "file with the stems or paths to use, one a line: keep the test "
         "frames of your probes out"),
        ("workers", int, None, "processes per process that decode and crop; if not given, they "
         "share the cores with the threads that train. Each keeps two batches in shared memory "
         "(/dev/shm), of 34 MB at --batch 64 and DINOv2's crops: 8 workers want 550 MB, and a "
         "container has 64 MB if it is not told otherwise (docker run --shm-size=8g)"),
        ("global_size", int, [224, 224, 224, 224, 98],
         "px of the two global crops, a multiple of 14"),
        ("local_size", int, [98, 98, 98, 98, 42], "px of the local crops, a multiple of 14"),
        ("local_crops", int, [8, 8, 4, 6, 4], "local crops per frame; they cost most of a step"),
        ("global_scale", PAIR, [(0.32, 1.0), (0.32, 1.0), (0.5, 1.0), (0.32, 1.0), (0.5, 1.0)],
         "area of a global crop in the frame"),
        ("local_scale", PAIR, [(0.05, 0.32), (0.05, 0.32), (0.2, 0.6), (0.05, 0.32), (0.2, 0.6)],
         "area of a local crop in the frame"),
        ("blur", augment.BLUR, "as-executed", "DINOv2's released weights were trained with its "
         "blur's probabilities inverted: as-executed repeats that, as-written is the paper's"),
        ("hue", bool, [ON, ON, OFF, ON, OFF],
         "turn hues at random; colour is diagnostic in endoscopy, so try without"),
        ("grayscale", bool, [ON, ON, OFF, ON, OFF], "drop the colour of a fifth of the crops"),
        ("solarize", bool, [ON, ON, OFF, ON, OFF],
         "invert the light part of a fifth of the second global crops"),
        ("exact_decode", bool, OFF,
         "never let the JPEG decoder shrink a frame that is much larger than its crops"),
    ],
    "optimisation": [
        ("steps", int, [125_000, 625_000, 900, 50_000, 200],
         "length of the run and of all schedules; warm-ups are fractions of it"),
        ("batch", int, [64, 32, 32, 32, 32],
         "frames per process and step; Sinkhorn and KoLeo want many"),
        ("lr", float, [4e-3, 2e-4, 1.2e-2, 2e-3, 1.2e-2],
         "base rate for 1024 frames per step, scaled by sqrt(global batch / 1024)"),
        ("min_lr", float, 1e-6,
         "rate at the end of the cosine; -1 = constant after the warm-up"),
        ("warmup", float, [0.1, 0.16, 0.1, 0.1, 0.1],
         "fraction of the steps over which the rate rises from 0"),
        ("backbone_lr", float, [1.0, 1.0, 0.05, 1.0, 1.0],
         "rate of the backbone relative to that of the heads; a warm start that is short wants "
         "fast new heads on a backbone that moves little"),
        ("layerwise_decay", float, [0.9, 1.0, 0.9, 0.9, 1.0],
         "rate of each block relative to the block above; 1 = all alike"),
        ("patch_embed_lr", float, 0.2, "further factor on the patch embedding's rate"),
        ("weight_decay", float, 0.04, "at the first step"),
        ("weight_decay_end", float, [0.4, 0.2, 0.4, 0.4, 0.4], "at the last step"),
        ("momentum", float, [0.992, 0.994, 0.95, 0.99, 0.9],
         "of the teacher at the first step; 1 at the last. Lower it for short runs"),
        ("clip", float, 3.0, "largest gradient norm of each submodule"),
        ("drop_path", float, [0.3, 0.4, 0.0, 0.1, 0.0],
         "fraction of the frames that each residual branch leaves out"),
        ("freeze_last_layer", float, [0.01, 0.002, 0.01, 0.01, 0.01],
         "fraction of the steps in which the prototypes stay"),
        ("freeze_backbone", float, 0.0,
         "fraction of the steps in which the backbone stays"),
        ("backbone_ramp", float, 0.0,
         "fraction of the steps over which its rate then rises"),
    ],
    "losses": [
        ("prototypes", int, [65536, 131072, 256, 2048, 128],
         "K, outputs of each head; fewer for small batches"),
        ("head_hidden", int, 2048, "width of the heads' hidden layers"),
        ("bottleneck", int, [256, 384, 256, 256, 256],
         "width before the prototypes (DINO head; 256 in a separate iBOT head)"),
        ("separate_heads", bool, [OFF, ON, ON, ON, ON], "an iBOT head of its own"),
        ("centering", ("sinkhorn", "centering"),
         ["centering", "sinkhorn", "sinkhorn", "sinkhorn", "sinkhorn"],
         "how the teacher is kept from collapse"),
        ("teacher_temp", float, [0.07, 0.07, 0.03, 0.05, 0.03],
         "after its warm-up; lower is sharper"),
        ("teacher_temp_start", float, [0.04, 0.04, 0.02, 0.03, 0.02],
         "at the first step; too high and nothing is learnt, too low and it collapses"),
        ("temp_warmup", float, [0.3, 0.06, 0.3, 0.3, 0.3],
         "fraction of the steps over which the temperature rises"),
        ("koleo", float, [0.1, 0.1, 0.02, 0.05, 0.02],
         "weight of the term that spreads the class tokens; per process"),
    ],
    "run": [
        ("out", str, None, "run folder; runs/<arch>-<recipe> if not given"),
        ("resume", str, "auto", "auto = from last.pt in the run folder if there is one; no = "
         "begin anew; or a file"),
        ("save_every", interval, "10m",
         "time between two last.pt: minutes with an m, or a number of steps"),
        ("export_every", int, None, "steps between two teacher_<step>.pt; 0 = only at the end; if "
         "not given, 5000 or a fiftieth of --steps, whichever is more"),
        ("log_every", int, 10, "steps between two lines of log.jsonl"),
        ("verbose", bool, OFF, "print every argument at the start; args.json has them anyway"),
        ("max_skips", int, 0,
         "steps with a non-finite loss or gradient that are skipped before the run stops"),
        ("probe_every", int, 0,
         "steps between two scores of the teacher on labelled frames; 0 = never"),
        ("probe_data", str, None,
         "labelled frames in a layout that data.py knows; the synthetic Mayo set if not given"),
        ("probe_task", ("mes", "landmarks"), "mes",
         "what they show; best.pt has the best quadratic kappa or macro F1"),
    ],
    "machine": [
        ("device", ("auto", "cuda", "mps", "cpu"), "auto",
         "auto = a CUDA GPU if there is one; mps, an Apple GPU, was never run by the authors"),
        ("precision", ("auto", *vit.PRECISIONS), "auto", "number type of the matrix products; "
         "auto = bf16 where the hardware multiplies it, else fp16 on GPUs and fp32 on CPUs"),
        ("compile", bool, OFF, "torch.compile each block: a slow first step, then faster where "
         "matrix products are not most of a step"),
        ("shard", bool, OFF, "FSDP2 instead of DDP, for a model that does not fit one GPU"),
        ("checkpoint_activations", bool, OFF,
         "recompute blocks in the backward pass: a third slower, far less memory"),
    ],
}
ROWS = {row[0]: row for rows in FLAGS.values() for row in rows}
RECIPES = {recipe: {name: default[i] for name, _, default, _ in ROWS.values() if type(default) is list}
           for i, recipe in enumerate(NAMES)}


def defaults(recipe, device):
    """{flag: the value it has where it is not given}."""
    row = {name: default for name, _, default, _ in ROWS.values()} | RECIPES[recipe]
    if device == "cpu":
        row |= ON_CPU.get(recipe, {name: RECIPES["demo"][name] for name in SHRINK_ON_CPU})
    return row


def parse(argv=None):
    """The arguments of a run as a namespace, complete and checked."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=recipe_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, rows in FLAGS.items():
        box = parser.add_argument_group(title)
        for row in rows:
            add_flag(box, *row)
    return complete(parser, parser.parse_args(argv))


def add_flag(box, name, kind, default, help):
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif kind is PAIR:
        how = {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")}
    else:
        how = {"type": kind} if callable(kind) else {"choices": kind}
    if default is not None:
        help += f" (default: {'that of the recipe' if isinstance(default, list) else default})"
    box.add_argument(flag(name), default=argparse.SUPPRESS, help=help, **how)


def flag(name):
    return "--" + name.replace("_", "-")


def recipe_table():
    lines = ["recipes:", " " * 22 + "".join(f"{name:>14}" for name in NAMES)]
    for name in RECIPES["scratch"]:
        values = [recipe[name] for recipe in RECIPES.values()]
        cells = (" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
        lines.append(f"  {flag(name):<20}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, "", "ViT-L keeps its MLP in every recipe. Without a GPU "
                      + ", ".join(map(flag, SHRINK_ON_CPU))
                      + " default to demo's, and the crops of adapt to 112 and 56 px."])


def complete(parser, given):
    """Fill in what was not given: the device, the recipe, then what follows from them."""
    given = vars(given)
    device = given.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = given.get("recipe")
    if recipe is None:
        recipe = "demo" if device == "cpu" else "scratch"
        if os.environ.get("RANK", "0") == "0":
            print(f"no --recipe: {recipe}, which is made for "
                  + ("hundreds of steps on a CPU" if recipe == "demo" else "long runs on GPUs"))
    given |= {"device": device, "recipe": recipe}
    args = argparse.Namespace(**defaults(recipe, device) | given)
    gpu = device != "cpu"
    args.workers, args.threads = share_cores(cores(), gpu, threads_set(), args.workers)
    if args.export_every is None:
        args.export_every = max(5000, math.ceil(args.steps / 50))
    args.out = args.out or f"runs/{args.arch}-{recipe}"
    for name in ("global_size", "local_size"):
        size = getattr(args, name)
        if size % 14 or size < 28:
            parser.error(f"{flag(name)} {size}: crops are squares of 14 px patches, so a "
                         "multiple of 14 from 28 up")
    for name in ("steps", "batch", "local_crops", "prototypes", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"{flag(name)} must be at least 1")
    return args


# --- set-up ------------------------------------------------------------------------------------


def cores():
    """Cores of this process: those that its affinity allows, shared with the other processes that
    torchrun started here."""
    allowed = range(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    return max(1, len(allowed) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def threads_set():
    """OMP_NUM_THREADS, or None where it is not set to a number; torchrun sets it to 1 for
    several processes."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) else None


def share_cores(n, gpu=False, threads=None, workers=None):
    """How a process uses its n cores: (loader processes, threads that train); what is given
    stays.

    A core decodes several times what a core trains on a CPU, so from 4 cores on one in eight
    decodes, and below that the threads fetch their own batches. A GPU is fed by all
    cores but one, 8 at most."""
    if workers is None:
        most = 8 if gpu or threads else (n + 4) // 8
        workers = max(int(gpu), min(most, n - (threads or 1)))
    return workers, threads or max(1, n - workers)


def start(args):
    """Join the process group that torchrun announces, if it does: (device, rank, world size)."""
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"--device cuda: process {local_rank} of this machine has no GPU "
                             f"({torch.cuda.device_count()} found); start fewer processes or "
                             "use --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as DINOv2
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise SystemExit("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if args.device == "mps" and (world > 1 or args.shard):
        raise SystemExit("--device mps takes one process and no --shard")
    if world > 1 or args.shard:
        store = None if "RANK" in os.environ else dist.HashStore()
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, rank=rank, world_size=world, store=store,
                                timeout=datetime.timedelta(hours=2))  # rank 0's probe is long
    number_type(args, device)
    return device, rank, world


def number_type(args, device):
    """The torch.dtype of the matrix products. The hardware is asked once: the answer's name stays
    in args.number_type, and so in args.json and last.pt."""
    if "number_type" not in args:
        names = {dtype: name for name, dtype in vit.PRECISIONS.items()}
        args.number_type = names[vit.precision(device, args.precision)]
    return vit.PRECISIONS[args.number_type]


def open_frames(args, say):
    """The unlabelled frames; synthetic ones where no --data is given."""
    root = args.data
    if root is None:
        root = synthetic.ensure() / "unlabelled"
        say(f"no --data: training on the synthetic frames in {root}")
    try:
        frames = data.Frames(root, only=args.frames)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data {root}: {error}") from error
    args.n_frames = len(frames)  # a checkpoint knows which frames its sampler walked through
    args.frame_names = digest(frames.blob, frames.ends)
    return frames


def build_model(args, say):
    """Student and teacher on the CPU, the same in every process. The position embedding keeps
    the grid of --init's file, or of the run that goes on; a new one has a global crop's.
    `forward` interpolates it for crops of other sizes."""
    torch.manual_seed(args.seed)
    size, loaded = stored_size(args), None
    if args.init and not size:  # a run that goes on has its weights in last.pt
        try:
            loaded = vit.load_backbone(args.init)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--init: {error}") from error
        size = 14 * math.isqrt(loaded.pos_embed.shape[1] - 1)
    size = size or args.global_size
    backbone = vit.build_vit(args.arch, image_size=size, drop_path=args.drop_path)
    if loaded:
        try:
            vit.check_same_tensors(backbone.state_dict(), loaded.state_dict(),
                                   f"--arch {args.arch} --init {args.init}")
        except ValueError as error:
            raise SystemExit(f"--init: {error}") from error
        backbone.load_state_dict(loaded.state_dict())
    backbone.checkpoint_activations = args.checkpoint_activations
    model = DINOv2(backbone, n_prototypes=args.prototypes, hidden_dim=args.head_hidden,
                   bottleneck_dim=args.bottleneck, separate_ibot_head=args.separate_heads,
                   centering=args.centering, weights={"koleo": args.koleo})
    if loaded:
        load_heads(model, args.init, say)
    return model


def load_heads(model, path, say):
    """Take the file's heads into student and teacher where it has them and they fit; they stay
    new otherwise."""
    teacher = vit.read_checkpoint(path).get("teacher", {})
    for name in ("dino_head", "ibot_head"):
        prefix = name + "."
        state = {k.removeprefix(prefix): v for k, v in teacher.items() if k.startswith(prefix)}
        if not state or name not in model.student:
            continue
        try:
            vit.check_same_tensors(model.student[name].state_dict(), state, path)
        except ValueError as error:
            say(f"--init: a new {name}: {error}")
            continue
        model.student[name].load_state_dict(state)
        model.teacher[name].load_state_dict(state)
        say(f"--init: {name} taken from {path}")


def distribute(model, args, device, world):
    """Move to the device, compile and wrap: returns the callable for the forward pass."""
    model.to(device)
    if args.compile:
        check_compiler(device)
        for block in [*model.student["backbone"].blocks, *model.teacher["backbone"].blocks]:
            block.compile()
    if args.shard:
        return shard(model, number_type(args, device))
    if world > 1:
        devices = [device.index] if device.type == "cuda" else None
        # the centres are equal in all processes already: they are made from the rows of all
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model


def shard(model, dtype):
    """Split every tensor among the processes (FSDP2). What a block multiplies with is gathered in
    `dtype`, used, and thrown away until the backward pass gathers it again: autocast's own copies
    would stay from the forward to the backward pass, 2 bytes a weight. Norms and LayerScale, which
    are few, and the residual stream are float32, as is every sum of gradients."""
    products = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype,
                                    reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (model.student, model.teacher):
        for block in part["backbone"].blocks:
            fully_shard(block.attn, mp_policy=products)
            fully_shard(block.mlp, mp_policy=products)
            fully_shard(block)
        for name, head in part.items():
            if name != "backbone":
                fully_shard(head)
    return fully_shard(model)  # the rest: embeddings and final norms, so that packing needs no hook


def check_compiler(device):
    """On a CPU torch.compile writes C++: say at once where nothing can compile it."""
    usual = "clang++" if sys.platform == "darwin" else "g++"  # as torch._inductor.config
    compiler = os.environ.get("CXX") or usual
    if device.type == "cpu" and not shutil.which(compiler):
        raise SystemExit(f"--compile needs a C++ compiler on a CPU and {compiler} is not there: "
                         "install it, name another one in the environment variable CXX, or leave "
                         "--compile out")


def make_optimizer(model, args):
    groups = param_groups(model.student, args.layerwise_decay, args.patch_embed_lr)
    fused = args.device != "mps"  # fused, it takes the verdict on a step on the device
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=fused)


def make_scaler(args, device, state=None):
    """float16 ends at 6e-8, where most gradients lie: they are computed 2^16 times as large, and a
    little less or more from then on. Disabled where products are in other types."""
    scaler = torch.amp.GradScaler(device.type, enabled=number_type(args, device) == torch.float16)
    if state:
        scaler.load_state_dict(state)
    return scaler


def autocast_for(args, device):
    return vit.autocast(device, number_type(args, device))


def make_batches(args, frames, start, rank, world, device, seen=None, lifeline=None):
    """Batches of this process from step `start` on, before which `seen` frames were seen.
    lifeline: see augment.outlive_signals."""
    multicrop = augment.MultiCrop(
        frames, seed=args.seed, global_size=args.global_size, local_size=args.local_size,
        local_crops=args.local_crops, global_scale=tuple(args.global_scale),
        local_scale=tuple(args.local_scale), blur=args.blur, hue=args.hue,
        grayscale=args.grayscale, solarize=args.solarize, exact_decode=args.exact_decode)
    sampler = augment.EpochSampler(len(frames), args.batch, args.seed, rank, world, start,
                                   args.steps, seen)
    side = args.global_size // 14
    masks = augment.BlockMasks((side, side), args.batch * world, args.seed)
    pin = device.type == "cuda"
    return iter(augment.loader(multicrop, sampler, masks, args.workers, pin, lifeline))


def next_batch(batches, skipped, log, step, trouble):
    """The next batch, or None: after the last step, or where `trouble` says why there is none."""
    try:
        with log.waiting():
            raw = next(batches, None)
        if raw and (unreadable := skipped.update(raw)):
            log.write({"step": step, "unreadable": unreadable})
        return raw
    except SystemExit as end:  # too many unreadable frames
        trouble.append(end.code)
    except (OSError, data.BadImage) as error:  # a worker's error brings its traceback along
        trouble.append(str(error).rpartition(f"{type(error).__name__}: ")[2])
    except RuntimeError as error:
        if "shared memory" in str(error) or "No space left" in str(error):
            trouble.append(
                "the workers have no shared memory left for their batches (/dev/shm): give the "
                "container more (docker run --shm-size=8g), fewer --workers or a smaller --batch")
        elif "DataLoader worker" in str(error):
            trouble.append(f"a loader's worker died ({error}); if the machine was short of memory, "
                           "take fewer --workers")
        else:
            raise
    return None


# --- the run -----------------------------------------------------------------------------------


def main(argv=None):
    args, threads = parse(argv), torch.get_num_threads()
    device, rank, world = start(args)
    try:
        with asked_to_stop() as stop:
            run(args, device, rank, world, stop)
    except NotImplementedError as error:
        if device.type != "mps":
            raise
        raise SystemExit("--device mps: PyTorch lacks an operation there; PYTORCH_ENABLE_MPS_FALLBACK=1 "
                         f"computes it on the CPU, or use --device cpu: {error}") from error
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def asked_to_stop():
    """Names of the signals that ask for the end, as they come; the run then saves and ends. One
    request may come twice, to the whole group of processes and from torchrun. A second SIGINT
    ends at once, and so does any signal more than 5 s after the first."""
    asked, times = [], []

    def note(number, frame):
        asked.append(signal.Signals(number).name)
        times.append(time.monotonic())
        if asked.count("SIGINT") > 1 or times[-1] - times[0] > 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
    handlers = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class RunEnds(Exception):
    """A step showed that the run must not go on, to all processes alike."""


class Verdicts:
    """Whether each step was finite, and what follows: its line in the log, or what is kept of it.

    settle() may run in the middle of the next step, before its update. The state is then still
    the one between the two steps, and a GPU computes the next one's gradients meanwhile."""

    def __init__(self, model, optimizer, scaler, args, frames, progress, log, trouble):
        self.model, self.optimizer, self.scaler, self.args = model, optimizer, scaler, args
        self.frames, self.progress, self.log, self.trouble = frames, progress, log, trouble
        self.open = None  # the step that was made last, until its verdict has been read

    def add(self, index, now, terms, norms, finite):
        self.open = index, now, terms, norms, answer(finite)

    def settle(self):
        """Read the verdict on the open step, if one is, and move `progress` on; RunEnds if it is
        the end of the run."""
        if self.open is None:
            return
        (index, now, terms, norms, finite), self.open = self.open, None
        progress, scaler, step = self.progress, self.scaler, self.progress["step"]
        if finite():
            progress["overflows"] = 0
            self.log.step(step, terms, norms, now, self.model, scaler)
        elif scaler.is_enabled() and everywhere(terms["loss"].isfinite()):
            progress["overflows"] += 1
            self.log.overflow(step, progress["overflows"], scaler)
        else:
            progress["scaler"] = scaler.state_dict()
            paths = [self.frames.path(i) for i in index.tolist()]
            if keep_nonfinite(self.model, self.optimizer, progress, self.args, terms, norms, paths,
                              self.trouble):
                raise RunEnds  # before this step, which will be made again
        progress |= {"step": step + 1, "seen": progress["seen"] + progress["global_batch"]}
        if progress["overflows"] == OVERFLOWS:
            raise RunEnds


def reads_late(device):
    """Whether the verdict on a step is read while the next one is under way: a GPU would be idle
    from the question until it is given new work."""
    return device.type == "cuda"


def every(n, done, steps):
    """Whether what is due every n steps (0: never) and at the end is due after `done` of them."""
    return done == steps or n > 0 and done % n == 0


def run(args, device, rank, world, stop):
    """Train from the first step, or from the checkpoint's, to the last one, until a signal has
    filled `stop`, or until a process is in trouble. Whatever ends the run, all processes end
    together after the same step, and last.pt is written."""
    say = print if rank == 0 else lambda *words, **how: None
    trouble = []  # sentences: why this process cannot go on
    frames = together(lambda: open_frames(args, say))
    lifeline = reader, writer = multiprocessing.Pipe(duplex=False)  # closing it ends the workers
    with run_folder(args) as out, reader, writer:
        model = together(lambda: build_model(args, say))
        check_agreement(args, model)
        on_rank_0(lambda: check_room(args, model))
        wrapped = distribute(model, args, device, world)
        optimizer, autocast = make_optimizer(model, args), autocast_for(args, device)
        progress = resume(model, optimizer, args, args.batch * world, say,
                          defaults(args.recipe, args.device))
        scaler = make_scaler(args, device, progress["scaler"])
        schedules = make_schedules(args, args.batch * world)
        describe(args, model, frames, world, say)
        labelled = on_rank_0(lambda: open_probe(args, say))
        reset_best(progress, measured_on(args, labelled), say)
        batches = make_batches(args, frames, progress["step"], rank, world, device,
                               progress["seen"], lifeline)
        skipped, saver = augment.Skipped(frames, world), Saver(args, progress["step"], trouble)
        log = Log(out, args, progress, world, rank, trouble)
        verdicts = Verdicts(model, optimizer, scaler, args, frames, progress, log, trouble)
        late = reads_late(device)
        model.train()
        try:
            for step in range(progress["step"], args.steps + 1):  # once more after the last, to save
                raw = None if stop else next_batch(batches, skipped, log, step, trouble)
                stopping, failing, saving = anywhere(stop, trouble, saver.due(step))
                ending = stopping or failing or step == args.steps
                if saving or ending:
                    verdicts.settle()
                    saver.save(model, optimizer, progress | {"scaler": scaler.state_dict()})
                if ending:
                    break
                batch = augment.augment(raw, device)
                batch["kept"] = draw_kept(model, batch, args.seed, step, rank)
                now = {name: values[step] for name, values in schedules.items()}
                found = train_step(model, optimizer, batch, now, args.clip, autocast, wrapped,
                                   scaler, verdicts.settle)
                verdicts.add(raw["index"], now, *found)
                done = step + 1
                probing = args.probe_every and every(args.probe_every, done, args.steps)
                exporting = every(args.export_every, done, args.steps)
                if not late or log.due(step) or probing or exporting:
                    verdicts.settle()
                if probing:
                    metrics = probe(model, args, labelled, progress, device, trouble)
                    log.write({"step": step, "probe": metrics})
                if exporting:
                    saver.export(model, done)
        except RunEnds:  # after the last step that counts
            saver.save(model, optimizer, progress | {"scaler": scaler.state_dict()})

        del batches  # while their workers can still answer
        saver.wait()
        log.close()
        together(lambda: sys.exit(trouble[0] if trouble else None))
    if stopping and step < args.steps:
        say(f"{stop[0] if stop else 'a signal'}: stopped after step {step} of {args.steps}; the same "
            f"command goes on from {out / 'last.pt'}")
    elif step == args.steps:
        say(closing_words(out, args, log, frames.path(0)))


def closing_words(out, args, log, frame):
    """What a finished run made, how it went, and what comes next; frame: the path of one."""
    teacher, frame = out / f"teacher_{args.steps}.pt", shlex.quote(str(frame))
    went = f"; total loss {log.losses[0]:.3f} -> {log.losses[-1]:.3f}" if log.losses else ""
    unwell = f"; {len(log.warned)} warnings above" if log.warned else ""
    return (f"done: {teacher} is the backbone{went} (log.jsonl beside it){unwell}\n"
            f"next: python probe_segment.py {teacher} --heads linear   # what it is worth, and a head\n"
            f"      python vit.py {teacher} {frame} --show {out / 'tokens.png'}   # what it sees")


def describe(args, model, frames, world, say):
    """Print what will run, and where the numbers come from."""
    if args.device == "cpu" and args.recipe not in ON_CPU:
        say(f"no GPU: {', '.join(map(flag, SHRINK_ON_CPU))} default to those of --recipe demo. The "
            f"other values of {args.recipe} are made for long runs: so short a run shows that all "
            "works, and learns little; --recipe demo learns")
    if args.precision == "auto":
        say(f"--precision auto: matrix products in {args.number_type}, as this {args.device} "
            "multiplies in hardware")
    if args.compile and args.device == "cpu":
        say("--compile: the blocks are compiled in the first two steps, which takes a quarter of a "
            "minute and more; the next run of the same sizes finds them compiled")
    n = args.batch * world
    backbone = sum(p.numel() for p in model.student["backbone"].parameters())
    everything = sum(p.numel() for p in model.student.parameters())
    say(f"{args.arch}, recipe {args.recipe}, seed {args.seed}, on {args.device} in "
        f"{args.number_type}: {backbone:,} parameters, {everything:,} with the heads\n"
        f"{len(frames):,} frames of {args.data or 'the synthetic set'}; of each 2 crops of "
        f"{args.global_size} px and {args.local_crops} of {args.local_size} px\n"
        f"{args.steps:,} steps of {n} frames ({world} x {args.batch}) = "
        f"{args.steps * n / len(frames):.1f} epochs\n"
        f"peak learning rate {args.lr * math.sqrt(n / 1024):.3g} = --lr {args.lr:g} * "
        f"sqrt({n} / 1024)")
    if others := other_than_usual(args):
        say(f"other than usual in {args.recipe}: {', '.join(others)}")
    if args.verbose:
        say("\n".join(f"  {k:20} {v}" for k, v in sorted(plain(args).items())))


def other_than_usual(args):
    """["--steps 100 (200)", "--no-hue", ...]: what shapes the training and is not as the recipe
    has it on this device."""
    usual, found = defaults(args.recipe, args.device), []
    for name, kind, *_ in (row for title in SHAPES for row in FLAGS[title]):
        value, before = getattr(args, name), usual[name]
        if kind is PAIR:
            value, before = (" ".join(map(str, pair)) for pair in (value, before))
        if before is None or value == before:
            continue
        found.append((flag(name) if value else flag(f"no_{name}")) if kind is bool else
                     f"{flag(name)} {value} ({before})")
    return found


def draw_kept(model, batch, seed, step, rank):
    """The samples that stochastic depth keeps at this step in this process, drawn on the CPU."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> 1))
    counts = [len(batch["global_crops"]), len(batch["local_crops"])]
    kept = model.student["backbone"].draw_kept(counts, generator)
    return kept and [k.to(batch["masks"].device, non_blocking=True) for k in kept]


if __name__ == "__main__":
    main()
