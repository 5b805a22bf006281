"""Mask selection: what kernels/topk_mask and kernels/max_similarity read, write and multiply.

``topk_mask``, a program a row of N positions: R partials of each score once; with indices the mask is read back. A row
of 8192 positions and more, and with noise of 1024, is staged: its keys (4 bytes, of float64 8) are written to memory
and read again twice. That stays in the caches, and so is requested, but not unique.

``max_similarity``, B samples of P patches by S words of width D; N_P blocks of patches, N_S of words, N_D of the width:

    forward         a program a block of patches: the image N_S times, the text N_P times; a product, 2 B P S D FLOPs
    backward_image  gathers a row of the text for every patch; which rows decides what is unique of them: at most all
    backward_text   a program a block of words and of the width: the image N_S times in all, a product
"""

from __future__ import annotations

from ..max_similarity.triton import configs as similarity
from ..topk_mask.triton import configs as selection
from .attention import DTYPES
from .launches import Launch, Op, Read, once, tiles
from .work import BYTES, Work

UNALIGNED = 16  # as in max_similarity/triton/launch_forward.py


def topk_op(
    rows: int,
    positions: int,
    size: int = 4,
    partials: int = 1,
    valid: bool = False,
    per_row: bool = False,
    noise: bool = False,
    width: int = 0,
    architecture: str = "sm_90",
) -> Op:
    """The launch of a selection. ``size``: bytes of a score; ``width``: columns of the indices, 0 for none."""
    tile = selection.select(architecture, positions, noise)
    key = 8 if size == 8 else 4
    calls = tile.block // tile.chunk if tile.staged else 1
    reads = {"Scores": once(rows * partials * positions * size)}
    writes = {"Mask": rows * positions, "Count": 8 * rows, "Nan": 8 * rows}
    if valid:
        reads["Valid"] = once(rows * positions)
    if per_row:
        reads["Limit"] = once(8 * rows)
    if noise:
        reads |= {"Seed": Read(8, 8 * rows * calls), "Rows": Read(8 * rows, 8 * rows * calls)}
    if width:
        writes["Indices"] = 8 * rows * width
    if tile.staged:
        again = tile.block + tiles(positions, tile.chunk) * tile.chunk
        writes["Keys"] = rows * tile.block * key
        reads["Keys"] = Read(0, rows * again * key)
    elif width:
        reads["Mask"] = Read(0, rows * positions)
    # a comparison and an addition for each of the passes that build the k-th largest key, and as many by position
    passes = 8 * key + tile.block.bit_length()
    vector = rows * positions * (partials + 2 * passes)
    return Op("fp32", [Launch("topk_mask", reads, writes, vector=vector)], frozenset(writes) - {"Keys"})


def topk_mask(
    rows: int,
    positions: int,
    size: int = 4,
    partials: int = 1,
    valid: bool = False,
    per_row: bool = False,
    noise: bool = False,
    width: int = 0,
    architecture: str = "sm_90",
) -> Work:
    """Reads ``size`` rows · positions · partials bytes, writes a byte a position, and 8 a column of indices."""
    return topk_op(rows, positions, size, partials, valid, per_row, noise, width, architecture).work()


def similarity_op(
    b: int, p: int, s: int, d: int, dtype: str, backward: bool = False, mask: bool = False, architecture: str = "sm_90"
) -> Op:
    """The launches of a forward, or of a ``backward``. ``mask``: of words."""
    e = BYTES[dtype]
    image, text, patches = b * p * d * e, b * s * d * e, b * p

    def tile(kernel: str) -> tuple[int, int, int]:
        """Patches, words and width of a tile, as launch_forward.start makes it."""
        found = similarity.select(kernel, architecture, DTYPES[dtype], s)
        widest = found.block_d if d % (16 // e) == 0 else min(found.block_d, UNALIGNED)
        return found.block_p, found.block_s, min(widest, max(16, 1 << (d - 1).bit_length()))

    def issued(block_p: int, block_s: int, block_d: int) -> int:
        sizes = (tiles(p, block_p) * block_p, tiles(s, block_s) * block_s, tiles(d, block_d) * block_d)
        return 2 * b * sizes[0] * sizes[1] * sizes[2]

    product = 2 * b * p * s * d
    if not backward:
        sizes = tile("forward")
        n_p, n_s = tiles(p, sizes[0]), tiles(s, sizes[1])
        reads = {"Image": Read(image, image * n_s), "Text": Read(text, text * n_p)}
        if mask:
            reads["TextMask"] = Read(b * s, b * s * n_p)
        writes = {"Score": 4 * patches, "Argmax": 8 * patches}
        return Op(dtype, [Launch("forward", reads, writes, product, issued(*sizes), 4 * b * p * s)], frozenset(writes))
    reads = {"Argmax": once(8 * patches), "GradScore": once(4 * patches), "Text": Read(min(text, image), image)}
    gather = Launch("backward_image", reads, {"GradImage": image}, vector=b * p * d)
    sizes = tile("backward_text")
    programs = tiles(s, sizes[1]) * tiles(d, sizes[2])
    scaled = dtype == "fp16"  # by the sample's largest gradient, which is looked for first
    reads = {
        "GradScore": Read(4 * patches, 4 * patches * programs * (1 + scaled)),
        "Argmax": Read(8 * patches, 8 * patches * programs),
        "Image": Read(image, image * tiles(s, sizes[1])),
    }
    sums = Launch("backward_text", reads, {"GradText": text}, product, issued(*sizes), 2 * b * p * s)
    return Op(dtype, [gather, sums], frozenset({"GradImage", "GradText"}))


def max_similarity(
    b: int, p: int, s: int, d: int, dtype: str, backward: bool = False, mask: bool = False, architecture: str = "sm_90"
) -> Work:
    """Reads e B D (P + S) bytes and writes 12 B P, for 2 B P S D FLOPs; the backward as many, and reads both twice."""
    return similarity_op(b, p, s, d, dtype, backward, mask, architecture).work()
