"""Attention as batched matrix products: what CPUs run. Not run by hand, attention.py dispatches
to it.

A run of sequences is worked on in pieces: n pairs of sequence and head, few enough that their
scores stay in a core's cache. For each piece

    S = Q K^T / sqrt(hd)      P = softmax(S)                     (n, length, length)
    O = P V                                                      (n, length, hd)
    dP = dO V^T               dS = P * (dP - sum_j P dP)         (n, length, length)
    dQ = dS K / sqrt(hd)      dK = dS^T Q / sqrt(hd)      dV = P^T dO

S and its softmax are float32 whatever the type: bfloat16 keeps 8 bits, which at a score of 10
makes a probability wrong by 3 %. The backward gets P from the forward, in qkv's type: to keep
the log-sum-exp alone and compute P anew took 1.4 times as long in bfloat16. For long sequences
P is too large to keep, and there the library is faster anyway.
"""
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

PIECE = 4 * 2**20  # bytes of a piece's scores, q, k and v in float32


@torch.library.custom_op("endodino::attention_products", mutates_args=())
def products(qkv: Tensor, runs: list[int], keep: bool) -> tuple[Tensor, Tensor]:
    """O (T, nh, hd), and P of all runs one after the other, flat, in qkv's type; empty unless
    it is to be kept for the backward.

    qkv (T, 3, nh, hd); runs flat: count, length, count, length, ...
    """
    out, kept = outputs(qkv, runs, keep)
    kept_by_run = probabilities(kept, qkv, runs) if keep else [None] * len(pairs(runs))
    with torch.autocast(qkv.device.type, enabled=False):
        for x, o, p_kept in zip(by_run(qkv, runs), by_run(out, runs), kept_by_run):
            for n, h in pieces(*x.shape):
                q, k, v = (heads_first(x[n, :, i, h]) for i in range(3))   # (n, length, hd) each
                s = scores(q, k)                                           # (n, length, length)
                p = p_kept[n, h].view_as(s) if keep else s.new_empty(s.shape, dtype=v.dtype)
                if s.dtype == p.dtype:
                    torch.softmax(s, -1, out=p)
                else:
                    p.copy_(s.softmax(-1))
                o[n, :, h] = tokens_first(p @ v, o[n, :, h])
    return out, kept


@products.register_fake
def outputs(qkv, runs, keep):
    T, _, nh, hd = qkv.shape
    size = nh * sum(count * length**2 for count, length in pairs(runs))
    return qkv.new_empty(T, nh, hd), qkv.new_empty(size if keep else 0)


@torch.library.custom_op("endodino::attention_products_backward", mutates_args=())
def products_backward(dout: Tensor, qkv: Tensor, kept: Tensor, runs: list[int]) -> Tensor:
    """The gradient of qkv, contiguous: where the projection's backward wants it."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    by_runs = *(by_run(y, runs) for y in (qkv, dout, dqkv)), probabilities(kept, qkv, runs)
    with torch.autocast(qkv.device.type, enabled=False):
        for x, do_run, dx, p_run in zip(*by_runs):
            for n, h in pieces(*x.shape):
                q, k, v = (heads_first(x[n, :, i, h]) for i in range(3))   # (n, length, hd) each
                do, p = heads_first(do_run[n, :, h]), p_run[n, h].flatten(0, 1)
                ds = torch._softmax_backward_data(do @ v.mT, p, -1, p.dtype)
                for i, gradient in enumerate((scaled(ds, k), scaled(ds.mT, q), p.mT @ do)):
                    dx[n, :, i, h] = tokens_first(gradient, do_run[n, :, h])
    return dqkv


@products_backward.register_fake
def _(dout, qkv, kept, runs):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


# --- pieces -----------------------------------------------------------------------------------


def pieces(count, length, _, heads, hd):
    """Slices (sequences, heads) that cover a run, each of few pairs; heads are cut only where
    those of one sequence are too many."""
    if length == 0:
        return
    at_once = max(1, PIECE // (4 * length * (length + 3 * hd)))
    n, h = max(1, at_once // heads), min(at_once, heads)
    for i in range(0, count, n):
        for j in range(0, heads, h):
            yield slice(i, i + n), slice(j, j + h)


def pairs(runs):
    """Flat runs -> ((count, length), ...)."""
    return tuple(zip(runs[::2], runs[1::2]))


def by_run(x, runs):
    """(T, ...) -> one (count, length, ...) per run, views."""
    parts = x.split([count * length for count, length in pairs(runs)])
    return [part.unflatten(0, run) for part, run in zip(parts, pairs(runs))]


def probabilities(kept, qkv, runs):
    """The flat P -> one (count, nh, length, length) per run, views."""
    nh = qkv.shape[2]
    shapes = [(count, nh, length, length) for count, length in pairs(runs)]
    parts = kept.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def heads_first(x):
    """(sequences, length, heads, hd) -> (pairs, length, hd). A copy, whose rows lie together as
    the products want them; of a piece alone, so that it stays in the cache."""
    return x.transpose(1, 2).contiguous().flatten(0, 1)


def tokens_first(x, like):
    """The inverse, a view of the shape of `like`."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def scores(q, k):
    """q k^T / sqrt(hd), in float32, or in float64 for float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return scaled(q.to(wide), k.to(wide).mT, q.shape[2])


def scaled(a, b, hd=None):
    """a b / sqrt(hd), without a pass of its own for the division."""
    ignored = a.new_empty(())  # for beta is 0
    return torch.baddbmm(ignored, a, b, beta=0, alpha=(hd or b.shape[2]) ** -0.5)


# --- gradients and FLOP -----------------------------------------------------------------------


def keep_for_backward(ctx, inputs, output):
    qkv, ctx.runs, _ = inputs
    ctx.save_for_backward(qkv, output[1])
    ctx.mark_non_differentiable(output[1])


def backward(ctx, dout, _):
    return products_backward(dout, *ctx.saved_tensors, ctx.runs), None, None


def no_second_derivative(ctx, *_):
    raise NotImplementedError('attention has no second derivative: attention(..., impl="sdpa") '
                              "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH) has one")


products.register_autograd(backward, setup_context=keep_for_backward)
products_backward.register_autograd(no_second_derivative)


def multiplications(qkv_shape, runs):
    """Of one product of length x length x hd in each head."""
    return sum(count * length**2 for count, length in pairs(runs)) * qkv_shape[2] * qkv_shape[3]


@register_flop_formula(torch.ops.endodino.attention_products)
def _(qkv_shape, runs, *_, **__):
    return 2 * 2 * multiplications(qkv_shape, runs)  # S, O


@register_flop_formula(torch.ops.endodino.attention_products_backward)
def _(dout_shape, qkv_shape, kept_shape, runs, *_, **__):
    return 2 * 4 * multiplications(qkv_shape, runs)  # dP, dQ, dK, dV; P was kept
