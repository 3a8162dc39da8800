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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(COMMANDS), help="; ".join(f"{n}: {f.__doc__.splitlines()[0]}" for n, f in sorted(COMMANDS.items())))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="flags of the sub-command (--help shows them)")
    args = parser.parse_args(argv)
    COMMANDS[args.what](args.rest)


if __name__ == "__main__":
    main()
