"""Attention over many short sequences that lie packed in one tensor."""
import torch
import torch.nn.functional as F


def attention(qkv, runs, impl="auto"):
    """Softmax attention within each sequence of a packed batch.

    qkv (T_total, 3, nh, hd); runs ((count, length), ...) in packing order, Python ints with sum(count*length) == T_total.
    Returns (T_total, nh, hd).
    """
    out, start = [], 0
    for count, length in runs:
        stop = start + count * length
        q, k, v = qkv[start:stop].unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)  # each (count, nh, length, hd)
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))  # (count*length, nh, hd)
        start = stop
    return torch.cat(out)
