"""Starts the forward kernels; and how tensors have to lie for all kernels here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import launch
from ...cross_attention.triton.configs import architecture
from ..request import Contrast, Forward
from . import configs
from .configs import Config
from .forward import STATISTICS, forward_keys, forward_rows

PROGRAMS = 2  # of a sweep over the keys that a multiprocessor holds at once
INTERPRETED = 4  # multiprocessors that Triton's interpreter stands for
UNEVEN = 32  # block_e of a width that no wider block divides
UNALIGNED = 16, 64  # block_e, and widest block_w, where rows do not begin at multiples of 16 bytes


@torch.no_grad()
def forward(contrast: Contrast) -> Forward:
    """Losses and what the backward needs, (N,) float32 each. float16, bfloat16 or float32; any N and E above 0."""
    queries, width = contrast.queries.shape
    device, sweeps = contrast.queries.device, [Sweep(contrast, *source) for source in contrast.sources()]
    shares = [Shares.of(sweep, forward_keys) for sweep in sweeps]
    splits = sum(share.splits for share in shares)
    partial = torch.empty((STATISTICS, splits, queries), dtype=torch.float32, device=device)
    before = 0
    for sweep, share in zip(sweeps, shares, strict=True):
        given = {"Partial": partial, "splits": splits, "first_split": before, "split_keys": share.keys}
        sweep.start(forward_keys, share.splits * share.blocks, share.tile, given)
        before += share.splits
    results = torch.empty((5, queries), dtype=torch.float32, device=device)
    tile = configs.select("forward_rows", architecture(device), contrast.dtype, queries, 0)
    names = ("Loss", "GradTemperature", "Lse", "TeacherLse", "Matches")
    if not contrast.distillation:
        results[3].zero_()
    given = {**dict(zip(names, results, strict=True)), "Partial": partial, "splits": splits}
    sweeps[0].start(forward_rows, -(-queries // tile.block_n), tile, given)
    loss, d_temperature, lse, teacher_lse, matches = (x.clone() for x in results)
    return Forward(loss, d_temperature, loss.new_empty((0, width)), lse, teacher_lse, matches)


class Sweep:
    """The queries against one matrix of keys: all that its kernels have in common."""

    def __init__(self, contrast: Contrast, keys: Tensor, key_groups: Tensor) -> None:
        query, teacher, key = map(dense, (contrast.queries, contrast.teacher_queries, keys))
        (self.queries, self.width), self.keys = query.shape, len(key)
        self.query, self.dtype, self.device = query, query.dtype, query.device
        self.arch, self.unit = architecture(query.device), units(query, teacher, key)
        self.given: dict[str, Any] = {
            "Query": query, "Teacher": teacher, "Key": key,
            "QueryGroup": contrast.query_groups.contiguous(), "KeyGroup": key_groups.contiguous(),
            "Temperature": contrast.temperature, "distillation": contrast.distillation,
            "HAS_TEACHER": contrast.distillation > 0,
            "N": self.queries, "K": self.keys, "E": self.width // self.unit, "UNIT": self.unit,
        }  # fmt: skip
        for name, x in (("query", query), ("teacher", teacher), ("key", key)):
            self.given[f"{name}_row"] = x.stride(0) // self.unit

    def tile(self, kernel: Any) -> Config:
        tile = configs.select(kernel.__name__, self.arch, self.dtype, self.queries, self.width)
        covering = max(16, 1 << (self.width - 1).bit_length())
        block_e, block_w = min(tile.block_e, covering), min(tile.block_w, covering)
        # what is loaded element by element takes a pointer each, and what has an edge a mask: both spill sooner
        if self.unit == 1:
            block_e, block_w = map(min, (block_e, block_w), UNALIGNED)
        while self.width % block_e and block_e > UNEVEN:
            block_e //= 2
        return replace(tile, block_e=block_e, block_w=block_w)

    def start(self, kernel: Any, programs: int, tile: Config, given: dict[str, Any]) -> None:
        """``given`` are the arguments of this kernel alone."""
        every = self.given | given | {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        every |= {"BLOCK_E": tile.block_e, "EVEN_E": tile.block_e > 0 and self.width % tile.block_e == 0}
        every |= {"BLOCK_W": tile.block_w, "EVEN_W": tile.block_w > 0 and self.width % tile.block_w == 0}
        launch.start(kernel, (programs,), {name: every[name] for name in kernel.arg_names}, tile, self.device)


@dataclass(frozen=True)
class Shares:
    """How the programs of a kernel divide a matrix of keys."""

    tile: Config
    blocks: int  # programs of a share: of queries, and of the width
    splits: int
    keys: int  # of a share, but the last

    @classmethod
    def of(cls, sweep: Sweep, kernel: Any) -> Shares:
        """As many shares as fill the device: a function of shapes and device alone, as it decides the order of sums."""
        multiprocessors = INTERPRETED
        if sweep.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(sweep.device).multi_processor_count
        tile = sweep.tile(kernel)
        chunks = -(-sweep.width // tile.block_w) if "BLOCK_W" in kernel.arg_names else 1
        blocks = -(-sweep.queries // tile.block_n) * chunks
        tiles = -(-sweep.keys // tile.block_k)
        each = -(-tiles // max(1, PROGRAMS * multiprocessors // blocks))  # blocks of keys a program
        return cls(tile, blocks, -(-tiles // each), each * tile.block_k)


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy with dense rows; of a matrix of one row or column strides say nothing."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def units(*matrices: Tensor) -> int:
    """Elements of 16 bytes where the strides and widths of all matrices are multiples of them, else 1."""
    elements = 16 // max(x.element_size() for x in matrices)
    return elements if all(n % elements == 0 for x in matrices for n in (x.stride(0), x.shape[1])) else 1
