"""What the losses launch on an architecture: kernels, tiles and everything else that a compile depends on.

The host functions run on the meta device, which has shapes and strides but no memory, and their launches are recorded.
An op is one function that gives its calls, in ``OPS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from ahead_of_time import Job
from selection_launches import Row, describe

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.triton.configs import assuming
from crossmask.kernels.soft_contrastive.request import Contrast
from crossmask.kernels.soft_contrastive.triton import configs as contrastive_configs
from crossmask.kernels.soft_contrastive.triton import launch_backward as contrastive_backward
from crossmask.kernels.soft_contrastive.triton import launch_forward as contrastive_forward
from crossmask.kernels.soft_cross_entropy.request import Inputs, Needed
from crossmask.kernels.soft_cross_entropy.triton import configs as entropy_configs
from crossmask.kernels.soft_cross_entropy.triton import launch_backward as entropy_backward
from crossmask.kernels.soft_cross_entropy.triton import launch_forward as entropy_forward

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Call(NamedTuple):
    launched: list[launch.Launch]
    dtype: str
    variant: str


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---- soft_contrastive

KEYS, QUEUE = 512, 65536


def soft_contrastive(arch: str) -> Iterator[Call]:
    """Calls that reach every tile; ``VARIANTS`` says what is special in them."""
    for dtype in ("bfloat16", "float32"):
        tiles = {
            kernel: contrastive_configs.tiles(kernel, arch, DTYPES[dtype])
            for kernel in ("forward_keys", "backward_queries", "backward_keys")
        }
        rows = sorted({tile.block_n for of_kernel in tiles.values() for tile in of_kernel})
        widths = sorted({tile.block_w for of_kernel in tiles.values() for tile in of_kernel} - {0})
        for queries in rows:
            for width in widths:
                yield _contrast(arch, dtype, queries, width, "distilled")
            yield _contrast(arch, dtype, queries, 256, "plain")
            yield _contrast(arch, dtype, queries, 72, "narrow")
            yield _contrast(arch, dtype, queries, 768, "wide")
            if arch in ("sm_80", "sm_90"):
                yield _contrast(arch, dtype, queries, 255, "ragged")
    if arch != "sm_89":  # but for 8-bit floats the twin of sm_86
        yield _contrast(arch, "float16", 64, 256, "distilled")
        yield _contrast(arch, "float32", 64, 256, "mixed")


def _contrast(arch: str, dtype: str, queries: int, width: int, variant: str) -> Call:
    """``plain``: without a teacher. ``narrow``, ``wide``: features of 72 and 768. ``ragged``: rows that are not
    aligned. ``mixed``: a queue in half precision."""
    kind = DTYPES[dtype]
    queue = torch.bfloat16 if variant == "mixed" else kind

    def groups(count: int) -> torch.Tensor:
        return empty(count, dtype=torch.int64)

    contrast = Contrast(
        *(empty(queries, width, dtype=kind), empty(KEYS, width, dtype=kind), empty(queries, width, dtype=kind)),
        *(groups(queries), groups(KEYS), empty(), empty(QUEUE, width, dtype=queue), groups(QUEUE)),
        0.0 if variant == "plain" else 0.4,
    )
    with assuming(arch), launch.recording() as recorded:
        found = contrastive_forward.forward(contrast)
        contrastive_backward.backward(found.loss, contrast, found, for_queries=True, for_keys=True)
    return Call(recorded, dtype, variant)


# ---- soft_cross_entropy

WORDS = 30522


def soft_cross_entropy(arch: str) -> Iterator[Call]:
    """Calls that reach every tile; ``VARIANTS`` says what is special in them."""
    for dtype in ("bfloat16", "float32"):
        kernels = ("forward_words", "backward_words")
        tiles = [tile for kernel in kernels for tile in entropy_configs.tiles(kernel, arch, DTYPES[dtype])]
        for rows in sorted({tile.block_n for tile in tiles}):
            yield _entropy(arch, dtype, rows, 768, "distilled")
            yield _entropy(arch, dtype, rows, 768, "plain")
            yield _entropy(arch, dtype, rows, 72, "narrow")
            if arch in ("sm_80", "sm_90"):
                yield _entropy(arch, dtype, rows, 255, "ragged")
    if arch != "sm_89":
        yield _entropy(arch, "float16", 64, 768, "distilled")


def _entropy(arch: str, dtype: str, rows: int, width: int, variant: str) -> Call:
    """``plain``: without a teacher, biases and token weights. ``narrow``: features of 72. ``ragged``: rows that are not
    aligned."""
    kind, plain = DTYPES[dtype], variant == "plain"
    hidden, weight = empty(rows, width, dtype=kind), empty(WORDS, width, dtype=kind)
    bias, labels = None if plain else empty(WORDS, dtype=kind), empty(rows, dtype=torch.int64)
    teacher = (None, None, None) if plain else (hidden, weight, bias)
    inputs = Inputs(hidden, weight, bias, labels, *teacher, 0.0 if plain else 0.4, None if plain else empty(rows))
    with assuming(arch), launch.recording() as recorded:
        found = entropy_forward.forward(inputs)
        entropy_backward.backward(found.loss, inputs, found.lse, found.teacher_lse, Needed(True, True, True))
    return Call(recorded, dtype, variant)


# ---- every op

OPS: dict[str, Callable[[str], Iterator[Call]]] = {
    "soft_contrastive": soft_contrastive,
    "soft_cross_entropy": soft_cross_entropy,
}
VARIANTS = ("distilled", "plain", "narrow", "wide", "ragged", "mixed")


def cases(archs: Iterable[str], ops: Iterable[str] = OPS) -> list[tuple[Row, Job]]:
    """Every compile that the table holds, once each, with its figures still empty."""
    found: dict[str, tuple[Row, Job]] = {}
    ops = list(ops)
    for arch in archs:
        for op in ops:
            for launched, dtype, variant in OPS[op](arch):
                for one in launched:
                    row, job = describe(one, arch, dtype, variant)
                    found.setdefault(row.job, (row, job))
    return list(found.values())
