"""Cross-entropy between student prototypes and teacher targets that are never stored.

Both normalisations of the teacher have one form, target = softmax_k(logits / temp + bias) with one number per prototype:
centring has bias = -center / temp, and Sinkhorn-Knopp ends by making rows sum to 1, so bias = log u of its column factors.

    targets = Targets(teacher_logits, sinkhorn_bias(teacher_logits, temp), temp)
    loss = cross_entropy(student_logits, targets, temp=0.1)                       # one loss per student row

`dino_loss.teacher_targets` makes such targets where the Triton kernels of prototype_loss_triton.py run, and plain probabilities
elsewhere. ENDODINO_PROTOTYPE_LOSS=torch switches the kernels off.
"""
import functools
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from custom_kernels import in_process_group, interpreted, say_once, why_no_triton_on


class Targets(NamedTuple):
    """Probabilities softmax(logits / temp + bias) that no one has written down."""
    logits: Tensor  # (..., K) float32 or float16
    bias: Tensor    # (K,) float32
    temp: float


def sinkhorn_bias(logits, temp, n_iters=3):
    """Sinkhorn-Knopp (Caron et al. 2020) as the bias (K,) of its targets; logits (n, K), n may differ between processes or be 0.

    With M = exp(logits / temp), a half-iteration scales the columns of diag(v) M diag(u) to one total over the rows of all
    processes, u = 1 / (v M), or its rows, v = 1 / (M u). Both are log-sum-exps over logits that are only read, so no range of
    logits overflows. The last row scaling is the softmax of whoever reads the targets: n_iters = 3 takes 5 passes.
    """
    log_v = logits.new_zeros(len(logits), dtype=wide(logits))             # (n,)
    for iteration in range(n_iters):
        if iteration > 0:
            log_v = -log_sum_exp(logits, log_u, temp, dim=1)              # every row: total 1
        log_u = -over_processes(log_sum_exp(logits, log_v, temp, dim=0))  # (K,) every column, all processes: total 1
    return log_u


def cross_entropy(student, targets, temp=0.1, shift=0, n_targets=1, impl="auto"):
    """-sum_k target_k log softmax(student / temp)_k for each student row, summed over its n_targets targets.

    student (..., K) -> (...) float32. Row i of the student, counted over all leading dimensions, meets row i + shift of the m
    target rows, modulo m, and with n_targets=2 also row i + 2 shift. So shift=0 pairs equal rows (iBOT); with the two teacher
    crops of B images, shift=B pairs a global crop with the other one, and n_targets=2 a local crop with both.
    No gradient reaches the targets. impl: auto | triton | torch; "triton" raises ValueError where the kernels cannot run.
    """
    rows, teacher = student.flatten(0, -2), targets.logits.flatten(0, -2)  # (n, K), (m, K)
    n, m = len(rows), len(teacher)
    if rows.shape[1] != teacher.shape[1] or n_targets not in (1, 2) or (n != m if shift == 0 else m == 0 or n * n_targets % m):
        raise ValueError(f"student logits {tuple(student.shape)} cannot be paired with {n_targets} each of the targets "
                         f"{tuple(targets.logits.shape)} at a shift of {shift} rows")
    if use_triton(rows, impl):
        loss = rowwise_cross_entropy(rows, teacher, targets.bias, temp, targets.temp, shift, n_targets)[0]
    else:
        loss = definition(rows, teacher.detach(), targets.bias, temp, targets.temp, shift, n_targets)[0]
    return loss.unflatten(0, student.shape[:-1])


def definition(student, teacher, bias, student_temp, teacher_temp, shift, n_targets):
    """What the cross-entropy kernel computes, in plain PyTorch: loss (n,) and the normalisers that its backward wants."""
    s = student.to(wide(student)) / student_temp                           # (n, K)
    x = teacher.to(wide(teacher)) / teacher_temp + bias                    # (m, K)
    pairs = paired_rows(len(student), len(teacher), shift, n_targets, student.device)
    target = torch.softmax(x, 1)[pairs].sum(1)                             # (n, K) its sum is n_targets
    loss = -(target * torch.log_softmax(s, 1)).sum(1)
    return loss, s.logsumexp(1), x.logsumexp(1)[pairs]


def paired_rows(n, m, shift, n_targets, device):
    """(n, n_targets) the teacher rows that each student row meets."""
    i = torch.arange(n, device=device)[:, None]
    return (i + torch.arange(1, n_targets + 1, device=device) * shift) % max(m, 1)


# --- which implementation ---------------------------------------------------------------------------------------------


def use_triton(logits, impl="auto"):
    """Whether the kernels take these logits. "auto" uses them on any GPU they are built for, "triton" insists, "torch" declines."""
    return triton_chosen(logits.device, logits.dtype, impl)


@torch.compiler.assume_constant_result
def triton_chosen(device, dtype, impl):
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}: it must be auto, triton or torch")
    if impl == "torch" or impl == "auto" and (device.type != "cuda" or os.environ.get("ENDODINO_PROTOTYPE_LOSS") == "torch"):
        return False
    if dtype == torch.bfloat16:
        raise ValueError("bfloat16 logits are too coarse for a teacher at temperature 0.04, where one rounding moves a probability "
                         "by up to 5 %: let the head return float32 or float16")
    obstacle = why_not_triton(device, dtype)
    if obstacle and impl == "triton":
        raise ValueError(f"the prototype loss kernels cannot run: {obstacle}")
    say_once(f"prototype loss: {f'plain PyTorch, because {obstacle}' if obstacle else 'Triton kernels'}")
    return obstacle is None


@functools.cache
def why_not_triton(device, dtype):
    """None where the kernels run, else the reason in words."""
    if dtype not in (torch.float32, torch.float16):
        return f"the logits are {dtype}, not float32 or float16"
    return why_no_triton_on(device)


def wide(x):
    """The type to compute in: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def over_processes(lse):
    """log-sum-exp over the processes of the process group, if there is one: (K,) -> (K,)."""
    if not in_process_group():
        return lse
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total = (lse - top).exp()
    dist.all_reduce(total)
    return top + total.log()


# --- the operators: opaque to torch.compile, with kernels on a GPU or under Triton's interpreter, and the formula on a CPU ----------


@torch.library.custom_op("endodino::prototype_log_sum_exp", mutates_args=())
def log_sum_exp(logits: Tensor, bias: Tensor, temp: float, dim: int) -> Tensor:
    """Log-sum-exp of logits / temp + bias, logits (n, K): over dim 1 with bias (K,) -> (n,), over dim 0 with bias (n,) -> (K,)."""
    if logits.is_cuda or interpreted():
        from custom_kernels import prototype_loss_triton as kernels
        return (kernels.row_lse if dim == 1 else kernels.column_lse)(logits.contiguous(), bias, temp)
    return (logits.to(wide(logits)) / temp + (bias if dim == 1 else bias[:, None])).logsumexp(dim)


@log_sum_exp.register_fake
def _(logits, bias, temp, dim):
    return logits.new_empty(logits.shape[1 - dim], dtype=wide(logits))


@torch.library.custom_op("endodino::prototype_cross_entropy", mutates_args=())
def rowwise_cross_entropy(student: Tensor, teacher: Tensor, bias: Tensor, student_temp: float, teacher_temp: float,
                          shift: int, n_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (n,), student's log-sum-exp (n,), its teachers' (n, n_targets); the arguments are those of `definition`."""
    if student.is_cuda or interpreted():
        from custom_kernels import prototype_loss_triton as kernels
        return kernels.cross_entropy(student.contiguous(), teacher.contiguous(), bias, student_temp, teacher_temp, shift, n_targets)
    return definition(student, teacher, bias, student_temp, teacher_temp, shift, n_targets)


@rowwise_cross_entropy.register_fake
def _(student, teacher, bias, student_temp, teacher_temp, shift, n_targets):
    rows = student.new_empty(len(student), dtype=wide(student))
    return rows, torch.empty_like(rows), rows.new_empty(len(student), n_targets)


@torch.library.custom_op("endodino::prototype_cross_entropy_backward", mutates_args=())
def rowwise_cross_entropy_backward(dloss: Tensor, student: Tensor, teacher: Tensor, bias: Tensor, student_lse: Tensor, teacher_lse: Tensor,
                                   student_temp: float, teacher_temp: float, shift: int) -> Tensor:
    """dloss / temp * (n_targets * softmax(student / temp) - sum of the targets), in the student's type: (n, K)."""
    if student.is_cuda or interpreted():
        from custom_kernels import prototype_loss_triton as kernels
        return kernels.cross_entropy_backward(dloss.contiguous(), student.contiguous(), teacher.contiguous(), bias,
                                              student_lse, teacher_lse, student_temp, teacher_temp, shift)
    n_targets = teacher_lse.shape[1]
    pairs = paired_rows(len(student), len(teacher), shift, n_targets, student.device)
    x = teacher.to(wide(teacher)) / teacher_temp + bias                    # (m, K)
    targets = (x[pairs] - teacher_lse[..., None]).exp().sum(1)             # (n, K)
    softmax = (student.to(wide(student)) / student_temp - student_lse[:, None]).exp()
    return (dloss[:, None] / student_temp * (n_targets * softmax - targets)).to(student.dtype)


@rowwise_cross_entropy_backward.register_fake
def _(dloss, student, teacher, bias, student_lse, teacher_lse, student_temp, teacher_temp, shift):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def keep_for_backward(ctx, inputs, output):
    student, teacher, bias, *ctx.rest, _ = inputs
    ctx.save_for_backward(student, teacher, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx, dloss, *_):
    return rowwise_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None, None


rowwise_cross_entropy.register_autograd(backward, setup_context=keep_for_backward)
