"""dino_loss.py against the official code's numbers, and where those do not reach, against
float64 or a direct sum."""
import math

import pytest
import torch
import torch.distributed as dist
from forked import both
from torch.testing import assert_close

from dino_loss import (DINOHead, centered_softmax, collapse_stats, dino_loss, ibot_loss,
                       koleo_loss, sinkhorn, teacher_targets, update_center)

B, K, L = 6, 97, 5  # of the reference case


def textbook_sinkhorn(logits, temp, n_iters=3):
    """The loop as DINOv2 writes it, on the whole matrix."""
    q = torch.exp(logits / temp).T
    q = q / q.sum()
    for _ in range(n_iters):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def sinkhorn_in_logarithms(logits, temp, n_iters=3):
    """The same for any range of logits."""
    log_q = logits / temp
    for _ in range(n_iters):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


# --- head -------------------------------------------------------------------------------------


def test_head_equals_official_forward_and_gradients(reference, filled, named_input):
    r = reference("head0")
    in_dim, prototypes, hidden, bottleneck, layers = (int(n) for n in r["cfg"])
    head = filled(DINOHead(in_dim, prototypes, hidden, bottleneck, layers))
    x = named_input("head0", (10, in_dim)).requires_grad_()
    out = head(x)
    out.backward(named_input("headgrad0", out.shape))
    assert_close(out, torch.from_numpy(r["out"]), rtol=1e-5, atol=1e-6)
    assert_close(x.grad, torch.from_numpy(r["grad_in"]), rtol=1e-5, atol=1e-6)
    weight = head.last_layer.weight_v
    assert_close(weight.grad, torch.from_numpy(r["grad_last_v"]), rtol=1e-5, atol=1e-6)


def test_head_names_and_initialisation():
    torch.manual_seed(0)
    head = DINOHead(64, 4096, hidden_dim=512, bottleneck_dim=256)
    assert list(head.state_dict()) == [f"mlp.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")] + [
        "last_layer.weight_g", "last_layer.weight_v"]
    assert head.last_layer.weight_g.requires_grad and (head.last_layer.weight_g == 1).all()
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    bound = 1 / math.sqrt(256)  # PyTorch's default for a linear layer, not 0.02
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_head_logits_are_float32_under_autocast():
    head = DINOHead(64, 128, hidden_dim=64, bottleneck_dim=32)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(3, 64)).dtype == torch.float32


def test_head_gives_each_group_its_logits():
    head, x = DINOHead(16, 32, hidden_dim=24, bottleneck_dim=8), torch.randn(9, 16)
    whole = head(x)
    parts = head(x, [2, 0, 7])
    assert [len(p) for p in parts] == [2, 0, 7]
    assert_close(torch.cat(parts), whole)
    gradients = [torch.autograd.grad((y ** 3).sum(), list(head.parameters()))
                 for y in (whole, torch.cat(parts))]
    for a, b in zip(*gradients):
        assert_close(a, b)


# --- teacher's targets ------------------------------------------------------------------------


def test_sinkhorn_equals_official(reference, named_input):
    r = reference("losses")
    teacher = sinkhorn(0.5 * named_input("teacher_cls", (2 * B, K)), 0.05)
    assert_close(teacher, torch.from_numpy(r["sinkhorn"]), rtol=2e-5, atol=1e-7)
    patches = sinkhorn(0.5 * named_input("teacher_patch", r["ibot_sinkhorn"].shape), 0.06)
    assert_close(patches, torch.from_numpy(r["ibot_sinkhorn"]), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("spread", [0.25, 1.0])  # at 1 the range is too wide for float32's exp
def test_sinkhorn_in_float64_is_the_textbook_loop(spread):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(37, 101, generator=g, dtype=torch.float64) * spread
    assert ((logits.max() - logits.min()) / 0.04 > 80) == (spread == 1)
    assert_close(sinkhorn(logits, 0.04), textbook_sinkhorn(logits, 0.04), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("reach", [0.5, 1.59, 1.61, 20.0, 200.0])  # two forms meet at 2 * 1.6 / 0.04
def test_sinkhorn_is_finite_and_right_at_any_range(reach):
    logits = torch.randn(24, 301, generator=torch.Generator().manual_seed(1))
    logits = (logits / logits.abs().max() * reach).clamp(-reach, reach)
    logits[0], logits[1, 0], logits[1, 1] = -reach, reach, -reach   # a row and a pair at the very ends
    exact = sinkhorn_in_logarithms(logits.double(), 0.04)
    ours = sinkhorn(logits, 0.04)
    assert ours.isfinite().all()
    assert_close(ours.sum(1), torch.ones(24), rtol=0, atol=1e-5)
    assert_close(ours, exact.float(), rtol=1e-3 if reach > 2 else 1e-4, atol=2e-5)


def test_sinkhorn_leaves_its_input_and_takes_no_rows():
    logits = torch.randn(5, 7)
    before = logits.clone()
    sinkhorn(logits, 0.1)
    assert torch.equal(logits, before)
    assert sinkhorn(torch.empty(0, 7), 0.1).shape == (0, 7)
    assert_close(sinkhorn(logits.half(), 0.1), sinkhorn(logits.half().float(), 0.1))


def test_centering_equals_official(reference, named_input):
    r = reference("losses")
    center = torch.zeros(K)
    for i in range(3):
        logits = 0.5 * named_input(f"teacher_step{i}", (2 * B, K)) + 0.3
        targets = centered_softmax(logits, center, 0.04 + 0.01 * i)
        assert_close(targets, torch.from_numpy(r[f"center_softmax{i}"]), rtol=1e-5, atol=1e-7)
        center = update_center(center, logits)  # after its use: it is one step late, as in DINO
    assert_close(center, torch.from_numpy(r["center_after3"])[0], rtol=1e-5, atol=1e-7)


def test_patch_centering_equals_official(reference, named_input):
    r = reference("losses")
    center = torch.zeros(K)
    for i in range(2):
        logits = 0.5 * named_input(f"teacher_patch_step{i}", r["ibot_sinkhorn"].shape) + 0.2
        targets = centered_softmax(logits, center, 0.05)
        assert_close(targets, torch.from_numpy(r[f"ibot_center_softmax{i}"]), rtol=1e-5, atol=1e-7)
        center = update_center(center, logits)
    assert_close(center, torch.from_numpy(r["ibot_center_after2"])[0, 0], rtol=1e-5, atol=1e-7)


def one_of_two_processes(rank, folder):
    """Rank 0 holds 5 rows, rank 1 holds 11 (then 0): each writes its part of the targets and
    the common centre."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    logits = torch.randn(16, 33, generator=torch.Generator().manual_seed(2))
    mine = logits[:5] if rank == 0 else logits[5:]
    out = {"targets": sinkhorn(mine, 0.1), "wide": sinkhorn(mine * 100, 0.1),
           "center": update_center(torch.ones(33), mine)}
    some = logits if rank == 0 else logits[:0]  # a process without a masked patch still takes part
    out["with_empty"] = sinkhorn(some, 0.1)
    out["center_with_empty"] = update_center(torch.ones(33), some)
    torch.save(out, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_different_row_counts_give_the_one_process_result(tmp_path):
    both(one_of_two_processes, str(tmp_path))
    parts = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    logits = torch.randn(16, 33, generator=torch.Generator().manual_seed(2))
    for name, x in {"targets": logits, "wide": logits * 100, "with_empty": logits}.items():
        found = torch.cat([p[name] for p in parts])
        assert_close(found, sinkhorn(x, 0.1), rtol=1e-4, atol=1e-7)
    for part in parts:
        assert_close(part["center"], update_center(torch.ones(33), logits))
        assert_close(part["center_with_empty"], update_center(torch.ones(33), logits))


# --- losses -----------------------------------------------------------------------------------


def test_dino_loss_and_gradients_equal_official(reference, named_input):
    r = reference("losses")
    # the official teacher stands swapped: its first B rows are crop 2's
    teacher = torch.from_numpy(r["sinkhorn"]).unflatten(0, (2, B)).flip(0)
    local = named_input("student_local", (L * B, K)).requires_grad_()
    across = named_input("student_global", (2 * B, K)).requires_grad_()
    crops = across.unflatten(0, (2, B)), local.unflatten(0, (L, B))
    global_term, local_term = dino_loss(*crops, teacher)
    pairs = 2 + 2 * L
    # official: sum over 2L pairs / pairs, and the mean of both global pairs * 2 / pairs
    assert_close(local_term * pairs, torch.tensor(r["dino_local_sum"]), rtol=1e-5, atol=0)
    assert_close(global_term * pairs / 2, torch.tensor(r["dino_global_sum"]), rtol=1e-5, atol=0)
    (local_term * pairs + global_term * pairs / 2).backward()
    assert_close(local.grad, torch.from_numpy(r["grad_local"]), rtol=1e-4, atol=1e-7)
    assert_close(across.grad, torch.from_numpy(r["grad_global"]), rtol=1e-4, atol=1e-7)


def test_dino_loss_is_the_mean_over_all_pairs_of_different_crops():
    g = torch.Generator().manual_seed(3)
    student_global, student_local = (torch.randn(n, B, K, generator=g) for n in (2, L))
    teacher = torch.randn(2, B, K, generator=g).softmax(-1)
    total = []
    for i, student in enumerate([*student_global, *student_local]):
        for j in range(2):
            if i != j:  # a crop is never compared with itself
                total.append(-(teacher[j] * (student / 0.1).log_softmax(-1)).sum(-1).mean())
    assert len(total) == 2 + 2 * L
    assert_close(sum(dino_loss(student_global, student_local, teacher)), torch.stack(total).mean())


def test_ibot_loss_and_gradient_equal_official(reference, named_input):
    r = reference("losses")
    student = named_input("student_patch", r["ibot_grad"].shape).requires_grad_()
    teacher, masks = (torch.from_numpy(r[name]) for name in ("ibot_sinkhorn", "ibot_masks"))
    loss = ibot_loss(student, teacher, masks)
    loss.backward()
    assert_close(loss, torch.tensor(r["ibot_loss"]), rtol=1e-5, atol=0)
    assert_close(student.grad, torch.from_numpy(r["ibot_grad"]), rtol=1e-4, atol=1e-7)


def test_ibot_denominator_counts_unmasked_images():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[1, :3] = True
    student, teacher = torch.zeros(3, K), torch.full((3, K), 1 / K)
    assert ibot_loss(student, teacher, masks).item() == pytest.approx(math.log(K) / 4)
    nothing = ibot_loss(student[:0].requires_grad_(), teacher[:0], masks & False)
    assert nothing.item() == 0 and nothing.requires_grad


def test_koleo_equals_official(reference, named_input):
    r = reference("losses")
    x = named_input("koleo", (12, 40)).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert_close(loss, torch.tensor(r["koleo"]), rtol=1e-5, atol=0)
    assert_close(x.grad, torch.from_numpy(r["koleo_grad"]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_koleo_is_finite_for_duplicates_and_one_row(dtype):
    for rows in (torch.ones(1, 8), torch.ones(4, 8), torch.randn(3, 8).repeat(2, 1)):
        x = rows.to(dtype).requires_grad_()
        loss = koleo_loss(x)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()
    assert koleo_loss(torch.ones(1, 8)) == 0


def test_losses_are_float32_under_autocast():
    masks = torch.ones(2, 3, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        student, teacher = torch.randn(6, K).bfloat16(), torch.randn(6, K).bfloat16()
        targets = sinkhorn(teacher, 0.05)
        crops = [x.unflatten(0, (2, 3)) for x in (student, student, targets)]
        terms = [targets.sum(), *dino_loss(*crops),
                 ibot_loss(student, targets, masks), koleo_loss(student)]
    assert all(t.dtype == torch.float32 for t in terms)


# --- health -----------------------------------------------------------------------------------


def test_collapse_stats_tell_three_states_apart():
    uniform = collapse_stats(torch.zeros(8, 16), 0.05)
    assert uniform["kl_to_uniform"] == pytest.approx(0, abs=1e-6)
    assert uniform["entropy_of_mean"] == pytest.approx(math.log(16))
    same = collapse_stats(torch.eye(16)[:1].repeat(8, 1) * 10, 0.05)      # every row on the same prototype
    assert same["entropy_of_mean"] == pytest.approx(0, abs=1e-6) and same["prototypes_used"] == 1
    healthy = collapse_stats(torch.eye(16)[:8] * 10, 0.05)                # every row on its own
    assert healthy["mean_entropy"] == pytest.approx(0, abs=1e-6)
    assert healthy["entropy_of_mean"] == pytest.approx(math.log(8))
    assert healthy["kl_to_uniform"] == pytest.approx(math.log(16))
    assert healthy["prototypes_used"] == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_targets_are_float32_also_under_autocast(centering, dtype):
    """The targets are made inside the forward pass, where matrix products are in 16 bits."""
    logits = torch.randn(48, 512, generator=torch.Generator().manual_seed(0)) / 16
    center = torch.full((512,), 0.1) if centering == "centering" else None
    expected = teacher_targets(logits, 0.04, center)
    with torch.autocast("cpu", dtype):
        assert torch.equal(teacher_targets(logits, 0.04, center), expected)
