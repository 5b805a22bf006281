"""Which attention weights dropout keeps: Philox4x32-7 in plain PyTorch, bit for bit what the Triton kernels draw.

The draw for weight (b, h, i, j) is word j % 4 of the block with counter (i * ceil(P / 4) + j // 4, b * H + h, 0, 0) and
the seed as key, so it depends on the position alone: any tiling, any implementation and the backward see the same mask.
One block serves four neighbouring keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import LOW, philox


def threshold(p: float) -> int:
    """The smallest 32-bit draw that is kept, for a probability ``p`` of being dropped."""
    return min(round(p * 2**32), LOW)


def keep(seed: Tensor, p: float, heads: Tensor, rows: Tensor, keys: int) -> Tensor:
    """(len(heads), len(rows), keys) bool, True = kept.

    Args:
        seed: (1,) int64.
        heads: flat indices b * H + h, int64.
        rows: query indices i, int64.
        keys: P.
    """
    blocks = -(-keys // 4)
    counter = rows[:, None] * blocks + torch.arange(blocks, device=rows.device)  # (rows, blocks)
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    words = philox(seed, (counter[None] & LOW, heads[:, None, None], zero, zero))
    drawn = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :keys]
    return drawn >= threshold(p)
