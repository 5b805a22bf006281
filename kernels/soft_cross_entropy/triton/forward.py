"""The forward kernels: a program takes a block of rows and one of words, then the blocks of words are joined.

Of a row's logits z and the teacher's z' a block keeps the largest, the sum of exp less it, where the largest is, and
sum_j exp(z'_j - max z') z_j; the label's logit is written by the block that it lies in. That is 5 numbers for a whole
block of words. A loop over words would keep them in registers instead, a quarter of each in every thread of a warp, as
the rows lie along the shorter side of the matrix instructions: too many to multiply more than 32 rows at a time.
Nothing is added atomically: two runs agree bitwise.
"""

import triton
import triton.language as tl

from .primitives import INF, LN2, LOG2E, SIZES, tile_of_logits

FLOOR = tl.constexpr(
    -3.0e38
)  # below every logit but -inf: a block that a bias of -inf rules out adds exp(-inf), not NaN
PARTIALS = 5  # largest and total; the teacher's largest, total, and its weighted sum of logits


@triton.jit(do_not_specialize=SIZES)
def forward_words(
    Hidden, Weight, Bias, Labels, TeacherHidden, TeacherWeight, TeacherBias, Partial, PartialArgmax, LabelLogit,
    N, V, D, h_row, w_row, th_row, tw_row,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
):  # fmt: skip
    """Partial (5, blocks of words, N) and LabelLogit (N,) float32; PartialArgmax (blocks of words, N) int32. Program
    block of words * blocks of rows + block: those that read the same words run together."""
    blocks = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // blocks
    first_row, first_word = tl.program_id(0) % blocks * BLOCK_N, part * BLOCK_V
    rows, words = first_row + tl.arange(0, BLOCK_N), first_word + tl.arange(0, BLOCK_V)
    inside = (words < V)[:, None]
    each, at = tl.cdiv(V, BLOCK_V).to(tl.int64) * N, part.to(tl.int64) * N + rows
    z = tile_of_logits(
        Hidden, Weight, Bias, first_row, first_word, N, V, D, h_row, w_row,
        UNIT, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, HAS_BIAS,
    )  # fmt: skip
    if HAS_TEACHER:
        t = tile_of_logits(
            TeacherHidden, TeacherWeight, TeacherBias, first_row, first_word, N, V, D, th_row, tw_row,
            UNIT, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, HAS_TEACHER_BIAS,
        )  # fmt: skip
        t = tl.where(inside, t, -INF)
        top = tl.maximum(tl.max(t, 0), FLOOR)
        t = tl.exp2((t - top[None, :]) * LOG2E)
        tl.store(Partial + 2 * each + at, top, mask=rows < N)
        tl.store(Partial + 3 * each + at, tl.sum(t, 0), mask=rows < N)
        tl.store(Partial + 4 * each + at, tl.sum(t * z, 0), mask=rows < N)  # z is 0 beyond the edge
    labels = tl.load(Labels + rows, mask=rows < N, other=-1)
    of_label = tl.sum(tl.where(words[:, None] == labels[None, :], z, 0.0), 0)
    here = (labels >= first_word) & (labels < tl.minimum(first_word + BLOCK_V, V))
    tl.store(LabelLogit + rows, of_label, mask=here)
    z = tl.where(inside, z, -INF)
    top = tl.maximum(tl.max(z, 0), FLOOR)
    where = tl.min(tl.where(z == top[None, :], words[:, None], V), 0)  # among equal ones the first
    tl.store(PartialArgmax + at, where, mask=rows < N)
    tl.store(Partial + at, top, mask=rows < N)
    tl.store(Partial + each + at, tl.sum(tl.exp2((z - top[None, :]) * LOG2E), 0), mask=rows < N)


@triton.jit(do_not_specialize=SIZES)
def forward_rows(
    Partial, PartialArgmax, LabelLogit, Labels, TokenWeights, Loss, Argmax, Lse, TeacherLse, distillation,
    N, V, parts,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Loss, Lse, TeacherLse (N,) float32 and Argmax (N,) int64 from the blocks of words, BLOCK_V of them at a time."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    each = parts.to(tl.int64) * N
    largest, total = tl.full([BLOCK_N], FLOOR, tl.float32), tl.zeros([BLOCK_N], tl.float32)
    t_largest, t_total = tl.full([BLOCK_N], FLOOR, tl.float32), tl.zeros([BLOCK_N], tl.float32)
    argmax, expected = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, parts, BLOCK_V):
        numbers = first + tl.arange(0, BLOCK_V)
        inside = (numbers < parts)[:, None] & (rows < N)[None, :]
        at = numbers.to(tl.int64)[:, None] * N + rows[None, :]
        tops = tl.load(Partial + at, mask=inside, other=FLOOR)
        found = tl.load(PartialArgmax + at, mask=inside, other=0)
        top = tl.max(tops, 0)
        # ties to the lower word: among these by the minimum, after them because later ones must be larger
        where = tl.min(tl.where(tops == top[None, :], found, V), 0)
        argmax = tl.where(top > largest, where, argmax)
        above = tl.maximum(largest, top)
        totals = tl.load(Partial + each + at, mask=inside, other=0.0)
        factors, shrink = tl.exp2((tops - above[None, :]) * LOG2E), tl.exp2((largest - above) * LOG2E)
        total = total * shrink + tl.sum(totals * factors, 0)
        largest = above
        if HAS_TEACHER:
            tops = tl.load(Partial + 2 * each + at, mask=inside, other=FLOOR)
            above = tl.maximum(t_largest, tl.max(tops, 0))
            factors, shrink = tl.exp2((tops - above[None, :]) * LOG2E), tl.exp2((t_largest - above) * LOG2E)
            totals = tl.load(Partial + 3 * each + at, mask=inside, other=0.0)
            sums = tl.load(Partial + 4 * each + at, mask=inside, other=0.0)
            t_total = t_total * shrink + tl.sum(totals * factors, 0)
            expected = expected * shrink + tl.sum(sums * factors, 0)
            t_largest = above
    log_total = tl.log2(total) * LN2
    of_label = tl.load(LabelLogit + rows, mask=rows < N, other=0.0)
    loss = log_total + (1.0 - distillation) * (largest - of_label)
    if HAS_TEACHER:
        loss += distillation * (largest - expected / t_total)
        tl.store(TeacherLse + rows, t_largest, mask=rows < N)
        tl.store(TeacherLse + N + rows, tl.log2(t_total) * LN2, mask=rows < N)
    labels = tl.load(Labels + rows, mask=rows < N, other=0)
    loss = tl.where((labels >= 0) & (labels < V), loss, float("nan"))
    if HAS_WEIGHTS:
        loss *= tl.load(TokenWeights + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(Loss + rows, loss, mask=rows < N)
    tl.store(Lse + rows, largest, mask=rows < N)
    tl.store(Lse + N + rows, log_total, mask=rows < N)
    tl.store(Argmax + rows, argmax.to(tl.int64), mask=rows < N)
