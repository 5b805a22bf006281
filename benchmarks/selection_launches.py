"""What mask selection launches on an architecture: kernels, tiles and everything else that a compile depends on.

The host functions run on the meta device, which has shapes and strides but no memory, and their launches are recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from ahead_of_time import Job, specialise
from proof import source

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.triton.configs import assuming
from crossmask.kernels.max_similarity.triton import configs as similarity_configs
from crossmask.kernels.max_similarity.triton import launch_backward, launch_forward
from crossmask.kernels.topk_mask.request import Request, fixed_point
from crossmask.kernels.topk_mask.triton import configs as selection_configs
from crossmask.kernels.topk_mask.triton import launch as selection_launch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
VARIANTS = ("plain", "policy", "everything", "masked", "ragged")
ROWS, PARTIALS, PATCHES = 256, 12, 577


@dataclasses.dataclass(frozen=True)
class Row:
    """A compile: what of, and what came out."""

    op: str
    kernel: str
    arch: str
    dtype: str
    tile: str  # block of positions; or patches x words x width
    warps: int
    stages: int
    variant: str  # the first that launches this
    flags: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    blocks_per_processor: int
    tensor_memory: int
    matrix: str  # instruction:count
    wide_loads: int  # of 128 bits
    code_bytes: int
    job: str  # hash of signature, constants, alignment: what the JIT would look up
    source: str  # hash of the kernel, all it calls, Triton, and what reads the figures


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def topk_mask(arch: str, dtype: torch.dtype, positions: int, variant: str) -> list[launch.Launch]:
    """``plain``: k of (B, N) scores. ``policy``: a ratio of what is valid, indices. ``everything``: also partials, a
    ratio for each row, noise."""
    valid = None if variant == "plain" else _empty(ROWS, positions, dtype=torch.bool)
    request = Request(k=min(8, positions))
    if variant == "policy":
        request = Request(ratio=fixed_point(0.3), width=positions)
    if variant == "everything":
        seed, rows = _empty(1, dtype=torch.int64), _empty(ROWS, dtype=torch.int64)
        request = Request(ratio=_empty(ROWS, dtype=torch.int64), seed=seed, rows=rows, width=positions)
    with assuming(arch), launch.recording() as recorded:
        scores = _empty(ROWS, PARTIALS if variant == "everything" else 1, positions, dtype=dtype)
        selection_launch.select(scores, valid, request)
    return recorded


def max_similarity(arch: str, dtype: torch.dtype, words: int, variant: str) -> list[launch.Launch]:
    """Forward and backward. ``masked``: ragged text, aligned rows; ``ragged``: also a width that is not aligned."""
    width = 255 if variant == "ragged" else 256
    image, text = _empty(ROWS, PATCHES, width, dtype=dtype), _empty(ROWS, words, width, dtype=dtype)
    mask = None if variant == "plain" else _empty(ROWS, words, dtype=torch.bool)
    with assuming(arch), launch.recording() as recorded:
        score, argmax = launch_forward.forward(image, text, mask)
        launch_backward.backward(torch.empty_like(score), image, text, argmax)
    return recorded


def cases(archs: Iterable[str]) -> list[tuple[Row, Job]]:
    """Every compile that the table holds, once each, with its figures still empty."""
    found: dict[str, tuple[Row, Job]] = {}
    for arch in archs:
        calls: list[tuple[list[launch.Launch], str, str]] = []
        for positions, dtype, variant in selections(arch):
            calls.append((topk_mask(arch, DTYPES[dtype], positions, variant), dtype, variant))
        for words, dtype, variant in similarities(arch):
            calls.append((max_similarity(arch, DTYPES[dtype], words, variant), dtype, variant))
        for launched, dtype, variant in calls:
            for one in launched:
                row, job = describe(one, arch, dtype, variant)
                found.setdefault(row.job, (row, job))
    return list(found.values())


def selections(arch: str) -> Iterator[tuple[int, str, str]]:
    """Positions, dtype and variant. A length below a block's is odd, so that no load is wide.

    Of other dtypes the blocks that most rows have, and the largest.
    """
    for block in selection_configs.blocks():
        yield block - 1, "float32", "policy"
        if arch == "sm_89":  # but for 8-bit floats the twin of sm_86
            continue
        yield block - 1, "float32", "everything"
        if block in (128, 1024, 4096, 16384):
            yield block, "float32", "plain"
        if block in (1024, 16384):
            yield from ((block - 1, "float64", variant) for variant in ("policy", "everything"))
            yield from ((block, "bfloat16", variant) for variant in ("plain", "everything"))
    if arch in ("sm_80", "sm_90", "gfx942"):
        yield 1024, "float16", "plain"
        yield 1024, "float64", "plain"


def similarities(arch: str) -> Iterator[tuple[int, str, str]]:
    """Words, dtype and variant: words that reach every tile."""
    for dtype in ("bfloat16", "float32"):
        kernels = ("forward", "backward_text")
        tiles = [tile for kernel in kernels for tile in similarity_configs.tiles(kernel, arch, DTYPES[dtype])]
        for words in sorted({tile.block_s - 1 for tile in tiles}):
            yield words, dtype, "masked"
            if arch in ("sm_80", "sm_90"):
                yield words, dtype, "ragged"
    if arch != "sm_89":
        yield 77, "float16", "masked"
        yield 77, "bfloat16", "plain"


def describe(one: launch.Launch, arch: str, dtype: str, variant: str) -> tuple[Row, Job]:
    job = specialise(one.kernel, one.arguments, arch, one.config.warps, one.config.stages)
    flags = [
        name.removeprefix("HAS_").lower() if value is True else f"{name}={value}"
        for name, value in job.constants.items()
        if name.isupper() and not name.startswith(("BLOCK", "CHUNK")) and value is not False
    ]
    module, name = job.kernel.split(":")
    empty = (0, 0, 0, 0, 0, 0, "", 0, 0)
    place = module.split(".")[2], name, arch, dtype, label(one.config)
    settings = one.config.warps, one.config.stages, variant, " ".join(flags)
    return Row(*place, *settings, *empty, job.key, source(one.kernel)), job


def label(config: Any) -> str:
    """A tile but for its warps and stages."""
    return "x".join(str(size) for name, size in dataclasses.asdict(config).items() if name.startswith("block"))
