"""Fused GPU kernels. One file per kernel, one dispatcher per operation with its plain PyTorch definition beside it.

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
        return interpreter_defect() if interpreted() else "on the CPU only Triton's interpreter runs them (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{device} is not an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def interpreter_defect():
    """The interpreter of Triton 3.6 fails on numpy 2.4 and newer (triton issue 9171)."""
    triton, numpy = ([int(n) for n in importlib.metadata.version(name).split(".")[:2]] for name in ("triton", "numpy"))
    return "Triton 3.6 cannot interpret kernels with numpy 2.4 or newer" if triton == [3, 6] and numpy >= [2, 4] else None


@functools.cache
def say_once(line):
    if not in_process_group() or dist.get_rank() == 0:
        print(line)


def in_process_group():
    return dist.is_available() and dist.is_initialized()
