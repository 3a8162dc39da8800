"""Clocks, peak memory and tables for every benchmark.

Candidates of one table run in turn (A B A B ...) in one process; the median is printed, so a
ratio holds when the machine's speed drifts. Peak memory is what a call needs beyond what was
already held.
"""
import ctypes
import os
import platform
import statistics
import time

import torch


def seconds(candidates, runs=7, warmup=1, clock=time.perf_counter):
    """{name: function} -> {name: median seconds of `runs` calls}, the functions called in
    turn."""
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


def event_seconds(candidates, runs, warmup=5):
    """As `seconds`, on the GPU's own clock: the time of the launches on the processor does not
    count."""
    times = {name: [] for name in candidates}
    for i in range(warmup + runs):
        for name, fn in candidates.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            stop.record()
            stop.synchronize()
            if i >= warmup:
                times[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(fn):
    """Bytes that one call of fn needs at its peak beyond what is held before: GPU memory, or
    resident memory on Linux."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):
        return float("nan")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # else the call could take freed memory that is still resident
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the high-water mark of resident memory
    before = resident("VmRSS")
    fn()
    return resident("VmHWM") - before


def resident(field):
    """Bytes of one memory field of this process (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def table(title, header, rows, device=None):
    """Print a GitHub Markdown table under a line that names the device and the versions."""
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    print(f"\n**{title}** ({device or device_name()}, {versions})\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
