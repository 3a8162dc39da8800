"""Cross-entropy between student prototypes and teacher targets that are never stored.

Both normalisations of the teacher have one form, target = softmax_k(logits / temp + bias) with
one number per prototype: centring has bias = -center / temp, and Sinkhorn-Knopp ends by making
rows sum to 1, so bias = log u of its column factors.

    targets = Targets(teacher_logits, sinkhorn_bias(teacher_logits, temp), temp)
    loss = cross_entropy(student_logits, targets, temp=0.1)          # one loss per student row

`dino_loss.teacher_targets` makes such targets where the Triton kernels of
prototype_loss_triton.py run, and plain probabilities elsewhere. ENDODINO_PROTOTYPE_LOSS=torch
switches the kernels off.
"""
import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from custom_kernels import all_reduce, in_process_group, say_once, why_no_triton_on


class Targets(NamedTuple):
    """Probabilities softmax(logits / temp + bias) that no one has written down."""
    logits: Tensor  # (..., K) float32 or float16
    bias: Tensor    # (K,) float32
    temp: float


def sinkhorn_bias(logits, temp, n_iters=3, lse=None):
    """Sinkhorn-Knopp (Caron et al. 2020) as the bias (K,) of its targets; logits (n, K), n may
    differ between processes or be 0.

    With M = exp(logits / temp), a half-iteration scales the columns of diag(v) M diag(u) to one
    total over the rows of all processes, u = 1 / (v M), or its rows, v = 1 / (M u). Both are
    log-sum-exps over logits that are only read, so no range of logits overflows. The last row
    scaling is the softmax of whoever reads the targets: n_iters = 3 takes 5 passes.
    lse: log_sum_exp, which takes kernels where they run, unless told otherwise.
    """
    lse = lse or log_sum_exp
    log_v = logits.new_zeros(len(logits), dtype=wide(logits))             # (n,)
    for iteration in range(n_iters):
        if iteration > 0:
            log_v = -lse(logits, log_u, temp, 1)                          # (n,) each row: 1
        log_u = -over_processes(lse(logits, log_v, temp, 0))              # (K,) each column: 1
    return log_u


def cross_entropy(student, targets, temp=0.1, shift=0, n_targets=1, impl="auto"):
    """-sum_k target_k log softmax(student / temp)_k for each student row, summed over its
    targets.

    student (..., K) -> (...) float32. Row i of the student, counted over all leading
    dimensions, meets row i + shift of the m target rows, modulo m, and with n_targets=2 also
    row i + 2 shift. For B = 2 images, with the teacher's two crops a and b:

        teacher     student, patches     student, a and b       student, local crops c, d, ...
        0  a 1      0  meets  0          0  a 1  meets  2       0  c 1  meets  2 and 0
        1  a 2      1  meets  1          1  a 2  meets  3       1  c 2  meets  3 and 1
        2  b 1      2  meets  2          2  b 1  meets  0       2  d 1  meets  0 and 2
        3  b 2      3  meets  3          3  b 2  meets  1       3  d 2  meets  1 and 3
                    shift=0              shift=B                shift=B, n_targets=2

    No gradient reaches the targets. impl: auto | triton | torch; "triton" raises ValueError where
    the kernels cannot run.
    """
    rows, teacher = student.flatten(0, -2), targets.logits.flatten(0, -2)  # (n, K), (m, K)
    n, m = len(rows), len(teacher)
    even = n == m if shift == 0 else m > 0 and n * n_targets % m == 0      # all targets equally often
    if rows.shape[1] != teacher.shape[1] or n_targets not in (1, 2) or not even:
        shapes = tuple(student.shape), tuple(targets.logits.shape)
        raise ValueError(f"student logits {shapes[0]} cannot be paired with {n_targets} each of the "
                         f"targets {shapes[1]} at a shift of {shift} rows")
    arguments = rows, teacher.detach(), targets.bias, temp, targets.temp, shift, n_targets
    loss = (rowwise_cross_entropy if use_triton(rows, impl) else definition)(*arguments)[0]
    return loss.unflatten(0, student.shape[:-1])


def definition(student, teacher, bias, student_temp, teacher_temp, shift, n_targets):
    """What the cross-entropy kernel computes, in plain PyTorch: the losses (n,) and the
    normalisers that its backward wants, (n,) of the student and (n, n_targets) of the
    teacher."""
    s = student.to(wide(student)) / student_temp                           # (n, K)
    x = teacher.to(wide(teacher)) / teacher_temp + bias                    # (m, K)
    pairs = paired_rows(len(student), len(teacher), shift, n_targets, student.device)
    target = torch.softmax(x, 1)[pairs].sum(1)                             # (n, K) sums to n_targets
    loss = -(target * torch.log_softmax(s, 1)).sum(1)
    return loss, s.logsumexp(1), x.logsumexp(1)[pairs]


def definition_of_backward(dloss, student, teacher, bias, student_lse, teacher_lse,
                           student_temp, teacher_temp, shift):
    """What its backward kernel computes: the student's gradient, (n, K)."""
    n_targets = teacher_lse.shape[1]
    pairs = paired_rows(len(student), len(teacher), shift, n_targets, student.device)
    x = teacher.to(wide(teacher)) / teacher_temp + bias                    # (m, K)
    targets = (x[pairs] - teacher_lse[..., None]).exp().sum(1)             # (n, K)
    softmax = (student.to(wide(student)) / student_temp - student_lse[:, None]).exp()
    return (dloss[:, None] / student_temp * (n_targets * softmax - targets)).to(student.dtype)


def definition_of_log_sum_exp(logits, bias, temp, dim):
    """What the log-sum-exp kernels compute."""
    bias = bias if dim == 1 else bias[:, None]
    return (logits.to(wide(logits)) / temp + bias).logsumexp(dim)


def paired_rows(n, m, shift, n_targets, device):
    """(n, n_targets) the teacher rows that each student row meets."""
    i = torch.arange(n, device=device)[:, None]
    return (i + torch.arange(1, n_targets + 1, device=device) * shift) % max(m, 1)


def wide(x):
    """The type to compute in: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def over_processes(lse):
    """log-sum-exp over the processes of the process group, if there is one: (K,) -> (K,)."""
    if not in_process_group():
        return lse
    top = all_reduce(lse.clone(), "MAX")
    return top + all_reduce((lse - top).exp()).log()


# --- which implementation ---------------------------------------------------------------------


def use_triton(logits, impl="auto"):
    """Whether the kernels take these logits. "auto" uses them on any GPU they are built for,
    "triton" insists, "torch" declines."""
    return triton_chosen(logits.device, logits.dtype, impl)


@torch.compiler.assume_constant_result
def triton_chosen(device, dtype, impl):
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}: it must be auto, triton or torch")
    switched_off = device.type != "cuda" or os.environ.get("ENDODINO_PROTOTYPE_LOSS") == "torch"
    if impl == "torch" or impl == "auto" and switched_off:
        return False
    if dtype == torch.bfloat16:
        raise ValueError("bfloat16 logits are too coarse for a teacher at temperature 0.04, where one "
                         "rounding moves a probability by up to 5 %: let the head return float32 or float16")
    obstacle = why_not_triton(device, dtype)
    if obstacle and impl == "triton":
        raise ValueError(f"the prototype loss kernels cannot run: {obstacle}")
    taken = f"plain PyTorch, because {obstacle}" if obstacle else "Triton kernels"
    say_once(f"prototype loss: {taken}")
    return obstacle is None


@functools.cache
def why_not_triton(device, dtype):
    """None where the kernels run, else the reason in words."""
    if dtype not in (torch.float32, torch.float16):
        return f"the logits are {dtype}, not float32 or float16"
    return why_no_triton_on(device)


def kernels_take(logits):
    return why_not_triton(logits.device, logits.dtype) is None


# --- the operators: opaque to torch.compile; kernels where they run, elsewhere the definition ---


@torch.library.custom_op("endodino::prototype_log_sum_exp", mutates_args=())
def log_sum_exp(logits: Tensor, bias: Tensor, temp: float, dim: int) -> Tensor:
    """Log-sum-exp of logits / temp + bias, logits (n, K): over dim 1 with bias (K,) -> (n,),
    over dim 0 with bias (n,) -> (K,)."""
    if kernels_take(logits):
        from custom_kernels import prototype_loss_triton as kernels
        lse = kernels.row_lse if dim == 1 else kernels.column_lse
        return lse(logits.contiguous(), bias, temp)
    return definition_of_log_sum_exp(logits, bias, temp, dim)


@log_sum_exp.register_fake
def _(logits, bias, temp, dim):
    return logits.new_empty(logits.shape[1 - dim], dtype=wide(logits))


@torch.library.custom_op("endodino::prototype_cross_entropy", mutates_args=())
def rowwise_cross_entropy(student: Tensor, teacher: Tensor, bias: Tensor,
                          student_temp: float, teacher_temp: float, shift: int,
                          n_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (n,), student's log-sum-exp (n,), its teachers' (n, n_targets); arguments as
    `definition`."""
    numbers = student_temp, teacher_temp, shift, n_targets
    if kernels_take(student):
        from custom_kernels import prototype_loss_triton as kernels
        return kernels.cross_entropy(student.contiguous(), teacher.contiguous(), bias, *numbers)
    return definition(student, teacher, bias, *numbers)


@rowwise_cross_entropy.register_fake
def _(student, teacher, bias, student_temp, teacher_temp, shift, n_targets):
    rows = student.new_empty(len(student), dtype=wide(student))
    return rows, torch.empty_like(rows), rows.new_empty(len(student), n_targets)


@torch.library.custom_op("endodino::prototype_cross_entropy_backward", mutates_args=())
def rowwise_cross_entropy_backward(dloss: Tensor, student: Tensor, teacher: Tensor, bias: Tensor,
                                   student_lse: Tensor, teacher_lse: Tensor, student_temp: float,
                                   teacher_temp: float, shift: int) -> Tensor:
    """dloss / temp * (n_targets * softmax(student / temp) - sum of the targets), in the
    student's type: (n, K)."""
    rest = bias, student_lse, teacher_lse, student_temp, teacher_temp, shift
    if kernels_take(student):
        from custom_kernels import prototype_loss_triton as kernels
        dloss, student, teacher = (x.contiguous() for x in (dloss, student, teacher))
        return kernels.cross_entropy_backward(dloss, student, teacher, *rest)
    return definition_of_backward(dloss, student, teacher, *rest)


@rowwise_cross_entropy_backward.register_fake
def _(dloss, student, teacher, bias, student_lse, teacher_lse, student_temp, teacher_temp, shift):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def keep_for_backward(ctx, inputs, output):
    student, teacher, bias, *ctx.rest, _ = inputs
    ctx.save_for_backward(student, teacher, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx, dloss, *_):
    dstudent = rowwise_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.rest)
    return dstudent, None, None, None, None, None, None


rowwise_cross_entropy.register_autograd(backward, setup_context=keep_for_backward)
