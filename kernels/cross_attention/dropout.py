"""Which attention weights dropout keeps: Philox4x32-7 in plain PyTorch, bit for bit what the Triton kernels draw.

The draw for weight (b, h, i, j) is word j % 4 of the block with counter (i * ceil(P / 4) + j // 4, b * H + h, 0, 0) and
the seed as key, so it depends on the position alone: any tiling, any implementation and the backward see the same mask.
One block serves four neighbouring keys. Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011),
whose authors find seven rounds to pass BigCrush.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_RAISE = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """The smallest 32-bit draw that is kept, for a probability ``p`` of being dropped."""
    return min(round(p * 2**32), _LOW)


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
    words = philox(seed, (counter[None] & _LOW, heads[:, None, None], zero, zero))
    drawn = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :keys]
    return drawn >= threshold(p)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter, in int64: products wrap modulo 2**64, and masks undo the sign."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _RAISE[0]) & _LOW, (k1 + _RAISE[1]) & _LOW
    return c0, c1, c2, c3
