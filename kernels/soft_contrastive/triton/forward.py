"""The forward kernels: a block of queries against a share of the keys, and what becomes of the shares.

    forward_keys    online over blocks of one matrix of keys, the in-batch ones or the queue: partial sums of each row
    forward_rows    partial sums of all shares, in their order, to the loss and to what the backward needs

Shape tags: N queries, K keys of a matrix, E width; BN, BK, BE a block of them. Logits are in base 2 and float32,
z = <query, key> log2(e) / tau and z' the same of the teacher's query; products are summed over blocks of the width, so
that any width runs in the same registers. Of a row a share keeps, in this order (STATISTICS of them):

    m = max z,  l = sum 2^(z - m),  sum 2^(z - m) z,  sum of z over matches,  matches,
    m' = max z',  l' = sum 2^(z' - m'),  sum 2^(z' - m') z

The last three only with HAS_TEACHER, without which the teacher's product is not computed. Nothing is added atomically:
two runs agree bitwise.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
STATISTICS = 8
# Not specialised: one binary for all lengths, widths and strides of a dtype, which is the one that was proven ahead of
# time. Strides and E are in units of 16 bytes (UNIT elements) wherever they are multiples of that, and the
# multiplication by UNIT is what tells the compiler so.
SIZES = (
    *("N", "K", "E", "splits", "first_split", "split_keys", "part_split", "part_row"),
    *(f"{x}_row" for x in ("query", "teacher", "key", "dk")),
)


@triton.jit
def base_2(tau):
    """What a product is multiplied by to be a logit in base 2, log2(e) / tau, rounded once."""
    return 1.4426950408889634 / tau


@triton.jit
def tile(Start, rows, stride, columns, width, inside, UNIT: tl.constexpr, EVEN_E: tl.constexpr):
    """Pointers to [rows, columns] of a matrix whose last dimension is dense, and which of them to touch."""
    keep = inside[:, None]
    if not EVEN_E:
        keep = keep & (columns < width)[None, :]
    return Start + rows[:, None] * stride * UNIT + columns[None, :], keep


@triton.jit
def at_row(Start, row, stride, UNIT: tl.constexpr):
    """Where a row begins, in int64: a queue may hold over 2**31 elements, a block of it does not."""
    return Start + row * stride.to(tl.int64) * UNIT


@triton.jit
def products(
    Query, Teacher, Key, rows, keys, row_inside, key_inside, query_row, teacher_row, key_row, width,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN_E: tl.constexpr, HAS_TEACHER: tl.constexpr,
):  # fmt: skip
    """<query, key> and <teacher's query, key>, both [BN, BK] float32; the keys are read once for both."""
    s = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    t = s
    for start in range(0, width, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        at, keep = tile(Key, keys, key_row, columns, width, key_inside, UNIT, EVEN_E)
        k = tl.trans(tl.load(at, mask=keep, other=0.0).to(Query.dtype.element_ty))  # [BE, BK]
        at, keep = tile(Query, rows, query_row, columns, width, row_inside, UNIT, EVEN_E)
        s = tl.dot(tl.load(at, mask=keep, other=0.0), k, s, input_precision="ieee")
        if HAS_TEACHER:
            at, keep = tile(Teacher, rows, teacher_row, columns, width, row_inside, UNIT, EVEN_E)
            t = tl.dot(tl.load(at, mask=keep, other=0.0), k, t, input_precision="ieee")
    return s, t


@triton.jit
def matching(QueryGroup, KeyGroup, rows, keys, row_inside, key_inside):
    """[BN, BK] bool: key of the query's group. Group -1 matches nothing, nor do rows and keys beyond the edge."""
    of_row = tl.load(QueryGroup + rows, mask=row_inside, other=-1)
    of_key = tl.load(KeyGroup + keys, mask=key_inside, other=-1)
    return (of_row[:, None] == of_key[None, :]) & (of_row != -1)[:, None]


@triton.jit(do_not_specialize=SIZES)
def forward_keys(
    Query, Teacher, Key, QueryGroup, KeyGroup, Temperature, Partial,
    N, K, E, query_row, teacher_row, key_row, splits, first_split, split_keys,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN_E: tl.constexpr, HAS_TEACHER: tl.constexpr,
):  # fmt: skip
    """Partial (STATISTICS, splits, N) float32. Program split * blocks of queries + block; a split is ``split_keys``
    keys, and its place is ``first_split`` later, behind those of another matrix."""
    blocks = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, width = rows < N, E * UNIT
    factor = base_2(tl.load(Temperature))
    m = tl.full([BLOCK_N], -INF, tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    mean, match, count = l, l, l
    m_t, l_t, mean_t = m, l, l
    last = tl.minimum((split + 1) * split_keys, K)
    for first in range(split * split_keys, last, BLOCK_K):
        keys = tl.arange(0, BLOCK_K)
        key_inside = keys < last - first
        s, t = products(
            Query, Teacher, at_row(Key, first, key_row, UNIT), rows, keys, row_inside, key_inside,
            query_row, teacher_row, key_row, width, UNIT, BLOCK_N, BLOCK_K, BLOCK_E, EVEN_E, HAS_TEACHER,
        )  # fmt: skip
        z = s * factor  # 0 beyond the edge, where its weight is 0 too
        positive = matching(QueryGroup, KeyGroup + first, rows, keys, row_inside, key_inside)
        match += tl.sum(tl.where(positive, z, 0.0), 1)
        count += tl.sum(positive.to(tl.float32), 1)
        inside = tl.where(key_inside[None, :], z, -INF)
        top = tl.maximum(m, tl.max(inside, 1))
        e, shrink = tl.exp2(inside - top[:, None]), tl.exp2(m - top)
        l, mean, m = l * shrink + tl.sum(e, 1), mean * shrink + tl.sum(e * z, 1), top
        if HAS_TEACHER:
            inside = tl.where(key_inside[None, :], t * factor, -INF)
            top = tl.maximum(m_t, tl.max(inside, 1))
            e, shrink = tl.exp2(inside - top[:, None]), tl.exp2(m_t - top)
            l_t, mean_t, m_t = l_t * shrink + tl.sum(e, 1), mean_t * shrink + tl.sum(e * z, 1), top
    one = splits.to(tl.int64) * N  # statistic
    at = Partial + (first_split + split).to(tl.int64) * N + rows
    tl.store(at, m, mask=row_inside)
    tl.store(at + one, l, mask=row_inside)
    tl.store(at + 2 * one, mean, mask=row_inside)
    tl.store(at + 3 * one, match, mask=row_inside)
    tl.store(at + 4 * one, count, mask=row_inside)
    if HAS_TEACHER:
        tl.store(at + 5 * one, m_t, mask=row_inside)
        tl.store(at + 6 * one, l_t, mask=row_inside)
        tl.store(at + 7 * one, mean_t, mask=row_inside)


@triton.jit
def merged(at, one, keep, m, l, mean):
    """A softmax's running m, l and sum, and those of some shares at ``at`` [shares, BN]."""
    m_new = tl.load(at, mask=keep, other=-INF)
    top = tl.maximum(m, tl.max(m_new, 0))
    w, shrink = tl.exp2(m_new - top[None, :]), tl.exp2(m - top)
    l = l * shrink + tl.sum(w * tl.load(at + one, mask=keep, other=0.0), 0)
    mean = mean * shrink + tl.sum(w * tl.load(at + 2 * one, mask=keep, other=0.0), 0)
    return top, l, mean


@triton.jit(do_not_specialize=SIZES)
def forward_rows(
    Partial, Temperature, Loss, GradTemperature, Lse, TeacherLse, Matches,
    N, splits, distillation,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_TEACHER: tl.constexpr,
):  # fmt: skip
    """The results (N,) float32, of the formulas in request.py; both log-sum-exps stay in base 2. A program is a
    block of queries, BLOCK_K shares at a time. TeacherLse is written with HAS_TEACHER alone."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    m = tl.full([BLOCK_N], -INF, tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    mean, match, count = l, l, l
    m_t, l_t, mean_t = m, l, l
    one = splits.to(tl.int64) * N
    for first in range(0, splits, BLOCK_K):
        shares = first + tl.arange(0, BLOCK_K)
        keep = (shares < splits)[:, None] & inside[None, :]
        at = Partial + shares.to(tl.int64)[:, None] * N + rows[None, :]
        m, l, mean = merged(at, one, keep, m, l, mean)
        match += tl.sum(tl.load(at + 3 * one, mask=keep, other=0.0), 0)
        count += tl.sum(tl.load(at + 4 * one, mask=keep, other=0.0), 0)
        if HAS_TEACHER:
            m_t, l_t, mean_t = merged(at + 5 * one, one, keep, m_t, l_t, mean_t)
    lse = m + tl.log2(l)
    share = tl.where(count > 0, 1.0, distillation)
    wanted = (1.0 - distillation) * match / tl.maximum(count, 1.0)  # of z, under the targets
    if HAS_TEACHER:
        wanted += distillation * mean_t / l_t
        tl.store(TeacherLse + rows, m_t + tl.log2(l_t), mask=inside)
    tau = tl.load(Temperature)
    tl.store(Loss + rows, (share * lse - wanted) * LN2, mask=inside)
    tl.store(GradTemperature + rows, (wanted - share * mean / l) * LN2 / tau, mask=inside)
    tl.store(Lse + rows, lse, mask=inside)
    tl.store(Matches + rows, count, mask=inside)
