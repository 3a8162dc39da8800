"""Every performance number that the README quotes.

    python bench.py model            images/s and FLOP/s of each architecture
    python bench.py --help           the other sub-commands

Candidates of one table run in turn (A B A B ...) in one process; the median is printed, so a ratio holds when the
machine's speed drifts. Peak memory is what a call needs beyond what was already held.
"""
import argparse
import contextlib
import functools
import itertools
import math
import os
import pathlib
import platform
import statistics
import tempfile
import time
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

import augment
import dino
import dino_loss
import frozen
import predict
import pretrain
import synthetic
import vit
from custom_kernels import say_once
from data import Frames, decode, opened, read_image
from heads import LinearHead, Ordinal, Softmax


def seconds(candidates, runs=7, warmup=1, clock=time.perf_counter):
    """{name: function} -> {name: median seconds of `runs` calls}, the functions called in turn."""
    times = {name: [] for name in candidates}
    for i in range(warmup + runs):
        for name, fn in candidates.items():
            synchronize()
            start = clock()
            fn()
            synchronize()
            if i >= warmup:
                times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def peak_bytes(fn):
    """Bytes that one call of fn needs at its peak beyond what is held before it: GPU memory, or resident memory on
    Linux."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):
        return float("nan")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the high-water mark of resident memory
    before = resident("VmRSS")
    fn()
    return resident("VmHWM") - before


def resident(field):
    """Bytes of one memory field of this process (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def table(title, header, rows):
    """Print a GitHub Markdown table under a line that names the device and the versions."""
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    print(f"\n**{title}** ({device_name()}, {versions})\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


COMMANDS = {}  # name -> function(argv); the docstring's first line is the help


def command(fn):
    COMMANDS[fn.__name__.removeprefix("bench_")] = fn
    return fn


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
    flag("--archs", nargs="+", choices=list(vit.ARCHS), metavar="ARCH", help="architectures",
         default=["vits14", "vitb14", "vitl14", "vitg14"] if cuda else ["vitt14", "vits14", "vitb14"])
    flag("--batch", type=int, default=64 if cuda else 4,
         help="images of 224 px; the multi-crop batch holds as many frames")
    flag("--runs", type=int, default=20 if cuda else 5, help="timed calls of each candidate")
    flag("--precision", choices=("auto", *vit.PRECISIONS), default="auto", help="number type of the products")
    args = parser.parse_args(argv)
    dtype = vit.precision("cuda" if cuda else "cpu", args.precision)
    rows, pack_rows = zip(*(model_rows(arch, args.batch, args.runs, dtype) for arch in args.archs))
    table(f"Backbone at 224 px, batch {args.batch}, {str(dtype)[6:]}",
          ["architecture", "forward images/s", "TFLOP/s", "forward + backward images/s", "TFLOP/s"], rows)
    table(f"2 x 224 px and 8 x 98 px crops of {args.batch} frames, forward + backward, {str(dtype)[6:]}",
          ["architecture", "packed ms", "separate ms", "packed / separate"], pack_rows)


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
    flops = counter.get_total_flops()                    # forward and backward; the forward is a third of it
    t = seconds({"f": forward, "fb": both}, runs)
    row = [arch, f"{B / t['f']:.1f}", f"{flops / 3 / t['f'] / 1e12:.3f}",
           f"{B / t['fb']:.1f}", f"{flops / t['fb'] / 1e12:.3f}"]

    t = seconds({"packed": lambda: train(lambda: model.forward_packed(crops, [None, None])),
                 "separate": lambda: train(lambda: [model(c) for c in crops])}, runs)
    packed = [arch, f"{t['packed'] * 1e3:.0f}", f"{t['separate'] * 1e3:.0f}", f"{t['packed'] / t['separate']:.3f}"]
    return row, packed


@command
def bench_sinkhorn(argv):
    """Sinkhorn-Knopp by scaling vectors against the textbook loop: time and peak memory."""
    from dino_loss import sinkhorn, sinkhorn_log_domain

    parser = argparse.ArgumentParser(prog="bench.py sinkhorn", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=640, help="teacher rows")
    parser.add_argument("--prototypes", type=int, default=65536, help="K")
    parser.add_argument("--runs", type=int, default=7, help="timed calls of each candidate")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    x, prototypes = (torch.nn.functional.normalize(torch.randn(n, 256, device=device, generator=generator), dim=1)
                     for n in (args.rows, args.prototypes))
    logits, temp = x @ prototypes.T, 0.05  # cosines, as the head's

    forms = {"textbook loop, in place": textbook_sinkhorn, "scaling vectors": sinkhorn,
             "logarithms (range too wide for exp)": sinkhorn_log_domain}
    forms = {name: lambda form=form: form(logits, temp) for name, form in forms.items()}
    times = seconds(forms, args.runs)
    slowest, exact = times["textbook loop, in place"], forms["textbook loop, in place"]()
    rows = []
    for name, form in forms.items():
        error = ((form() - exact).norm() / exact.norm()).item()
        rows.append([name, f"{times[name] * 1e3:.1f}", f"{slowest / times[name]:.2f}", f"{peak_bytes(form) / 2**20:.0f}", f"{error:.1e}"])
    table(f"Sinkhorn-Knopp, {args.rows} x {args.prototypes}, 3 iterations, temperature {temp}",
          ["form", "ms", "times faster", "peak MiB", "relative difference"], rows)


def textbook_sinkhorn(logits, temp):
    """DINOv2's loop, its divisions in place: two sums over the matrix and two divisions of it per iteration."""
    q = torch.exp(logits.float() / temp).t()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    q *= q.shape[1]
    return q.t()


def textbook_losses(student_global, student_local, student_patch, teacher, teacher_patch, masks, temp):
    """DINOv2's form of the three cross-entropies: targets stored, one product and sum per pair of crops."""
    def log_softmax(x):
        return torch.log_softmax(x.float() / 0.1, dim=-1)
    pairs, cls = 2 + 2 * len(student_local), textbook_sinkhorn(teacher.flatten(0, 1), temp).view(teacher.shape)
    local = sum(-(target * s).sum(-1).mean() for s in map(log_softmax, student_local) for target in cls)
    across = sum(-(target * s).sum(-1).mean() for target, s in zip(cls.flip(0), map(log_softmax, student_global)))
    weight = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]
    patch = (-(textbook_sinkhorn(teacher_patch, temp) * log_softmax(student_patch)).sum(-1) * weight).sum() / len(masks)
    return (local + across) / pairs + patch


def our_losses(student_global, student_local, student_patch, teacher, teacher_patch, masks, temp, kernels):
    import dino_loss
    os.environ["ENDODINO_PROTOTYPE_LOSS"] = "triton" if kernels else "torch"
    targets, patch_targets = (dino_loss.teacher_targets(x, temp) for x in (teacher, teacher_patch))
    return sum(dino_loss.dino_loss(student_global, student_local, targets)) + dino_loss.ibot_loss(student_patch, patch_targets, masks)


@command
def bench_loss(argv):
    """Sinkhorn-Knopp and the DINO and iBOT cross-entropies, forward and backward from the logits: time, memory traffic, peak memory."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.py loss", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=64 if cuda else 4, help="frames; the rows of logits follow, for ViT-S, B and L alike")
    parser.add_argument("--prototypes", type=int, nargs="+", default=[65536, 131072], help="K of the shared and of separate heads")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the logits")
    parser.add_argument("--runs", type=int, default=20 if cuda else 3, help="timed calls of each candidate")
    args = parser.parse_args(argv)
    device, B, temp, rows = torch.device("cuda" if cuda else "cpu"), args.batch, 0.05, []
    masks = torch.zeros(2 * B, 256, dtype=torch.bool, device=device)
    masks[:B, :77] = True  # DINOv2 hides 30 % of the patches of half the crops
    for K in args.prototypes:
        generator = torch.Generator(device).manual_seed(0)
        prototypes = torch.nn.functional.normalize(torch.randn(K, 256, device=device, generator=generator), dim=1)
        shapes = (2, B), (8, B), (77 * B,), (2, B), (77 * B,)  # student: global, local, patches; teacher: global, patches
        logits = [(torch.nn.functional.normalize(torch.randn(*shape, 256, device=device, generator=generator), dim=-1) @ prototypes.T)
                  .to(getattr(torch, args.dtype)).requires_grad_(i < 3) for i, shape in enumerate(shapes)]
        del prototypes
        student, teacher = (sum(x.nbytes for x in part) for part in (logits[:3], logits[3:]))
        moved = 7 * teacher + 3 * student  # 5 passes of Sinkhorn, 1 forward, 1 backward; 1 forward, 1 backward, the gradient written

        def gradients(losses, **kwargs):
            loss = losses(*logits, masks, temp, **kwargs)
            return loss.detach(), torch.autograd.grad(loss, logits[:3])

        forms = {"(a) textbook, as DINOv2 writes it": lambda: gradients(textbook_losses),
                 "(b) scaling vectors, plain PyTorch": lambda: gradients(our_losses, kernels=False)}
        if cuda:
            forms["(c) Triton kernels, targets never stored"] = lambda: gradients(our_losses, kernels=True)
        copy = torch.empty_like(logits[2])
        times = seconds(forms | {"copy": lambda: copy.copy_(logits[2].detach())}, args.runs)
        rate = 2 * copy.nbytes / times.pop("copy")
        del copy
        first, peaks = next(iter(forms)), {name: peak_bytes(form) for name, form in forms.items()}
        for name, form in forms.items():
            (loss, gradient), (exact, exact_gradient) = form(), forms[first]()
            difference = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip((loss, *gradient), (exact, *exact_gradient)))
            rows.append([f"{K:,}", name, f"{times[name] * 1e3:.1f}", f"{times[first] / times[name]:.2f}",
                         f"{moved / times[name] / 1e9:.1f}", f"{moved / times[name] / rate:.0%}", f"{peaks[name] / 2**20:.0f}",
                         f"{peaks[name] / peaks[first]:.0%}", f"{difference:.0e}"])
            del loss, gradient, exact, exact_gradient
    table(f"Loss head, batch {B}: {10 * B} student and {2 * B} teacher class tokens, {77 * B} patches, {args.dtype} logits; "
          f"a copy moves {rate / 1e9:.1f} GB/s",
          ["K", "form", "ms", "times faster", "useful GB/s", "of the copy rate", "peak MiB", "of the textbook's", "difference"], rows)
    print("\nUseful bytes: 7 reads of the teacher's logits, 2 reads of the student's and one write of their gradient, whatever a form "
          "moves. The rows are those of ViT-S, B and L alike: heads see tokens, not widths."
          + ("" if cuda else " On a CPU pretrain.py runs (b); the kernels (c) need a GPU, and the batch is small so that this ends soon."))


@command
def bench_input(argv):
    """Frames/s of one core through the multi-crop: PIL crop by crop, ours on the CPU, ours without the device's half."""
    parser = flags_of("input")
    flag = parser.add_argument
    flag("--frames", type=int, default=16, help="JPEG frames of each size")
    flag("--runs", type=int, default=7, help="timed passes over the frames of each candidate")
    flag("--rate", type=int, default=700, help="images/s that a GPU takes, such as one that trains ViT-B")
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
        for name, s in t.items():
            rows.append([f"{height}x{width}, {size / 1e3:.0f} kB", name, f"{args.frames / s:.1f}",
                         f"{slowest / s:.2f}", math.ceil(args.rate * s / args.frames)])
    table(f"Multi-crop input, 2 x 224 px and 8 x 98 px of a JPEG frame, seconds of one core, medians of {args.runs} "
          f"alternating passes over {args.frames} frames",
          ["frame", "pipeline", "frames/s per core", "times PIL", f"cores for {args.rate} images/s"], rows)
    table("Crops of reduced decoding against the same crops of the whole frame, absolute difference in grey levels",
          ["frame", "frames reduced by", "mean", "99 %", "99.9 %", "largest"], errors)


def write_frames(folder, n, height, width):
    """n synthetic frames as JPEG files of that size; returns their mean bytes."""
    kinds = ("colon", "cecum", "z-line", "retroflex-stomach", "mayo-0", "mayo-2", "mayo-3", "pylorus")
    for i in range(n):
        job = dict(seed=0, scope=1, kind=kinds[i % 8], patient=i, place=0, images=[None], masks=None, video=False,
                   size=256)
        small = Image.fromarray(next(synthetic.frames_of(job))[0])
        frame = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        # a sensor's noise: as many bytes to decode as real frames have
        frame = frame + augment.stream(0, 0, i).normal(0, 3, frame.shape)
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i:03d}.jpg", quality=90)
    return sum(path.stat().st_size for path in pathlib.Path(folder).iterdir()) / n


def input_seconds(ours, runs):
    """{pipeline: seconds of this core for all of the multi-crop's frames}, whatever else the machine does."""
    frames, n = ours.frames, len(ours.frames)
    keys, masks = [(0, i, 0, i) for i in range(n)], augment.BlockMasks((16, 16), n)
    exact, classical = augment.MultiCrop(frames, exact_decode=True), pil_multicrop()
    return seconds({
        "PIL, one crop at a time (torchvision transforms)": lambda: [classical(frames.path(i)) for i in range(n)],
        "ours, both halves on the CPU": lambda: augment.augment(augment.collate(ours[keys], masks), "cpu"),
        "ours, CPU half": lambda: augment.collate(ours[keys], masks),
        "ours, CPU half, --exact-decode": lambda: augment.collate(exact[keys], masks),
    }, runs, clock=time.process_time)


def reduced_error(multicrop):
    """[which factors the frames are reduced by, then mean, percentiles and maximum of what that does to their crops], in
    grey levels."""
    factors, differences = [], []
    for i in range(len(multicrop.frames)):
        with opened(multicrop.frames.path(i)) as image:
            boxes, flips, _ = multicrop.draw(augment.stream(multicrop.seed, 0, 0, i), *image.size)
            factor = multicrop.spare(boxes)
            small = decode(image, factor)
        with opened(multicrop.frames.path(i)) as image:
            whole = decode(image)
        factors.append(factor)
        boxes = [[round(x / factor) for x in box] for box in boxes]
        coarse = augment.cut(small, boxes, multicrop.sizes, flips)
        fine = augment.cut(whole, [[x * factor for x in box] for box in boxes], multicrop.sizes, flips)
        if factor > 1:
            differences += [(a.int() - b.int()).abs().flatten().numpy() for a, b in zip(coarse, fine)]
    counts = ", ".join(f"{f}: {factors.count(f)}" for f in sorted(set(factors)))
    d = np.concatenate(differences or [np.zeros(1, int)])
    return [counts, f"{d.mean():.2f}", *(f"{q:.0f}" for q in np.percentile(d, (99, 99.9))), d.max()]


def pil_multicrop():
    """path -> the ten crops of DINOv2's augmentation as executed, composed of torchvision's PIL transforms."""
    def view(size, scale, *extra):
        return T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), T.RandomGrayscale(0.2), *extra,
            T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def blur(p):
        return T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=p)

    first, second = view(224, (0.32, 1)), view(224, (0.32, 1), blur(0.9), T.RandomSolarize(128, 0.2))
    views = [first, second] + [view(98, (0.05, 0.32), blur(0.5))] * 8

    def crops(path):
        image = Image.open(path).convert("RGB")
        return [v(image) for v in views]
    return crops


PACK = ((128, 257), (512, 50))  # 64 images: two crops of 224 px, eight of 98 px
ATTENTION_SHAPES = {  # name -> (runs, numbers of heads)
    "A the pack": (PACK, (6, 12, 16, 24)),
    "B global crops": (PACK[:1], (12, 16)),
    "C local crops": (PACK[1:], (12, 16)),
    "D four registers": (((128, 261), (512, 54)), (12, 16)),
    "E patches of 16 px": (((128, 197), (512, 37)), (12,)),
    "F 518 px": (((16, 1370), (64, 50)), (16,)),
    "F 644 px": (((8, 2117),), (16,)),
    "G 1 image": (((2, 257), (8, 50)), (12,)),
    "G 4 images": (((8, 257), (32, 50)), (12,)),
    "G 16 images": (((32, 257), (128, 50)), (12,)),
    "H ragged": (tuple((1, 1 + i * 97 % 272) for i in range(425)), (12,)),  # every length from 1 to 272, 58 thousand tokens
}


@command
def bench_attention(argv):
    """fused attention against every stock backend on a GPU; --compile-only: registers, spills, shared memory, without one."""
    parser = argparse.ArgumentParser(prog="bench.py attention", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list("ABCDEFGH"), metavar="LETTER",
                        help="first letters of: " + ", ".join(ATTENTION_SHAPES))
    parser.add_argument("--heads", nargs="+", type=int, help="heads of 64 channels, instead of each shape's own")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="type of q, k and v")
    parser.add_argument("--runs", type=int, default=50, help="timed calls of each candidate, twice")
    parser.add_argument("--compile-only", action="store_true", help="what the compiler makes of the kernels; needs no GPU")
    parser.add_argument("--archs", nargs="+", type=int, choices=[80, 90], default=[90, 80], help="compute capabilities to compile for")
    args = parser.parse_args(argv)
    if args.compile_only:
        return attention_as_compiled(args.archs)
    if not torch.cuda.is_available():
        return print("bench.py attention compares kernels on a GPU, and there is none here. `python bench.py attention --compile-only` "
                     "prints what the compiler makes of them without one.")
    torch.manual_seed(0)
    block = torch.empty(2**28, device="cuda"), torch.empty(2**28, device="cuda")
    copied = 2 * block[0].nbytes / event_seconds({"copy": lambda: block[0].copy_(block[1])}, args.runs)["copy"]  # byte/s, read and written
    del block
    print(f"measured copy rate {copied / 1e12:.2f} TB/s; cuDNN {torch.backends.cudnn.version()}, CUDA {torch.version.cuda}")
    for name, (runs, heads) in ATTENTION_SHAPES.items():
        for H in (args.heads or heads) if name[0] in args.shapes else ():
            attention_table(name, runs, H, getattr(torch, args.dtype), copied, args.runs)


def attention_as_compiled(archs):
    """Table of the kernels that the dispatcher picks, compiled for GPUs that need not be here."""
    import triton
    from tests.attention_aot import report

    cases = [(257, False), (50, False), (261, False), (1370, False), (64, True), (272, True)]
    rows = []
    for arch in archs:
        for dtype in ("bfloat16", "float16"):
            for length, ragged in cases:
                for kernel, f in report(length, dtype, arch, ragged):
                    rows.append([f"sm_{arch}", dtype, f"up to {length}" if ragged else length, kernel, f["warps"], f["registers"],
                                 f["spills"], f"{f['shared'] / 1024:.0f}", f["programs_per_sm"], f["wgmma"], f["mma"], f["atomics"],
                                 f["instructions"]])
    table(f"Attention kernels as triton {triton.__version__} compiles them; nothing was run",
          ["GPU", "type", "tokens", "kernel", "warps", "registers", "spills", "shared KiB", "programs per SM", "wgmma", "mma", "atomics",
           "instructions"], rows)


def stock_attention(runs, H):
    """{name: function(q, k, v) -> out}, all (T, H, 64): what PyTorch brings for packed sequences."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention as attend

    lengths = torch.tensor([n for count, n in runs for _ in range(count)], device="cuda")
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    longest, sizes = int(lengths.max()), [count * n for count, n in runs]
    document = torch.arange(len(lengths), device="cuda").repeat_interleave(lengths)
    inside = torch.arange(longest, device="cuda") < lengths[:, None]                                # (sequences, longest)
    rows = (starts[:-1, None] + torch.arange(longest, device="cuda")).where(inside, 0)
    cache = {}

    def per_run(backend, q, k, v):
        with sdpa_kernel(backend):
            parts = zip(runs, *(x.split(sizes) for x in (q, k, v)))
            out = [attend(*(x.unflatten(0, run).transpose(1, 2) for x in part)) for run, *part in parts]
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in out])

    def padded(q, k, v):
        out = attend(*(x[rows].transpose(1, 2) for x in (q, k, v)), attn_mask=inside[:, None, None])
        return out.transpose(1, 2)[inside]

    def varlen(q, k, v):
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(q, k, v, starts.int(), starts.int(), longest, longest)

    def flex(q, k, v):
        if not cache:
            same = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, len(q), len(q), "cuda", _compile=True)
            cache.update(mask=same, fn=torch.compile(flex_attention, dynamic=False))
        return cache["fn"](*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=cache["mask"])[0].transpose(0, 1)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    return {f"SDPA {name}": functools.partial(per_run, backend) for name, backend in backends.items()} | {
        "varlen_attn": varlen, "flex_attention, compiled": flex, "SDPA padded and masked": padded}


def attention_table(name, runs, H, dtype, copied, n_runs):
    """One table. Kernel level: q, k, v given, dq, dk, dv wanted. Module level: packed qkv and its packed gradient, as in training."""
    from custom_kernels.attention import attention, sdpa

    T, pairs = sum(count * n for count, n in runs), sum(count * n**2 for count, n in runs)
    inputs = [(torch.randn(T, 3, H, 64, device="cuda", dtype=dtype), torch.randn(T, H, 64, device="cuda", dtype=dtype)) for _ in range(4)]
    stock = stock_attention(runs, H)
    packed = {"ours": lambda qkv: attention(qkv, runs, "triton"), "what auto picks": lambda qkv: attention(qkv, runs)}
    packed |= {label: lambda qkv, fn=fn: fn(*qkv.unbind(1)) for label, fn in stock.items()}

    def step(fn, separate):
        """Function that runs forward and backward on the next of four inputs, which together exceed the cache."""
        leaves = [(qkv.unbind(1) if separate else [qkv], dout) for qkv, dout in inputs]
        turn = itertools.cycle([([x.detach().requires_grad_() for x in given], dout) for given, dout in leaves])

        def call():
            given, dout = next(turn)
            return torch.autograd.grad(fn(*given), given, dout)
        return call

    def wrong(fn):
        """Relative error of output and gradient, the larger, on the first sequence of each run; fresh memory is full of NaN."""
        first = [sum(count * n for count, n in runs[:i]) + j for i, run in enumerate(runs[:9]) for j in range(run[1])]
        few, results = [(1, n) for _, n in runs[:9]], []
        exact = lambda x: sdpa(x, few), slice(None), *(y[first].double() for y in inputs[0])  # noqa: E731
        for f, rows, x, do in ((fn, first, *inputs[0]), exact):
            torch.full((2**28,), float("nan"), device="cuda")
            x = x.detach().requires_grad_()
            out = f(x)
            results.append([y[rows].double() for y in (out.detach(), *torch.autograd.grad(out, x, do))])
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))

    error, kernel, module, forward = {}, {}, {}, {}
    for label, fn in packed.items():
        try:
            error[label] = wrong(fn)
            kernel[label] = step(stock[label], True) if label in stock else step(fn, False)
            kernel[label]()
            module[label] = step(fn, False)
            forward[label] = torch.no_grad()(lambda fn=fn, turn=itertools.cycle(inputs): fn(next(turn)[0]))
        except Exception as e:  # a backend that does not take these inputs, or is not in this PyTorch
            print(f"{label} is out of {name}: {type(e).__name__}: {' '.join(str(e).split())}"[:200])
            kernel.pop(label, None)
    graphs = {label: as_cuda_graph(fn, 4) for label, fn in module.items()}
    times = [[event_seconds(c, n_runs) for _ in range(2)] for c in (forward, kernel, module, {k: g for k, g in graphs.items() if g})]
    floor, rows = (12 * 64 * dtype.itemsize + 8) * T * H / copied, []  # q k v o, then q k v o do dq dk dv; L written and read
    best = [min((t[0][label] for label in stock if label in kernel), default=float("nan")) for t in times[:3]]
    for label in kernel:
        f, k, m = (times[level][0][label] for level in range(3))
        again = max(abs(times[level][1][label] / times[level][0][label] - 1) for level in range(3))
        replay = f"{times[3][0][label] / 4 * 1e3:.3f}" if graphs[label] else "-"
        rows.append([label, f"{error[label]:.1e}", f"{f * 1e3:.3f}", f"{k * 1e3:.3f}", f"{m * 1e3:.3f}", replay,
                     f"{14 * pairs * H * 64 / m / 1e12:.0f}", f"{floor / m:.0%}", *(f"{b / t:.2f}" for b, t in zip(best, (f, k, m))),
                     f"{(peak_bytes(module[label]) - inputs[0][0].nbytes * 4 / 3) / 2**20:.0f}", f"{again:.0%}"])
    table(f"Attention {name}, {T} tokens, {H} heads, {str(dtype)[6:]}",
          ["", "error", "forward ms", "kernel ms", "module ms", "graph replay ms", "TFLOP/s", "of floor", "x stock forward",
           "x stock kernel", "x stock module", "extra MiB", "second pass"], rows)


def as_cuda_graph(call, n):
    """n calls as one replay, or None where they cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(n):
                call()
        return graph.replay
    except Exception:
        torch.cuda.synchronize()
        return None


def event_seconds(candidates, runs):
    """As `seconds`, on the GPU's own clock."""
    times = {name: [] for name in candidates}
    for i in range(5 + runs):
        for name, fn in candidates.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            stop.record()
            stop.synchronize()
            if i >= 5:
                times[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


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
    """images/s of a whole pre-training step by number type, attention and compiler; the share of each part; the floor."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="bench.py step", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further flags are those of pretrain.py, for every case.\n\ncases:\n"
               + "\n".join(f"  {letter}  {flags}" for letter, flags in CASES.items()))
    flag = parser.add_argument
    flag("--cases", nargs="+", choices=CASES, default=list("EFG" if cuda else "ABCD"), metavar="LETTER",
         help="rows of the list below (E F G on a GPU, else A B C D)")
    flag("--archs", nargs="+", metavar="ARCH", help="architectures, instead of the cases")
    flag("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
         help="in quotes, of: " + "; ".join(VARIANTS) + " (all)")
    flag("--runs", type=int, default=20 if cuda else 5, help="timed steps of each variant (20 on a GPU, else 5)")
    args, flags = parser.parse_known_args(argv)
    cases = [CASES[letter].split() for letter in args.cases]
    if args.archs:
        cases = [["--arch", arch] for arch in args.archs]
    for case in cases:
        step_tables([*case, *flags], args.variants, args.runs)


def step_tables(flags, variants, runs):
    """One case: the variants' steps in turn, and what the steps of the eager ones are made of."""
    trainers, first = {name: Trainer(flags, *VARIANTS[name]) for name in variants}, {}
    for name, trainer in trainers.items():
        first[name] = seconds({"step": trainer.step}, runs=1, warmup=0)["step"]
    t = seconds({name: trainer.step for name, trainer in trainers.items()}, runs)

    run, device, flops = trainer.run, trainer.device, trainer.flops()
    rates = {dtype: product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    rows = []
    for name, s in t.items():
        floor = flops / rates[trainers[name].dtype]
        rows.append([name, f"{s * 1e3:.0f}", f"{run.batch / s:.2f}", f"{t[variants[0]] / s:.2f}",
                     f"{floor * 1e3:.0f}", f"{s / floor:.1f}", f"{first[name]:.1f}"])
        if device.type == "cuda":
            rows[-1].append(f"{peak_bytes(trainers[name].step) / 2**30:.1f}")
    crops = f"{run.global_size} px and {run.local_crops} x {run.local_size} px"
    table(f"A step of {run.arch}, B {run.batch}, crops of {crops}, K {run.prototypes:,}",
          ["", "ms", "images/s", f"times {variants[0]}", "floor ms", "times the floor", "first step s",
           *(["GiB beside the weights"] if device.type == "cuda" else [])], rows)
    print(f"\nFloor: the step's {flops / 1e9:.0f} GFLOP at the rate of large matrix products measured beside it, "
          + ", ".join(f"{str(dtype)[6:]} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in rates.items()) + ".")
    parts_table({name: trainer for name, trainer in trainers.items() if not trainer.run.compile})


def parts_table(trainers):
    """Milliseconds and share of each part of the trainers' steps, and what the input costs beside them."""
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
    decode = seconds({"batch": lambda: next(batches)}, runs=3, clock=time.process_time)["batch"]
    print(f"\nBeside the steps, workers decode and crop: {decode * 1e3:.0f} ms of one core per batch.")


def product_rate(device, dtype):
    """FLOP/s of a plain matrix product, large enough to keep the machine busy."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds({"product": lambda: a @ b})["product"]


class Trainer:
    """Pre-training under some flags, a step at a time, on two batches of frames over and over.

    flags, more: of pretrain.py; attention: what ENDODINO_ATTENTION says while it steps."""

    def __init__(self, flags, more, attention):
        self.run = run = pretrain.parse([*flags, *more.split(), "--workers", "0", "--resume", "no"])
        self.attention, self.device = attention, torch.device(run.device)
        self.frames = pretrain.open_frames(run, say_once)
        self.model = pretrain.build_model(run, say_once).train()
        pretrain.distribute(self.model, run, self.device, world=1)
        self.optimizer = pretrain.make_optimizer(self.model, run)
        self.autocast, self.dtype = pretrain.autocast_for(run, self.device), torch.float32
        with self.autocast:
            if torch.is_autocast_enabled(self.device.type):
                self.dtype = torch.get_autocast_dtype(self.device.type)
        middle = run.steps // 2
        self.now = {name: values[middle] for name, values in pretrain.make_schedules(run, run.batch).items()}
        batches = self.batches()
        self.raw = itertools.cycle([next(batches), next(batches)])

    def batches(self):
        """What a loader's workers hand over, decoded, cropped and masked; here by this process."""
        return pretrain.make_batches(self.run, self.frames, 0, 0, 1, self.device)

    def input(self):
        batch = augment.augment(next(self.raw), self.device)
        batch["kept"] = pretrain.draw_kept(self.model, batch, self.run.seed, 0, 0)
        return batch

    def step(self):
        with mock.patch.dict(os.environ, ENDODINO_ATTENTION=self.attention):
            batch = self.input()
            pretrain.train_step(self.model, self.optimizer, batch, self.now, self.run.clip, self.autocast)

    def flops(self):
        """FLOP of the products of one step, attention's included."""
        with FlopCounterMode(display=False) as counter, countable(self.device), mock.patch.object(self, "attention", "sdpa"):
            self.step()
        return counter.get_total_flops()

    def parts(self, steps=2):
        """{part: seconds of a step}."""
        ranges = [
            (self, "input", "input: colours and blur"), (vit, "attention", "attention"),
            (dino_loss, "teacher_targets", LOSSES), (dino_loss, "update_center", LOSSES),
            (dino_loss, "dino_loss", LOSSES), (dino_loss, "ibot_loss", LOSSES), (dino_loss, "koleo_loss", LOSSES),
            (dino, "clip_gradients", "clipping"), (self.optimizer, "step", "AdamW"),
            (self.model, "update_teacher", "the teacher's moving average")]
        with contextlib.ExitStack() as stack:
            for owner, name, part in ranges:
                stack.enter_context(mock.patch.object(owner, name, named(part, getattr(owner, name))))
            profile = stack.enter_context(torch.profiler.profile(record_shapes=True))
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
            synchronize()
            whole = time.perf_counter() - start
        weights = {tuple(p.shape) for p in self.model.parameters()}
        return {part: s / steps for part, s in split_by_part(profile.events(), weights, whole).items()}


@contextlib.contextmanager
def countable(device):
    """All products pass where FlopCounterMode sees them: no compiled code, and not the CPU's fused attention."""
    with torch.compiler.set_stance("force_eager"):
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext():
            yield


LOSSES = "losses and targets"
PARTS = {  # part -> its operators. What runs in a range of the part's name, or is the gradient of that, belongs to it too
    "matrix products": ("aten::mm", "aten::addmm", "aten::convolution", "aten::convolution_backward"),
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


def named(part, fn):
    """fn as a range of that name in the profile."""
    def call(*args, **kwargs):
        with torch.profiler.record_function(part):
            return fn(*args, **kwargs)
    return call


def split_by_part(events, weights, whole):
    """{part: seconds} of a profile that took `whole` seconds: of each operator the time that it spent itself.

    weights: shapes. What copies a tensor of such a shape is autocast, casting a weight or its gradient."""
    by_operator = {name: part for part, names in PARTS.items() for name in names}
    made_in = {}                                         # number of an autograd node -> range that made it
    parts, gpu = dict.fromkeys(PARTS, 0.0), torch.cuda.is_available()
    for event in sorted(events, key=lambda e: e.time_range.start):
        callers = [event]
        while callers[-1].cpu_parent:
            callers.append(callers[-1].cpu_parent)
        part = next((e.name for e in callers if e.name in PARTS), None)
        backward = callers[-1].name.startswith("autograd::engine")
        if backward:
            part = made_in.get(callers[-1].sequence_nr)
        elif event.sequence_nr >= 0:
            made_in[event.sequence_nr] = part            # the last to carry a number makes the node
        if part is None:
            part = next((by_operator[e.name] for e in reversed(callers) if e.name in by_operator), list(PARTS)[-2])
            cast = any(e.name == "aten::_to_copy" for e in callers)
            if part == "other casts and copies" and cast and tuple(event.input_shapes[0]) in weights:
                part = "casts of weights and their gradients"
        parts[part] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
    parts["between operators"] = whole - sum(parts.values())
    return parts


@command
def bench_cost(argv):
    """what a recipe costs on each architecture, counted on no device: FLOP per frame, GPU hours, bytes of parameters."""
    parser = flags_of("cost")
    flag = parser.add_argument
    flag("--archs", nargs="+", metavar="ARCH", default=["vitt14", "vits14", "vitb14", "vitl14", "vitg14"],
         help="architectures")
    flag("--recipes", nargs="+", choices=pretrain.RECIPES, default=["scratch", "scratch-long", "adapt"],
         help="rows of pretrain.py's table")
    flag("--gpus", type=int, default=8, help="processes, each with the recipe's --batch")
    flag("--rate", type=float, default=4e14,
         help="FLOP/s that one GPU is taken to sustain; an H100's peak in bf16 is 9.9e14")
    args = parser.parse_args(argv)
    rows = []
    for recipe, arch in itertools.product(args.recipes, args.archs):
        run = pretrain.parse(["--arch", arch, "--recipe", recipe, "--device", "cuda"])
        parameters, flops = counted(run)
        rows.append([recipe, arch, f"{parameters / 1e6:.0f}", f"{flops / 1e9:.0f}", f"{args.rate / flops:.0f}",
                     f"{run.steps:,} x {run.batch * args.gpus:,}",
                     f"{run.steps * run.batch * flops / args.rate / 3600:,.1f}", f"{20 * parameters / 2**30:.1f}"])
    header = ["recipe", "architecture", "million parameters", "GFLOP per frame", "frames/s per GPU", "steps x frames",
              "hours", "GiB of state"]
    print(f"\n**What a run costs on {args.gpus} GPUs, counted and not timed** "
          f"(torch {torch.__version__.split('+')[0]}; a GPU is taken to sustain {args.rate:.3g} FLOP/s)\n")
    print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]))
    print("\nMatrix products and attention of the teacher's forward pass and of the student's forward and backward pass. "
          "State: student, teacher, gradient and AdamW's two moments in float32, before --shard divides it; activations "
          "come on top. Traffic of the loss head and of the optimiser, decoding and communication are not in the hours.")


def counted(run):
    """(parameters of the student, FLOP of a step per frame) of a parsed pretrain.py run, without a number being
    computed."""
    B, S, s, L = run.batch, run.global_size, run.local_size, run.local_crops
    masked = round(0.15 * 2 * B * (S // 14) ** 2)        # half of the global crops hide 30 % of their patches
    # tensors of shapes without numbers, which trunc_normal_ would ask for
    with mock.patch("torch.nn.init.trunc_normal_"), FakeTensorMode(), FlopCounterMode(display=False) as counter:
        backbone = vit.build_vit(run.arch, image_size=S, drop_path=run.drop_path)
        D = backbone.dim
        heads = [dino_loss.DINOHead(D, run.prototypes, bottleneck_dim=run.bottleneck),
                 dino_loss.DINOHead(D, run.prototypes)]
        crops = [torch.empty(2 * B, 3, S, S), torch.empty(L * B, 3, s, s)]
        cls, teacher_cls, patches = (torch.empty(n, D, requires_grad=True) for n in ((2 + L) * B, 2 * B, masked))
        with torch.no_grad():
            backbone.eval()(crops[0])
            heads[0](teacher_cls), heads[1](patches)
        out = backbone.train().forward_packed(crops, [None, None])
        (sum(o["cls"].sum() for o in out) + heads[0](cls).sum() + heads[1](patches).sum()).backward()
    parts = [backbone, *heads[:1 + run.separate_heads]]
    return sum(p.numel() for part in parts for p in part.parameters()), counter.get_total_flops() / B


@command
def bench_probe(argv):
    """frames/s of frozen features in each number type."""
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    short = torch.bfloat16 if device.type == "cpu" else vit.precision(device)
    rows = []
    for arch, size in itertools.product(args.archs, args.sizes):
        model, frames = vit.build_vit(arch).to(device).eval(), torch.randn(args.batch, 3, size, size, device=device)

        def features(dtype, model=model, frames=frames):
            with vit.autocast(device, dtype), torch.inference_mode():
                model(frames)

        with FlopCounterMode(display=False) as counter, countable(device):
            features(torch.float32)
        t = seconds({dtype: functools.partial(features, dtype) for dtype in (torch.float32, short)}, args.runs)
        rows.append([arch, size, *(f"{args.batch / s:.1f}" for s in t.values()), f"{t[torch.float32] / t[short]:.2f}",
                     *(f"{counter.get_total_flops() / s / 1e12:.2f}" for s in t.values())])
    name = str(short)[6:]
    table(f"Frozen features, batch {args.batch}, forward only, decoding not included",
          ["architecture", "pixels", "float32 frames/s", f"{name} frames/s", "times", "float32 TFLOP/s",
           f"{name} TFLOP/s"], rows)


@command
def bench_live(argv):
    """ms per frame of live use, stage by stage: decoding, backbone, each head, overlay; and whether 25 frames/s are kept."""
    cuda = torch.cuda.is_available()
    parser = flags_of("live")
    flag = parser.add_argument
    flag("--archs", nargs="+", metavar="ARCH", help="architectures",
         default=["vits14", "vitb14", "vitl14"] if cuda else ["vitt14", "vits14", "vitb14"])
    flag("--sizes", nargs="+", type=int, default=[224, 518] if cuda else [224, 336],
         help="sides in pixels of the square that the backbone sees")
    flag("--frame", nargs=2, type=int, default=[576, 768], metavar=("H", "W"), help="pixels of a video's frame")
    flag("--batches", nargs="+", type=int, default=[1, 8], help="frames that wait for each other")
    flag("--precisions", nargs="+", choices=tuple(vit.PRECISIONS), default=["fp32", "bf16"], help="number types")
    flag("--frames", type=int, default=200 if cuda else 40, help="frames timed in each row")
    args = parser.parse_args(argv)
    rows = []
    for arch, size, precision, batch in itertools.product(args.archs, args.sizes, args.precisions, args.batches):
        rows.append([arch, size, precision, batch, *live_row(args, arch, size, vit.PRECISIONS[precision], batch)])
    table(f"Live: three heads on frames of {args.frame[1]}x{args.frame[0]}, median ms per frame",
          ["architecture", "pixels", "type", "batch", "decode", "squares", "backbone", "landmarks", "Mayo", "polyps",
           "overlay", "latency", "95 %", "99 %", "frames/s", "frames/s, a pass per head", "25 a second"], rows)


def live_row(args, arch, size, dtype, batch):
    """Times of predict.py's own stages, with heads of random weights: what they say costs the same."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, frame = vit.build_vit(arch).to(device).eval().requires_grad_(False), smooth_noise(*args.frame)
    loaded = random_heads(model, size)
    columns = predict.columns_of(loaded, 1)
    labels = {key: column for column in columns for key in loaded if column.startswith(f"{key} label")}
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
    passes = sum(statistics.median(lap[k] for _, lap in alone.laps) for k in ("squares", "backbone", *loaded)) / batch
    rest = sum(stages[k][0] for k in ("decode", "overlay")) / 1e3
    latency = stages.pop("latency")
    rate = batch / statistics.median(sum(lap.values()) for _, lap in watch.laps)
    order = ("decode", "squares", "backbone", *loaded, "overlay")
    return [*(f"{stages[k][0]:.1f}" for k in order), *(f"{ms:.1f}" for ms in latency), f"{rate:.1f}",
            f"{1 / (passes + rest):.1f}", "yes" if rate >= 25 else "no"]


def smooth_noise(height, width):
    """A PIL frame that a JPEG compresses about as well as an endoscope's."""
    low = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def random_heads(model, size):
    """{key: frozen.Head} of a landmark, a Mayo and a linear polyp head, all on stretched frames of one size."""
    D, device, last = model.dim, model.pos_embed.device, (model.depth - 1,)
    scale = dict(mean=torch.zeros(2 * D), std=torch.ones(2 * D))
    networks = {
        ("landmarks", "linear", 6): Softmax(1, True, **scale, weight=torch.randn(6, 2 * D), bias=torch.zeros(6)),
        ("mes", "ordinal", 4): Ordinal(1, True, **scale, direction=torch.randn(2 * D).double(),
                                       thresholds=torch.tensor([-1.0, 0, 1]).double()),
        ("polyps", "linear", 1): LinearHead(D, 1)}
    return {f"{task} {name}": frozen.Head(task, name, tuple(map(str, range(n))), size, "stretch", last, True, {}, {},
                                          network.to(device).eval().requires_grad_(False))
            for (task, name, n), network in networks.items()}


@command
def bench_curate(argv):
    """frames/s of each stage of curation at two sizes, and the hours that 10 million frames take by the measured growth."""
    import math
    import pathlib
    import tempfile
    from types import SimpleNamespace

    import curate
    import numpy as np
    from PIL import Image

    parser = argparse.ArgumentParser(prog="bench.py curate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--frames", type=int, nargs=2, default=[1500, 4500], help="the two sizes; below 1500 k-means has several starts")
    parser.add_argument("--checkpoint", help="backbone of the embedding stage; without it the untrained descriptor")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="processes that read images")
    args = parser.parse_args(argv)
    device, times, rng = "cuda" if torch.cuda.is_available() else "cpu", {}, np.random.default_rng(0)
    how = curate.embedder(SimpleNamespace(checkpoint=args.checkpoint, device=device))
    run_args = SimpleNamespace(workers=args.workers, device=device)

    def timed(name, fn):
        synchronize()
        start = time.perf_counter()
        result = fn()
        synchronize()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for i in range(16):  # smooth 512 px frames: their decoding costs what a frame's does
            Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).resize((640, 512), Image.BICUBIC).save(folder / f"{i}.jpg")
        for n in (512, *args.frames):  # the first warms up
            frames = curate.Listed(str(folder / f"{i % 16}.jpg") for i in range(n))
            rows, video = np.arange(n), np.arange(n) // 200
            timed("quality", lambda: curate.over_images(folder / f"q{n}.npy", frames, rows, curate.thumbnail, len(curate.QUALITY), np.float32,
                                                        curate.quality, run_args, "quality"))
            timed("embeddings", lambda: curate.over_images(folder / f"e{n}.npy", frames, rows, how[1], how[3], np.float16, how[2], run_args,
                                                           "embeddings"))
            file = np.lib.format.open_memmap(folder / f"x{n}.npy", "w+", np.float16, (n, how[3]))
            file[:] = rng.standard_normal((n, how[3]), dtype=np.float32)
            x = curate.Embeddings(file, rows, curate.moments_of(file, 0), device)
            timed("near-duplicates", lambda: curate.duplicates(x, video, np.ones(n), 0.95))
            tree = timed("hierarchical k-means", lambda: curate.hierarchy(x, curate.default_levels(n), 0, 3, lambda name, fn: fn()))
            timed("sampling", lambda: curate.balanced_sample(tree, rows, n // 4, rng))
    small, large = args.frames
    table_rows = []
    for name, (_, a, b) in times.items():
        growth = math.log(b / a) / math.log(large / small)
        table_rows.append([name, f"{small / a:.0f}", f"{large / b:.0f}", f"n^{growth:.2f}", f"{b * (1e7 / large) ** growth / 3600:.1f}"])
    table(f"Curation, {how[0]}, {args.workers} workers, one run of each",
          ["stage", f"frames/s at {small}", f"frames/s at {large}", "growth of the time", "hours for 10 million by that growth"], table_rows)
    print("\nOne run on whatever else the machine does. k-means compares every frame with every leaf: its growth nears n^2 up to 200,000 frames,"
          " where the leaves stop at 100,000, and is n beyond. From small sizes its last cell says too little: measure near your own.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "; ".join(f"{name}: {fn.__doc__.splitlines()[0]}" for name, fn in sorted(COMMANDS.items()))
    parser.add_argument("what", choices=sorted(COMMANDS), help=what)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="flags of the sub-command (--help shows them)")
    args = parser.parse_args(argv)
    COMMANDS[args.what](args.rest)


if __name__ == "__main__":
    main()
