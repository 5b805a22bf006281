"""The backward kernels, with g the gradient of the losses and the formulas of request.py:

    w_ij = c_i p_ij - a q_ij - (1 - a) / n_i [j matches i]
    d query_i = g_i / tau sum_j w_ij key_j      backward_queries, over a share of the keys: partial sums, unscaled
    d key_j   = 1 / tau sum_i g_i w_ij query_i  backward_keys, over all queries

Both compute the logits once more. Wider features than BLOCK_W take several programs. No weight exceeds 1 in size; in
half precision it is multiplied by WEIGHT before it is rounded, so that float16 keeps the digits of small ones: of many
keys, and of a teacher that the student is close to.
"""

import triton
import triton.language as tl

from .forward import SIZES, at_row, base_2, matching, products, tile

WEIGHT = tl.constexpr(16384.0)


@triton.jit
def weights(
    s, t, positive, factor, distillation, lse, teacher_lse, count, inside, HAS_TEACHER: tl.constexpr
):  # fmt: skip
    """w [BN, BK], 0 where not ``inside``, of both products and of the rows' statistics."""
    share = tl.where(count > 0, 1.0, distillation)
    w = share[:, None] * tl.exp2(s * factor - lse[:, None])
    if HAS_TEACHER:
        w -= distillation * tl.exp2(t * factor - teacher_lse[:, None])
    w -= tl.where(positive, ((1.0 - distillation) / tl.maximum(count, 1.0))[:, None], 0.0)
    return tl.where(inside, w, 0.0)


@triton.jit(do_not_specialize=SIZES)
def backward_queries(
    Query, Teacher, Key, QueryGroup, KeyGroup, Temperature, Lse, TeacherLse, Matches, Part,
    N, K, E, query_row, teacher_row, key_row, part_split, part_row, first_split, split_keys, distillation,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_W: tl.constexpr, HAS_TEACHER: tl.constexpr,
):  # fmt: skip
    """Part (splits, N, E) float32. Program (split * blocks of queries + block) * blocks of width + block."""
    width = E * UNIT
    chunks = tl.cdiv(width, BLOCK_W)
    blocks = tl.cdiv(N, BLOCK_N)
    wide = tl.program_id(0) % chunks * BLOCK_W + tl.arange(0, BLOCK_W)
    rows = tl.program_id(0) // chunks % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(0) // chunks // blocks
    row_inside = rows < N
    factor = base_2(tl.load(Temperature))
    lse = tl.load(Lse + rows, mask=row_inside, other=0.0)
    teacher_lse = lse
    if HAS_TEACHER:
        teacher_lse = tl.load(TeacherLse + rows, mask=row_inside, other=0.0)
    count = tl.load(Matches + rows, mask=row_inside, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    last = tl.minimum((split + 1) * split_keys, K)
    for first in range(split * split_keys, last, BLOCK_K):
        keys = tl.arange(0, BLOCK_K)
        key_inside = keys < last - first
        block = at_row(Key, first, key_row, UNIT)
        s, t = products(
            Query, Teacher, block, rows, keys, row_inside, key_inside,
            query_row, teacher_row, key_row, width, UNIT, BLOCK_N, BLOCK_K, BLOCK_E, EVEN_E, HAS_TEACHER,
        )  # fmt: skip
        positive = matching(QueryGroup, KeyGroup + first, rows, keys, row_inside, key_inside)
        w = weights(s, t, positive, factor, distillation, lse, teacher_lse, count, key_inside[None, :], HAS_TEACHER)
        at, keep = tile(block, keys, key_row, wide, width, key_inside, UNIT, EVEN_W)
        k = tl.load(at, mask=keep, other=0.0).to(Query.dtype.element_ty)  # [BK, BW]
        total = tl.dot((w * WEIGHT).to(k.dtype), k, total, input_precision="ieee")
    at, keep = tile(
        Part + (first_split + split).to(tl.int64) * part_split * UNIT,
        rows, part_row, wide, width, row_inside, UNIT, EVEN_W,
    )  # fmt: skip
    tl.store(at, total / WEIGHT, mask=keep)


@triton.jit(do_not_specialize=SIZES)
def backward_keys(
    Query, Teacher, Key, QueryGroup, KeyGroup, Temperature, Lse, TeacherLse, Matches, GradLoss, Largest, GradKey,
    N, K, E, query_row, teacher_row, key_row, dk_row, distillation,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr,
    EVEN_E: tl.constexpr, EVEN_W: tl.constexpr, HAS_TEACHER: tl.constexpr,
):  # fmt: skip
    """GradKey (K, E). Program block of keys * blocks of width + block. Largest () is the largest |g|, above 0: the
    gradients are divided by it before they are rounded."""
    width = E * UNIT
    chunks = tl.cdiv(width, BLOCK_W)
    wide = tl.program_id(0) % chunks * BLOCK_W + tl.arange(0, BLOCK_W)
    first = tl.program_id(0) // chunks * BLOCK_K
    keys = tl.arange(0, BLOCK_K)
    key_inside = keys < K - first
    tau, largest = tl.load(Temperature), tl.load(Largest)
    factor = base_2(tau)
    block = at_row(Key, first, key_row, UNIT)
    total = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        row_inside = rows < N
        s, t = products(
            Query, Teacher, block, rows, keys, row_inside, key_inside,
            query_row, teacher_row, key_row, width, UNIT, BLOCK_N, BLOCK_K, BLOCK_E, EVEN_E, HAS_TEACHER,
        )  # fmt: skip
        lse = tl.load(Lse + rows, mask=row_inside, other=0.0)
        teacher_lse = lse
        if HAS_TEACHER:
            teacher_lse = tl.load(TeacherLse + rows, mask=row_inside, other=0.0)
        count = tl.load(Matches + rows, mask=row_inside, other=0.0)
        positive = matching(QueryGroup, KeyGroup + first, rows, keys, row_inside, key_inside)
        w = weights(s, t, positive, factor, distillation, lse, teacher_lse, count, row_inside[:, None], HAS_TEACHER)
        w *= (tl.load(GradLoss + rows, mask=row_inside, other=0.0) / largest)[:, None]
        at, keep = tile(Query, rows, query_row, wide, width, row_inside, UNIT, EVEN_W)
        q = tl.load(at, mask=keep, other=0.0)  # [BN, BW]
        total = tl.dot(tl.trans((w * WEIGHT).to(q.dtype)), q, total, input_precision="ieee")
    at, keep = tile(at_row(GradKey, first, dk_row, UNIT), keys, dk_row, wide, width, key_inside, UNIT, EVEN_W)
    tl.store(at, (total * (largest / tau / WEIGHT)).to(GradKey.dtype.element_ty), mask=keep)
