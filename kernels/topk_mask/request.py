"""What an implementation of the selection is asked for, and what it hands back.

Every implementation is a function over these types, and none imports another:

    select(scores, valid, request) -> Selected

``scores`` (B, R, N) of any of float64, float32, float16 and bfloat16, last dimension contiguous, R >= 1 (1 for plain
scores); ``valid`` (B, N) bool or None. B rows, R partials whose mean is selected from, N positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 48  # of a ratio's fraction: with counts to 2**14 the product stays below 2**63


@dataclass(frozen=True)
class Request:
    """One call, checked and with its defaults filled in. ``k`` or ``ratio`` or neither, then all valid positions."""

    k: int | Tensor | None = None  # (B,) int64 on the device of the scores; within [0, N]
    ratio: int | Tensor | None = None  # fixed point, as fixed_point gives it; (B,) int64 on the device of the scores
    threshold: float | None = None
    largest: bool = True
    seed: Tensor | None = None  # (1,) int64: Gumbel noise is added
    rows: Tensor | None = None  # (B,) int64: what the noise of a row is drawn for; there where seed is
    width: int = 0  # columns of the indices, at least as many as any row may select; 0 = no indices


# mask (B, N) bool; indices (B, width) int64, positions ascending, then -1; count (B,) int64, selected;
# nan (B,) int64, NaN among the valid scores
Selected = tuple[Tensor, Tensor, Tensor, Tensor]


def fixed_point(ratio: float | Tensor) -> int | Tensor:
    """``ceil(ratio (1 + 1e-9) 2**48)``: with it, k is exact integer arithmetic and the same in every implementation.

    The nudge makes 0.3 of 10 three and not two: ``0.3 * 10`` in binary may fall short of 3. A float32 tensor is nudged
    by what its rounding takes, 1e-7. Rounded up, so that nothing positive becomes 0.

    Args:
        ratio: in [0, 1]; tensors of any shape and floating dtype, what is outside is clamped and NaN is 0.

    Returns:
        An int, or int64 of the same shape and device.
    """
    if isinstance(ratio, Tensor):
        nudge = 1e-7 if ratio.dtype == torch.float32 else 1e-9
        share = ratio.double().nan_to_num(0.0).clamp(0.0, 1.0)
        return (share * (1.0 + nudge) * 2.0**BITS).ceil().long()
    return math.ceil(ratio * (1.0 + 1e-9) * 2.0**BITS)


def share_of(fixed: int | Tensor, count: Tensor) -> Tensor:
    """``(fixed * count) >> 48``, at least 1 where both are positive, at most ``count``; int64, like ``count``.

    In halves, so that counts to 2**38 fit: fixed = high 2**24 + low.
    """
    high, low = fixed >> 24, fixed & 0xFFFFFF
    share = (high * count + ((low * count) >> 24)) >> 24
    positive = fixed > 0
    return torch.minimum(share.clamp(min=1) * positive, count)


def largest_share(fixed: int, positions: int) -> int:
    """What :func:`share_of` gives at most in a row of so many positions; for sizes, without looking at data."""
    return min(max((fixed * positions) >> BITS, min(fixed, 1)), positions)
