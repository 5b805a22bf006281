"""How every kernel is started, in one place; what is compiled ahead of time is recorded here, from real launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .configs import Config


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for; ``arguments`` are all of the kernel's, tiles included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches instead of making them. Nothing is computed, so the tensors may be on the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], config: Config, device: torch.device) -> None:
    """Start ``kernel`` on the current stream of ``device``.

    ``arguments`` holds all of the kernel's parameters by name but those the configuration names: BLOCK_S, BLOCK_P,
    TRANSPOSED and STAGES, each passed where the kernel has it.
    """
    tiles = {
        "BLOCK_S": config.block_s,
        "BLOCK_P": config.block_p,
        "TRANSPOSED": config.transposed,
        "STAGES": config.stages,
    }
    arguments = {**arguments, **{name: value for name, value in tiles.items() if name in kernel.arg_names}}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, config))
    elif device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)
    else:  # Triton's interpreter
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


def readable(x: Tensor) -> bool:
    """Whether the kernels can read or write ``x`` as it lies: rows dense, and within 2**31 elements of their first."""
    return (x.stride(-1) == 1 or x.shape[-1] == 1) and x.shape[-2] * x.stride(-2) < 2**31


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy that the kernels can read."""
    return x if readable(x) else x.contiguous()


def writable(x: Tensor) -> Tensor:
    """``x``, or a stand-in for it whose values are to be copied."""
    return x if readable(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def unit(*tensors: Tensor) -> int:
    """Elements of 16 bytes where the strides and widths of all tensors are multiples of them, else 1."""
    elements = 16 // max(x.element_size() for x in tensors)
    multiples = all(n % elements == 0 for x in tensors for n in (*x.stride()[:-1], x.shape[-1]))
    return elements if multiples else 1


def strides(name: str, x: Tensor, unit: int) -> dict[str, int]:
    """Strides of a (B, H, length, width) tensor as the kernels take them."""
    return {f"{name}_{axis}": x.stride(i) // unit for i, axis in enumerate(("batch", "head", "row"))}


def byte(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """A bool mask as the kernels read it: contiguous, a byte each. ``stand_in`` where there is none; it is not read."""
    return stand_in if mask is None else mask.contiguous().view(torch.uint8)
