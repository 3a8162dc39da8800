"""Every performance number that the README quotes.

    python bench.py model            images/s and FLOP/s of each architecture
    python bench.py --help           the other sub-commands

Candidates of one table run in turn (A B A B ...) in one process; the median is printed, so a ratio holds when the
machine's speed drifts. Peak memory is what a call needs beyond what was already held.
"""
import argparse
import os
import platform
import statistics
import time

import torch


def seconds(candidates, runs=7, warmup=1):
    """{name: function} -> {name: median seconds of `runs` calls}, the functions called in turn."""
    times = {name: [] for name in candidates}
    for i in range(warmup + runs):
        for name, fn in candidates.items():
            synchronize()
            start = time.perf_counter()
            fn()
            synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def peak_bytes(fn):
    """Bytes that one call of fn needs at its peak beyond what is held before it: GPU memory, or resident memory on Linux."""
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
    print(f"\n**{title}** ({device_name()}, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()})\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


COMMANDS = {}  # name -> function(argv); the docstring's first line is the help


def command(fn):
    COMMANDS[fn.__name__.removeprefix("bench_")] = fn
    return fn


@command
def bench_model(argv):
    """images/s and FLOP/s of each architecture; packed multi-crop against separate calls."""
    from torch.utils.flop_counter import FlopCounterMode
    from vit import ARCHS, build_vit

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.py model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=list(ARCHS), metavar="ARCH", help="architectures",
                        default=["vits14", "vitb14", "vitl14", "vitg14"] if cuda else ["vitt14", "vits14", "vitb14"])
    parser.add_argument("--batch", type=int, default=64 if cuda else 4, help="images of 224 px; the multi-crop batch holds as many frames")
    parser.add_argument("--runs", type=int, default=20 if cuda else 5, help="timed calls of each candidate")
    args = parser.parse_args(argv)
    device, rows, pack_rows = torch.device("cuda" if cuda else "cpu"), [], []
    for arch in args.archs:
        model = build_vit(arch).to(device).train()
        images = torch.randn(args.batch, 3, 224, 224, device=device)
        crops = [torch.randn(2 * args.batch, 3, 224, 224, device=device), torch.randn(8 * args.batch, 3, 98, 98, device=device)]

        def call(fn, backward, model=model):
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda), torch.set_grad_enabled(backward):
                loss = sum(out["cls"].float().square().mean() for out in fn(model))
            if backward:
                loss.backward()
                model.zero_grad()

        def forward(m):
            return [m(images)]

        def packed(m):
            return m.forward_packed(crops, [None, None])

        def separate(m):
            return [m(c) for c in crops]

        with FlopCounterMode(display=False) as counter:
            call(forward, True)
        flops = counter.get_total_flops()  # forward and backward; the forward is a third of it
        t = seconds({"f": lambda: call(forward, False), "fb": lambda: call(forward, True)}, args.runs)
        rows.append([arch, f"{args.batch / t['f']:.1f}", f"{flops / 3 / t['f'] / 1e12:.3f}", f"{args.batch / t['fb']:.1f}",
                     f"{flops / t['fb'] / 1e12:.3f}"])
        t = seconds({"packed": lambda: call(packed, True), "separate": lambda: call(separate, True)}, args.runs)
        pack_rows.append([arch, f"{t['packed'] * 1e3:.0f}", f"{t['separate'] * 1e3:.0f}", f"{t['packed'] / t['separate']:.3f}"])
    table(f"Backbone at 224 px, batch {args.batch}, {'bf16 autocast' if cuda else 'float32'}",
          ["architecture", "forward images/s", "TFLOP/s", "forward + backward images/s", "TFLOP/s"], rows)
    table(f"2 x 224 px and 8 x 98 px crops of {args.batch} frames, forward + backward",
          ["architecture", "packed ms", "separate ms", "packed / separate"], pack_rows)


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

    def textbook(logits, temp):
        """DINOv2's loop, its divisions in place: two sums over the matrix and two divisions of it per iteration."""
        q = torch.exp(logits / temp).t()
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True)
            q /= q.shape[0]
            q /= q.sum(0, keepdim=True)
            q /= q.shape[1]
        q *= q.shape[1]
        return q.t()

    forms = {"textbook loop, in place": textbook, "scaling vectors": sinkhorn, "logarithms (range too wide for exp)": sinkhorn_log_domain}
    forms = {name: lambda form=form: form(logits, temp) for name, form in forms.items()}
    times = seconds(forms, args.runs)
    slowest, exact = times["textbook loop, in place"], forms["textbook loop, in place"]()
    rows = []
    for name, form in forms.items():
        error = ((form() - exact).norm() / exact.norm()).item()
        rows.append([name, f"{times[name] * 1e3:.1f}", f"{slowest / times[name]:.2f}", f"{peak_bytes(form) / 2**20:.0f}", f"{error:.1e}"])
    table(f"Sinkhorn-Knopp, {args.rows} x {args.prototypes}, 3 iterations, temperature {temp}",
          ["form", "ms", "times faster", "peak MiB", "relative difference"], rows)


@command
def bench_input(argv):
    """Frames/s of one core through the multi-crop: PIL crop by crop, ours on the CPU, ours without the device's half."""
    import math
    import tempfile
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from data import BlockMasks, Frames, MultiCrop, augment, collate, stream
    from synthetic import frames_of

    parser = argparse.ArgumentParser(prog="bench.py input", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, help="JPEG frames of each size")
    parser.add_argument("--runs", type=int, default=7, help="timed passes over the frames of each candidate")
    parser.add_argument("--rate", type=int, default=700, help="images/s that a GPU takes, such as one that trains ViT-B")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in a loader's worker
    kinds = ("colon", "cecum", "z-line", "retroflex-stomach", "mayo-0", "mayo-2", "mayo-3", "pylorus")
    jobs = [dict(seed=0, scope=1, kind=kinds[i % 8], patient=i, place=0, images=[None], masks=None, video=False, size=256) for i in range(args.frames)]
    small = [Image.fromarray(next(frames_of(job))[0]) for job in jobs]
    rows, errors = [], []
    for height, width in ((512, 640), (1080, 1350)):
        with tempfile.TemporaryDirectory() as folder:
            for i, image in enumerate(small):
                large = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
                large += stream(0, 0, i).normal(0, 3, large.shape)  # a sensor's noise: as many bytes to decode as real frames have
                Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i:03d}.jpg", quality=90)
            size = sum(p.stat().st_size for p in Path(folder).iterdir()) / args.frames
            frames, keys = Frames(folder), [(0, i, 0, i) for i in range(args.frames)]
            ours, exact, classical = MultiCrop(frames), MultiCrop(frames, exact_decode=True), pil_multicrop()
            masks = BlockMasks((16, 16), args.frames)
            t = seconds({
                "PIL, one crop at a time (torchvision transforms)": lambda: [classical(frames.path(i)) for i in range(args.frames)],
                "ours, both halves on the CPU": lambda: augment(collate(ours[keys], masks), "cpu"),
                "ours, CPU half": lambda: collate(ours[keys], masks),
                "ours, CPU half, --exact-decode": lambda: collate(exact[keys], masks)}, args.runs)
            slowest = next(iter(t.values()))
            rows += [[f"{height}x{width}, {size / 1e3:.0f} kB", name, f"{args.frames / s:.1f}", f"{slowest / s:.2f}", math.ceil(args.rate * s / args.frames)]
                     for name, s in t.items()]
            errors.append([f"{height}x{width}", *reduced_error(ours)])
    table(f"Multi-crop input, 2 x 224 px and 8 x 98 px of a JPEG frame, one thread, medians of {args.runs} alternating passes over {args.frames} frames",
          ["frame", "pipeline", "frames/s per core", "times PIL", f"cores for {args.rate} images/s"], rows)
    table("Crops of reduced decoding against the same crops of the whole frame, absolute difference in grey levels",
          ["frame", "frames reduced by", "mean", "99 %", "99.9 %", "largest"], errors)


def reduced_error(multicrop):
    """Which factors the frames are reduced by, and mean, percentiles and maximum of what that does to their crops, in grey levels."""
    import numpy as np
    from data import cut, decode, opened, stream

    factors, differences = [], []
    for i in range(len(multicrop.frames)):
        with opened(multicrop.frames.path(i)) as image:
            boxes, flips, _ = multicrop.draw(stream(multicrop.seed, 0, 0, i), *image.size)
            factors.append(multicrop.spare(boxes))
            small = decode(image, factors[-1])
        with opened(multicrop.frames.path(i)) as image:
            whole = decode(image)
        boxes = [[round(x / factors[-1]) for x in box] for box in boxes]
        pairs = zip(cut(small, boxes, multicrop.sizes, flips),
                    cut(whole, [[x * factors[-1] for x in box] for box in boxes], multicrop.sizes, flips))
        differences += [(a.int() - b.int()).abs().flatten().numpy() for a, b in pairs if factors[-1] > 1]
    counts = ", ".join(f"{f}: {factors.count(f)}" for f in sorted(set(factors)))
    d = np.concatenate(differences or [np.zeros(1, int)])
    return [counts, f"{d.mean():.2f}", *(f"{q:.0f}" for q in np.percentile(d, (99, 99.9))), d.max()]


def pil_multicrop():
    """path -> the ten crops of DINOv2's augmentation as executed, composed of torchvision's PIL transforms."""
    from PIL import Image
    from torchvision import transforms as T

    def view(size, scale, *extra):
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        return T.Compose([T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(), jitter,
                          T.RandomGrayscale(0.2), *extra, T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def blur(p):
        return T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=p)

    views = [view(224, (0.32, 1)), view(224, (0.32, 1), blur(0.9), T.RandomSolarize(128, 0.2))] + [view(98, (0.05, 0.32), blur(0.5))] * 8

    def crops(path):
        image = Image.open(path).convert("RGB")
        return [v(image) for v in views]
    return crops


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(COMMANDS), help="; ".join(f"{n}: {f.__doc__.splitlines()[0]}" for n, f in sorted(COMMANDS.items())))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="flags of the sub-command (--help shows them)")
    args = parser.parse_args(argv)
    COMMANDS[args.what](args.rest)


if __name__ == "__main__":
    main()
