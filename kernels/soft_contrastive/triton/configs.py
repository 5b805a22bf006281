"""Tiles for every kernel and architecture, chosen by what the compiler reports without a GPU: nothing spills, shared
memory fits, half precision gets matrix instructions, and loads are of 128 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...cross_attention.triton.configs import FAMILIES


@dataclass(frozen=True)
class Config:
    """block_n queries by block_k keys; logits are summed over block_e of the width at a time, and the backward gives
    block_w of it a program. Narrower features take smaller blocks of both."""

    block_n: int
    block_k: int
    block_e: int = 0
    block_w: int = 0
    warps: int = 4
    stages: int = 2


# By family of architectures and kernel. A launch takes, of the tiles whose block_w covers the width, else of the
# widest, the smallest block of queries that covers all of them, else the largest; a kernel that is missing is that of
# the next family in FAMILIES.
Tiles = dict[str, tuple[Config, ...]]
C = Config
ROWS = C(8, 64)  # forward_rows: 64 shares at a time

HALF: dict[str, Tiles] = {
    "sm_80": {
        "forward_keys": (C(16, 64, 64), C(32, 64, 32), C(64, 64, 64, 0, 8, 3)),
        "forward_rows": (ROWS,),
        "backward_queries": (C(16, 64, 64, 256), C(32, 64, 64, 256, 8), C(32, 64, 64, 512, 8)),
        "backward_keys": (C(32, 32, 64, 256), C(64, 32, 64, 256, 8), C(32, 32, 64, 512, 8)),
    },
    # Hopper multiplies 64 rows at a time, four warps together
    "sm_90": {
        "forward_keys": (C(16, 64, 64), C(32, 64, 32, 0, 4, 3), C(64, 64, 64, 0, 8, 3)),
        "backward_queries": (
            *(C(16, 64, 64, 256), C(32, 64, 64, 256, 8), C(64, 64, 64, 256, 8)),
            C(32, 64, 64, 512, 8),
        ),
    },
    # its compiler spills a little sooner
    "sm_120": {"forward_keys": (C(16, 64, 64), C(32, 64, 32, 0, 4, 3), C(64, 64, 64, 0, 8))},
    # 64 KiB of shared memory
    "gfx942": {
        "forward_keys": (C(16, 64, 64), C(64, 64, 64)),
        "backward_queries": (
            *(C(16, 64, 64, 256), C(32, 32, 64, 256, 4, 1), C(64, 64, 64, 256, 8)),
            C(32, 32, 64, 512, 8, 1),
        ),
    },
}
# float32 has no matrix instructions on NVIDIA where products have to be exact (ieee): its operands stay in registers
SINGLE: dict[str, Tiles] = {
    "sm_80": {
        "forward_keys": (C(16, 32, 32, 0, 4, 1), C(32, 32, 32, 0, 4, 1)),
        "forward_rows": (ROWS,),
        "backward_queries": (C(16, 32, 32, 256, 8, 1), C(32, 16, 32, 256, 8, 1), C(16, 16, 32, 512, 8, 1)),
        "backward_keys": (C(32, 16, 32, 256, 8, 1), C(16, 16, 32, 512, 8, 1)),
    },
    "gfx942": {"backward_queries": (C(16, 16, 32, 256, 4, 1), C(16, 16, 32, 512, 8, 1))},
}


def select(kernel: str, arch: str, dtype: torch.dtype, queries: int, width: int) -> Config:
    """The tile for a launch; ``arch`` as ``cross_attention.triton.configs.architecture`` names it."""
    found = tiles(kernel, arch, dtype)
    covering = [tile.block_w for tile in found if tile.block_w >= width]
    block_w = min(covering) if covering else max(tile.block_w for tile in found)
    found = tuple(tile for tile in found if tile.block_w == block_w)
    enough = [tile for tile in found if tile.block_n >= queries]
    return min(enough, key=lambda tile: tile.block_n) if enough else max(found, key=lambda tile: tile.block_n)


def tiles(kernel: str, arch: str, dtype: torch.dtype) -> tuple[Config, ...]:
    """All that ``select`` chooses from."""
    table = SINGLE if dtype == torch.float32 else HALF
    return next(table[family][kernel] for family in FAMILIES[arch.partition("/")[0]] if kernel in table.get(family, ()))
