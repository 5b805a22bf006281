"""Philox4x32-7 in plain PyTorch: random numbers as a function of what they are for, the same bits on any device.

A number depends on its counter and key alone, not on what was drawn before it, so any tiling, any implementation and
any number of ranks draws the same. Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), whose
authors find seven rounds to pass BigCrush. ``tl.philox`` with ``n_rounds=7`` and ``csrc/philox.h`` give the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_RAISE = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter, in int64: products wrap modulo 2**64, and masks undo the sign.

    ``seed`` holds one int64, its halves are the key; the parts of ``counter`` are int64 in [0, 2**32) and broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & LOW) ^ c1 ^ k0,
            second & LOW,
            ((first >> 32) & LOW) ^ c3 ^ k1,
            first & LOW,
        )
        k0, k1 = (k0 + _RAISE[0]) & LOW, (k1 + _RAISE[1]) & LOW
    return c0, c1, c2, c3


def words(seed: Tensor, rows: Tensor, columns: int) -> Tensor:
    """(B, columns) int64 in [0, 2**32): word n % 4 of the block with counter (n // 4, row's low half, high half, 0).

    ``seed`` (1,) int64; ``rows`` (B,) int64 of any value: what a row is, such as a sample's index, not where it is.
    """
    block = torch.arange(-(-columns // 4), device=rows.device)[None]
    low, high = (rows & LOW)[:, None], ((rows >> 32) & LOW)[:, None]
    drawn = philox(seed, (block, low, high, torch.zeros_like(block)))
    return torch.stack(torch.broadcast_tensors(*drawn), dim=-1).flatten(-2)[:, :columns]


def uniform(seed: Tensor, rows: Tensor, columns: int) -> Tensor:
    """(B, columns) float32 in the open interval (0, 1): the upper 23 bits of :func:`words` plus a half, over 2**23.

    With 24 bits the largest would round to 1, whose logarithm and its logarithm are 0 and infinite.
    """
    return ((words(seed, rows, columns) >> 9).float() + 0.5) * 2.0**-23
