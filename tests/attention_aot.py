"""Compile the attention kernels for a GPU that is not there, and read what the compiler made of
them.

    python tests/attention_aot.py 90:bfloat16:257,50 80:bfloat16:257

prints one line of JSON per kernel: registers, spills, ...
Used by tests/test_attention.py and by `python bench.py attention --compile-only`.
"""
import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

POINTERS = {"lse": "*fp32"}  # the others point at tensors of the input's type
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHARED_PER_SM = {80: 164 * 1024, 90: 227 * 1024}  # bytes; a program takes 1 KiB more than it asks


def compiled(kernel, options, dtype, arch):
    """Compile one kernel of attention_triton.plan as its launcher would specialise it for a
    contiguous qkv."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    constants = {name: options.pop(name) for name in ("FULL", "TAIL")}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("first", "n", "T", "H"):
            signature[name] = "i32"
        else:
            pointer = POINTERS.get(name, "*" + DTYPES[dtype])
            signature[name] = "i32" if name.startswith("stride") else pointer
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32),
                          options=dict(options, enable_fp_fusion=True))


def read(binary, arch):
    """What cuobjdump and nvdisasm, which come with triton, say about a compiled kernel."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = printed(tools / "cuobjdump", "-res-usage", file.name)
        sass = printed(tools / "nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    ops = collections.Counter(re.findall(instruction, sass))
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    programs = min(65536 // (-(-registers // 8) * 8 * 32 * warps),
                   SHARED_PER_SM[arch] // (shared + 1024), 64 // warps)
    return dict(registers=registers, spills=ops["LDL"] + ops["STL"], shared=shared, warps=warps,
                programs_per_sm=programs, wgmma=ops["HGMMA"], mma=ops["HMMA"],
                atomics=ops["ATOM"] + ops["ATOMG"] + ops["RED"], instructions=sum(ops.values()))


def printed(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def report(length, dtype, arch):
    """[(kernel name, figures)] of the kernels that the dispatcher picks for that length."""
    import torch

    from custom_kernels.attention_triton import plan

    chosen = plan(length, getattr(torch, dtype), divmod(arch, 10))
    return [(kernel.__name__, read(compiled(kernel, options, dtype, arch), arch))
            for kernel, options in chosen]


if __name__ == "__main__":
    for arch, dtype, lengths in (word.split(":") for word in sys.argv[1:]):
        for length in lengths.split(","):
            for name, figures in report(int(length), dtype, int(arch)):
                row = dict(kernel=name, length=int(length), arch=int(arch), dtype=dtype, **figures)
                print(json.dumps(row), flush=True)
