"""What cross-attention launches on an architecture: kernels, tiles and everything else that a compile depends on.

The host functions run on the meta device, which has shapes and strides but no memory, and their launches are recorded.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from ahead_of_time import Job, specialise
from proof import source

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.request import Forward, Gradients, Masks, Request
from crossmask.kernels.cross_attention.triton import configs, launch_backward, launch_forward

BATCH, HEADS = 64, 12
FEW = 1  # samples, whose heads do not fill a GPU: backward_fused then shares out the keys
WIDTHS = (16, 32, 64, 128, 256)
LINKED_WIDTHS = (64, 128)  # that are compiled with a link mask too
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EVERYTHING = dict.fromkeys(("max_probability", "entropy", "key_attention", "query_attention", "key_max"), True)
MASKS = ("key", "query", "head")
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # what is asked for, and which masks there are
    "plain": ({}, ()),
    "statistics": (EVERYTHING, MASKS),
    "dropout": (EVERYTHING | {"dropout_p": 0.1}, MASKS),
    "per_head": (EVERYTHING | {"dropout_p": 0.1, "per_head": True}, MASKS),
    "links": (EVERYTHING | {"dropout_p": 0.1}, (*MASKS, "link")),
}
TILE = ("BLOCK_S", "BLOCK_P", "BLOCK_D", "TRANSPOSED", "STAGES", "D")


@dataclasses.dataclass(frozen=True)
class Row:
    """A compile: what of, and what came out."""

    kernel: str
    arch: str
    width: int  # BLOCK_D
    d: int
    dtype: str
    block_s: int
    block_p: int
    warps: int
    stages: int
    transposed: bool
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

    @property
    def tile(self) -> configs.Config:
        return configs.Config(self.block_s, self.block_p, self.warps, self.stages, self.transposed)


def launches(
    arch: str, d: int, dtype: torch.dtype, queries: int, keys: int, variant: str, batch: int = BATCH
) -> list[launch.Launch]:
    """Everything that one forward and one backward start on ``arch``."""
    asked, which = VARIANTS[variant]
    request = Request(scale=d**-0.5, **asked)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = empty(batch, HEADS, queries, d, dtype=dtype)
    k, v = empty(batch, HEADS, keys, d, dtype=dtype), empty(batch, HEADS, keys, d, dtype=dtype)
    lengths = {"key": (keys,), "query": (queries,), "head": (HEADS,), "link": (queries, keys)}
    masks = Masks(**{name: empty(batch, *lengths[name], dtype=torch.bool) for name in which})
    seed = empty(1, dtype=torch.int64)
    with configs.assuming(arch), launch.recording() as recorded:
        found = launch_forward.forward(q, k, v, masks, seed, request)
        launch_backward.backward(_gradients(found, request), q, k, v, found, masks, seed, request)
    return recorded


def _gradients(found: Forward, request: Request) -> Gradients:
    """Through everything that was asked for; a plain call has one through its output alone."""

    def like(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else torch.empty_like(x)

    names = [name for name in Gradients._fields if name != "output" and (name != "lse" or request.entropy)]
    return Gradients(torch.empty_like(found.output), **{name: like(getattr(found, name)) for name in names})


def cases(archs: Iterable[str], widths: Iterable[int], kernels: Sequence[str] = ()) -> list[tuple[Row, Job]]:
    """Every compile that the table holds, once each, with its figures still empty."""
    found: dict[str, tuple[Row, Job]] = {}
    for arch, width in itertools.product(archs, widths):
        for d, dtype, variant in sampled(arch, width):
            for queries, keys, batch in shapes(arch, width, DTYPES[dtype], variant == "links"):
                for one in launches(arch, d, DTYPES[dtype], queries, keys, variant, batch):
                    if not kernels or one.kernel.fn.__name__ in kernels:
                        row, job = describe(one, arch, width, d, dtype, variant)
                        found.setdefault(row.job, (row, job))
    return list(found.values())


def sampled(arch: str, width: int) -> Iterator[tuple[int, str, str]]:
    """Width, dtype and variant; what only repeats its neighbours is compiled for some widths and architectures."""
    yield from ((width, dtype, "dropout") for dtype in ("bfloat16", "float32"))
    if arch != "sm_89":  # but for 8-bit floats the twin of sm_86
        yield width, "bfloat16", "plain"
    if width in LINKED_WIDTHS:
        yield from ((width, dtype, "links") for dtype in ("bfloat16", "float32"))
    if width == 64 and arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        yield width, "bfloat16", "statistics"
    if width == 64 and arch in ("sm_80", "sm_90"):
        yield from ((width, "float16", variant) for variant in ("plain", "dropout"))
        yield width, "bfloat16", "per_head"
    if width == 128 and arch in ("sm_80", "sm_90"):
        yield 80, "bfloat16", "dropout"  # ViT-H's heads: no power of two
        yield 72, "bfloat16", "dropout"  # SigLIP-so400m's: no multiple of 16


def shapes(arch: str, width: int, dtype: torch.dtype, links: bool = False) -> Iterator[tuple[int, int, int]]:
    """Queries, keys and samples that reach every tile; no length is a multiple of 16, which would be exploited."""
    tiles = [tile for kernel in configs.KERNELS for tile in configs.tiles(kernel, arch, width, dtype, links)]
    queries = sorted({tile.block_s - 1 for tile in tiles} | {577})
    keys = sorted({tile.block_p - 1 for tile in tiles} | {577})
    yield from ((*lengths, BATCH) for lengths in itertools.product(queries, keys))
    yield from ((length, 577, FEW) for length in queries)
    yield 8191, 577, FEW  # so many blocks of queries that key statistics have a kernel of their own


def describe(one: launch.Launch, arch: str, width: int, d: int, dtype: str, variant: str) -> tuple[Row, Job]:
    job = specialise(one.kernel, one.arguments, arch, one.config.warps, one.config.stages)
    flags = [
        name.removeprefix("HAS_").lower() if value is True else f"{name}={value}"
        for name, value in job.constants.items()
        if name.isupper() and name not in TILE and value is not False
    ]
    name, tile = job.kernel.split(":")[1], dataclasses.astuple(one.config)
    empty = (0, 0, 0, 0, 0, 0, "", 0, 0)
    row = Row(name, arch, width, d, dtype, *tile, variant, " ".join(flags), *empty, job.key, source(one.kernel))
    return row, job
