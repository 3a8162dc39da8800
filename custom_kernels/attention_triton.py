"""Triton kernels for attention over many short sequences, forward and backward. Not run by hand:
attention.py dispatches to it.

DINOv2's crops are 257 tokens (16 x 16 patches and a class token) and 50. A row is what one token
has in one head of one array: 64 numbers, 128 bytes in 16 bit. Per token and head:

               rows in and out             FLOP per key    at 257 tokens     an H100's ridge
    forward    q k v -> o             4    4 * 64          128 FLOP/byte     270 FLOP/byte
    backward   q k v o do -> dq dk dv 8    10 * 64         160 FLOP/byte

so memory sets the time, not the tensor cores, and the winner moves few bytes and pads little:

  * One program is one head of one sequence, or 64 rows of it, and what it needs stays on the chip.
    Library kernels cut 257 tokens into three tiles of 128 (45 % useful work; 15 % at 50 tokens).
    Here 257 is 4 blocks of 64 and a tail of 16 (89 %), 50 is one tile.
  * q, k, v are read where the projection left them, and dq, dk, dv are written where its backward
    wants them: one tensor (T, 3, H, 64), no copy. The only other thing saved is L, the row-wise
    log-sum-exp in base 2, (H, T) float32.
  * The backward writes each element once: no atomics, no workspace, so it is bit-deterministic.

Each kernel's docstring counts the bytes that it reads and writes, per token and head in 16 bit,
with b blocks of 64 tokens in a sequence: 1 at 50 tokens, 5 at 257. The programs of a sequence
run side by side, so that a second read mostly finds the first one's rows in the cache that they
share.

bwd_257, one pass at 1 + 256 tokens. Q and dO of the 256 patches wait in shared memory, dQ grows
in registers; K, V stream by in blocks of 64, and each block's dK, dV are finished before the
next comes. As a row and a column of matrices the class token would cost a whole extra tile; as
vectors it adds a twentieth.

                keys ->   0     1-64   65-128 129-192 193-256
               +-------+------+------+------+------+------+
     class   0 |  q0   |corner|   row 0: class_row        |
               +-------+------+------+------+------+------+
    patches  1 |  Q dO |column|  ->     ->     ->     ->  |
        to 256 |  dQ   |   0  | dK dV                     |
               +-------+------+---------------------------+
                       class_column

Notation of the FlashAttention papers (Dao 2022, 2023), row i, column j, scale 1/8 = 64^-1/2:

    S = Q K^T / 8    P = exp(S - L)    O = P V    L_i = log sum_j exp S_ij
    dV = P^T dO      dP = dO V^T       dS = P * (dP - delta),  delta_i = sum_d dO_id O_id
    dQ = dS K / 8    dK = dS^T Q / 8
"""
import torch
import triton
import triton.language as tl

D = tl.constexpr(64)  # head dimension of every ViT here
SCALE = tl.constexpr(0.125)
SCALE_LOG2 = tl.constexpr(0.125 * 1.4426950408889634)  # exp(S) = exp2(that * Q K^T): hardware has exp2


@triton.jit
def locate(first, n, H):
    """This program's first token, and head. Heads run fastest: neighbours share the tokens'
    memory pages."""
    i = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    return first + i.to(tl.int64) * n, h


@triton.jit
def load(ptr, rows, n, stride, MASKED: tl.constexpr):
    """Rows of one head, (len(rows), D). MASKED: rows from n on belong to a neighbour, or to
    nobody, and read as zero."""
    ptrs = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        tile = tl.load(ptrs, mask=rows[:, None] < n, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store(ptr, rows, n, stride, tile, MASKED: tl.constexpr):
    ptrs = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=rows[:, None] < n)
    else:
        tl.store(ptrs, tile.to(ptr.dtype.element_ty))


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # float32 operands multiply in float32, not TF32


# --- forward ----------------------------------------------------------------------------------


@triton.jit
def fwd_block(q, k_ptr, v_ptr, cols, n, stride_t, acc, m, l, MASKED: tl.constexpr):
    """Online softmax (FlashAttention algorithm 1): fold one block of keys into acc = sum exp2(s
    - m) v, l = sum exp2(s - m)."""
    k = load(k_ptr, cols, n, stride_t, MASKED)  # (BN, D)
    v = load(v_ptr, cols, n, stride_t, MASKED)  # (BN, D)
    s = dot(q, tl.trans(k))  # (BM, BN)
    if MASKED:
        s = tl.where(cols[None, :] < n, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * SCALE_LOG2)
    p = tl.math.exp2(s * SCALE_LOG2 - m_new[:, None])
    alpha = tl.math.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + dot(p.to(v.dtype), v)
    return acc, m_new, l


@triton.jit
def fwd_rows(q_ptr, stride_3, stride_t, o_ptr, stride_o, lse_ptr, start, n,
             BM: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr):
    rows = start + tl.arange(0, BM)
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3
    q = load(q_ptr, rows, n, stride_t, MASKED)
    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    if FULL:
        for j in range(0, n // 64 * 64, 64):
            cols = j + tl.arange(0, 64)
            acc, m, l = fwd_block(q, k_ptr, v_ptr, cols, n, stride_t, acc, m, l, False)
    if n % 64 > 0:
        cols = n // 64 * 64 + tl.arange(0, TAIL)
        acc, m, l = fwd_block(q, k_ptr, v_ptr, cols, n, stride_t, acc, m, l, True)
    store(o_ptr, rows, n, stride_o, acc / l[:, None], MASKED)
    tl.store(lse_ptr + rows, m + tl.math.log2(l), mask=rows < n)


@triton.jit(do_not_specialize=["first", "n", "T"])
def fwd(qkv, out, lse, first, n, T, H, stride_t, stride_3, stride_h,
        FULL: tl.constexpr, TAIL: tl.constexpr):
    """O = softmax(Q K^T / 8) V and L, for 64 queries (or the last TAIL) of one head of one
    sequence.

    Reads q 128, k and v 256 b; writes o 128, L 4. FULL: there are 64 tokens or more. TAIL:
    width of the last, masked block, for queries as for keys.
    """
    t0, h = locate(first, n, H)
    q_ptr = qkv + t0 * stride_t + h * stride_h
    o_ptr = out + (t0 * H + h) * D
    lse_ptr = lse + h * T + t0
    start = tl.program_id(1) * 64
    if FULL and start + 64 <= n:
        fwd_rows(q_ptr, stride_3, stride_t, o_ptr, H * D, lse_ptr, start, n,
                 64, False, FULL, TAIL)
    elif start < n:
        fwd_rows(q_ptr, stride_3, stride_t, o_ptr, H * D, lse_ptr, start, n,
                 TAIL, True, FULL, TAIL)


# --- backward, up to 64 tokens: one tile ------------------------------------------------------


@triton.jit(do_not_specialize=["first", "n", "T"])
def bwd_tile(qkv, out, dout, lse, dqkv, first, n, T, H, stride_t, stride_3, stride_h,
             FULL: tl.constexpr, TAIL: tl.constexpr):
    """The five products of the backward, as in the paper, on one 64 x 64 tile that holds the
    whole sequence. Reads q k v o do 640, L 4; writes dq dk dv 384."""
    t0, h = locate(first, n, H)
    q_ptr = qkv + t0 * stride_t + h * stride_h
    dq_ptr = dqkv + (t0 * 3 * H + h) * D
    o_offset = (t0 * H + h) * D
    rows = tl.arange(0, 64)
    q = load(q_ptr, rows, n, stride_t, True)  # (64, D)
    k = load(q_ptr + stride_3, rows, n, stride_t, True)
    v = load(q_ptr + stride_3 + stride_3, rows, n, stride_t, True)
    o = load(out + o_offset, rows, n, H * D, True)
    do = load(dout + o_offset, rows, n, H * D, True)
    # of padding: infinity, so that P = 0 in its rows
    L = tl.load(lse + h * T + t0 + rows, mask=rows < n, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)

    p = tl.math.exp2(dot(q, tl.trans(k)) * SCALE_LOG2 - L[:, None])  # (64, 64)
    p = tl.where(rows[None, :] < n, p, 0.0)
    ds = (p * (dot(do, tl.trans(v)) - delta[:, None])).to(q.dtype)
    dv = dot(tl.trans(p.to(q.dtype)), do)
    dk = dot(tl.trans(ds), q) * SCALE
    dq = dot(ds, k) * SCALE

    store(dq_ptr, rows, n, 3 * H * D, dq, True)
    store(dq_ptr + H * D, rows, n, 3 * H * D, dk, True)
    store(dq_ptr + 2 * H * D, rows, n, 3 * H * D, dv, True)


# --- backward, 256 + 1 tokens: one pass -------------------------------------------------------


@triton.jit
def class_query(q_ptr, o_ptr, do_ptr, lse_ptr):
    """q, dO, L, delta of token 0. Read again for each block of keys: held through the loop they
    would make dQ spill."""
    d = tl.arange(0, D)
    q0 = tl.load(q_ptr + d).to(tl.float32)  # (D,)
    do0 = tl.load(do_ptr + d).to(tl.float32)  # (D,)
    return q0, do0, tl.load(lse_ptr), tl.sum(tl.load(o_ptr + d).to(tl.float32) * do0, 0)


@triton.jit
def class_column(k0, v0, q, do, L, delta, q0, do0, L0, delta0):
    """The class token's key, which every query looks at: column 0 of P.

    k0, v0 (D,) are the token's; q, do (256, D), L, delta (256,) the patches' queries; q0, do0
    (D,), L0, delta0 its own. Returns dk0 / scale and dv0 (D,), finished; and what this key adds
    to dQ / scale of the patches (256, D) and of the class token (D,).
    """
    p = tl.math.exp2(tl.sum(q.to(tl.float32) * k0[None, :], 1) * SCALE_LOG2 - L)  # (256,)
    p0 = tl.math.exp2(tl.sum(q0 * k0, 0) * SCALE_LOG2 - L0)  # the corner: it looks at itself
    ds = p * (tl.sum(do.to(tl.float32) * v0[None, :], 1) - delta)  # (256,)
    ds0 = p0 * (tl.sum(do0 * v0, 0) - delta0)
    dv0 = tl.sum(p[:, None] * do.to(tl.float32), 0) + p0 * do0
    dk0 = tl.sum(ds[:, None] * q.to(tl.float32), 0) + ds0 * q0
    return dk0, dv0, ds[:, None] * k0[None, :], ds0 * k0


@triton.jit
def class_row(k, v, q0, do0, L0, delta0):
    """The class token's query, which looks at every key: row 0 of P, against one block of the
    patches' k, v (64, D).

    Returns what it adds to dk / scale and dv of the block (64, D), and to its own dq / scale
    (D,).
    """
    p = tl.math.exp2(tl.sum(k.to(tl.float32) * q0[None, :], 1) * SCALE_LOG2 - L0)  # (64,)
    ds = p * (tl.sum(v.to(tl.float32) * do0[None, :], 1) - delta0)  # (64,)
    dq0 = tl.sum(ds[:, None] * k.to(tl.float32), 0)  # (D,)
    return ds[:, None] * q0[None, :], p[:, None] * do0[None, :], dq0


@triton.jit(do_not_specialize=["first", "n", "T"])
def bwd_257(qkv, out, dout, lse, dqkv, first, n, T, H, stride_t, stride_3, stride_h,
            FULL: tl.constexpr, TAIL: tl.constexpr):
    """All five products in one pass over the keys, with all queries on the chip.

    P is 257 x 257: the class token's key (column 0) comes first, then block by block the
    patches' keys, where the class token's query (row 0) is added. k0 is the class token's k, dk
    its patches', and so on; dk and dq are without their scale of 1/8 until they are stored.

    Reads q k v o do 640, L 4, and q o do of token 0 again for each 64 keys; writes dq dk dv 384.
    """
    t0, h = locate(first, n, H)
    d = tl.arange(0, D)
    q_ptr = qkv + t0 * stride_t + h * stride_h
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3
    o_ptr = out + (t0 * H + h) * D
    do_ptr = dout + (t0 * H + h) * D
    lse_ptr = lse + h * T + t0
    dq_ptr = dqkv + (t0 * 3 * H + h) * D
    dk_ptr = dq_ptr + H * D
    dv_ptr = dk_ptr + H * D

    patches = 1 + tl.arange(0, 256)
    q = load(q_ptr, patches, n, stride_t, False)  # (256, D), here to the end
    do = load(do_ptr, patches, n, H * D, False)  # (256, D), here to the end
    o = load(o_ptr, patches, n, H * D, False)
    L = tl.load(lse_ptr + patches)  # (256,)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # (256,)

    k0 = tl.load(k_ptr + d).to(tl.float32)  # (D,)
    v0 = tl.load(v_ptr + d).to(tl.float32)  # (D,)
    q0, do0, L0, delta0 = class_query(q_ptr, o_ptr, do_ptr, lse_ptr)
    # dq (256, D) and dq0 (D,) grow in registers from here on
    dk0, dv0, dq, dq0 = class_column(k0, v0, q, do, L, delta, q0, do0, L0, delta0)
    tl.store(dv_ptr + d, dv0.to(dqkv.dtype.element_ty))
    tl.store(dk_ptr + d, (dk0 * SCALE).to(dqkv.dtype.element_ty))

    for j in range(1, 257, 64):
        cols = j + tl.arange(0, 64)
        k = load(k_ptr, cols, n, stride_t, False)  # (64, D)
        v = load(v_ptr, cols, n, stride_t, False)  # (64, D)
        p = tl.math.exp2(dot(q, tl.trans(k)) * SCALE_LOG2 - L[:, None]).to(q.dtype)  # (256, 64)
        dv = dot(tl.trans(p), do)
        dp = dot(do, tl.trans(v)) - delta[:, None]
        if q.dtype == tl.float16:
            ds = (p.to(tl.float32) * dp).to(q.dtype)  # dP may leave float16's range where P dP does not
        else:
            ds = p * dp.to(q.dtype)  # bfloat16 has the range, and 16 bits leave registers for dQ
        dk = dot(tl.trans(ds), q)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
        q0_, do0_, L0_, delta0_ = class_query(q_ptr, o_ptr, do_ptr, lse_ptr)
        more_dk, more_dv, more_dq0 = class_row(k, v, q0_, do0_, L0_, delta0_)
        dq0 += more_dq0
        store(dk_ptr, cols, n, 3 * H * D, (dk + more_dk) * SCALE, False)
        store(dv_ptr, cols, n, 3 * H * D, dv + more_dv, False)
    store(dq_ptr, patches, n, 3 * H * D, dq * SCALE, False)
    tl.store(dq_ptr + d, (dq0 * SCALE).to(dqkv.dtype.element_ty))


# --- backward, any length: dQ by rows, dK dV by columns ---------------------------------------


@triton.jit
def dq_block(q, do, L, delta, k_ptr, v_ptr, cols, n, stride_t, dq, MASKED: tl.constexpr):
    k = load(k_ptr, cols, n, stride_t, MASKED)
    v = load(v_ptr, cols, n, stride_t, MASKED)
    p = tl.math.exp2(dot(q, tl.trans(k)) * SCALE_LOG2 - L[:, None])  # (BM, BN)
    if MASKED:
        p = tl.where(cols[None, :] < n, p, 0.0)  # exp2(0 - L) may be inf
    ds = p * (dot(do, tl.trans(v)) - delta[:, None])
    return tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_rows(q_ptr, stride_3, stride_t, o_ptr, do_ptr, stride_o, lse_ptr, dq_ptr, start, n,
            BM: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr):
    rows = start + tl.arange(0, BM)
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3
    q = load(q_ptr, rows, n, stride_t, MASKED)
    o = load(o_ptr, rows, n, stride_o, MASKED)
    do = load(do_ptr, rows, n, stride_o, MASKED)
    L = tl.load(lse_ptr + rows, mask=rows < n, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    dq = tl.zeros([BM, D], tl.float32)
    if FULL:
        for j in range(0, n // 64 * 64, 64):
            cols = j + tl.arange(0, 64)
            dq = dq_block(q, do, L, delta, k_ptr, v_ptr, cols, n, stride_t, dq, False)
    if n % 64 > 0:
        cols = n // 64 * 64 + tl.arange(0, TAIL)
        dq = dq_block(q, do, L, delta, k_ptr, v_ptr, cols, n, stride_t, dq, True)
    store(dq_ptr, rows, n, 3 * stride_o, dq * SCALE, MASKED)


@triton.jit(do_not_specialize=["first", "n", "T"])
def bwd_dq(qkv, out, dout, lse, dqkv, first, n, T, H, stride_t, stride_3, stride_h,
           FULL: tl.constexpr, TAIL: tl.constexpr):
    """dQ_i = sum_j P_ij (dP_ij - delta_i) K_j / 8 for 64 queries i (or the last TAIL).

    Reads q o do 384, L 4, k and v 256 b; writes dq 128.
    """
    t0, h = locate(first, n, H)
    q_ptr = qkv + t0 * stride_t + h * stride_h
    o_ptr = out + (t0 * H + h) * D
    do_ptr = dout + (t0 * H + h) * D
    lse_ptr = lse + h * T + t0
    dq_ptr = dqkv + (t0 * 3 * H + h) * D
    start = tl.program_id(1) * 64
    if FULL and start + 64 <= n:
        dq_rows(q_ptr, stride_3, stride_t, o_ptr, do_ptr, H * D, lse_ptr, dq_ptr, start, n,
                64, False, FULL, TAIL)
    elif start < n:
        dq_rows(q_ptr, stride_3, stride_t, o_ptr, do_ptr, H * D, lse_ptr, dq_ptr, start, n,
                TAIL, True, FULL, TAIL)


@triton.jit
def dkdv_block(k, v, q_ptr, o_ptr, do_ptr, lse_ptr, rows, n, stride_t, stride_o, dk, dv,
               MASKED: tl.constexpr):
    """Scores are held transposed, keys by queries, so that P^T and dS^T need no transposing."""
    q = load(q_ptr, rows, n, stride_t, MASKED)
    o = load(o_ptr, rows, n, stride_o, MASKED)
    do = load(do_ptr, rows, n, stride_o, MASKED)
    L = tl.load(lse_ptr + rows, mask=rows < n, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    p = tl.math.exp2(dot(k, tl.trans(q)) * SCALE_LOG2 - L[None, :])  # (BN, BM)
    dv = tl.dot(p.to(q.dtype), do, dv, input_precision="ieee")
    ds = p * (dot(v, tl.trans(do)) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_cols(q_ptr, stride_3, stride_t, o_ptr, do_ptr, stride_o, lse_ptr, dk_ptr, start, n,
              BN: tl.constexpr, MASKED: tl.constexpr, TAIL: tl.constexpr):
    cols = start + tl.arange(0, BN)
    k = load(q_ptr + stride_3, cols, n, stride_t, MASKED)
    v = load(q_ptr + stride_3 + stride_3, cols, n, stride_t, MASKED)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for i in range(0, n // 32 * 32, 32):  # 64 queries at a time would spill
        dk, dv = dkdv_block(k, v, q_ptr, o_ptr, do_ptr, lse_ptr, i + tl.arange(0, 32), n,
                            stride_t, stride_o, dk, dv, False)
    if n % 32 > 0:
        rows = n // 32 * 32 + tl.arange(0, 16 if TAIL == 16 else 32)
        dk, dv = dkdv_block(k, v, q_ptr, o_ptr, do_ptr, lse_ptr, rows, n,
                            stride_t, stride_o, dk, dv, True)
    store(dk_ptr, cols, n, 3 * stride_o, dk * SCALE, MASKED)
    store(dk_ptr + stride_o, cols, n, 3 * stride_o, dv, MASKED)


@triton.jit(do_not_specialize=["first", "n", "T"])
def bwd_dkdv(qkv, out, dout, lse, dqkv, first, n, T, H, stride_t, stride_3, stride_h,
             FULL: tl.constexpr, TAIL: tl.constexpr):
    """dV_j = sum_i P_ij dO_i and dK_j = sum_i P_ij (dP_ij - delta_i) Q_i / 8 for 64 keys j (or
    the last TAIL).

    Reads k v 256, q o do 384 b, L 4 b; writes dk dv 256.
    """
    t0, h = locate(first, n, H)
    q_ptr = qkv + t0 * stride_t + h * stride_h
    o_ptr = out + (t0 * H + h) * D
    do_ptr = dout + (t0 * H + h) * D
    lse_ptr = lse + h * T + t0
    dk_ptr = dqkv + (t0 * 3 * H + H + h) * D
    start = tl.program_id(1) * 64
    if FULL and start + 64 <= n:
        dkdv_cols(q_ptr, stride_3, stride_t, o_ptr, do_ptr, H * D, lse_ptr, dk_ptr, start, n,
                  64, False, TAIL)
    elif start < n:
        dkdv_cols(q_ptr, stride_3, stride_t, o_ptr, do_ptr, H * D, lse_ptr, dk_ptr, start, n,
                  TAIL, True, TAIL)


# --- launches ---------------------------------------------------------------------------------


def plan(length, dtype, capability):
    """Kernels for sequences of `length` tokens on a GPU of that compute capability (major,
    minor).

    Returns [(kernel, options), ...], the forward kernel first. A table read off compile reports
    (`python bench.py attention --compile-only`), not an autotuner: no warm-up, and the same
    bits on every GPU of a kind.
    """
    tail = 16 if 0 < length % 64 <= 16 else 64
    options = dict(FULL=length >= 64, TAIL=tail, num_warps=4, num_stages=2)
    if dtype == torch.float32:  # no tensor cores: right, not fast
        options |= dict(num_warps=8, num_stages=1)
        return [(fwd, options), (bwd_dq, options), (bwd_dkdv, options)]
    if length <= 64:
        return [(fwd, options), (bwd_tile, options)]
    if length == 257 and capability[0] == 9:  # 136 of the 227 KiB of shared memory
        return [(fwd, options), (bwd_257, options | dict(num_warps=8, num_stages=1))]
    return [(fwd, options), (bwd_dq, options), (bwd_dkdv, options)]


def launch(which, tensors, qkv, runs):
    """The kernels plan(...)[which] of each run, one launch each."""
    T, _, H, _ = qkv.shape
    first = 0  # token of the run
    for count, length in runs:
        if length * max(qkv.stride(0), 3 * H * 64) >= 2**31:
            raise ValueError(f"a sequence of {length} tokens spans more elements than a 32-bit offset counts")
        if count * length > 0:
            for kernel, options in plan(length, qkv.dtype, compute_capability(qkv))[which]:
                blocks = 1 if kernel in (bwd_tile, bwd_257) else triton.cdiv(length, 64)
                shape = first, length, T, H, *qkv.stride()[:3]
                run(kernel, (count * H, blocks), *tensors, *shape, **options)
        first += count * length


def run(kernel, grid, *args, **options):
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, enable_fp_fusion=True, **options)


def compute_capability(qkv):
    """(major, minor); on a CPU the interpreter plays an H100."""
    return torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (9, 0)


def forward(qkv, runs):
    """qkv (T, 3, H, 64), unit last stride; runs ((count, length), ...). Returns O (T, H, 64)
    and L (H, T) float32, base 2."""
    T, _, H, _ = qkv.shape
    out = torch.empty(T, H, 64, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(H, T, dtype=torch.float32, device=qkv.device)
    launch(slice(0, 1), (qkv, out, lse), qkv, runs)
    return out, lse


def backward(dout, qkv, out, lse, runs):
    """Gradient of qkv, (T, 3, H, 64) contiguous. dout, out (T, H, 64) and lse (H, T)
    contiguous."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    launch(slice(1, None), (qkv, out, dout, lse, dqkv), qkv, runs)
    return dqkv
