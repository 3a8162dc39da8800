"""Every performance number that the README quotes.

    python bench.py model            images/s and FLOP/s of each architecture
    python bench.py --help           the other sub-commands

Candidates of one table run in turn (A B A B ...) in one process; the median is printed, so a
ratio holds when the machine's speed drifts. Peak memory is what a call needs beyond what was held.
"""
import argparse
import contextlib
import functools
import itertools
import math
import os
import pathlib
import statistics
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

import augment
import clusters
import curate
import dino
import dino_loss
import frozen
import predict
import pretrain
import synthetic
import vit
from checkpoint import Saver
from custom_kernels import bench_attention as attention_benchmark
from custom_kernels import bench_prototype_loss as loss_benchmark
from custom_kernels import say_once
from custom_kernels.timing import peak_bytes, resident, seconds, synchronize, table
from data import Frames, decode, opened, read_image
from heads import LinearHead, Ordinal, Softmax

COMMANDS = {}  # name -> function(argv); the docstring's first line is the help


def command(fn):
    COMMANDS[fn.__name__.removeprefix("bench_")] = fn
    return fn


def short(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def flags_of(name, **how):
    """The parser of one sub-command."""
    return argparse.ArgumentParser(prog=f"bench.py {name}", **dict(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter) | how)


@command
def bench_model(argv):
    """images/s and FLOP/s of each architecture; packed multi-crop against separate calls."""
    cuda = torch.cuda.is_available()
    parser = flags_of("model")
    flag = parser.add_argument
    archs = ["vits14", "vitb14", "vitl14", "vitg14"] if cuda else ["vitt14", "vits14", "vitb14"]
    flag("--archs", nargs="+", choices=vit.ARCHS, metavar="ARCH", default=archs, help="of these")
    flag("--batch", type=int, default=64 if cuda else 4,
         help="images of 224 px; the multi-crop batch holds as many frames")
    flag("--runs", type=int, default=20 if cuda else 5, help="timed calls of each candidate")
    flag("--precision", choices=("auto", *vit.PRECISIONS), default="auto",
         help="number type of the products")
    args = parser.parse_args(argv)
    B, dtype = args.batch, vit.precision("cuda" if cuda else "cpu", args.precision)
    rows, packs = zip(*(model_rows(arch, B, args.runs, dtype) for arch in args.archs))
    header = ["forward images/s", "TFLOP/s", "forward + backward images/s", "TFLOP/s"]
    table(f"Backbone at 224 px, batch {B}, {short(dtype)}", ["architecture", *header], rows)
    table(f"2 x 224 px and 8 x 98 px crops of {B} frames, forward + backward, {short(dtype)}",
          ["architecture", "packed ms", "separate ms", "packed / separate"], packs)


def model_rows(arch, B, runs, dtype):
    """One architecture's row of either table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = vit.build_vit(arch).to(device).train()
    images = torch.randn(B, 3, 224, 224, device=device)
    crops = [torch.randn(n * B, 3, side, side, device=device) for n, side in ((2, 224), (8, 98))]

    def forward():
        with vit.autocast(device, dtype), torch.no_grad():
            model(images)

    def train(outputs):
        with vit.autocast(device, dtype):
            loss = sum(out["cls"].float().square().mean() for out in outputs())
        loss.backward()
        model.zero_grad()

    def both():
        train(lambda: [model(images)])

    with FlopCounterMode(display=False) as counter, countable(device):
        both()
    flops = counter.get_total_flops()                    # the forward pass is a third of it
    t = seconds({"f": forward, "fb": both}, runs)
    row = [arch, f"{B / t['f']:.1f}", f"{flops / 3 / t['f'] / 1e12:.3f}",
           f"{B / t['fb']:.1f}", f"{flops / t['fb'] / 1e12:.3f}"]

    t = seconds({"packed": lambda: train(lambda: model.forward_packed(crops, [None, None])),
                 "separate": lambda: train(lambda: [model(c) for c in crops])}, runs)
    p, s = t.values()
    return row, [arch, f"{p * 1e3:.0f}", f"{s * 1e3:.0f}", f"{p / s:.3f}"]


@command
def bench_attention(argv):
    """attention on a CPU: library against batched products; on a GPU: kernels against every backend."""
    attention_benchmark.main(argv)


@command
def bench_loss(argv):
    """Sinkhorn-Knopp and the cross-entropies, forward and backward: time, traffic, peak memory."""
    loss_benchmark.loss(argv)


@command
def bench_sinkhorn(argv):
    """Sinkhorn-Knopp by scaling vectors against the textbook loop: time and peak memory."""
    loss_benchmark.sinkhorn(argv)


@command
def bench_input(argv):
    """frames/s of one core through the multi-crop: PIL's crop by crop, and ours."""
    parser = flags_of("input")
    flag = parser.add_argument
    flag("--frames", type=int, default=16, help="JPEG frames of each size")
    flag("--runs", type=int, default=7, help="timed passes over the frames of each candidate")
    flag("--rate", type=int, default=700, help="images/s to feed: of a GPU that trains ViT-B")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)                             # as in a loader's worker
    rows, errors = [], []
    for height, width in ((512, 640), (1080, 1350)):
        with tempfile.TemporaryDirectory() as folder:
            size = write_frames(folder, args.frames, height, width)
            multicrop = augment.MultiCrop(Frames(folder))
            t = input_seconds(multicrop, args.runs)
            errors.append([f"{height}x{width}", *reduced_error(multicrop)])
        slowest = next(iter(t.values()))
        frame = f"{height}x{width}, {size / 1e3:.0f} kB"
        for name, s in t.items():
            rows.append([frame, name, f"{args.frames / s:.1f}", f"{slowest / s:.2f}",
                         math.ceil(args.rate * s / args.frames)])
    cores = f"cores for {args.rate} images/s"
    table("Multi-crop input, 2 x 224 px and 8 x 98 px of a JPEG frame, seconds of one core, "
          f"medians of {args.runs} alternating passes over {args.frames} frames",
          ["frame", "pipeline", "frames/s per core", "times PIL", cores], rows)
    table("Crops of reduced decoding less the same crops of the whole frame, in grey levels",
          ["frame", "frames reduced by", "mean", "99 %", "99.9 %", "largest"], errors)


def write_frames(folder, n, height, width):
    """n synthetic frames as JPEG files of that size; returns their mean bytes."""
    kinds = "colon cecum z-line retroflex-stomach mayo-0 mayo-2 mayo-3 pylorus".split()
    for i in range(n):
        job = dict(seed=0, scope=1, kind=kinds[i % 8], patient=i, place=0, images=[None],
                   masks=None, video=False, size=256)
        small = Image.fromarray(next(synthetic.frames_of(job))[0])
        frame = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        # a sensor's noise: as many bytes to decode as real frames have
        frame = frame + augment.stream(0, 0, i).normal(0, 3, frame.shape)
        frame = Image.fromarray(frame.clip(0, 255).astype(np.uint8))
        frame.save(f"{folder}/{i:03d}.jpg", quality=90)
    return sum(path.stat().st_size for path in pathlib.Path(folder).iterdir()) / n


def input_seconds(ours, runs):
    """{pipeline: seconds of this core for all the multi-crop's frames}, whatever else runs."""
    frames, n = ours.frames, len(ours.frames)
    keys, masks = [(0, i, 0, i) for i in range(n)], augment.BlockMasks((16, 16), n)
    exact, classical = augment.MultiCrop(frames, exact_decode=True), pil_multicrop()

    def cropped(multicrop):
        return augment.collate(multicrop[keys], masks)

    return seconds({
        "PIL, one crop at a time (torchvision transforms)":
            lambda: [classical(frames.path(i)) for i in range(n)],
        "ours, both halves on the CPU": lambda: augment.augment(cropped(ours), "cpu"),
        "ours, CPU half": lambda: cropped(ours),
        "ours, CPU half, --exact-decode": lambda: cropped(exact),
    }, runs, clock=time.process_time)


def reduced_error(multicrop):
    """[factors by which the decoder reduces the frames; mean, 99 %, 99.9 % and maximum of what
    that does to their crops, in grey levels]."""
    factors, differences = [], []
    for i in range(len(multicrop.frames)):
        with opened(multicrop.frames.path(i)) as image:
            drawn = augment.stream(multicrop.seed, 0, 0, i)
            boxes, flips, _ = multicrop.draw(drawn, *image.size)
            factor = multicrop.spare(boxes)
            small = decode(image, factor)
        with opened(multicrop.frames.path(i)) as image:
            whole = decode(image)
        factors.append(factor)
        boxes = [[round(x / factor) for x in box] for box in boxes]
        coarse = augment.cut(small, boxes, multicrop.sizes, flips)
        boxes = [[x * factor for x in box] for box in boxes]
        fine = augment.cut(whole, boxes, multicrop.sizes, flips)
        if factor > 1:
            differences += [(a.int() - b.int()).abs().flatten() for a, b in zip(coarse, fine)]
    counts = ", ".join(f"{f}: {factors.count(f)}" for f in sorted(set(factors)))
    d = torch.cat(differences or [torch.zeros(1)]).numpy()
    tail = [f"{q:.0f}" for q in np.percentile(d, (99, 99.9))]
    return [counts, f"{d.mean():.2f}", *tail, d.max()]


def pil_multicrop():
    """path -> the ten crops of DINOv2 as executed, composed of torchvision's PIL transforms."""
    def view(size, scale, *extra):
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), T.RandomGrayscale(0.2),
            *extra, T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def blur(p):
        return T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=p)

    first = view(224, (0.32, 1))
    second = view(224, (0.32, 1), blur(0.9), T.RandomSolarize(128, 0.2))
    views = [first, second] + [view(98, (0.05, 0.32), blur(0.5))] * 8

    def crops(path):
        image = Image.open(path).convert("RGB")
        return [v(image) for v in views]
    return crops


CASES = {  # letter -> flags of pretrain.py; A to D end in minutes on a CPU, E to G are for GPUs
    "A": "--arch vitt14 --recipe demo",
    "B": "--arch vits14 --recipe demo --batch 16",
    "C": "--arch vits14 --recipe demo --batch 8 --global-size 224 --local-size 98",
    "D": "--arch vits14 --recipe demo --batch 16 --prototypes 2048",
    "E": "--arch vits14 --recipe scratch",
    "F": "--arch vitb14 --recipe scratch",
    "G": "--arch vitl14 --recipe scratch",
}
VARIANTS = {  # name -> (flags of pretrain.py, ENDODINO_ATTENTION)
    "float32, the library's attention": ("--precision fp32", "sdpa"),
    "float32": ("--precision fp32", "auto"),
    "bf16, the library's attention": ("--precision bf16", "sdpa"),
    "bf16": ("--precision bf16", "auto"),
    "bf16, compiled": ("--precision bf16 --compile", "auto"),
}


@command
def bench_step(argv):
    """images/s of a training step by number type, attention and compiler; its parts, its floor."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="bench.py step", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further flags are those of pretrain.py, for every case.\n\ncases:\n"
               + "\n".join(f"  {letter}  {flags}" for letter, flags in CASES.items()))
    flag = parser.add_argument
    flag("--cases", nargs="+", choices=CASES, metavar="LETTER",
         default=list("EFG" if cuda else "ABCD"),
         help="rows of the list below (E F G on a GPU, else A B C D)")
    flag("--archs", nargs="+", metavar="ARCH", help="architectures, instead of the cases")
    flag("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
         help="in quotes, of: " + "; ".join(VARIANTS) + " (all)")
    flag("--runs", type=int, default=20 if cuda else 5,
         help="timed steps of each variant (20 on a GPU, else 5)")
    flag("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds of all threads, for "
         "a machine that does other work as well; with OMP_NUM_THREADS=1 (wall)")
    args, flags = parser.parse_known_args(argv)
    cases = [CASES[letter].split() for letter in args.cases]
    if args.archs:
        cases = [["--arch", arch] for arch in args.archs]
    for case in cases:
        step_tables([*case, *flags], args.variants, args.runs, CLOCKS[args.clock])


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def step_tables(flags, variants, runs, clock):
    """One case: the variants' steps in turn, and what those of the eager ones are made of."""
    trainers, first = {name: Trainer(flags, *VARIANTS[name]) for name in variants}, {}
    for name, trainer in trainers.items():
        first[name] = seconds({"step": trainer.step}, runs=1, warmup=0)["step"]
    t = seconds({name: trainer.step for name, trainer in trainers.items()}, runs, clock=clock)

    run, device, flops = trainer.run, trainer.device, trainer.flops()
    rates = {dtype: product_rate(device, dtype, clock) for dtype in (torch.float32, torch.bfloat16)}
    rows = []
    for name, s in t.items():
        floor = flops / rates[trainers[name].dtype]
        rows.append([name, f"{s * 1e3:.0f}", f"{run.batch / s:.2f}", f"{t[variants[0]] / s:.2f}",
                     f"{floor * 1e3:.0f}", f"{s / floor:.1f}", f"{first[name]:.1f}",
                     f"{peak_bytes(trainers[name].step) / 2**30:.2f}"])
    crops = f"{run.global_size} px and {run.local_crops} x {run.local_size} px"
    header = ["ms" if clock is time.perf_counter else "ms of a core", "images/s",
              f"times {variants[0]}", "floor ms", "times the floor", "first step s",
              "GiB beside the weights"]
    table(f"A step of {run.arch}, B {run.batch}, crops of {crops}, K {run.prototypes:,}",
          ["", *header], rows)
    rates = ", ".join(f"{short(dtype)} {r / 1e12:.2f} TFLOP/s" for dtype, r in rates.items())
    print(f"\nFloor: the step's {flops / 1e9:.0f} GFLOP at the rate of large products, {rates}.")
    parts_table({name: trainer for name, trainer in trainers.items() if not trainer.run.compile})
    held, written, size = saving(trainer)
    print(f"\nA save of last.pt, {size / 1e6:.0f} MB, holds training for {held * 1e3:.0f} ms; its file "
          f"is whole after {written:.1f} s, of which the rest goes on beside the steps.")


def parts_table(trainers):
    """Milliseconds and share of each part of a step; what the input costs beside it."""
    if not trainers:
        return
    rows = [[part] for part in PARTS]
    for trainer in trainers.values():
        parts = trainer.parts()
        for row, s in zip(rows, parts.values()):
            row += [f"{s * 1e3:.1f}", f"{s / sum(parts.values()):.1%}"]
    table("What these steps are made of, by torch.profiler",
          ["part", *(cell for name in trainers for cell in (f"{name}: ms", "share"))], rows)
    batches = trainer.batches()
    decode = seconds({"": lambda: next(batches)}, runs=3, clock=time.process_time)[""]
    print(f"\nBeside the steps workers decode and crop: {decode * 1e3:.0f} ms of a core a batch.")


def saving(trainer, saves=5):
    """Medians of the seconds for which a save holds training and until its file is whole, in the
    working directory's file system, with nothing else to do; and the file's bytes."""
    held, written, trouble = [], [], []
    with tempfile.TemporaryDirectory(dir=".") as out:
        trainer.run.out = out
        saver = Saver(trainer.run, 0, trouble)
        for step in range(1, 1 + saves):
            synchronize()
            start = time.perf_counter()
            saver.save(trainer.model, trainer.optimizer, {"step": step})
            held.append(time.perf_counter() - start)
            saver.wait()
            written.append(time.perf_counter() - start)
        if trouble:
            raise SystemExit(trouble[0])
        size = os.path.getsize(f"{out}/last.pt")
    return statistics.median(held), statistics.median(written), size


def product_rate(device, dtype, clock):
    """FLOP/s of a plain matrix product, large enough to keep the machine busy."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds({"": lambda: a @ b}, clock=clock)[""]


class Trainer:
    """Pre-training under some flags, a step at a time, on two batches of frames over and over.

    flags, more: of pretrain.py; attention: what ENDODINO_ATTENTION says while it steps."""

    def __init__(self, flags, more, attention):
        run = pretrain.parse([*flags, *more.split(), "--workers", "0", "--resume", "no"])
        self.run, self.attention, self.device = run, attention, torch.device(run.device)
        self.frames = pretrain.open_frames(run, say_once)
        self.model = pretrain.build_model(run, say_once).train()
        pretrain.distribute(self.model, run, self.device, world=1)
        self.optimizer = pretrain.make_optimizer(self.model, run)
        self.autocast, self.dtype = pretrain.autocast_for(run, self.device), torch.float32
        with self.autocast:
            if torch.is_autocast_enabled(self.device.type):
                self.dtype = torch.get_autocast_dtype(self.device.type)
        schedules = pretrain.make_schedules(run, run.batch)
        self.now = {name: values[run.steps // 2] for name, values in schedules.items()}
        batches = self.batches()
        self.raw = itertools.cycle([next(batches), next(batches)])

    def batches(self):
        """What a loader's workers hand over: decoded, cropped, masked; here by this process."""
        return pretrain.make_batches(self.run, self.frames, 0, 0, 1, self.device)

    def input(self):
        batch = augment.augment(next(self.raw), self.device)
        batch["kept"] = pretrain.draw_kept(self.model, batch, self.run.seed, 0, 0)
        return batch

    def step(self):
        with mock.patch.dict(os.environ, ENDODINO_ATTENTION=self.attention):
            pretrain.train_step(self.model, self.optimizer, self.input(), self.now,
                                self.run.clip, self.autocast)

    def flops(self):
        """FLOP of the products of one step, attention's included."""
        with FlopCounterMode(display=False) as counter, countable(self.device):
            with mock.patch.object(self, "attention", "sdpa"):
                self.step()
        return counter.get_total_flops()

    def parts(self, steps=2):
        """{part: seconds of a step}."""
        ranges = [
            (self, "input", "input: colours and blur"), (vit, "attention", "attention"),
            (dino_loss, "teacher_targets", LOSSES), (dino_loss, "update_center", LOSSES),
            (dino_loss, "dino_loss", LOSSES), (dino_loss, "ibot_loss", LOSSES),
            (dino_loss, "koleo_loss", LOSSES), (dino, "clip_gradients", "clipping"),
            (self.optimizer, "step", "AdamW"),
            (self.model, "update_teacher", "the teacher's moving average")]
        with contextlib.ExitStack() as stack:
            for owner, name, part in ranges:
                fn = named(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, fn))
            profile = stack.enter_context(torch.profiler.profile(record_shapes=True))
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
            synchronize()
            whole = time.perf_counter() - start
        weights = {tuple(p.shape) for p in self.model.parameters()}
        parts = split_by_part(profile.events(), weights, whole)
        return {part: s / steps for part, s in parts.items()}


@contextlib.contextmanager
def countable(device):
    """FlopCounterMode sees every product: none in compiled code or in the CPU's fused attention."""
    with torch.compiler.set_stance("force_eager"):
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext():
            yield


LOSSES = "losses and targets"
PARTS = {  # part -> its operators; and what runs in a range of its name, and its gradient
    "matrix products": (
        "aten::mm", "aten::addmm", "aten::convolution", "aten::convolution_backward"),
    "attention": (),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "LayerNorm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "casts of weights and their gradients": (),
    "other casts and copies": ("aten::copy_",),
    LOSSES: (),
    "clipping": (),
    "AdamW": (),
    "the teacher's moving average": (),
    "input: colours and blur": (),
    "other operators: residuals, LayerScale, sums, indices": (),
    "between operators": (),
}
CASTS, OTHER = "casts of weights and their gradients", list(PARTS)[-2]


def named(part, fn):
    """fn as a range of that name in the profile."""
    def call(*args, **kwargs):
        with torch.profiler.record_function(part):
            return fn(*args, **kwargs)
    return call


def split_by_part(events, weights, whole):
    """{part: seconds} of a profile of `whole` seconds, each operator without those it called.

    weights: shapes. A cast of such a shape is autocast's, of a weight or its gradient."""
    by_operator = {name: part for part, names in PARTS.items() for name in names}
    made_in = {}                                    # number of an autograd node -> its range
    parts, gpu = dict.fromkeys(PARTS, 0.0), torch.cuda.is_available()
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(on_host, key=lambda e: e.time_range.start):
        callers = [event]
        while callers[-1].cpu_parent:
            callers.append(callers[-1].cpu_parent)
        part = next((e.name for e in callers if e.name in PARTS), None)
        if callers[-1].name.startswith("autograd::engine"):
            part = made_in.get(callers[-1].sequence_nr)
        elif event.sequence_nr >= 0:
            made_in[event.sequence_nr] = part       # the last to carry a number makes the node
        if part is None:
            known = (by_operator[e.name] for e in reversed(callers) if e.name in by_operator)
            part = next(known, OTHER)
            if event.name == "aten::copy_" and any(e.name == "aten::_to_copy" for e in callers):
                part = CASTS if tuple(event.input_shapes[0]) in weights else part
        parts[part] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
    parts["between operators"] = whole - sum(parts.values())
    return parts


@command
def bench_cost(argv):
    """FLOP per frame, GPU hours and bytes of a recipe on each architecture, counted, not timed."""
    parser = flags_of("cost")
    flag = parser.add_argument
    flag("--archs", nargs="+", metavar="ARCH", help="architectures",
         default="vitt14 vits14 vitb14 vitl14 vitg14".split())
    flag("--recipes", nargs="+", choices=pretrain.RECIPES, help="rows of pretrain.py's table",
         default=["scratch", "scratch-long", "adapt"])
    flag("--gpus", type=int, default=8, help="processes, each with the recipe's --batch")
    flag("--rate", type=float, default=4e14,
         help="FLOP/s that one GPU is taken to sustain; an H100's peak in bf16 is 9.9e14")
    args = parser.parse_args(argv)
    rows = []
    for recipe, arch in itertools.product(args.recipes, args.archs):
        run = pretrain.parse(["--arch", arch, "--recipe", recipe, "--device", "cuda"])
        parameters, flops = counted(run)
        hours = run.steps * run.batch * flops / args.rate / 3600
        rows.append([recipe, arch, f"{parameters / 1e6:.0f}", f"{flops / 1e9:.0f}",
                     f"{args.rate / flops:.0f}", f"{run.steps:,} x {run.batch * args.gpus:,}",
                     f"{hours:,.1f}", f"{20 * parameters / 2**30:.1f}"])
    table(f"What a run costs on {args.gpus} GPUs that sustain {args.rate:.3g} FLOP/s",
          ["recipe", "architecture", "million parameters", "GFLOP per frame", "frames/s per GPU",
           "steps x frames", "hours", "GiB of state"], rows, device="counted, not timed")
    print("""
Matrix products and attention of the teacher's forward pass and of the student's forward and
backward pass. State: student, teacher, gradient and AdamW's two moments in float32, before --shard
divides it; activations come on top. Traffic of the loss head and of the optimiser, decoding and
communication are not in the hours.""")


def counted(run):
    """(parameters of the student, FLOP of a step per frame) of pretrain.py's parsed flags; shapes
    alone are computed."""
    B, S, s, L = run.batch, run.global_size, run.local_size, run.local_crops
    masked = round(0.15 * 2 * B * (S // 14) ** 2)        # half of the global crops hide 30 %
    numbers = mock.patch("torch.nn.init.trunc_normal_")  # the one function that would want some
    with numbers, FakeTensorMode(), FlopCounterMode(display=False) as counter:
        backbone = vit.build_vit(run.arch, image_size=S, drop_path=run.drop_path)
        D = backbone.dim
        heads = [dino_loss.DINOHead(D, run.prototypes, bottleneck_dim=run.bottleneck),
                 dino_loss.DINOHead(D, run.prototypes)]
        crops = [torch.empty(2 * B, 3, S, S), torch.empty(L * B, 3, s, s)]
        cls, teacher_cls, patches = (
            torch.empty(n, D, requires_grad=True) for n in ((2 + L) * B, 2 * B, masked))
        with torch.no_grad():
            backbone.eval()(crops[0])
            heads[0](teacher_cls), heads[1](patches)
        out = backbone.train().forward_packed(crops, [None, None])
        outputs = [*(o["cls"] for o in out), heads[0](cls), heads[1](patches)]
        sum(x.sum() for x in outputs).backward()
    parts = [backbone, *heads[:1 + run.separate_heads]]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    return parameters, counter.get_total_flops() / B


@command
def bench_probe(argv):
    """frames/s of frozen features, forward only, in float32 and in 16 bits side by side."""
    cuda = torch.cuda.is_available()
    parser = flags_of("probe")
    flag = parser.add_argument
    flag("--archs", nargs="+", metavar="ARCH", help="architectures",
         default=["vits14", "vitb14", "vitl14", "vitg14"] if cuda else ["vitt14", "vits14"])
    flag("--sizes", nargs="+", type=int, default=[224, 518] if cuda else [224, 336],
         help="sides of the square frame in pixels")
    flag("--batch", type=int, default=32 if cuda else 4, help="frames at a time")
    flag("--runs", type=int, default=20 if cuda else 5, help="timed calls of each candidate")
    args = parser.parse_args(argv)
    device, B = torch.device("cuda" if cuda else "cpu"), args.batch
    half = vit.precision(device) if cuda else torch.bfloat16
    rows = []
    for arch, size in itertools.product(args.archs, args.sizes):
        model = vit.build_vit(arch).to(device).eval()
        frames = torch.randn(B, 3, size, size, device=device)

        def features(dtype, model=model, frames=frames):
            with vit.autocast(device, dtype), torch.inference_mode():
                model(frames)

        with FlopCounterMode(display=False) as counter, countable(device):
            features(torch.float32)
        flops = counter.get_total_flops()
        forms = {dtype: functools.partial(features, dtype) for dtype in (torch.float32, half)}
        t = seconds(forms, args.runs)
        rows.append([arch, size, *(f"{B / s:.1f}" for s in t.values()),
                     f"{t[torch.float32] / t[half]:.2f}",
                     *(f"{flops / s / 1e12:.2f}" for s in t.values())])
    table(f"Frozen features, batch {B}, forward only, decoding not included",
          ["architecture", "pixels", "float32 frames/s", f"{short(half)} frames/s", "times",
           "float32 TFLOP/s", f"{short(half)} TFLOP/s"], rows)


@command
def bench_live(argv):
    """ms per frame of live use, stage by stage, and whether 25 frames/s are kept."""
    cuda = torch.cuda.is_available()
    parser = flags_of("live")
    flag = parser.add_argument
    flag("--archs", nargs="+", metavar="ARCH", help="architectures",
         default=["vits14", "vitb14", "vitl14"] if cuda else ["vitt14", "vits14", "vitb14"])
    flag("--sizes", nargs="+", type=int, default=[224, 518] if cuda else [224, 336],
         help="sides in pixels of the square that the backbone sees")
    flag("--frame", nargs=2, type=int, default=[576, 768], metavar=("H", "W"),
         help="pixels of a video's frame")
    flag("--batches", nargs="+", type=int, default=[1, 8], help="frames that wait for each other")
    flag("--precisions", nargs="+", choices=tuple(vit.PRECISIONS), default=["fp32", "bf16"],
         help="number types")
    flag("--frames", type=int, default=200 if cuda else 40, help="frames timed in each row")
    args = parser.parse_args(argv)
    rows = []
    for case in itertools.product(args.archs, args.sizes, args.precisions, args.batches):
        rows.append([*case, *live_row(args, *case)])
    table(f"Live: three heads on frames of {args.frame[1]}x{args.frame[0]}, median ms per frame",
          ["architecture", "pixels", "type", "batch", "decode", "squares", "backbone", "landmarks",
           "Mayo", "polyps", "overlay", "latency", "95 %", "99 %", "frames/s",
           "frames/s, a pass per head", "25 a second"], rows)


def live_row(args, arch, size, precision, batch):
    """Times of predict.py's own stages; the heads' weights are random, which costs the same."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, frame = vit.PRECISIONS[precision], smooth_noise(*args.frame)
    model = vit.build_vit(arch).to(device).eval().requires_grad_(False)
    loaded = random_heads(model, size)
    columns = predict.columns_of(loaded, 1)
    labels = {key: column for column in columns for key in loaded
              if column.startswith(f"{key} label")}
    jpeg = tempfile.NamedTemporaryFile(suffix=".jpg")
    frame.save(jpeg.name, quality=90)
    shared = predict.plan(loaded, None)
    each = [predict.Pass("stretch", size, False, (key,)) for key in loaded]
    watch, alone = predict.Stopwatch(device), predict.Stopwatch(device)
    for n in range(-1, -(-args.frames // batch)):
        images = []
        for _ in range(batch):
            with watch("decode"):
                images.append(read_image(jpeg.name))
        for said in predict.predict(model, loaded, shared, images, dtype, watch):
            with watch("overlay"):
                row = predict.row_of(("", "", None, frame, ""), said, loaded)
                row |= {labels[key]: predict.Smoothed(loaded[key], key, 1)(row) for key in labels}
                predict.drawn(("", "", None, frame, ""), said, row, loaded, labels)
        predict.predict(model, loaded, each, images, dtype, alone)
        watch.lap(batch)
        alone.lap(batch)
        if n < 0:  # a warm-up
            watch.laps, alone.laps = [], []
    stages = {stage: ms for stage, *ms in watch.table()}
    each_pass = [statistics.median(lap[k] for _, lap in alone.laps)
                 for k in ("squares", "backbone", *loaded)]
    passes = sum(each_pass) / batch
    rest = sum(stages[k][0] for k in ("decode", "overlay")) / 1e3
    latency = stages.pop("latency")
    rate = batch / statistics.median(sum(lap.values()) for _, lap in watch.laps)
    order = ("decode", "squares", "backbone", *loaded, "overlay")
    cells = [*(stages[k][0] for k in order), *latency, rate, 1 / (passes + rest)]
    return [*(f"{cell:.1f}" for cell in cells), "yes" if rate >= 25 else "no"]


def smooth_noise(height, width):
    """A PIL frame that a JPEG compresses about as well as an endoscope's."""
    low = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def random_heads(model, size):
    """{key: frozen.Head} of a landmark, a Mayo and a linear polyp head, all on stretched frames."""
    D, device, last = model.dim, model.pos_embed.device, (model.depth - 1,)
    scale = dict(mean=torch.zeros(2 * D), std=torch.ones(2 * D))
    networks = {
        ("landmarks", "linear", 6): Softmax(1, True, **scale, weight=torch.randn(6, 2 * D),
                                            bias=torch.zeros(6)),
        ("mes", "ordinal", 4): Ordinal(1, True, **scale, direction=torch.randn(2 * D).double(),
                                       thresholds=torch.tensor([-1.0, 0, 1]).double()),
        ("polyps", "linear", 1): LinearHead(D, 1)}
    found = {}
    for (task, name, n), network in networks.items():
        network.to(device).eval().requires_grad_(False)
        classes = tuple(map(str, range(n)))
        found[f"{task} {name}"] = frozen.Head(
            task, name, classes, size, "stretch", last, True, {}, {}, network)
    return found


@command
def bench_curate(argv):
    """each stage of curation, measured where it is cheap; what 10 million frames take, counted."""
    parser = flags_of("curate")
    flag = parser.add_argument
    flag("--frames", type=int, nargs="+", default=[2048],
         help="images of the two passes over images (the largest number counts)")
    flag("--rows", type=int, default=1_000_000, help="random embeddings of the other stages")
    flag("--of", type=int, default=10_000_000, help="frames that bytes, FLOP and hours are counted for")
    flag("--checkpoint", help="backbone of the embeddings; without it the untrained descriptor")
    flag("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1),
         help="processes that read images")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = curate.embedder(SimpleNamespace(checkpoint=args.checkpoint, device=device, precision="auto"))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rates, size = curate_images(folder, max(args.frames), how, args.workers, device)
        file = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, (args.rows, how[3]))
        rng = np.random.default_rng(0)
        for i in range(0, args.rows, 2 ** 14):
            file[i:i + 2 ** 14] = rng.standard_normal(file[i:i + 2 ** 14].shape, dtype=np.float32)
        del file  # written through one mapping, read through another, as by curate.py
        file = np.load(folder / "x.npy", mmap_mode="r")
        rates |= curate_rows(file, device)
    table(f"Curation, measured once at {max(args.frames):,} images of {size / 1e3:.0f} kB, "
          f"{args.workers} workers, and at {args.rows:,} random embeddings of {how[3]} numbers",
          ["stage", "per second"], [[name, f"{rate:,.1f}"] for name, rate in rates.items()])
    curate_counted(args, rates, size, how)
    if os.path.exists("/proc/self/status"):
        print(f"\nPeak resident memory of this process, at {args.rows:,} rows and "
              f"{curate.default_levels(args.rows)[0]:,} leaves, the mapped file of embeddings included: "
              f"{resident('VmHWM') / 1e9:.2f} GB")


def curate_images(folder, n, how, workers, device):
    """({stage: frames/s} of the two passes over n images of 640x512, bytes of one)."""
    for i in range(16):  # smooth: their decoding costs what a frame's does
        smooth_noise(512, 640).save(folder / f"{i}.jpg")
    passes = {"quality": (curate.thumbnail, len(curate.QUALITY), np.float32, curate.quality),
              "embeddings": (how[1], how[3], np.float16, how[2])}
    rates, run = {}, SimpleNamespace(workers=workers, device=device)
    for m in (curate.BATCH, n):  # the first warms up
        frames = curate.Listed(str(folder / f"{i % 16}.jpg") for i in range(m))
        for name, (read, width, dtype, describe) in passes.items():
            start = time.perf_counter()
            curate.over_images(folder / f"{name}{m}.npy", frames, np.arange(m), read, width, dtype,
                               describe, run, name)
            rates[f"{name}, frames"] = m / (time.perf_counter() - start)
    return rates, sum(os.path.getsize(folder / f"{i}.jpg") for i in range(16)) / 16


def curate_rows(file, device):
    """{stage: rows or centres per second} of the stages that see embeddings, a file (n, D)."""
    n, rng, rates = len(file), np.random.default_rng(0), {}
    assert not np.isnan(file[:, 0]).any()  # maps every page, as curate.py's look for damage does
    moments = curate.moments_of(file, 0)
    x = curate.Embeddings(file, np.arange(n), moments, device)
    few = curate.Embeddings(file, np.arange(min(n, 100_000)), moments, device)
    levels = curate.default_levels(n)
    k, seeds = levels[0], min(n, max(clusters.SAMPLE, 4 * levels[0]))

    def rate(name, count, fn):
        synchronize()
        start = time.perf_counter()
        result = fn()
        synchronize()
        rates[name] = count / (time.perf_counter() - start)
        return result

    video = np.arange(n) // 77  # as many frames to a video as ten million of 130,000 videos
    rate("near-duplicates, rows", len(few),
         lambda: curate.duplicates(few, video[:len(few)], np.ones(len(few)), 0.95))
    rate("--exclude of 1,000 images, rows", len(few), lambda: curate.resembling(few, x[:1000], 0.85))
    sample = clusters.gather(x, np.sort(rng.choice(n, seeds, replace=False)))
    tries = 2 + int(np.log(k))  # candidates for a centre; first_centres asks the generator for them
    draw = SimpleNamespace(random=lambda m: rng.random(tries if m > 1 else 1))
    rate("first centres, centres", 20, lambda: clusters.first_centres(sample, 20, draw))
    centres = sample[:k].clone()
    del sample
    part = curate.Embeddings(file, np.arange(min(n, 20 * (clusters.CHUNK // k))), moments, device)
    rate("a pass of k-means, rows", len(part), lambda: clusters.assign(part, centres))
    labels, cosines = rng.integers(k, size=n), rng.random(n, dtype=np.float32)
    rate("members nearest to centres, rows", n, lambda: clusters.nearest(labels, cosines, 5))
    tree = [labels] + [rng.integers(b, size=a) for a, b in itertools.pairwise(levels)]
    rate("sampling, rows", n, lambda: clusters.balanced_sample(
        tree, clusters.capped(video, labels, 40, rng), n // 4, rng))
    return rates


def curate_counted(args, rates, size, how):
    """Print what --of frames take: bytes and FLOP by counting, hours by the rates measured here, and the
    least that a GPU takes by its data sheet."""
    peak, bandwidth = 989e12, 3.35e12  # an H100 SXM's bf16 FLOP/s without sparsity, and bytes/s
    n, D, rounds, steps = args.of, how[3], 3, 50
    (k, *_), (k_here, *_) = curate.default_levels(n), curate.default_levels(args.rows)
    seeds, seeds_here = (min(m, max(clusters.SAMPLE, 4 * j)) for m, j in ((n, k), (args.rows, k_here)))
    tries, tries_here = 2 + int(np.log(k)), 2 + int(np.log(k_here))
    per = max(1, n // (2 * k))  # members of a leaf that a round of resampling clusters
    passes = steps + rounds * (steps * per * k / n + 1) if per > 1 else steps + 1
    starts = 1 + rounds * (per > 1)
    file = n * D * 2
    rate = {name.partition(",")[0]: value for name, value in rates.items()}
    took = {name: n / rate[name] for name in ("quality", "embeddings", "near-duplicates", "sampling")}
    took |= {"exclude": n / rates["--exclude of 1,000 images, rows"],
                "nearest": rounds * (per > 1) * n / rate["members nearest to centres"],
                "first": k / rate["first centres"] * (seeds * tries) / (seeds_here * tries_here),
                "pass": n / rate["a pass of k-means"] * k / k_here}
    first_gpu = k * seeds * D * 4 / bandwidth  # the sample is read for every centre
    pass_gpu = max(2 * n * k * D / peak, 3 * 2 * n * k / bandwidth)  # products: written, read twice
    rows = [  # stage, GB read, TFLOP, GB of memory for one process, seconds here, seconds on a GPU
        ("quality", n * size, 0, 0, took["quality"], 0),
        ("embeddings", n * size, 0, 0, took["embeddings"], 0),
        ("near-duplicates", file, 2 * n * 32 * D, 0, took["near-duplicates"], 0),
        ("--exclude of 1,000 images", file, 2 * n * 1000 * D, 0, took["exclude"],
         max(2 * n * 1000 * D / peak, file / bandwidth)),
        ("first centres, once", seeds * D * 2, 2 * k * seeds * tries * D, seeds * D * 4,
         took["first"], first_gpu),
        ("a pass of k-means", file, 2 * n * k * D, k * D * (8 + 4 + 4 + 2) + 12 * n, took["pass"],
         pass_gpu),
        (f"leaves in all, at most: {starts} x first centres, {passes:.0f} passes", passes * file,
         starts * 2 * k * seeds * tries * D + passes * 2 * n * k * D, 0,
         starts * took["first"] + passes * took["pass"] + took["nearest"],
         starts * first_gpu + passes * pass_gpu),
        ("sampling", 0, 0, 0, took["sampling"], 0)]
    cell = lambda value, unit, digits: f"{value / unit:,.{digits}f}" if value else ""
    table(f"Curation of {n:,} frames of {size / 1e3:.0f} kB by the rates above; {how[0]}",
          ["stage", "GB read", "TFLOP", "GB held", "hours here", "hours on one H100, at least"],
          [[name, cell(read, 1e9, 0), cell(flop, 1e12, 0), cell(held, 1e9, 2), cell(here, 3600, 2),
            cell(gpu, 3600, 3)] for name, read, flop, held, here, gpu in rows])
    print(f"""
Hours here = count / rate: each stage but k-means does the same work for a frame however many there
are, and a pass compares each with {k:,} leaves (where fewer rows or leaves were measured, the hours
grow as the FLOP do). How many passes k-means makes, until its inertia falls by less than a
ten-thousandth, depends on the data. Given is the most: {steps} for the leaves, and {steps} over {per} members of
each leaf in each of {rounds} rounds of resampling. The levels above cluster the leaves' centres, a
hundredth of it. On the GPU: counted from its data sheet, not measured; the larger of FLOP at its peak
and bytes at its bandwidth. Images are decoded on CPUs, every process its share.""")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines = [f"{name}: {fn.__doc__.splitlines()[0]}" for name, fn in sorted(COMMANDS.items())]
    parser.add_argument("what", choices=sorted(COMMANDS), help="; ".join(lines))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its flags (WHAT --help lists them)")
    args = parser.parse_args(argv)
    COMMANDS[args.what](args.rest)


if __name__ == "__main__":
    main()
