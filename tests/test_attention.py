"""Attention over packed sequences, against float64 written out one sequence at a time and
against PyTorch's own error.

Most of these tests reach the operator. In this process it computes its definition (on a GPU:
runs its kernels), and the same tests reach the batched products, which CPUs run;
test_again_with_kernels_interpreted runs the same tests in a child process where Triton's
interpreter runs the kernels, and test_compiled_for reads what the compiler makes of them for
GPUs that need not be there.
"""
import importlib.util
import json
import re
import types

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import vit
from custom_kernels import attention as module
from custom_kernels import attention_products, bench_attention
from custom_kernels import interpreted, why_no_triton_on
from custom_kernels.attention import attention, packed_attention, packed_attention_backward, sdpa
from custom_kernels.attention_products import products, products_backward

INTERPRETED = interpreted()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NO_KERNELS = why_no_triton_on(torch.device(DEVICE))
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_kernels = pytest.mark.skipif(NO_KERNELS is not None,
                                   reason=f"the kernels run in the child process: {NO_KERNELS}")
here_only = pytest.mark.skipif(INTERPRETED, reason="does not depend on the kernels")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
LIMITS = {torch.float32: (2e-6, 2e-6), torch.float16: (6e-4, 1.5e-3),  # output, gradients
          torch.bfloat16: (4e-3, 1e-2)}

PACKS = {
    "the pack": ((2, 257), (4, 50)),
    "short": ((2, 1), (1, 15), (1, 16), (1, 17), (0, 50), (2, 49), (3, 0), (1, 54)),
    "around 64": ((1, 32), (1, 33), (1, 63), (1, 64), (1, 65), (1, 128)),
    "around 257": tuple((1, n) for n in (196, 197, 255, 256, 258, 261, 272, 273)),
    "many runs": ((1, 130), (2, 1), (1, 15), (1, 0), (1, 64), (2, 50), (1, 65), (1, 17), (1, 81),
                  (0, 9), (1, 63), (1, 257), (1, 54)),
    "1025": ((1, 1025),),
    "1370": ((1, 1370),),
}


WAYS = ["operator"] + ["products"] * (DEVICE == "cpu" and not INTERPRETED)  # for CPUs alone


@pytest.fixture(autouse=True)
def operator(monkeypatch):
    """attention() goes through the operator, whatever the device, and so does
    impl="operator"."""
    monkeypatch.setattr(module, "use_triton", lambda qkv, runs, impl: impl in ("auto", "operator"))


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """A function of (qkv, runs): the operator, or the products in pieces so small that runs,
    and the heads of one sequence, are cut."""
    monkeypatch.setattr(attention_products, "PIECE", 2**18)
    return lambda qkv, runs: attention(qkv, runs, request.param)


@pytest.fixture
def poison():
    """Memory that torch.empty hands out is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def example(runs, heads=2, dtype=torch.float32, seed=0):
    """qkv and the gradient of the output."""
    T, g = sum(count * length for count, length in runs), torch.Generator().manual_seed(seed)
    shapes = (T, 3, heads, 64), (T, heads, 64)
    return tuple(torch.randn(*shape, generator=g).to(DEVICE, dtype) for shape in shapes)


def textbook(qkv, runs):
    """One sequence at a time: softmax(q k^T / 8) v."""
    out = []
    for x in qkv.split([length for count, length in runs for _ in range(count)]):
        q, k, v = x.permute(1, 2, 0, 3)                          # (heads, length, 64) each
        out.append(((q @ k.mT / 8).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def output_and_gradients(fn, qkv, runs, dout):
    """{"out", "dq", "dk", "dv"}"""
    qkv = qkv.detach().requires_grad_()
    out = fn(qkv, runs)
    gradient, = torch.autograd.grad(out, qkv, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradient.unbind(1))))


def errors(value, exact):
    """Relative Frobenius norm of the difference, and its largest entry over the largest of the
    exact value."""
    difference = value.double() - exact
    largest = difference.abs().max() / exact.abs().max()
    return (difference.norm() / exact.norm()).item(), largest.item()


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# --- equal to the definition ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_against_float64(poison, way, name, dtype):
    if INTERPRETED and (name, dtype) in (("1025", torch.float16), ("1370", torch.float32)):
        pytest.skip("slow to interpret; each length runs in one type")
    runs = PACKS[name]
    qkv, dout = example(runs, heads=2 if name == "the pack" else 1, dtype=dtype)
    ours = output_and_gradients(way, qkv, runs, dout)
    torch.use_deterministic_algorithms(False)
    library = output_and_gradients(sdpa, qkv, runs, dout)
    exact = output_and_gradients(textbook, qkv.double(), runs, dout.double())
    for tensor in ours:
        assert ours[tensor].dtype == dtype and ours[tensor].isfinite().all(), tensor
        norm, largest = errors(ours[tensor], exact[tensor])
        allowed = LIMITS[dtype][tensor != "out"]
        assert norm < allowed and largest < 4 * allowed, (tensor, norm, largest)
        assert norm < 1.5 * errors(library[tensor], exact[tensor])[0] + 1e-7, (tensor, norm)


@pytest.mark.parametrize("heads", [1, 6, 12, 16, 24])
def test_numbers_of_heads(poison, way, heads):
    runs = ((1, 50), (1, 70))
    qkv, dout = example(runs, heads, torch.float16)
    ours = output_and_gradients(way, qkv, runs, dout)
    exact = output_and_gradients(textbook, qkv.double(), runs, dout.double())
    for tensor in ours:
        norm, _ = errors(ours[tensor], exact[tensor])
        assert norm < LIMITS[torch.float16][tensor != "out"], tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_and_zero_queries(poison, way, dtype):
    """Scores of +-1000, where exp overflows unless the maximum is taken off; queries of zero,
    where attention is the mean."""
    runs = ((1, 257), (1, 50))
    qkv, dout = example(runs, 1, dtype)
    qkv[:, :2] *= 15
    qkv[257:, 0] = 0
    ours = output_and_gradients(way, qkv, runs, dout)
    torch.use_deterministic_algorithms(False)
    library = output_and_gradients(sdpa, qkv, runs, dout)
    exact = output_and_gradients(textbook, qkv.double(), runs, dout.double())
    for tensor in ours:
        norm, theirs = (errors(x[tensor], exact[tensor])[0] for x in (ours, library))
        assert ours[tensor].isfinite().all(), tensor
        assert norm < 1.5 * theirs + 2e-4, (tensor, norm, theirs)  # float32 holds 1000 to 6e-5
    mean = qkv[257:, 2].double().mean(0, keepdim=True).expand(50, -1, -1)
    assert_close(ours["out"][257:].double(), mean, atol=1e-2, rtol=1e-2)


def test_no_sequences():
    for runs in ((), ((0, 257), (4, 0)), ((1, 0),) * 9):
        qkv = torch.zeros(0, 3, 2, 64, device=DEVICE, requires_grad=True)
        for impl in ("auto", "products", "sdpa"):
            out = attention(qkv, runs, impl)
            assert out.shape == (0, 2, 64)
            assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


# --- one sequence knows nothing of the others -------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", ["the pack", "around 64", "many runs"])
def test_nan_stays_in_its_sequence(poison, name):
    runs = PACKS[name]
    qkv, dout = example(runs, heads=1, dtype=torch.float16)
    clean = output_and_gradients(attention, qkv, runs, dout)
    lengths = [length for count, length in runs for _ in range(count)]
    starts = torch.tensor([0] + lengths).cumsum(0).tolist()
    hurt = torch.zeros(len(qkv), dtype=torch.bool, device=DEVICE)
    for start, stop in list(zip(starts, starts[1:]))[1::3]:
        qkv[start:stop] = float("nan")
        qkv[start:stop, 2] = float("inf")
        hurt[start:stop] = True
    ours = output_and_gradients(attention, qkv, runs, dout)
    assert hurt.any() and ours["out"][hurt].isnan().all()
    ours, clean = ({name: x[~hurt] for name, x in found.items()} for found in (ours, clean))
    assert same_bits(ours, clean)


@needs_kernels
def test_rows_outside_every_sequence_stay_untouched(poison):
    from custom_kernels import attention_triton as kernels
    for lengths in ((257, 50, 70), (17, 1, 50, 70, 65, 3, 80, 64, 16)):
        runs = tuple((1, n) for n in lengths)
        T = sum(count * length for count, length in runs)
        qkv, dout = example((*runs, (1, 40)), dtype=torch.float16)
        out, lse = kernels.forward(qkv, runs)
        dqkv = kernels.backward(dout, qkv, out, lse, runs)
        for x in (out, lse.T, dqkv):
            assert x[:T].isfinite().all() and x[T:].isnan().all()


@needs_kernels
def test_bits_do_not_depend_on_the_run_or_the_batch():
    runs = ((2, 257), (3, 50), (1, 70))
    qkv, dout = example(runs, heads=1, dtype=torch.float16)
    batch = output_and_gradients(attention, qkv, runs, dout)
    assert same_bits(batch, output_and_gradients(attention, qkv, runs, dout))
    for start, length in ((257, 257), (564, 50), (664, 70)):
        rows = slice(start, start + length)
        alone = output_and_gradients(attention, qkv[rows], ((1, length),), dout[rows])
        assert same_bits(alone, {name: x[rows] for name, x in batch.items()})


# --- strides ----------------------------------------------------------------------------------


def layouts(qkv):
    T, _, H, D = qkv.shape
    padded = torch.full((T, 3, H, D + 8), float("nan"), dtype=qkv.dtype, device=qkv.device)
    padded[..., :D] = qkv
    longer = torch.cat([qkv.new_full((5, 3, H, D), float("nan")), qkv])
    return {
        "view of the projection": qkv.reshape(T, 3 * H * D).view(T, 3, H, D),
        "padded last dimension": padded[..., :D],
        "storage offset": longer[5:],
        "every other token": torch.stack([qkv, qkv * float("nan")], 1).flatten(0, 1)[::2],
        "q, k, v outermost": qkv.transpose(0, 1).contiguous().transpose(0, 1),
        "heads outermost": qkv.movedim(2, 0).contiguous().movedim(0, 2),
        "last stride not one": qkv.mT.contiguous().mT,
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 3, 1, 64)))
def test_strides_of_qkv(way, layout):
    runs = ((1, 70), (2, 50))
    qkv, dout = example(runs, dtype=torch.float16)
    strided = layouts(qkv)[layout]
    a, b = (output_and_gradients(way, x, runs, dout) for x in (qkv, strided))
    assert torch.equal(strided, qkv)
    assert not INTERPRETED or same_bits(a, b)  # elsewhere a sum may go in another order
    for name in a:
        assert_close(a[name], b[name])


def test_strides_of_the_output_gradient(way):
    runs = ((1, 70), (2, 50))
    qkv, dout = example(runs, dtype=torch.float16)
    for strided in (dout.transpose(0, 1).contiguous().transpose(0, 1), dout.mT.contiguous().mT,
                    dout[:1, :1, :1].expand_as(dout), torch.stack([dout, dout], -1)[..., 0]):
        a, b = (output_and_gradients(way, qkv, runs, x) for x in (strided.contiguous(), strided))
        for name in a:
            assert_close(a[name], b[name])


# --- behaves as an operator -------------------------------------------------------------------


class Names(TorchDispatchMode):
    """The names of the operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@here_only
def test_opcheck():
    runs, (qkv, _) = [2, 9, 0, 4, 3, 5], example(((2, 9), (3, 5)))
    check = torch.library.opcheck
    for x in (qkv, layouts(qkv)["heads outermost"]):
        out, lse = packed_attention(x, runs)
        dout = out.mT.contiguous().mT
        check(packed_attention_backward, (dout, x, out, lse, runs))
        check(products_backward, (dout, x, products(x, runs, True)[1], runs))
        check(products, (x, runs, False))
        check(products, (x.requires_grad_(), runs, True))
        check(packed_attention, (x, runs))


@here_only
def test_formula_of_the_gradient(way):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(11, 3, 2, 5, dtype=torch.float64, generator=g, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: way(x, ((2, 3), (1, 4), (1, 1))), qkv)


def test_no_second_derivative(way):
    qkv, _ = example(((1, 5),))
    loss = way(qkv.requires_grad_(), ((1, 5),)).square().sum()
    gradient, = torch.autograd.grad(loss, qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@here_only
@pytest.mark.parametrize("impl", ["auto", "products", "sdpa"])  # operators, and around them
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_under_autocast(impl, dynamic):
    def step(qkv, runs):
        with torch.autocast(DEVICE, torch.bfloat16):
            return attention(qkv, runs, impl).float().square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for runs in (((2, 17), (3, 50)), ((4, 17), (5, 50))):
        qkv, _ = example(runs)
        qkv.requires_grad_()
        eager, graph = (torch.autograd.grad(f(qkv, runs), qkv)[0] for f in (step, compiled))
        assert_close(graph, eager)


@here_only
@pytest.mark.parametrize("training", [False, True])
def test_dispatch_compiles_as_one_graph(monkeypatch, training):
    monkeypatch.undo()  # the true use_triton
    monkeypatch.setattr(module, "LONGEST_PRODUCTS", {torch.float32: (20, 20)})
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for runs in (((2, 17), (3, 50)), ((4, 17), (5, 50))):
        qkv, dout = example(runs)
        if training:
            a, b = (output_and_gradients(f, qkv, runs, dout) for f in (compiled, attention))
            assert_close(a, b)
        assert_close(compiled(qkv, runs), attention(qkv, runs))


def block(dim=128):
    return vit.Block(dim, dim // 64, "mlp", layerscale=1.0).to(DEVICE)


@here_only
def test_activation_checkpointing():
    """Recomputing the block gives the same gradients; a policy can name the operator and keep
    what it returned."""
    m, runs, seen = block(), ((2, 17), (3, 5)), []
    x = torch.randn(49, 128, device=DEVICE, requires_grad=True)

    def keep_attention(ctx, op, *args, **kwargs):
        if op == torch.ops.endodino.attention.default:
            seen.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    kept = torch.autograd.grad(m(x, runs).square().sum(), x)[0]
    whole = torch.autograd.grad(checkpoint(m, x, runs, use_reentrant=False).square().sum(), x)[0]
    chosen = checkpoint(m, x, runs, use_reentrant=False,
                        context_fn=lambda: create_selective_checkpoint_contexts(keep_attention))
    with Names() as mode:
        chosen = torch.autograd.grad(chosen.square().sum(), x)[0]
    assert torch.equal(whole, kept) and torch.equal(chosen, kept) and seen[0] is False
    assert "addmm" in mode.names and "attention" not in mode.names  # the rest is computed again


@here_only
def test_fully_sharded_in_bfloat16():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        m, runs, x = block(), ((2, 17), (3, 5)), torch.randn(49, 128, device=DEVICE)
        m(x, runs).square().mean().backward()
        exact = m.attn.qkv.weight.grad.clone()
        m.zero_grad()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(m, mesh=dist.init_device_mesh(DEVICE, (1,)), mp_policy=policy)
        with Names() as mode:
            m(x, runs).float().square().mean().backward()
        assert "attention" in mode.names
        assert errors(m.attn.qkv.weight.grad.full_tensor(), exact.double())[0] < 0.03
    finally:
        dist.destroy_process_group()


@here_only
def test_flops():
    """Two products of length x length x hd forward, five backward, as PyTorch counts its own
    fused attention; four where the probabilities are kept."""
    for impl, flops in (("operator", 14), ("products", 12)):
        qkv, _ = example(((2, 257), (3, 50)))
        with FlopCounterMode(display=False) as counter:
            attention(qkv.requires_grad_(), ((2, 257), (3, 50)), impl).sum().backward()
        assert counter.get_total_flops() == flops * (2 * 257**2 + 3 * 50**2) * 2 * 64


@here_only
@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_q_k_v_are_not_copied(monkeypatch, impl):
    monkeypatch.setattr(module, "use_triton", lambda qkv, runs, _: impl == "auto")
    m = block()
    with Names() as mode, torch.no_grad():
        m.attn(torch.randn(3 * 50, 128, device=DEVICE), ((3, 50),))
    assert ("attention" in mode.names) == (impl == "auto")
    assert not {"clone", "copy_", "_to_copy", "cat", "contiguous"} & set(mode.names), mode.names


# --- which path -------------------------------------------------------------------------------


@here_only
@pytest.mark.skipif(DEVICE != "cpu", reason="CPUs only")
def test_who_takes_what_on_a_cpu(monkeypatch):
    """The table decides by type, length and gradients, run by run, and all agree;
    ENDODINO_ATTENTION=sdpa is obeyed."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "LONGEST_PRODUCTS", {torch.bfloat16: (20, 10)})

    def chosen(runs, dtype, training, impl="auto"):
        qkv, _ = example(runs, dtype=dtype)
        with Names() as mode:
            out = attention(qkv.requires_grad_(training), runs, impl)
        assert_close(out.detach(), sdpa(qkv.detach(), runs), rtol=0.02, atol=0.02)
        return [{"attention_products": "p"}.get(n, "l") for n in mode.names if "attention" in n]

    bf16, fp32, long, short = torch.bfloat16, torch.float32, ((2, 30),), ((3, 20), (2, 5))
    assert chosen(short, bf16, True) == ["p"] and chosen(long, bf16, True) == ["l"]
    assert chosen(long + short, bf16, True) == ["l", "p", "p"]
    assert chosen(short, bf16, False) == ["l", "p"] and chosen(short, fp32, True) == ["l", "l"]
    assert chosen(long, fp32, False, "products") == ["p"]
    assert chosen(short, bf16, True, "sdpa") == ["l", "l"]
    monkeypatch.setenv("ENDODINO_ATTENTION", "sdpa")
    assert chosen(short, bf16, True) == ["l", "l"]


@here_only
def test_products_keep_what_the_gradient_needs_and_no_more():
    qkv, _ = example(((2, 257), (3, 50)), dtype=torch.bfloat16)
    out, kept = products(qkv, [2, 257, 3, 50], True)
    assert kept.dtype == torch.bfloat16 and kept.shape == (2 * (2 * 257**2 + 3 * 50**2),)
    assert products(qkv, [2, 257, 3, 50], False)[1].shape == (0,)


@here_only
def test_products_work_in_pieces():
    """2,117 tokens (644 px), 16 heads: no tensor of the forward holds 64 MiB, though all scores
    are 274."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    qkv, _ = example(((1, 2117),), heads=16, dtype=torch.bfloat16)
    with Sizes():
        products._init_fn(qkv, [1, 2117], False)
    assert 2117**2 * 4 <= max(largest) < 64 * 2**20
    for run in ((64, 50, 3, 3, 64), (2, 257, 3, 6, 64), (1, 2117, 3, 24, 64), (0, 9, 3, 2, 64)):
        tiles = torch.zeros(run[0], run[3])
        for n, h in attention_products.pieces(*run):
            tiles[n, h] += 1
        assert (tiles == 1).all()  # each pair of sequence and head once


@here_only
def test_dispatch(monkeypatch, capsys):
    """On a GPU whose kernels can be built (a stand-in for one): who takes what, and that it is
    said, once."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "why_no_triton_on", lambda device: None)
    module.why_not_triton.cache_clear()
    module.say_once.cache_clear()

    def chosen(shape, dtype, runs, impl="auto"):
        with torch.device("meta"):
            qkv = torch.empty(shape, dtype=dtype)
        monkeypatch.setattr(module, "triton_chosen", lambda device, *rest: choose(gpu, *rest))
        return module.use_triton(qkv, runs, impl)

    choose, gpu, bf16, fp32 = module.triton_chosen, torch.device("cuda"), torch.bfloat16, torch.float32
    assert chosen((564, 3, 2, 64), bf16, ((2, 257), (1, 50)))
    assert chosen((640, 3, 2, 64), torch.float16, ((1, 640),))
    assert chosen((641, 3, 2, 64), bf16, ((1, 641),), "triton")
    assert chosen((50, 3, 2, 64), fp32, ((1, 50),), "triton")
    said = capsys.readouterr().out
    assert said == "attention: Triton kernels\n"
    assert not chosen((50, 3, 2, 64), bf16, ((1, 50),), "sdpa") and capsys.readouterr().out == ""
    for lengths, head_dim, dtype, reason in (
            ((641, 50), 64, bf16, "640 tokens"), ((50,), 32, bf16, "head dimension"),
            ((50,), 64, fp32, "float32"), ((50,), 64, torch.float64, "float64")):
        runs = tuple((1, n) for n in lengths)
        for _ in range(2):
            assert not chosen((sum(lengths), 3, 2, head_dim), dtype, runs)
        said = capsys.readouterr().out
        assert said.startswith("attention: scaled_dot_product_attention") and reason in said
        assert said.count("\n") == 1
    for head_dim, dtype in ((32, bf16), (128, bf16), (64, torch.float64)):
        with pytest.raises(ValueError, match="cannot run"):
            chosen((50, 3, 2, head_dim), dtype, ((1, 50),), "triton")
    monkeypatch.setenv("ENDODINO_ATTENTION", "sdpa")
    assert not chosen((50, 3, 2, 64), bf16, ((1, 50),))
    assert "ENDODINO_ATTENTION=sdpa" in capsys.readouterr().out
    module.why_not_triton.cache_clear()


@here_only
@needs_triton
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0)])  # V100, T4, A100
def test_gpus_without_bfloat16_take_the_library(monkeypatch, capsys, capability):
    """Below compute capability 8.0 nothing of ours runs, not even inside the operator, and that
    is said once."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu, old = torch.device("cuda", 7), capability < (8, 0)
    module.why_not_triton.cache_clear()
    module.say_once.cache_clear()
    for _ in range(2):
        assert module.triton_chosen(gpu, torch.float16, None, "auto") == (not old)
    said = capsys.readouterr().out
    assert said.count("attention: ") == 1
    assert ("scaled_dot_product_attention, because cuda:7 is not" in said) == old
    assert module.longest_products(gpu, torch.bfloat16, True, "auto") == 0
    a_tensor = types.SimpleNamespace(shape=(50, 3, 6, 64), device=gpu, dtype=torch.float16)
    assert module.kernels_take(a_tensor) == (not old)
    if old:
        with pytest.raises(ValueError, match="cuda:7 is not an NVIDIA GPU of compute capability 8.0"):
            module.triton_chosen(gpu, torch.float16, None, "triton")
    module.why_not_triton.cache_clear()
    module.say_once.cache_clear()


def test_refusals(monkeypatch):
    monkeypatch.undo()
    qkv = torch.zeros(50, 3, 2, 64)
    with pytest.raises(ValueError, match="impl is 'flash'"):
        attention(qkv, ((1, 50),), "flash")
    for runs, x in ((((1, 49),), qkv), (((1, 50),), qkv[:, :2]), (((1, 50),), qkv.flatten(2))):
        with pytest.raises(ValueError, match="qkv is"):
            attention(x, runs)
    if INTERPRETED:
        with pytest.raises(ValueError, match="bfloat16"):
            attention(qkv.bfloat16(), ((1, 50),), "triton")
    else:
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1|not installed"):
            attention(qkv, ((1, 50),), "triton")
        for head_dim in (32, 64, 128):  # a CPU takes the library, whatever the width
            x = torch.randn(20, 3, 2, head_dim)
            assert_close(attention(x, ((2, 10),)), sdpa(x, ((2, 10),)))


@needs_kernels
def test_kernels_that_run(monkeypatch):
    """impl="triton" reaches these kernels and no others."""
    from custom_kernels import attention_triton as kernels
    monkeypatch.undo()
    run, names = kernels.run, []

    def noted(kernel, *args, **options):
        names.append(kernel.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(kernels, "run", noted)
    hopper = kernels.compute_capability(torch.empty(0, device=DEVICE))[0] == 9
    general = ["fwd", "bwd_dq", "bwd_dkdv"]
    for dtype, length, expected in ((torch.float16, 257, ["fwd", "bwd_257"] if hopper else general),
                                    (torch.float16, 50, ["fwd", "bwd_tile"]),
                                    (torch.float16, 65, general), (torch.float32, 50, general)):
        runs = ((1, length),)
        qkv, dout = example(runs, 1, dtype)
        output_and_gradients(lambda x, runs: attention(x, runs, "triton"), qkv, runs, dout)
        assert names == expected
        names.clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_gpu_takes_the_kernels(monkeypatch):
    monkeypatch.undo()
    qkv, _ = example(((2, 257),), 6, torch.bfloat16)
    with Names() as mode:
        attention(qkv, ((2, 257),))
    assert mode.names.count("attention") == 1
    assert "_scaled_dot_product_flash_attention" not in mode.names


# --- its benchmark ----------------------------------------------------------------------------


@here_only
@pytest.mark.skipif(DEVICE != "cpu", reason="CPUs only")
def test_benchmark_on_a_cpu(capsys, monkeypatch):
    bench_attention.main("--runs 1 --lengths 10 5 --tokens 20 --heads 2".split())
    out = capsys.readouterr().out
    assert out.count("| 5 | 4 | ") == out.count("| 10 | 2 | ") == 2  # both types
    for dtype, limits in module.LONGEST_PRODUCTS.items():
        for mode, limit in zip(("in training", "without gradients"), limits):
            name = bench_attention.name_of(dtype)
            assert re.search(rf"^\| {name} \| {mode} \| \d+ \| {limit} \|$", out, re.M)
    monkeypatch.setattr(bench_attention, "wrong", lambda fn, *_: fn.keywords["impl"] == "products")
    with pytest.raises(SystemExit, match="5 tokens, bfloat16: the products err by"):
        bench_attention.main("--runs 1 --lengths 5 --tokens 20".split())


@here_only
def test_padded_competitor():
    """Right, and its backward pass adds no rows up: those of the padding would be thousands at one
    place."""
    runs = ((2, 5), (3, 3))
    qkv, dout = bench_attention.example(runs, 2, torch.float32, "cpu")
    padded = bench_attention.stock_attention(runs, "cpu")["SDPA padded and masked"]
    with Names() as mode:
        found = bench_attention.gradient(lambda x: padded(*x.unbind(1)), [qkv], dout)
    assert_close(padded(*qkv.unbind(1)), sdpa(qkv, runs))
    assert_close(found, bench_attention.gradient(lambda x: sdpa(x, runs), [qkv], dout))
    assert not any("index_put" in name for name in mode.names)


@here_only
def test_how_far_products_win():
    """(length, library's seconds, products' seconds): to the first length at which the products
    lose by more than 3 %."""
    win = bench_attention.longest_win
    assert win([(5, 2, 1), (10, 1, 1.02), (50, 1, 1.1), (257, 2, 1)]) == 10
    assert win([(5, 1, 2)]) == win([]) == 0


# --- child processes: the interpreter, and the compiler for GPUs that are not here ------------


@here_only
@needs_triton
@pytest.mark.parametrize("arch", [90, 80])
def test_compiled_for(child, arch):
    """No spills, no atomics, shared memory within the limit, and the products on tensor
    cores."""
    code, output = child
    assert code == 0, output
    kernels = [row for row in map(json.loads, output.splitlines()) if row["arch"] == arch]
    names = [(row["kernel"], row["length"]) for row in kernels]
    backward = [("bwd_257", 257)] if arch == 90 else [("bwd_dq", 257), ("bwd_dkdv", 257)]
    hires = [("fwd", 1370), ("bwd_dq", 1370), ("bwd_dkdv", 1370)] if arch == 90 else []
    assert names == [("fwd", 257), *backward, ("fwd", 50), ("bwd_tile", 50), *hires]
    for row in kernels:
        assert row["spills"] == row["atomics"] == 0 and row["programs_per_sm"] >= 1, row
        assert row["shared"] <= (227 if arch == 90 else 99) * 1024, row  # 8.6, 8.9: less than 8.0
        assert row["wgmma" if arch == 90 else "mma"] > 0, row


@here_only
@needs_triton
def test_again_with_kernels_interpreted(child):
    from custom_kernels import interpreter_defect
    if interpreter_defect():
        pytest.skip(interpreter_defect())
    code, output = child
    assert code == 0 and "passed" in output, output[-5000:]
