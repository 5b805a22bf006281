"""The forward kernel: a block of patches against all words of its sample, the largest similarity and where it is.

    score[b, i]  = max over the words j that the mask allows of <image[b, i], text[b, j]>
    argmax[b, i] = the first of them that gives it

Shape tags: P patches, S words, D width; BP, BS, BD a block of them (``BLOCK_P`` …). Products are summed in float32 over
blocks of the width, so that any width runs in the same registers.
"""

import triton
import triton.language as tl

# Not specialised: one binary for all lengths, widths and strides of a dtype, which is the one that was proven ahead of
# time. Strides and D are in units of 16 bytes (UNIT elements) wherever they are multiples of that, and the
# multiplication by UNIT is what tells the compiler so.
SIZES = ("P", "S", "D", *(f"{x}_{axis}" for x in ("image", "text", "di", "dt") for axis in ("batch", "row")))
NOTHING = tl.constexpr(-(2**31))  # key of a word that is not allowed; below that of -inf
NAN = tl.constexpr(2**31 - 1)  # key of NaN; above that of inf, and the bits of a NaN


@triton.jit
def at_sample(Start, sample, batch_stride, UNIT: tl.constexpr):
    """Where a sample begins, in int64: a tensor may hold over 2**31 elements, its samples do not."""
    return Start + sample.to(tl.int64) * batch_stride * UNIT


@triton.jit
def tile(Start, rows, stride, columns, width, inside, UNIT: tl.constexpr, EVEN_D: tl.constexpr):
    """Pointers to [rows, columns] of a matrix whose last dimension is dense, and which of them to touch."""
    keep = inside[:, None]
    if not EVEN_D:
        keep = keep & (columns < width)[None, :]
    return Start + rows[:, None] * stride * UNIT + columns[None, :], keep


@triton.jit
def sortable(s):
    """int32 in the order of s; NaN is the largest, +0 and -0 are one. Undone by ``value``."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    return tl.where(s == s, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN)


@triton.jit
def value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SIZES)
def forward(
    Image, Text, TextMask, Score, Argmax,
    P, S, D, image_batch, image_row, text_batch, text_row,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Score (B, P) float32 and Argmax (B, P) int64; TextMask (B, S) uint8. Program b * blocks of patches + block."""
    blocks = tl.cdiv(P, BLOCK_P)
    sample = tl.program_id(0) // blocks
    patches = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    image = at_sample(Image, sample, image_batch, UNIT)
    text = at_sample(Text, sample, text_batch, UNIT)
    width = D * UNIT
    best = tl.full([BLOCK_P], NOTHING, tl.int32)
    argmax = tl.full([BLOCK_P], -1, tl.int32)
    for first in range(0, S, BLOCK_S):
        words = first + tl.arange(0, BLOCK_S)
        s = tl.zeros([BLOCK_P, BLOCK_S], tl.float32)
        for start in range(0, width, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            at, keep = tile(image, patches, image_row, columns, width, patches < P, UNIT, EVEN_D)
            v = tl.load(at, mask=keep, other=0.0)  # [BP, BD]
            at, keep = tile(text, words, text_row, columns, width, words < S, UNIT, EVEN_D)
            w = tl.load(at, mask=keep, other=0.0)  # [BS, BD]
            s = tl.dot(v, tl.trans(w), s, input_precision="ieee")
        allowed = words < S
        if HAS_MASK:
            allowed = allowed & (tl.load(TextMask + sample.to(tl.int64) * S + words, mask=allowed, other=0) != 0)
        key = tl.where(allowed[None, :], sortable(s), NOTHING)
        top = tl.max(key, 1)
        # ties to the lower index: within the block by the minimum, between blocks because later ones must be larger
        where = tl.min(tl.where(key == top[:, None], words[None, :], S), 1)
        argmax = tl.where(top > best, where, argmax)
        best = tl.maximum(top, best)
    at = sample.to(tl.int64) * P + patches
    tl.store(Score + at, tl.where(best == NOTHING, 0.0, value(best)), mask=patches < P)
    tl.store(Argmax + at, argmax.to(tl.int64), mask=patches < P)
