"""Fused kernels: for each operation a dispatcher with its definition in plain PyTorch, kernels
in files of their own, and a benchmark (bench_*.py).

What every dispatcher asks before it takes the kernels stands here.
"""
import functools
import importlib.metadata
import importlib.util
import os

import torch
import torch.distributed as dist


def why_no_triton_on(device):
    """None where Triton kernels run on that device, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if interpreted():
            return interpreter_defect()
        return "on the CPU only Triton's interpreter runs them (TRITON_INTERPRET=1)"
    nvidia = device.type == "cuda" and not torch.version.hip
    if not nvidia or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{device} is not an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def interpreter_defect():
    """The interpreter of Triton 3.6 fails on numpy 2.4 and newer (triton issue 9171)."""
    def release(package):
        return [int(n) for n in importlib.metadata.version(package).split(".")[:2]]
    if release("triton") == [3, 6] and release("numpy") >= [2, 4]:
        return "Triton 3.6 cannot interpret kernels with numpy 2.4 or newer"
    return None


@functools.cache
def say_once(line):
    if not in_process_group() or dist.get_rank() == 0:
        print(line)


def in_process_group():
    return dist.is_available() and dist.is_initialized()


def all_reduce(x, op="SUM"):
    """x reduced over the process group, in place; x itself where there is no group. op: "SUM"
    or "MAX"."""
    if in_process_group():
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
    return x
