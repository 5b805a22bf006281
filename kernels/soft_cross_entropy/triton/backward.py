"""The backward kernel: the gradient of the loss by a range of words' logits, without the rows' factors.

    dz_ij = p_ij - alpha q_ij - (1 - alpha) [j is the label of i]

Both softmaxes are computed again from their log-sum-exps. The products with dz are left to the library that multiplies
matrices; its rows are words, so that a range of words is dense however many rows there are.
"""

import triton
import triton.language as tl

from .primitives import LOG2E, SIZES, tile_of_logits


@triton.jit
def probabilities(z, Lse, rows, N):
    """exp(z - lse) of a tile [BV, BN]; Lse (2, N) has the largest logit, and the log of the sum of exp less it."""
    largest = tl.load(Lse + rows, mask=rows < N, other=0.0)
    log_total = tl.load(Lse + N + rows, mask=rows < N, other=0.0)
    return tl.exp2(((z - largest[None, :]) - log_total[None, :]) * LOG2E)


@triton.jit(do_not_specialize=SIZES)
def backward_words(
    Hidden, Weight, Bias, Labels, TeacherHidden, TeacherWeight, TeacherBias, Lse, TeacherLse, Factors,
    GradLogits, PartialBias, distillation,
    N, V, D, h_row, w_row, th_row, tw_row, dz_row, first, stop,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, FOR_BIAS: tl.constexpr,
):  # fmt: skip
    """GradLogits (stop - first, N) of the words from first to stop, and PartialBias (blocks of rows, stop - first)
    float32, which has the rows' factors. Program block of words * blocks of rows + block."""
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) % blocks
    first_row, first_word = block * BLOCK_N, first + tl.program_id(0) // blocks * BLOCK_V
    rows, words = first_row + tl.arange(0, BLOCK_N), first_word + tl.arange(0, BLOCK_V)
    z = tile_of_logits(
        Hidden, Weight, Bias, first_row, first_word, N, V, D, h_row, w_row,
        UNIT, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, HAS_BIAS,
    )  # fmt: skip
    dz = probabilities(z, Lse, rows, N)
    if HAS_TEACHER:
        t = tile_of_logits(
            TeacherHidden, TeacherWeight, TeacherBias, first_row, first_word, N, V, D, th_row, tw_row,
            UNIT, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, HAS_TEACHER_BIAS,
        )  # fmt: skip
        dz -= distillation * probabilities(t, TeacherLse, rows, N)
    labels = tl.load(Labels + rows, mask=rows < N, other=-1).to(tl.int32)
    dz -= tl.where(words[:, None] == labels[None, :], 1.0 - distillation, 0.0)
    if FOR_BIAS:
        factors = tl.load(Factors + rows, mask=rows < N, other=0.0)
        inside = (rows < N)[None, :]  # of a row beyond the edge only its factor is 0, which inf would make NaN
        sums = tl.sum(tl.where(inside, dz * factors[None, :], 0.0), 1)
        tl.store(PartialBias + block.to(tl.int64) * (stop - first) + words - first, sums, mask=words < stop)
    at = (words - first).to(tl.int64) * dz_row
    keep = (words < stop)[:, None] & (rows < N)[None, :]
    tl.store(GradLogits + at[:, None] + rows[None, :], dz.to(GradLogits.dtype.element_ty), mask=keep)
