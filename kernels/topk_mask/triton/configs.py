"""How many threads share a row: chosen by what the compiler reports, without a GPU (benchmarks/static/selection.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LONGEST = 16384  # positions a row may have: what lies in the registers of one block of threads
SHORTEST = 128
THREADS, VALUES = 512, 16  # at most so many threads share a row; so many values a thread does not spill


@dataclass(frozen=True)
class Config:
    """``block`` positions a program; indices are written, and keys made where ``staged``, ``chunk`` at a time."""

    block: int
    chunk: int
    warps: int
    stages: int = 1  # nothing is pipelined: a row's values stay where they are
    staged: bool = False


def select(arch: str, positions: int, noise: bool) -> Config:
    """``arch`` as ``cross_attention.triton.configs.architecture`` names it."""
    block = max(SHORTEST, 1 << (positions - 1).bit_length())
    lanes = 64 if arch.startswith("gfx") else 32
    threads = min(THREADS, max(lanes, block // VALUES))
    chunk = min(block, threads * (8 if block <= THREADS * VALUES else 4))
    return Config(block, chunk, threads // lanes, staged=block >= THREADS * VALUES or (noise and block >= 1024))


def blocks() -> list[int]:
    """All that ``select`` chooses from."""
    return [1 << n for n in range(SHORTEST.bit_length() - 1, LONGEST.bit_length())]


def units(positions: int, *tensors: torch.Tensor) -> int:
    """Elements of 16 bytes where the row's length and all strides but the last are multiples of them, else 1."""
    elements = 16 // max(x.element_size() for x in tensors)
    multiples = positions % elements == 0 and all(n % elements == 0 for x in tensors for n in x.stride()[:-1])
    return elements if multiples else 1
