"""The prototype losses without stored targets, against DINOv2's numbers and against float64 written out pair by pair.

Most of these tests reach the operators through dino_loss. In this process the operators compute their formula (on a GPU: run
their kernels); test_again_with_kernels_interpreted runs the same tests in a child process where Triton's interpreter runs the
kernels; test_compiles_for_hopper_without_spills compiles them for a GPU that need not be there.
"""
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

import dino_loss
from custom_kernels import prototype_loss
from custom_kernels.prototype_loss import Targets, cross_entropy, log_sum_exp, rowwise_cross_entropy, sinkhorn_bias

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture
def fused(monkeypatch):
    """Targets are not stored and losses go through the operators, whatever the device."""
    monkeypatch.setattr(prototype_loss, "use_triton", lambda logits, impl="auto": True)


def textbook_sinkhorn(logits, temp, n_iters=3):
    """DINOv2's loop in logarithms: columns to a common total, then rows to one."""
    log_q = logits.double() / temp  # (n, K)
    for _ in range(n_iters):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def textbook_losses(student_global, student_local, student_patch, teacher, teacher_patch, masks, temp=0.1):
    """(DINO, iBOT) in the inputs' precision, one (student crop, teacher crop) pair and one image at a time; probabilities as targets."""
    def ce(p, s):
        return -(p * (s / temp).log_softmax(-1)).sum(-1)
    crops = [*student_global, *student_local]
    pairs = [ce(teacher[j], s).mean() for i, s in enumerate(crops) for j in (0, 1) if i != j]
    patches = ce(teacher_patch, student_patch).split(masks.sum(1).tolist())
    return sum(pairs) / len(pairs), sum(p.mean() for p in patches if len(p)) / len(masks)


def example(K, dtype=torch.float32, reach=None, B=3, L=4, seed=0):
    """Student and teacher logits (the head's cosines are within 1; reach: spread to +-reach) and masks, half the images unmasked."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2 * B, 5, dtype=torch.bool)
    masks[1, :4] = masks[3, 2:3] = masks[4, 1:4] = True
    tensors = [torch.randn(*shape, K, generator=g) / 2 for shape in ((2, B), (L, B), (masks.sum(),), (2, B), (masks.sum(),))]
    if reach:
        tensors = [(x * reach).clamp(-reach, reach) for x in tensors]
        for x in tensors:
            x[0, ..., 0], x[0, ..., 1] = reach, -reach
    return [x.to(DEVICE, dtype) for x in tensors], masks.to(DEVICE)


def value_and_gradients(losses, student, scale=1.0):
    """Detached losses, and the gradients of their weighted sum: as under a gradient scaler, so that float16 can hold them."""
    gradients = torch.autograd.grad((losses[0] + 2 * losses[1]) * scale, student)
    return torch.stack(losses).detach(), [g.double() / scale for g in gradients]


def run(tensors, masks, targets, losses, scale=1.0):
    student = [x.clone().requires_grad_() for x in tensors[:3]]
    return value_and_gradients(losses(*student, targets(tensors[3]), targets(tensors[4]), masks), student, scale)


def our_losses(student_global, student_local, student_patch, teacher, teacher_patch, masks):
    return [sum(dino_loss.dino_loss(student_global, student_local, teacher)), dino_loss.ibot_loss(student_patch, teacher_patch, masks)]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


# --- equal to the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [97, 1024, 2053])  # within one block of a kernel, exactly one, several with a ragged last
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_losses_and_gradients(fused, K, dtype, centering):
    tensors, masks = example(K, dtype)
    center = torch.randn(K, generator=torch.Generator().manual_seed(1)).to(DEVICE) / 4 if centering == "centering" else None

    def exact_targets(logits):
        rows = logits.flatten(0, -2).double()
        return (textbook_sinkhorn(rows, 0.05) if center is None else ((rows - center) / 0.05).softmax(-1)).view(logits.shape)

    exact, exact_gradients = run([x.double() for x in tensors], masks, exact_targets, textbook_losses)
    losses, gradients = run(tensors, masks, lambda x: dino_loss.teacher_targets(x, 0.05, center), our_losses, scale=2.0**12)
    assert losses.dtype == torch.float32
    assert_close(losses.double(), exact, rtol=1e-5, atol=0)
    for gradient, exact_gradient in zip(gradients, exact_gradients):
        assert error(gradient, exact_gradient) < (1e-4 if dtype == torch.float32 else 1e-3)  # float16 holds 11 bits of a gradient


def test_logits_of_200_are_as_accurate_as_plain_float32(fused, monkeypatch):
    """Exponents of 5000 leave float32 four digits, in any formula: the stored-target form sets the error that is allowed."""
    tensors, masks = example(301, reach=200.0)
    exact = run([x.double() for x in tensors], masks, lambda x: textbook_sinkhorn(x.flatten(0, -2), 0.04).view(x.shape), textbook_losses)
    ours = run(tensors, masks, lambda x: dino_loss.teacher_targets(x, 0.04), our_losses)
    monkeypatch.setattr(prototype_loss, "use_triton", lambda logits, impl="auto": False)
    plain = run(tensors, masks, lambda x: dino_loss.teacher_targets(x, 0.04), our_losses)
    for a, b, e in zip((ours[0], *ours[1]), (plain[0], *plain[1]), (exact[0], *exact[1])):
        assert a.isfinite().all() and error(a, e) < 2 * error(b, e) + 1e-5


def test_official_numbers(fused, reference, named_input):
    r, B, L, K = reference("losses"), 6, 5, 97
    teacher = (0.5 * named_input("teacher_cls", (2 * B, K))).unflatten(0, (2, B)).flip(0).to(DEVICE)  # the official rows stand swapped
    local = named_input("student_local", (L * B, K)).to(DEVICE).requires_grad_()
    across = named_input("student_global", (2 * B, K)).to(DEVICE).requires_grad_()
    targets = dino_loss.teacher_targets(teacher, 0.05)
    assert isinstance(targets, Targets)
    global_term, local_term = (2 + 2 * L) * torch.stack(
        dino_loss.dino_loss(across.unflatten(0, (2, B)), local.unflatten(0, (L, B)), targets)) / torch.tensor([2, 1], device=DEVICE)
    (local_term + global_term).backward()
    patch = named_input("student_patch", r["ibot_grad"].shape).to(DEVICE).requires_grad_()
    targets = dino_loss.teacher_targets(0.5 * named_input("teacher_patch", r["ibot_sinkhorn"].shape).to(DEVICE), 0.06)
    loss = dino_loss.ibot_loss(patch, targets, torch.from_numpy(r["ibot_masks"]).to(DEVICE))
    loss.backward()
    for ours, name in ((global_term, "dino_global_sum"), (local_term, "dino_local_sum"), (loss, "ibot_loss")):
        assert_close(ours.cpu(), torch.tensor(r[name]), rtol=1e-5, atol=0)
    for ours, name in ((local.grad, "grad_local"), (across.grad, "grad_global"), (patch.grad, "ibot_grad")):
        assert_close(ours.cpu(), torch.from_numpy(r[name]), rtol=1e-4, atol=1e-7)


def test_sinkhorn_bias_over_many_rows(fused):
    """More rows than one program of the column kernel takes; then one row; then rows that repeat."""
    g = torch.Generator().manual_seed(2)
    for logits in (torch.randn(1031, 37, generator=g) / 2, torch.randn(1, 37, generator=g), torch.randn(1, 37, generator=g).expand(5, 37)):
        logits = logits.to(DEVICE)
        targets = torch.softmax(logits / 0.07 + sinkhorn_bias(logits, 0.07), 1)
        assert error(targets, textbook_sinkhorn(logits, 0.07)) < 1e-5
    assert_close(targets, torch.full_like(targets, 1 / 37))  # nothing tells the repeated rows apart: every prototype gets its share


def test_no_rows_and_one_row(fused):
    (_, local, patch, teacher, _), masks = example(50, B=1)
    student = patch[:0].requires_grad_()
    loss = dino_loss.ibot_loss(student, dino_loss.teacher_targets(patch[:0], 0.05), masks & False)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 50)
    bias = torch.zeros(50, device=DEVICE)
    one = cross_entropy(local[0], Targets(teacher[0], bias, 0.05))
    assert_close(one, -((teacher[0] / 0.05).softmax(1) * (local[0] / 0.1).log_softmax(1)).sum(1))


def test_two_runs_agree_bit_for_bit(fused):
    tensors, masks = example(1500)
    first, second = (run(tensors, masks, lambda x: dino_loss.teacher_targets(x, 0.05), our_losses) for _ in range(2))
    for a, b in zip((first[0], *first[1]), (second[0], *second[1])):
        assert torch.equal(a, b)


# --- behaves as an operator -----------------------------------------------------------------------------------------------------


def operator_arguments(dtype=torch.float32):
    (_, local, _, teacher, _), _ = example(33, dtype, B=2, L=3)
    return local.flatten(0, 1).requires_grad_(), teacher.flatten(0, 1), torch.randn(33).to(DEVICE, local.dtype), 0.1, 0.05, 2, 2


def test_opcheck():
    student, teacher, bias, *rest = operator_arguments()
    torch.library.opcheck(rowwise_cross_entropy, (student, teacher, bias, *rest))
    strided = teacher.T.contiguous().T
    torch.library.opcheck(rowwise_cross_entropy, (student, strided, bias, *rest))
    for dim in (0, 1):
        torch.library.opcheck(log_sum_exp, (strided, torch.zeros(strided.shape[1 - (1 - dim)], device=DEVICE), 0.05, dim))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels compute in float32")
def test_formula_of_the_gradient():
    student, *rest = operator_arguments(torch.float64)
    assert torch.autograd.gradcheck(lambda s: rowwise_cross_entropy(s, *rest)[0], student)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_under_autocast(fused, dynamic):
    def step(student_global, student_local, teacher):
        with torch.autocast(DEVICE, torch.bfloat16):
            return sum(dino_loss.dino_loss(student_global, student_local, dino_loss.teacher_targets(teacher, 0.05)))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B in (3, 4):
        (student_global, student_local, _, teacher, _), _ = example(64, B=B)
        eager, graph = (torch.autograd.grad(f(s := student_local.clone().requires_grad_() * 1, s, teacher), s) if False else
                        gradients(f, student_global, student_local, teacher) for f in (step, compiled))
        for a, b in zip(eager, graph):
            assert_close(a, b)


def gradients(f, student_global, student_local, teacher):
    student = [x.clone().requires_grad_() for x in (student_global, student_local)]
    loss = f(*student, teacher)
    return loss.detach(), *torch.autograd.grad(loss, student)
