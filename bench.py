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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(COMMANDS), help="; ".join(f"{n}: {f.__doc__.splitlines()[0]}" for n, f in sorted(COMMANDS.items())))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="flags of the sub-command (--help shows them)")
    args = parser.parse_args(argv)
    COMMANDS[args.what](args.rest)


if __name__ == "__main__":
    main()
