"""Tiles for every kernel and architecture, chosen by what the compiler reports without a GPU: nothing spills, shared
memory fits, half precision gets matrix instructions, and loads are of 128 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...cross_attention.triton.configs import FAMILIES


@dataclass(frozen=True)
class Config:
    """block_p patches, block_s words and block_d of the width at a time; narrower tensors take a smaller block_d."""

    block_p: int
    block_s: int
    block_d: int
    warps: int = 4
    stages: int = 2


# By family of architectures and kernel. A launch takes the smallest block of words that covers all of them, else the
# largest; a kernel that is missing is that of the next family in FAMILIES. backward_image has no words to block.
Tiles = dict[str, tuple[Config, ...]]
C = Config

HALF: dict[str, Tiles] = {
    "sm_80": {
        "forward": (C(64, 32, 64, 4, 3), C(64, 64, 64, 4, 3), C(64, 128, 64, 8, 2)),
        "backward_image": (C(16, 16, 256),),
        "backward_text": (C(32, 32, 64, 4, 3), C(32, 64, 128, 4, 3)),
    },
    # Hopper multiplies 64 rows at a time, four warps together
    "sm_90": {"forward": (C(64, 32, 64, 4, 3), C(64, 64, 64, 4, 3), C(64, 128, 64, 4, 3))},
    "sm_120": {  # its compiler spills a little sooner
        "forward": (C(64, 32, 64, 4, 3), C(64, 64, 64, 4, 3), C(64, 128, 32, 8, 2)),
        "backward_text": (C(32, 32, 64, 4, 3), C(32, 64, 64, 4, 3)),
    },
    "gfx942": {
        "forward": (C(64, 32, 64), C(64, 64, 64), C(64, 128, 32)),
        "backward_text": (C(32, 32, 64), C(32, 64, 64)),
    },
}
# float32 has no matrix instructions on NVIDIA where products have to be exact (ieee): its operands stay in registers
SINGLE: dict[str, Tiles] = {
    "sm_80": {
        "forward": (C(32, 32, 32, 4, 1),),
        "backward_image": (C(16, 16, 128),),
        "backward_text": (C(32, 32, 32),),
    },
}


def select(kernel: str, arch: str, dtype: torch.dtype, words: int) -> Config:
    """The tile for a launch; ``arch`` as ``cross_attention.triton.configs.architecture`` names it."""
    found = tiles(kernel, arch, dtype)
    covering = [tile for tile in found if tile.block_s >= words]
    return min(covering, key=lambda tile: tile.block_s) if covering else max(found, key=lambda tile: tile.block_s)


def tiles(kernel: str, arch: str, dtype: torch.dtype) -> tuple[Config, ...]:
    """All that ``select`` chooses from."""
    table = SINGLE if dtype == torch.float32 else HALF
    return next(table[family][kernel] for family in FAMILIES[arch.partition("/")[0]] if kernel in table.get(family, ()))
