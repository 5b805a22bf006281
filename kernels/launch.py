"""How every Triton kernel is started, in one place; what is compiled ahead of time is recorded here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Config(Protocol):
    """What every configuration of a kernel says; its tile sizes go into the arguments."""

    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for; ``arguments`` are all of the kernel's, tiles included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Any


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


def start(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], config: Config, device: torch.device) -> None:
    """Start ``kernel`` on the current stream of ``device``; ``arguments`` holds all of its parameters by name."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, config))
    elif device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)
    else:  # Triton's interpreter
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


def byte(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """A bool mask as the kernels read it: contiguous, a byte each. ``stand_in`` where there is none; it is not read."""
    return stand_in if mask is None else mask.contiguous().view(torch.uint8)
