"""Attention: first checked against float64, then timed. `python bench.py attention` runs it.

On a CPU: the library against batched products, by type and length, and the table that the
dispatcher holds. On a GPU: the Triton kernels against every backend that PyTorch brings. With
--compile-only: what the compiler makes of the kernels.
"""
import argparse
import functools
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from custom_kernels.attention import LONGEST_PRODUCTS, attention, by_run, packed, sdpa
from custom_kernels.timing import event_seconds, peak_bytes, seconds, table

LENGTHS = [5, 10, 17, 26, 50, 65, 101, 145, 197, 257, 401, 577, 785, 1025, 1370, 2117]
PACK = ((128, 257), (512, 50))  # 64 images: two crops of 224 px, eight of 98 px
SHAPES = {  # name -> (runs, numbers of heads), for GPUs
    "A the pack": (PACK, (6, 12, 16, 24)),
    "B global crops": (PACK[:1], (12, 16)),
    "C local crops": (PACK[1:], (12, 16)),
    "D four registers": (((128, 261), (512, 54)), (12, 16)),
    "E patches of 16 px": (((128, 197), (512, 37)), (12,)),
    "F 518 px": (((16, 1370), (64, 50)), (16,)),
    "F 644 px": (((8, 2117),), (16,)),
    "G 1 image": (((2, 257), (8, 50)), (12,)),
    "G 4 images": (((8, 257), (32, 50)), (12,)),
    "G 16 images": (((32, 257), (128, 50)), (12,)),
}


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.py attention",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--heads", nargs="+", type=int, default=argparse.SUPPRESS,
                        help="of 64 channels; without it 6 on a CPU, on a GPU each shape's own")
    parser.add_argument("--runs", type=int, default=50 if cuda else 5, help="timed calls")
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of sequences")
    cpu.add_argument("--tokens", type=int, default=4096, help="about how many in a call")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--shapes", nargs="+", default=list("ABCDEFG"), metavar="LETTER",
                     help="first letters of: " + ", ".join(SHAPES))
    gpu.add_argument("--without", nargs="+", default=[], metavar="NAME", help="backends to leave out, "
                     "by their first letters (flex: a minute of compiling a shape)")
    gpu.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="type")
    compiler = parser.add_argument_group("anywhere")
    compiler.add_argument("--compile-only", action="store_true", help="the compiler's report")
    compiler.add_argument("--archs", nargs="+", type=int, choices=[80, 90], default=[90, 80],
                          help="compute capabilities to compile for")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.compile_only:
        as_compiled(args.archs)
    elif cuda:
        on_gpu(args)
    else:
        for heads in getattr(args, "heads", [6]):
            on_cpu(args.lengths, args.tokens, heads, args.runs)


def example(runs, heads, dtype, device):
    """qkv (T, 3, heads, 64) and the gradient of the output."""
    T = sum(count * length for count, length in runs)
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    return make(T, 3, heads, 64), make(T, heads, 64)


def gradient(fn, given, dout):
    """One forward and backward pass: the gradients of what is given."""
    given = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(fn(*given), given, dout)


def wrong(fn, runs, qkv, dout):
    """Relative error of output and gradient, the larger, on the first sequence of each run,
    against float64."""
    starts = itertools.accumulate((count * length for count, length in runs), initial=0)
    first = [start + i for start, (_, length) in zip(starts, runs) for i in range(length)]
    few, results = [(1, length) for _, length in runs], []
    exact = (lambda x: sdpa(x, few)), slice(None), qkv[first].double(), dout[first].double()
    for f, rows, x, do in ((fn, first, qkv, dout), exact):
        x = x.detach().requires_grad_()
        out = f(x)
        found = out.detach(), *torch.autograd.grad(out, x, do)
        results.append([y[rows].double() for y in found])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))


# --- on a CPU: library or products? -----------------------------------------------------------


def on_cpu(lengths, tokens, heads, n_runs):
    """A table for each type; then, from its times, how far the products win, beside what the
    dispatcher holds."""
    print("each length is checked before it is timed: the products may err by half more than the "
          "library at most")
    held = []
    for dtype in LONGEST_PRODUCTS:
        rows, times = [], []
        for length in sorted(lengths):
            row, t = cpu_row(length, max(1, tokens // length), heads, dtype, n_runs)
            rows.append(row)
            times.append(t)
        columns = ["ms", "times faster", "peak MiB"]
        table(f"Attention, about {tokens} tokens, {heads} heads, {name_of(dtype)}: library / products",
              ["tokens", "sequences", "error", "forward + backward " + columns[0], *columns[1:],
               "forward " + columns[0], *columns[1:]], rows)
        for mode, limit in zip(("in training", "without gradients"), LONGEST_PRODUCTS[dtype]):
            t = [(length, *x[mode]) for length, x in zip(sorted(lengths), times)]
            held.append([name_of(dtype), mode, longest_win(t), limit])
    table("Up to how many tokens the products take a sequence",
          ["type", "", "by these times", "the dispatcher's"], held)


def cpu_row(length, count, heads, dtype, n_runs):
    """Cells of one line, and {mode: (library's seconds, products' seconds)}."""
    runs = ((count, length),)
    qkv, dout = example(runs, heads, dtype, "cpu")
    ways = [functools.partial(attention, runs=runs, impl=impl) for impl in ("sdpa", "products")]
    errors = [wrong(fn, runs, qkv, dout) for fn in ways]
    if errors[1] > 1.5 * errors[0] + 1e-7:
        raise SystemExit(f"{length} tokens, {name_of(dtype)}: the products err by {errors[1]:.1e},"
                         f" the library by {errors[0]:.1e}")
    modes = {"in training": [functools.partial(gradient, fn, [qkv], dout) for fn in ways],
             "without gradients": [functools.partial(fn, qkv) for fn in ways]}
    cells, times = [], {}
    for mode, calls in modes.items():
        a, b = times[mode] = tuple(seconds(dict(enumerate(calls)), n_runs).values())
        peaks = [f"{peak_bytes(call) / 2**20:.0f}" for call in calls]
        cells += [f"{a * 1e3:.1f} / {b * 1e3:.1f}", f"{a / b:.2f}", " / ".join(peaks)]
    return [length, count, " / ".join(f"{error:.0e}" for error in errors), *cells], times


def longest_win(times):
    """The largest length at which, as at all smaller ones, the products are at most 3 % slower;
    times [(length, a, b), ...]."""
    won = itertools.takewhile(lambda row: row[2] <= 1.03 * row[1], times)
    return max((length for length, *_ in won), default=0)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# --- on a GPU: the kernels or one of PyTorch's backends? --------------------------------------


def on_gpu(args):
    block = torch.empty(2**28, device="cuda"), torch.empty(2**28, device="cuda")
    copy = event_seconds({"copy": lambda: block[0].copy_(block[1])}, args.runs)["copy"]
    copied = 2 * block[0].nbytes / copy  # bytes per second, read and written
    del block
    print(f"measured copy rate {copied / 1e12:.2f} TB/s; "
          f"cuDNN {torch.backends.cudnn.version()}, CUDA {torch.version.cuda}")
    for name, (runs, heads) in SHAPES.items():
        for H in getattr(args, "heads", heads) if name[0] in args.shapes else ():
            gpu_table(name, runs, H, getattr(torch, args.dtype), copied, args.runs, args.without)


def stock_attention(runs, device="cuda"):
    """{name: function(q, k, v) -> out}, all (T, H, 64): what PyTorch brings for packed
    sequences."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor([n for count, n in runs for _ in range(count)], device=device)
    starts, longest = F.pad(lengths.cumsum(0), (1, 0)), int(lengths.max())
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)  # (T,)
    inside = torch.arange(longest, device=device) < lengths[:, None]        # (sequences, longest)
    places = inside.flatten().nonzero()[:, 0]  # (T,) of the tokens among the padded ones
    cache = {}

    def per_run(backend, q, k, v):
        with sdpa_kernel(backend):
            parts = zip(*(by_run(x, runs) for x in (q, k, v)))
            return packed([F.scaled_dot_product_attention(*part) for part in parts])

    def padded(q, k, v):
        # tokens are written into zeros: reading one row for all of the padding would have the
        # backward pass add them up one by one, for minutes
        q, k, v = (x.new_zeros(inside.numel(), *x.shape[1:]).index_copy(0, places, x)
                   .unflatten(0, inside.shape).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, inside[:, None, None])
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)

    def varlen(q, k, v):
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(q, k, v, starts.int(), starts.int(), longest, longest)

    def flex(q, k, v):
        if not cache:
            def same(b, h, i, j):
                return document[i] == document[j]
            mask = create_block_mask(same, None, None, len(q), len(q), device, _compile=True)
            cache.update(mask=mask, fn=torch.compile(flex_attention, dynamic=False))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))               # (1, H, T, 64) each
        return cache["fn"](q, k, v, block_mask=cache["mask"])[0].transpose(0, 1)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION}
    stock = {f"SDPA {name}": functools.partial(per_run, each) for name, each in backends.items()}
    return stock | {"varlen_attn": varlen, "flex_attention, compiled": flex,
                    "SDPA padded and masked": padded}


def gpu_table(name, runs, H, dtype, copied, n_runs, without):
    """One table. Kernel level: q, k, v given, dq, dk, dv wanted. Module level: qkv and its
    gradient, packed, as in training."""
    T, pairs = sum(count * n for count, n in runs), sum(count * n**2 for count, n in runs)
    inputs = [example(runs, H, dtype, "cuda") for _ in range(4)]
    error, (forward, kernel, module) = gpu_candidates(name, runs, H, inputs, without)
    replay = {label: graph for label, fn in module.items() if (graph := as_cuda_graph(fn, 4))}
    levels = forward, kernel, module, replay
    times = [[event_seconds(level, n_runs) for _ in range(2)] for level in levels]
    best = [min((t for label, t in level[0].items() if label not in OURS), default=float("nan"))
            for level in times[:3]]
    floor = (12 * 64 * dtype.itemsize + 8) * T * H / copied  # 4 rows, 8 back; L written and read
    rows = []
    for label in kernel:
        f, k, m = t = [level[0][label] for level in times[:3]]
        again = max(abs(level[1][label] / level[0][label] - 1) for level in times[:3])
        extra = (peak_bytes(module[label]) - inputs[0][0].nbytes * 4 / 3) / 2**20
        rows.append([label, f"{error[label]:.1e}", *(f"{x * 1e3:.3f}" for x in t),
                     f"{times[3][0][label] / 4 * 1e3:.3f}" if label in replay else "-",
                     f"{14 * pairs * H * 64 / m / 1e12:.0f}", f"{floor / m:.0%}",
                     *(f"{b / x:.2f}" for b, x in zip(best, t)), f"{extra:.0f}", f"{again:.0%}"])
    table(f"Attention {name}, {T} tokens, {H} heads, {name_of(dtype)}",
          ["", "error", "forward ms", "kernel ms", "module ms", "graph replay ms", "TFLOP/s",
           "of floor", "x stock forward", "x stock kernel", "x stock module", "extra MiB",
           "second pass"], rows)


OURS = {"ours": "triton", "what auto picks": "auto"}


def gpu_candidates(name, runs, H, inputs, without):
    """{label: error}, and {label: function} of the forward, kernel and module level: of those
    that take these inputs and are in this PyTorch."""
    stock = {label: fn for label, fn in stock_attention(runs).items()
             if not label.removeprefix("SDPA ").startswith(tuple(without))}
    packs = {label: functools.partial(attention, runs=runs, impl=OURS[label]) for label in OURS}
    packs |= {label: lambda qkv, fn=fn: fn(*qkv.unbind(1)) for label, fn in stock.items()}
    apart, whole = [(x.unbind(1), do) for x, do in inputs], [([x], do) for x, do in inputs]
    error, forward, kernel, module = {}, {}, {}, {}
    for label, fn in (bar := tqdm(packs.items(), desc=f"{name}, {H} heads", unit="way")):
        bar.set_postfix_str(label)  # flex_attention compiles for a minute
        try:
            torch.full((2**28,), float("nan"), device="cuda")  # so that what is not written shows
            error[label] = wrong(fn, runs, *inputs[0])
            one = in_turn(gradient, stock.get(label, fn), apart if label in stock else whole)
            one()
            kernel[label], module[label] = one, in_turn(gradient, fn, whole)
            forward[label] = torch.no_grad()(in_turn(lambda fn, x, _: fn(x), fn, inputs))
        except Exception as e:
            reason = " ".join(str(e).split())
            print(f"{label} is out of {name}: {type(e).__name__}: {reason}"[:200])
    return error, (forward, kernel, module)


def in_turn(call, fn, inputs):
    """Function that calls with the next of some inputs, which together exceed the cache."""
    turn = itertools.cycle(inputs)
    return lambda: call(fn, *next(turn))


def as_cuda_graph(call, n):
    """n calls as one replay, or None where they cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(n):
                call()
        return graph.replay
    except Exception:
        torch.cuda.synchronize()
        return None


# --- no GPU needed: what the compiler makes of the kernels ------------------------------------


def as_compiled(archs):
    """Table of the kernels that the dispatcher picks, compiled for GPUs that need not be
    here."""
    import triton

    from tests.attention_aot import report

    figures = ["warps", "registers", "spills", "shared", "programs_per_sm", "wgmma", "mma", "atomics",
               "instructions"]
    cases, rows = itertools.product(archs, ("bfloat16", "float16"), (257, 50, 261, 1370)), []
    for arch, dtype, length in cases:
        for kernel, f in report(length, dtype, arch):
            rows.append([f"sm_{arch}", dtype, length, kernel, *(f[name] for name in figures)])
    table(f"Attention kernels as triton {triton.__version__} compiles them; nothing was run",
          ["GPU", "type", "tokens", "kernel", "warps", "registers", "spills", "shared bytes",
           "programs per SM", "wgmma", "mma", "atomics", "instructions"], rows)
