"""Triton kernels for Sinkhorn-Knopp and the prototype cross-entropies: every pass streams logits
and stores no K-wide temporary. Not run by hand: prototype_loss.py dispatches to it.

With K = 65,536 prototypes one row of float32 logits is 256 KiB, and a ViT step with 64 images
has 5,043 teacher rows and 5,555 student rows (1.32 and 1.46 GB). Arithmetic is nearly free
beside moving them, so the design counts reads and writes:

                              as usually written            here
    Sinkhorn, 3 iterations    ~40 passes over (n, K)        5 reads
    cross-entropy, forward    ~10, with targets stored      1 read of student and teacher
    cross-entropy, backward   ~6                            1 read of both, 1 write of the gradient
    whole step                ~81 GB in float32             14 GB in float32, 7 GB in float16

Each kernel's docstring counts its bytes, w for each logit (4 in float32, 2 in float16); what is
not as long as n K is left out. A local crop meets two teacher rows, and each teacher row is met
by all local crops: its first reader pays, the others mostly find it in the cache.

What makes it possible: a target is softmax_k(teacher / temp + bias), so two numbers per row and
one per column rebuild any entry wherever it is needed.

    log-sum-exp over rows        over columns              cross-entropy
    a program: 8 rows of a       a program: 256 columns    a program: a student row i and its T
    slice of columns             of a slice of rows        teacher rows, all columns

         K ->                         K ->                      K ->
    [####|    |    |             [ ## |                    [####|    |    ] student i
    [####| -> |    |             [ ## |                    [####| -> |    ] teacher (i + shift) % m
                                   v    v                  [####|    |    ] teacher (i + 2 shift) % m
    slices joined -> lse[i]      slices joined -> lse[k]

A tile of 8 x 256 also reads the bias once for 8 rows: one row at a time would fetch as many
bytes of bias as of logits. All sums are float32, in a fixed order (no atomics): two runs agree
bit for bit.
"""
import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where running maxima start: not at -inf, for (-inf) - (-inf) is NaN
ROWS, COLUMNS = 8, 256  # a tile of the log-sum-exp kernels, one step of their loops
# How far one program goes: even the 128 class tokens of 64 images fill the GPU's 132 processors.
ROW_SLICE, COLUMN_SLICE = 1024, 8192
# Columns per step of a cross-entropy: 8 per thread, so that 2 x 3 running sums and their 3
# inputs fit in registers.
ROW_BLOCK = 2048
LAUNCH = dict(num_warps=4, enable_fp_fusion=True)


@triton.jit
def rise(top, x):
    """Raise a running maximum to max(top, x). Returns (new top, exp2(top - new top), exp2(x -
    new top)) with one exponential."""
    gap = x - top
    fall = tl.exp2(-tl.abs(gap))
    return tl.maximum(top, x), tl.where(gap > 0, fall, 1.0), tl.where(gap > 0, 1.0, fall)


@triton.jit
def merge(top, axis: tl.constexpr):
    """Common maximum of the lanes along an axis, and the factor exp2(top - maximum) that brings
    each lane's sum to it."""
    highest = tl.max(top, axis)
    return highest, tl.exp2(top - tl.expand_dims(highest, axis))


@triton.jit
def load_tile(logits, i, k, inside, K, scale):
    """scale * logits[i, k] in float32, (ROWS, COLUMNS); 64-bit offsets, for n K may pass
    2^31."""
    offsets = i[:, None].to(tl.int64) * K + k[None, :]
    return tl.load(logits + offsets, inside, other=0).to(tl.float32) * scale


@triton.jit
def row_lse_kernel(logits, bias, out, n, K, scale,
                   SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[slice, i] = log sum_k exp(logits[i, k] / temp + bias[k]) over the columns k of one
    slice; scale = LOG2E / temp. Reads n K w."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SLICE
    # every lane streams its own columns; the lanes meet once, at the end
    top = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, tl.minimum(first + SLICE, K), COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        inside = (i < n)[:, None] & (k < K)[None, :]
        x = load_tile(logits, i, k, inside, K, scale)
        x += (tl.load(bias + k, k < K, other=0) * LOG2E)[None, :]
        top, old, new = rise(top, tl.where(inside, x, -float("inf")))
        total = total * old + new
    highest, factor = merge(top, 1)
    lse = highest + tl.log2(tl.sum(total * factor, 1))  # (ROWS,) base 2
    tl.store(out + tl.program_id(1) * n + i, lse * LN2, i < n)


@triton.jit
def column_lse_kernel(logits, bias, out, n, K, scale,
                      SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[slice, k] = log sum_i exp(logits[i, k] / temp + bias[i]) over the rows i of one slice.
    Reads n K w."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * SLICE
    top = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, tl.minimum(first + SLICE, n), ROWS):
        i = start + tl.arange(0, ROWS)
        inside = (i < n)[:, None] & (k < K)[None, :]
        x = load_tile(logits, i, k, inside, K, scale)
        x += (tl.load(bias + i, i < n, other=0) * LOG2E)[:, None]
        top, old, new = rise(top, tl.where(inside, x, -float("inf")))
        total = total * old + new
    highest, factor = merge(top, 0)
    lse = highest + tl.log2(tl.sum(total * factor, 0))  # (COLUMNS,) base 2
    tl.store(out + tl.program_id(1) * K + k, lse * LN2, k < K)


@triton.jit
def load_targets(teacher, bias, rows, k, K, scale):
    """log2 of the targets, not yet normalised, of some teacher rows: (T, BLOCK)."""
    inside = (k < K)[None, :]
    x = tl.load(teacher + rows[:, None] * K + k[None, :], inside, other=0).to(tl.float32) * scale
    return x + (tl.load(bias + k, k < K, other=0) * LOG2E)[None, :]


@triton.jit
def cross_entropy_kernel(student, teacher, bias, loss, student_lse, teacher_lse, K, m, shift,
                         student_scale, teacher_scale, T: tl.constexpr, BLOCK: tl.constexpr):
    """loss[i] = sum_t (lse(s) - sum_k p_tk s_k), with s = student[i] / temp and p_t = softmax
    of teacher row (i + t shift) % m.

    The teacher's normaliser is not known before its row has been read, so sum_k exp(x_tk) s_k
    and sum_k exp(x_tk) run side by side under one running maximum; their quotient is the dot
    product. Reads the student's n K w and the teacher's m K w (T n K w, but for the cache).
    """
    i = tl.program_id(0).to(tl.int64)
    rows = (i + (tl.arange(0, T) + 1) * shift) % m  # (T,)
    s_top = tl.full([BLOCK], LOWEST, tl.float32)
    s_total = tl.zeros([BLOCK], tl.float32)
    t_top = tl.full([T, BLOCK], LOWEST, tl.float32)
    t_total = tl.zeros([T, BLOCK], tl.float32)
    dot = tl.zeros([T, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = tl.load(student + i * K + k, k < K, other=0).to(tl.float32) * student_scale
        x = load_targets(teacher, bias, rows, k, K, teacher_scale)
        s_top, old, new = rise(s_top, tl.where(k < K, s, -float("inf")))
        s_total = s_total * old + new
        t_top, old_t, new_t = rise(t_top, tl.where((k < K)[None, :], x, -float("inf")))
        t_total = t_total * old_t + new_t
        dot = dot * old_t + new_t * s[None, :]
    highest, factor = merge(s_top, 0)
    s_lse = highest + tl.log2(tl.sum(s_total * factor, 0))
    highest_t, factor_t = merge(t_top, 1)
    total_t = tl.sum(t_total * factor_t, 1)  # (T,)
    tl.store(loss + i, (T * s_lse - tl.sum(tl.sum(dot * factor_t, 1) / total_t, 0)) * LN2)
    tl.store(student_lse + i, s_lse * LN2)
    tl.store(teacher_lse + i * T + tl.arange(0, T), (highest_t + tl.log2(total_t)) * LN2)


@triton.jit
def cross_entropy_backward_kernel(dloss, student, teacher, bias, student_lse, teacher_lse, dstudent,
                                  K, m, shift, student_scale, teacher_scale,
                                  T: tl.constexpr, BLOCK: tl.constexpr):
    """dstudent[i, k] = dloss[i] / temp (T softmax(s)_k - sum_t p_tk); one program = one block
    of one row. Reads the student's n K w and the teacher's m K w (as above); writes n K w."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, T)
    rows = (i + (t + 1) * shift) % m
    s = tl.load(student + i * K + k, k < K, other=0).to(tl.float32) * student_scale
    x = load_targets(teacher, bias, rows, k, K, teacher_scale)
    x -= (tl.load(teacher_lse + i * T + t) * LOG2E)[:, None]
    gradient = T * tl.exp2(s - tl.load(student_lse + i) * LOG2E) - tl.sum(tl.exp2(x), 0)
    gradient *= tl.load(dloss + i) * (student_scale * LN2)
    tl.store(dstudent + i * K + k, gradient.to(dstudent.dtype.element_ty), k < K)


def row_lse(logits, bias, temp):
    """logits (n, K) contiguous, bias (K,) -> (n,): log-sum-exp of logits / temp + bias over
    each row."""
    n, K = logits.shape
    out = logits.new_empty(triton.cdiv(K, COLUMN_SLICE), n, dtype=torch.float32)
    if n:
        grid = (triton.cdiv(n, ROWS), len(out))
        row_lse_kernel[grid](logits, bias, out, n, K, LOG2E.value / temp,
                             SLICE=COLUMN_SLICE, ROWS=ROWS, COLUMNS=COLUMNS, **LAUNCH)
    return out.logsumexp(0)


def column_lse(logits, bias, temp):
    """logits (n, K) contiguous, bias (n,) -> (K,): log-sum-exp of logits / temp + bias over
    each column; -inf where n = 0."""
    n, K = logits.shape
    out = logits.new_empty(triton.cdiv(n, ROW_SLICE), K, dtype=torch.float32)
    if n:
        grid = (triton.cdiv(K, COLUMNS), len(out))
        column_lse_kernel[grid](logits, bias, out, n, K, LOG2E.value / temp,
                                SLICE=ROW_SLICE, ROWS=ROWS, COLUMNS=COLUMNS, **LAUNCH)
    return out.logsumexp(0)


def cross_entropy(student, teacher, bias, student_temp, teacher_temp, shift, n_targets):
    """student (n, K), teacher (m, K), bias (K,) -> loss (n,), student_lse (n,), teacher_lse (n,
    n_targets), all float32."""
    n, K = student.shape
    loss, student_lse = (student.new_empty(n, dtype=torch.float32) for _ in range(2))
    teacher_lse = student.new_empty(n, n_targets, dtype=torch.float32)
    if n:
        cross_entropy_kernel[(n,)](student, teacher, bias, loss, student_lse, teacher_lse,
                                   K, len(teacher), shift,
                                   LOG2E.value / student_temp, LOG2E.value / teacher_temp,
                                   T=n_targets, BLOCK=ROW_BLOCK, **LAUNCH | {"num_warps": 8})
    return loss, student_lse, teacher_lse


def cross_entropy_backward(dloss, student, teacher, bias, student_lse, teacher_lse,
                           student_temp, teacher_temp, shift):
    """dloss (n,) -> dstudent (n, K) in the student's dtype; the other arguments as given to and
    returned by the forward."""
    n, K = student.shape
    dstudent = torch.empty_like(student)
    if n:
        grid = (n, triton.cdiv(K, ROW_BLOCK))
        scales = LOG2E.value / student_temp, LOG2E.value / teacher_temp
        cross_entropy_backward_kernel[grid](dloss, student, teacher, bias, student_lse, teacher_lse,
                                            dstudent, K, len(teacher), shift, *scales,
                                            T=teacher_lse.shape[1], BLOCK=ROW_BLOCK, **LAUNCH)
    return dstudent
