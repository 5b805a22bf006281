"""Tiles for every kernel and architecture, chosen by what the compiler reports without a GPU: nothing spills, shared
memory fits, half precision gets matrix instructions, and loads are of 128 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...cross_attention.triton.configs import FAMILIES


@dataclass(frozen=True)
class Config:
    """block_v words by block_n rows; logits are summed over block_d of the width at a time."""

    block_v: int
    block_n: int
    block_d: int = 0
    warps: int = 4
    stages: int = 2


# By family of architectures and kernel. A launch takes the smallest block of rows that covers all of them, else the
# largest; a kernel that is missing is that of the next family in FAMILIES.
Tiles = dict[str, tuple[Config, ...]]
C = Config
ROWS = C(64, 8)  # forward_rows: 64 parts of the vocabulary at a time

HALF: dict[str, Tiles] = {
    "sm_80": {
        "forward_words": (C(128, 16, 64, 4, 3), C(128, 32, 64, 4, 3), C(128, 64, 64, 8, 3), C(128, 128, 32, 8, 3)),
        "forward_rows": (ROWS,),
        "backward_words": (C(128, 16, 64, 4, 3), C(128, 32, 64, 4, 3), C(128, 64, 64, 8, 3), C(128, 128, 32, 8, 3)),
    },
    # Hopper multiplies 64 rows at a time, four warps together
    "sm_90": {
        "forward_words": (C(128, 16, 64, 4, 3), C(128, 32, 64, 4, 3), C(128, 64, 64, 4, 3), C(128, 128, 64, 8, 3)),
        "backward_words": (C(128, 16, 64, 4, 3), C(128, 32, 64, 4, 3), C(128, 64, 64, 8, 3), C(128, 128, 64, 8, 3)),
    },
    # accumulators in a memory of their own come back into registers whole
    "sm_100": {
        "forward_words": (C(128, 16, 64, 4, 3), C(128, 32, 64, 4, 3), C(128, 64, 64, 8, 3), C(128, 128, 64, 8, 3)),
        "backward_words": (C(128, 16, 64, 4, 3), C(128, 32, 64, 4, 3), C(128, 64, 64, 8, 3)),
    },
    # 64 KiB of shared memory
    "gfx942": {
        "forward_words": (C(128, 16, 64), C(128, 32, 64), C(128, 64, 64), C(128, 128, 32, 8)),
        "backward_words": (C(128, 16, 64), C(128, 32, 64), C(128, 64, 64), C(128, 128, 32, 8)),
    },
}
# float32 has no matrix instructions on NVIDIA where products have to be exact (ieee): its operands stay in registers
SINGLE: dict[str, Tiles] = {
    "sm_80": {
        "forward_words": (C(32, 16, 32, 4, 1), C(32, 32, 32, 8, 1)),
        "forward_rows": (ROWS,),
        "backward_words": (C(32, 16, 32, 4, 1), C(32, 32, 32, 8, 1)),
    },
    # multiplies float32 exactly by matrix instructions
    "gfx942": {
        "forward_words": (C(32, 16, 32, 4, 1), C(32, 32, 32, 4, 1)),
        "backward_words": (C(32, 16, 32, 4, 1), C(32, 32, 32, 4, 1)),
    },
}


def select(kernel: str, arch: str, dtype: torch.dtype, rows: int) -> Config:
    """The tile for a launch; ``arch`` as ``cross_attention.triton.configs.architecture`` names it."""
    found = tiles(kernel, arch, dtype)
    covering = [tile for tile in found if tile.block_n >= rows]
    return min(covering, key=lambda tile: tile.block_n) if covering else max(found, key=lambda tile: tile.block_n)


def tiles(kernel: str, arch: str, dtype: torch.dtype) -> tuple[Config, ...]:
    """All that ``select`` chooses from."""
    table = SINGLE if dtype == torch.float32 else HALF
    return next(table[family][kernel] for family in FAMILIES[arch.partition("/")[0]] if kernel in table.get(family, ()))
