"""The prototype losses without stored targets, against DINOv2's numbers and against float64
written out pair by pair.

Most of these tests reach the operators through dino_loss. In this process the operators compute
their formula (on a GPU: run their kernels); test_again_with_kernels_interpreted runs the same
tests in a child process where Triton's interpreter runs the kernels;
test_compiles_for_hopper_without_spills compiles them for a GPU that need not be there.
"""
import functools
import importlib.util
import os
import re
import types

import pytest
import torch
import torch.distributed as dist
from attention_aot import read
from forked import both
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import dino_loss
from custom_kernels import bench_prototype_loss, interpreter_defect, prototype_loss
from custom_kernels.prototype_loss import (Targets, cross_entropy, log_sum_exp, rowwise_cross_entropy,
                                           sinkhorn_bias)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
LOGITS = {"logits", "student", "teacher", "dstudent"}  # the kernels' arguments of their type
not_interpreted = pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None,
                                     reason="needs triton, and is not for the child process")


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


def textbook_losses(student_global, student_local, student_patch, teacher, teacher_patch, masks,
                    temp=0.1):
    """(DINO, iBOT) in the inputs' precision, one (student crop, teacher crop) pair and one
    image at a time; probabilities as targets."""
    def ce(p, s):
        return -(p * (s / temp).log_softmax(-1)).sum(-1)
    crops = [*student_global, *student_local]
    pairs = [ce(teacher[j], s).mean() for i, s in enumerate(crops) for j in (0, 1) if i != j]
    patches = ce(teacher_patch, student_patch).split(masks.sum(1).tolist())
    return sum(pairs) / len(pairs), sum(p.mean() for p in patches if len(p)) / len(masks)


def example(K, dtype=torch.float32, reach=None, B=3, L=4, seed=0):
    """Student and teacher logits (the head's cosines are within 1; reach: spread to +-reach)
    and masks, half the images unmasked."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2 * B, 5, dtype=torch.bool)
    masks[1::2, 1:4] = masks[1, 0] = True
    shapes = (2, B), (L, B), (masks.sum(),), (2, B), (masks.sum(),)
    tensors = [torch.randn(*shape, K, generator=g) / 2 for shape in shapes]
    if reach:
        tensors = [(x * reach).clamp(-reach, reach) for x in tensors]
        for x in tensors:
            x[0, ..., 0], x[0, ..., 1] = reach, -reach
    return [x.to(DEVICE, dtype) for x in tensors], masks.to(DEVICE)


def value_and_gradients(losses, student, scale=1.0):
    """Detached losses, and the gradients of their weighted sum: as under a gradient scaler, so
    that float16 can hold them."""
    gradients = torch.autograd.grad((losses[0] + 2 * losses[1]) * scale, student)
    return torch.stack(losses).detach(), [g.double() / scale for g in gradients]


def run(tensors, masks, targets, losses, scale=1.0):
    student = [x.clone().requires_grad_() for x in tensors[:3]]
    found = losses(*student, targets(tensors[3]), targets(tensors[4]), masks)
    return value_and_gradients(found, student, scale)


def our_losses(student_global, student_local, student_patch, teacher, teacher_patch, masks):
    return [sum(dino_loss.dino_loss(student_global, student_local, teacher)),
            dino_loss.ibot_loss(student_patch, teacher_patch, masks)]


def our_targets(x, temp=0.05):
    return dino_loss.teacher_targets(x, temp)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


# --- equal to the definition ------------------------------------------------------------------


@pytest.mark.parametrize("K", [97, 2048, 2053])  # less than a kernel's block, just one, and a bit
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_losses_and_gradients(fused, K, dtype, centering):
    tensors, masks = example(K, dtype)
    center = torch.randn(K, generator=torch.Generator().manual_seed(1)).to(DEVICE) / 4
    center = center if centering == "centering" else None

    def exact_targets(logits):
        rows = logits.flatten(0, -2).double()
        if center is None:
            return textbook_sinkhorn(rows, 0.05).view(logits.shape)
        return ((rows - center) / 0.05).softmax(-1).view(logits.shape)

    exact, exact_gradients = run([x.double() for x in tensors], masks, exact_targets, textbook_losses)
    losses, gradients = run(tensors, masks, lambda x: dino_loss.teacher_targets(x, 0.05, center),
                            our_losses, scale=2.0**12)
    assert losses.dtype == torch.float32
    assert_close(losses.double(), exact, rtol=1e-5, atol=0)
    for gradient, exact_gradient in zip(gradients, exact_gradients):
        limit = 1e-4 if dtype == torch.float32 else 1e-3  # float16 holds 11 bits of a gradient
        assert error(gradient, exact_gradient) < limit


def test_logits_of_200_are_as_accurate_as_plain_float32(fused, monkeypatch):
    """Exponents of 5000 leave float32 four digits, in any formula: the stored-target form sets
    the error that is allowed, and the kernels round a few times more, on the way from base e to
    base 2 and back."""
    tensors, masks = example(301, reach=200.0)

    def exact_targets(x):
        return textbook_sinkhorn(x.flatten(0, -2), 0.04).view(x.shape)

    exact = run([x.double() for x in tensors], masks, exact_targets, textbook_losses)
    ours = run(tensors, masks, lambda x: our_targets(x, 0.04), our_losses)
    monkeypatch.setattr(prototype_loss, "use_triton", lambda logits, impl="auto": False)
    stored = run(tensors, masks, lambda x: our_targets(x, 0.04), our_losses)
    for a, b, e in zip((ours[0], *ours[1]), (stored[0], *stored[1]), (exact[0], *exact[1])):
        assert a.isfinite().all() and error(a, e) < 4 * error(b, e) + 1e-5


def test_official_numbers(fused, reference, named_input):
    r, B, L, K = reference("losses"), 6, 5, 97
    teacher = 0.5 * named_input("teacher_cls", (2 * B, K)).unflatten(0, (2, B))
    teacher = teacher.flip(0).to(DEVICE)  # the official rows stand swapped
    local = named_input("student_local", (L * B, K)).to(DEVICE).requires_grad_()
    across = named_input("student_global", (2 * B, K)).to(DEVICE).requires_grad_()
    targets = our_targets(teacher)
    assert isinstance(targets, Targets)
    found = dino_loss.dino_loss(across.unflatten(0, (2, B)), local.unflatten(0, (L, B)), targets)
    global_term, local_term = (2 + 2 * L) * torch.stack(found) / torch.tensor([2, 1], device=DEVICE)
    (local_term + global_term).backward()
    patch = named_input("student_patch", r["ibot_grad"].shape).to(DEVICE).requires_grad_()
    teacher = 0.5 * named_input("teacher_patch", r["ibot_sinkhorn"].shape).to(DEVICE)
    targets = our_targets(teacher, 0.06)
    loss = dino_loss.ibot_loss(patch, targets, torch.from_numpy(r["ibot_masks"]).to(DEVICE))
    loss.backward()
    losses = (global_term, "dino_global_sum"), (local_term, "dino_local_sum"), (loss, "ibot_loss")
    for ours, name in losses:
        assert_close(ours.cpu(), torch.tensor(r[name]), rtol=1e-5, atol=0)
    for x, name in ((local, "grad_local"), (across, "grad_global"), (patch, "ibot_grad")):
        assert_close(x.grad.cpu(), torch.from_numpy(r[name]), rtol=1e-4, atol=1e-7)


def test_sinkhorn_bias_of_many_slices_one_row_and_repeated_rows(fused, monkeypatch):
    """More rows and columns than one program takes; then one row; then rows that repeat."""
    if INTERPRETED or DEVICE == "cuda":
        from custom_kernels import prototype_loss_triton as kernels
        monkeypatch.setattr(kernels, "ROW_SLICE", 16)
        monkeypatch.setattr(kernels, "COLUMN_SLICE", 512)
    g = torch.Generator().manual_seed(2)
    many, one, another = (torch.randn(*s, generator=g) for s in ((37, 1100), (1, 37), (1, 37)))
    for logits in (many / 2, one, another.expand(5, 37)):
        logits = logits.to(DEVICE)
        targets = torch.softmax(logits / 0.07 + sinkhorn_bias(logits, 0.07), 1)
        assert error(targets, textbook_sinkhorn(logits, 0.07)) < 1e-5
    # nothing tells the repeated rows apart: every prototype gets its share
    assert_close(targets, torch.full_like(targets, 1 / 37))


def test_no_rows_and_one_row(fused):
    (_, local, patch, teacher, _), masks = example(50, B=1)
    student = patch[:0].requires_grad_()
    loss = dino_loss.ibot_loss(student, our_targets(patch[:0]), masks & False)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 50)
    bias = torch.zeros(50, device=DEVICE)
    one = cross_entropy(local[0], Targets(teacher[0], bias, 0.05))
    assert_close(one, -((teacher[0] / 0.05).softmax(1) * (local[0] / 0.1).log_softmax(1)).sum(1))


def test_shapes_that_cannot_be_paired_are_refused():
    student, teacher, bias = torch.zeros(6, 8), torch.zeros(4, 8), torch.zeros(8)
    for targets, shift in ((teacher, 0), (teacher, 2), (teacher[:0], 2), (teacher[:, :7], 2)):
        with pytest.raises(ValueError, match=r"\(6, 8\) cannot be paired"):
            cross_entropy(student, Targets(targets, bias, 0.05), shift=shift)


def test_which_path_runs():
    """Kernels on a GPU, the definition on a CPU; and only logits that are fine enough."""
    from custom_kernels.prototype_loss import use_triton
    cpu, bias = torch.zeros(2, 8), torch.zeros(8)
    assert not use_triton(cpu)
    assert not torch.cuda.is_available() or use_triton(cpu.cuda())
    if not INTERPRETED:
        with pytest.raises(ValueError, match="cannot run: .*(CPU|not installed)"):
            cross_entropy(cpu, Targets(cpu, bias, 0.05), impl="triton")
    with pytest.raises(ValueError, match="bfloat16 logits are too coarse"):
        use_triton(cpu.bfloat16(), "triton")
    with pytest.raises(ValueError, match="must be auto, triton or torch"):
        use_triton(cpu, "cuda")


@not_interpreted
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0)])  # V100, T4, A100
def test_gpus_without_bfloat16_take_pytorch(monkeypatch, capsys, capability):
    """Below compute capability 8.0 nothing of ours runs, not even inside the operators, and
    that is said once."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu, old = torch.device("cuda", 7), capability < (8, 0)
    a_tensor = types.SimpleNamespace(device=gpu, dtype=torch.float32, is_cuda=True)
    for cache in (prototype_loss.why_not_triton, prototype_loss.say_once):
        cache.cache_clear()
    for _ in range(2):
        taken = prototype_loss.use_triton(a_tensor), prototype_loss.kernels_take(a_tensor)
        assert taken == (not old, not old)
    said = capsys.readouterr().out
    assert said.count("prototype loss: ") == 1
    assert ("plain PyTorch, because cuda:7 is not" in said) == old
    for cache in (prototype_loss.why_not_triton, prototype_loss.say_once):
        cache.cache_clear()


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED,
                    reason="without a GPU the kernels run in the interpreted child process alone")
def test_kernels_run(fused, monkeypatch):
    from custom_kernels import prototype_loss_triton as kernels
    called = []
    names = "row_lse", "column_lse", "cross_entropy", "cross_entropy_backward"

    def noted(name, kernel, *args):
        called.append(name)
        return kernel(*args)

    for name in names:
        monkeypatch.setattr(kernels, name, functools.partial(noted, name, getattr(kernels, name)))
    tensors, masks = example(97)
    run(tensors, masks, our_targets, our_losses)
    assert [called.count(name) for name in names] == [4, 6, 3, 3]


def test_two_runs_agree_bit_for_bit(fused):
    tensors, masks = example(300)
    first, second = (run(tensors, masks, our_targets, our_losses) for _ in range(2))
    for a, b in zip((first[0], *first[1]), (second[0], *second[1])):
        assert torch.equal(a, b)


# --- behaves as an operator -------------------------------------------------------------------


def operator_arguments(dtype=torch.float32):
    (_, local, _, teacher, _), _ = example(33, dtype, B=2, L=3)
    student, teacher = local.flatten(0, 1).requires_grad_(), teacher.flatten(0, 1)
    return student, teacher, torch.randn(33).to(DEVICE, local.dtype), 0.1, 0.05, 2, 2


def test_opcheck():
    student, teacher, bias, *rest = operator_arguments()
    torch.library.opcheck(rowwise_cross_entropy, (student, teacher, bias, *rest))
    strided = teacher.T.contiguous().T
    torch.library.opcheck(rowwise_cross_entropy, (student, strided, bias, *rest))
    for dim in (0, 1):
        bias = torch.zeros(strided.shape[dim], device=DEVICE)
        torch.library.opcheck(log_sum_exp, (strided, bias, 0.05, dim))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels compute in float32")
def test_formula_of_the_gradient():
    student, *rest = operator_arguments(torch.float64)
    assert torch.autograd.gradcheck(lambda s: rowwise_cross_entropy(s, *rest)[0], student)


@pytest.mark.skipif(INTERPRETED, reason="opaque to torch.compile, whoever computes them")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_under_autocast(fused, dynamic):
    def step(student_global, student_local, teacher):
        with torch.autocast(DEVICE, torch.bfloat16):
            targets = dino_loss.teacher_targets(teacher, 0.05)
            return sum(dino_loss.dino_loss(student_global, student_local, targets))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B in (3, 4):
        (student_global, student_local, _, teacher, _), _ = example(64, B=B)
        eager, graph = (gradients(f, student_global, student_local, teacher)
                        for f in (step, compiled))
        for a, b in zip(eager, graph):
            assert_close(a, b)


def gradients(f, student_global, student_local, teacher):
    student = [x.clone().requires_grad_() for x in (student_global, student_local)]
    loss = f(*student, teacher)
    return loss.detach(), *torch.autograd.grad(loss, student)


# --- several processes ------------------------------------------------------------------------


def head_and_loss():
    """A small head, and the loss of its logits against the Sinkhorn targets of the same
    logits."""
    torch.manual_seed(0)
    head = dino_loss.DINOHead(16, 33, hidden_dim=24, bottleneck_dim=8)

    def loss(model, x):
        logits = model(x)
        return cross_entropy(logits, dino_loss.teacher_targets(logits.detach(), 0.05)).mean()
    return head, loss


def logits_and_inputs():
    g = torch.Generator().manual_seed(4)
    return torch.randn(11, 33, generator=g), torch.randn(8, 16, generator=g)


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    prototype_loss.use_triton = lambda logits, impl="auto": True
    logits, x = logits_and_inputs()
    out = {"bias": sinkhorn_bias(logits[:3] if rank == 0 else logits[3:], 0.1),
           "empty": sinkhorn_bias(logits if rank == 0 else logits[:0], 0.1)}
    for name in ("ddp", "fsdp"):
        head, loss = head_and_loss()
        if name == "ddp":
            wrapped = DistributedDataParallel(head)
        else:
            wrapped = fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
        loss(wrapped, x[4 * rank : 4 * rank + 4]).backward()
        grads = [p.grad for p in head.parameters()]
        out[name] = grads if name == "ddp" else [g.full_tensor() for g in grads]
    torch.save(out, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(INTERPRETED, reason="whoever computes the operators, the sums are the same")
def test_two_processes_with_different_row_counts_ddp_and_fsdp(fused, tmp_path):
    both(one_of_two_processes, str(tmp_path))
    logits, x = logits_and_inputs()
    head, loss = head_and_loss()
    loss(head, x).backward()
    for rank in range(2):
        out = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert_close(out["bias"], sinkhorn_bias(logits, 0.1), rtol=1e-5, atol=1e-5)
        assert_close(out["empty"], sinkhorn_bias(logits, 0.1), rtol=1e-5, atol=1e-5)
        for name in ("ddp", "fsdp"):
            for a, p in zip(out[name], head.parameters(), strict=True):
                assert error(a, p.grad.double()) < 1e-5


# --- its benchmark ----------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="takes the CPU's forms")
def test_benchmark_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setenv("ENDODINO_PROTOTYPE_LOSS", "auto")  # it sets it, and this puts it back
    bench_prototype_loss.loss("--batch 1 --prototypes 40 --runs 1".split())
    bench_prototype_loss.sinkhorn("--rows 9 --prototypes 40 --runs 1".split())
    differences = re.findall(r"^\| (?:40|scaling|bias).* \| (\S+) \|$", capsys.readouterr().out, re.M)
    assert len(differences) == 4 and max(map(float, differences)) < 1e-5  # one loss, one normalisation


# --- the kernels, without a GPU ---------------------------------------------------------------


@not_interpreted
def test_again_with_kernels_interpreted(child):
    if interpreter_defect():
        pytest.skip(interpreter_defect())
    code, output = child
    assert code == 0 and "passed" in output, output[-5000:]


def compiled(kernel, constants, dtype, warps):
    """The kernel for a Hopper GPU, as its launcher would specialise it for K a multiple of
    16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict.fromkeys(LOGITS, "*" + dtype) | dict.fromkeys(("n", "K", "m", "shift"), "i32")
    kinds |= dict.fromkeys(("scale", "student_scale", "teacher_scale"), "fp32")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name == "K"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32),
                          options=dict(num_warps=warps, enable_fp_fusion=True))


@not_interpreted
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_compiles_for_hopper_without_spills(dtype):
    from custom_kernels import prototype_loss_triton as kernels
    tile = dict(ROWS=kernels.ROWS, COLUMNS=kernels.COLUMNS)
    cases = [(kernels.row_lse_kernel, dict(tile, SLICE=kernels.COLUMN_SLICE), 4),
             (kernels.column_lse_kernel, dict(tile, SLICE=kernels.ROW_SLICE), 4)]
    cases += [(kernel, dict(T=T, BLOCK=kernels.ROW_BLOCK), warps) for T in (1, 2)
              for kernel, warps in ((kernels.cross_entropy_kernel, 8),
                                    (kernels.cross_entropy_backward_kernel, 4))]
    for kernel, constants, warps in cases:
        binary = compiled(kernel, constants, dtype, warps)
        figures = read(binary, 90)
        name = kernel.__name__
        assert figures["spills"] == figures["atomics"] == 0, (name, figures)
        assert figures["programs_per_sm"] * warps >= 16, (name, figures)
        if dtype == "fp16":  # logits alone are 16 bits wide here
            # 16,384 rows of 131,072 logits pass 2^31: their rows need 64-bit offsets
            wide = [line for line in binary.asm["ttir"].splitlines()
                    if "tt.addptr" in line and "ptr<f16>" in line and "i64" in line]
            assert len(wide) == len(LOGITS & set(kernel.arg_names)), name
