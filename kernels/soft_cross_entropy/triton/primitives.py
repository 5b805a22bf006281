"""What the kernels share: a tile of logits from rows of hidden features and of a vocabulary's weight.

Shape tags: N rows, V words, D width; BN, BV, BD a block of them (``BLOCK_N`` …). A tile of logits is [BV, BN]: the
matrix instructions that multiply 64 rows at a time are filled with words, of which there are many, by however few rows.
Softmax arithmetic is in float32, with exp2, which is one instruction where exp is two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# Not specialised: one binary for all sizes and strides of a dtype, which is the one that was proven ahead of time.
# Strides and D are in units of 16 bytes (UNIT elements) wherever they are multiples of that, and the multiplication by
# UNIT is what tells the compiler so.
SIZES = ("N", "V", "D", "h_row", "w_row", "th_row", "tw_row", "dz_row", "parts", "first", "stop")


@triton.jit
def tile_of_logits(
    Hidden, Weight, Bias, first_row, first_word, N, V, D, h_row, w_row,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """[BV, BN] float32 products, summed over blocks of the width so that any width runs in the same registers; 0 beyond
    the edges, but for the bias."""
    rows, words = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    # in int64, as a tensor may hold over 2**31 elements; a block does not
    hidden = Hidden + first_row.to(tl.int64) * h_row * UNIT + rows[:, None] * h_row * UNIT
    weight = Weight + first_word.to(tl.int64) * w_row * UNIT + words[:, None] * w_row * UNIT
    rows_inside, words_inside = (first_row + rows < N)[:, None], (first_word + words < V)[:, None]
    width = D * UNIT
    z = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        keep_rows, keep_words = rows_inside, words_inside
        if not EVEN_D:
            keep_rows = keep_rows & (columns < width)[None, :]
            keep_words = keep_words & (columns < width)[None, :]
        w = tl.load(weight + columns[None, :], mask=keep_words, other=0.0)  # [BV, BD]
        h = tl.load(hidden + columns[None, :], mask=keep_rows, other=0.0)  # [BN, BD]
        z = tl.dot(w, tl.trans(h), z, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(Bias + first_word + words, mask=first_word + words < V, other=0.0)
        z += bias.to(tl.float32)[:, None]
    return z
