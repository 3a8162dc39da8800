"""Attention over many short sequences that lie packed in one tensor.

    out = attention(qkv, ((128, 257), (512, 50)))     # 128 sequences of 257 tokens, 512 of 50

On an NVIDIA GPU the Triton kernels of attention_triton.py run. On a CPU the batched products of
attention_products.py run where they are faster than the library, which depends on the type and
on the length. Elsewhere: PyTorch's scaled_dot_product_attention on views of the same tensor.
ENDODINO_ATTENTION=sdpa leaves everything to the library.
"""
import functools
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from custom_kernels import interpreted, say_once, why_no_triton_on
from custom_kernels.attention_products import (multiplications, no_second_derivative, pairs,
                                               products)

HEAD_DIM = 64  # the kernels know no other, and no ViT here has another
LOG2E = 1.4426950408889634

# GPU: sequences longer than this go to the library, whose products of long rows are better
# pipelined. Computed, not measured: moving q, k, v, o and their gradients once takes as long as
# their 14 hd FLOP per pair of tokens at about 460 tokens (H100: 3.0 TB/s, 800 TFLOP/s), and the
# library's copies of the packed gradient, which the kernels do not make, add half as many bytes
# again.
LONGEST = 640

# CPU: the longest sequences that the products take, (in training, without gradients). Longer
# ones, and types that do not stand here, go to the library. `python bench.py attention` prints
# the times that this comes from. Without gradients the products gain little (a fifth at 257
# tokens, on a CPU without bfloat16 tiles), and one with them would lose it to their float32
# scores: few tokens there.
LONGEST_PRODUCTS = {torch.bfloat16: (577, 101), torch.float32: (145, 0)}


def attention(qkv, runs, impl="auto"):
    """Softmax attention within each sequence of a packed batch: softmax(q k^T / sqrt(hd)) v.

    qkv (T_total, 3, nh, hd), any strides with unit last; runs ((count, length), ...) in packing
    order, few and Python ints, with sum(count * length) == T_total. Returns (T_total, nh, hd),
    in autocast's type where that is on.
    impl: auto | triton | products | sdpa. "triton" raises ValueError where the kernels cannot run
    (they also take CPU tensors under TRITON_INTERPRET=1); it and "products" insist at every
    length. No second derivative, except in "sdpa" where PyTorch has one.
    """
    total = sum(count * length for count, length in runs)
    if qkv.ndim != 4 or qkv.shape[1] != 3 or qkv.shape[0] != total:
        raise ValueError(f"qkv is {tuple(qkv.shape)}: it must be (T, 3, heads, head dimension) "
                         f"with T = {total}, the tokens of runs {runs}")
    if torch.is_autocast_enabled(qkv.device.type) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    if use_triton(qkv, runs, impl) and runs:
        return packed_attention(qkv, flat(runs))[0]
    return products_or_library(qkv, runs, impl)


def products_or_library(qkv, runs, impl):
    """Each run to whichever is faster; one call for all of them where they agree."""
    keep = torch.is_grad_enabled() and qkv.requires_grad
    longest = longest_products(qkv.device, qkv.dtype, keep, impl)
    win = [length <= longest for _, length in runs]
    if not any(win):
        return sdpa(qkv, runs)
    if all(win):
        return products(qkv, flat(runs), keep)[0]
    parts = qkv.split([count * length for count, length in runs])
    return torch.cat([products_or_library(part, (run,), impl) for part, run in zip(parts, runs)])


def sdpa(qkv, runs):
    """The same by the library, a call per run. q, k, v are views; their gradients are copied
    into one tensor."""
    runs = [run for run in runs if math.prod(run)]  # of nothing in 16 bits CUDA's returns None
    if not runs:
        return qkv[:, 0]
    return packed([F.scaled_dot_product_attention(*x.unbind(1)) for x in by_run(qkv, runs)])


def definition(qkv, runs):
    """What the forward kernel computes, in plain PyTorch: O (T, nh, hd) and L (nh, T), the
    scores' log-sum-exp in base 2."""
    out, lse = [], []
    for x in by_run(wide(qkv), runs):
        q, k, v = x.unbind(1)                                    # (count, nh, length, hd) each
        s = q @ k.mT * q.shape[-1] ** -0.5                       # (count, nh, length, length)
        lse.append(s.logsumexp(-1, keepdim=True))
        out.append((s - lse[-1]).exp() @ v)
    return packed(out).to(qkv.dtype), packed(lse).squeeze(-1).T.contiguous() * LOG2E


def definition_of_backward(dout, qkv, out, lse, runs):
    """What the backward kernels compute, in plain PyTorch (Dao 2022, appendix B): the gradient
    of qkv, (T, 3, nh, hd)."""
    gradients, scale = [], qkv.shape[-1] ** -0.5
    by_runs = [by_run(wide(y), runs) for y in (qkv, dout, out, lse.T[..., None] / LOG2E)]
    for x, do, o, l in zip(*by_runs):
        q, k, v = x.unbind(1)
        p = (q @ k.mT * scale - l).exp()
        ds = p * (do @ v.mT - (o * do).sum(-1, keepdim=True))
        gradients.append(torch.stack([ds @ k * scale, ds.mT @ q * scale, p.mT @ do], 1))
    return packed(gradients).to(qkv.dtype)


def by_run(x, runs):
    """(T, ..., hd) -> one (count, ..., length, hd) per run, views."""
    parts = x.split([count * length for count, length in runs])
    return [part.unflatten(0, run).movedim(1, -2) for part, run in zip(parts, runs)]


def packed(parts):
    """The inverse: (count, ..., length, hd) per run -> (T, ..., hd)."""
    parts = [part.movedim(-2, 1).flatten(0, 1) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def flat(runs):
    """count, length, count, length, ...: what an operator of PyTorch can be given."""
    return [n for run in runs for n in run]


def wide(x):
    """In the type to compute in: float32, or float64 for float64 inputs."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- which implementation ---------------------------------------------------------------------


@torch.compiler.assume_constant_result
def longest_products(device, dtype, training, impl):
    """Up to how many tokens batched products take a run. "auto": on CPUs, by the table."""
    if impl == "products":
        return 2**62
    if impl != "auto" or device.type != "cpu" or os.environ.get("ENDODINO_ATTENTION") == "sdpa":
        return 0
    in_training, without_gradients = LONGEST_PRODUCTS.get(dtype, (0, 0))
    return in_training if training else without_gradients


def use_triton(qkv, runs, impl="auto"):
    """Whether the kernels take this call. "auto" uses them on any GPU, type and length they pay
    for, "triton" insists, the others decline."""
    obstacle = None
    if qkv.shape[3] != HEAD_DIM:
        obstacle = f"the head dimension is not {HEAD_DIM}"
    elif impl == "auto" and any(length > LONGEST for _, length in runs):
        obstacle = f"there are sequences of more than {LONGEST} tokens"
    return triton_chosen(qkv.device, qkv.dtype, obstacle, impl)


@torch.compiler.assume_constant_result
def triton_chosen(device, dtype, obstacle, impl):
    if impl not in ("auto", "triton", "products", "sdpa"):
        raise ValueError(f"impl is {impl!r}: it must be auto, triton, products or sdpa")
    if impl in ("products", "sdpa") or impl == "auto" and device.type != "cuda":
        return False
    if impl == "auto" and os.environ.get("ENDODINO_ATTENTION") == "sdpa":
        obstacle = "ENDODINO_ATTENTION=sdpa"
    elif impl == "auto" and dtype == torch.float32:
        obstacle = obstacle or "in float32 the kernels, which keep to IEEE products, gain nothing"
    obstacle = obstacle or why_not_triton(device, dtype)
    if obstacle and impl == "triton":
        raise ValueError(f"the attention kernels cannot run: {obstacle}")
    taken = f"scaled_dot_product_attention, because {obstacle}" if obstacle else "Triton kernels"
    say_once(f"attention: {taken}")
    return obstacle is None


@functools.cache
def why_not_triton(device, dtype):
    """None where the kernels run, else the reason in words."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"qkv is {dtype}, not bfloat16, float16 or float32"
    if device.type == "cpu" and interpreted() and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"  # the bits, as integers
    return why_no_triton_on(device)


def kernels_take(qkv):
    return qkv.shape[3] == HEAD_DIM and why_not_triton(qkv.device, qkv.dtype) is None


# --- the operators: opaque to torch.compile; kernels where they run, elsewhere the definition ---


@torch.library.custom_op("endodino::attention", mutates_args=())
def packed_attention(qkv: Tensor, runs: list[int]) -> tuple[Tensor, Tensor]:
    """O (T, nh, hd) and L (nh, T) of `definition`, contiguous; runs flat."""
    if kernels_take(qkv):
        from custom_kernels import attention_triton as kernels
        return kernels.forward(unit_stride(qkv), pairs(runs))
    with torch.autocast(qkv.device.type, enabled=False):
        return definition(qkv, pairs(runs))


@packed_attention.register_fake
def _(qkv, runs):
    T, _, nh, hd = qkv.shape
    lse = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(T, nh, hd), qkv.new_empty(nh, T, dtype=lse)


@torch.library.custom_op("endodino::attention_backward", mutates_args=())
def packed_attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
                              runs: list[int]) -> Tensor:
    """The gradient of qkv, contiguous."""
    if kernels_take(qkv):
        from custom_kernels import attention_triton as kernels
        dout, out, lse = (x.contiguous() for x in (dout, out, lse))
        return kernels.backward(dout, unit_stride(qkv), out, lse, pairs(runs))
    with torch.autocast(qkv.device.type, enabled=False):
        return definition_of_backward(dout, qkv, out, lse, pairs(runs))


@packed_attention_backward.register_fake
def _(dout, qkv, out, lse, runs):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def unit_stride(qkv):
    return qkv if qkv.stride(-1) == 1 else qkv.contiguous()


def keep_for_backward(ctx, inputs, output):
    qkv, ctx.runs = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)


def backward(ctx, dout, _):
    return packed_attention_backward(dout, *ctx.saved_tensors, ctx.runs), None


packed_attention.register_autograd(backward, setup_context=keep_for_backward)
packed_attention_backward.register_autograd(no_second_derivative)


@register_flop_formula(torch.ops.endodino.attention)
def _(qkv_shape, runs, *_, **__):
    return 2 * 2 * multiplications(qkv_shape, runs)  # S, O


@register_flop_formula(torch.ops.endodino.attention_backward)
def _(dout_shape, qkv_shape, out_shape_, lse_shape, runs, *_, **__):
    return 2 * 5 * multiplications(qkv_shape, runs)  # S again, dP, dQ, dK, dV
