"""The backward kernels, through the argmax: with g the gradient of the scores and a_i the argmax of patch i,

    d image[b, i] = g_i text[b, a_i]                    backward_image: a gather
    d text[b, j]  = sum over i with a_i = j of g_i image[b, i]    backward_text: a product with [a_i = j] g_i

A patch with a_i = -1 gives and gets nothing. The product sweeps the patches in order, so nothing is added atomically
and two runs agree bitwise. What is not finite in a patch reaches every word of its sample, as 0 * inf is NaN.
"""

import triton
import triton.language as tl

from .forward import SIZES, at_sample, tile


@triton.jit(do_not_specialize=SIZES)
def backward_image(
    GradScore, Text, Argmax, GradImage,
    P, D, text_batch, text_row, di_batch, di_row,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """GradImage (B, P, D). Program b * blocks of patches + block."""
    blocks = tl.cdiv(P, BLOCK_P)
    sample = tl.program_id(0) // blocks
    patches = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside, row, width = patches < P, sample.to(tl.int64) * P + patches, D * UNIT
    words = tl.load(Argmax + row, mask=inside, other=-1).to(tl.int32)
    g = tl.load(GradScore + row, mask=inside, other=0.0)
    text = at_sample(Text, sample, text_batch, UNIT)
    image = at_sample(GradImage, sample, di_batch, UNIT)
    for start in range(0, width, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        at, keep = tile(text, words, text_row, columns, width, words >= 0, UNIT, EVEN_D)
        w = tl.load(at, mask=keep, other=0.0).to(tl.float32)  # [BP, BD]
        found = tl.where((words >= 0)[:, None], g[:, None] * w, 0.0)
        at, keep = tile(image, patches, di_row, columns, width, inside, UNIT, EVEN_D)
        tl.store(at, found.to(GradImage.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=SIZES)
def backward_text(
    GradScore, Image, Argmax, GradText,
    P, S, D, image_batch, image_row, dt_batch, dt_row,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """GradText (B, S, D). Program (b * blocks of words + block) * blocks of width + block.

    SCALED, for float16: the gradients are multiplied by the power of two that brings the sample's largest to [1, 2).
    """
    width = D * UNIT
    chunks = tl.cdiv(width, BLOCK_D)
    blocks = tl.cdiv(S, BLOCK_S)
    columns = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    words = tl.program_id(0) // chunks % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    sample = tl.program_id(0) // chunks // blocks
    first = sample.to(tl.int64) * P
    scale = 1.0
    if SCALED:
        largest = tl.zeros([BLOCK_P], tl.float32)
        for start in range(0, P, BLOCK_P):
            patches = start + tl.arange(0, BLOCK_P)
            g = tl.load(GradScore + first + patches, mask=patches < P, other=0.0)
            largest = tl.maximum(largest, tl.abs(g))
        bounded = tl.minimum(tl.maximum(tl.max(largest, 0), 2.0**-126), 2.0**126)  # the reciprocal is normal too
        scale = (bounded.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    image = at_sample(Image, sample, image_batch, UNIT)
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, P, BLOCK_P):
        patches = start + tl.arange(0, BLOCK_P)
        inside = patches < P
        found = tl.load(Argmax + first + patches, mask=inside, other=-1).to(tl.int32)
        g = tl.load(GradScore + first + patches, mask=inside, other=0.0) * (1.0 / scale)
        at, keep = tile(image, patches, image_row, columns, width, inside, UNIT, EVEN_D)
        v = tl.load(at, mask=keep, other=0.0)  # [BP, BD]
        chosen = tl.where(words[:, None] == found[None, :], g[None, :], 0.0)  # [BS, BP]
        total = tl.dot(chosen.to(v.dtype), v, total, input_precision="ieee")
    at, keep = tile(at_sample(GradText, sample, dt_batch, UNIT), words, dt_row, columns, width, words < S, UNIT, EVEN_D)
    tl.store(at, (total * scale).to(GradText.dtype.element_ty), mask=keep)
