"""What an implementation of cross-attention is asked for, and what it hands back.

Every implementation is a module with two functions over these types, and none imports another:

    forward(q, k, v, masks, seed, request) -> Forward
    backward(gradients, q, k, v, found, masks, seed, request) -> (dq, dk, dv)

B samples, H heads, S queries, P keys, D width of a head. Compute dtype: float32, or float64 for float64 inputs; what is
called float32 below is then float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("lse", "max_probability", "entropy", "key_attention", "query_attention", "key_max")


@dataclass(frozen=True)
class Request:
    """One call, checked and with its defaults filled in. ``lse`` is always given: the backward needs it."""

    scale: float
    dropout_p: float = 0.0
    per_head: bool = False  # key and query statistics for every head instead of their mean (maximum) over heads
    max_probability: bool = False
    entropy: bool = False
    key_attention: bool = False
    query_attention: bool = False
    key_max: bool = False
    normalise: bool = True  # key_attention and query_attention are means; False: sums over the same weights


class Masks(NamedTuple):
    """Bool, True = counts; None = all count."""

    key: Tensor | None = None  # (B, P) keys that may be attended to
    query: Tensor | None = None  # (B, S) queries that count in key and query statistics; the output never changes
    head: Tensor | None = None  # (B, H) heads that are on; one that is off attends to nothing and counts nowhere
    link: Tensor | None = None  # (B, S, P) or (1, S, P) keys that a query may attend to, in every head


class Forward(NamedTuple):
    """Statistics are float32, contiguous, and None where the request did not ask for them."""

    output: Tensor  # (B, H, S, D) dtype of q, laid out by torch.empty_like(q)
    lse: Tensor  # (B, H, S); -inf where a row attends to nothing
    max_probability: Tensor | None = None  # (B, H, S)
    entropy: Tensor | None = None  # (B, H, S)
    key_attention: Tensor | None = None  # (B, P), per head (B, H, P)
    query_attention: Tensor | None = None  # (B, S), per head (B, H, S)
    key_max: Tensor | None = None  # (B, P), per head (B, H, P)
    column_lse: Tensor | None = None  # (B, H, P) log of the sum over valid queries with a link; for the backward


class Gradients(NamedTuple):
    """Of the loss by what forward gave; None where it does not depend on it. ``key_max`` has none."""

    output: Tensor  # (B, H, S, D)
    lse: Tensor | None = None
    max_probability: Tensor | None = None
    entropy: Tensor | None = None
    key_attention: Tensor | None = None
    query_attention: Tensor | None = None


def share(
    valid: Tensor | None,
    length: int,
    heads: Tensor | None,
    head_count: int,
    request: Request,
    dtype: torch.dtype = torch.float32,
) -> Tensor | float:
    """What one weight counts in a mean over valid positions, and over heads unless ``per_head``; 1.0 in a sum.

    Args:
        valid: (B, length) bool or None, the positions the mean runs over.
        heads: (B, H) bool or None.

    Returns:
        A float, or (B, 1) of ``dtype``; a mean over nothing divides by one.
    """
    if not request.normalise:
        return 1.0
    positions = length if valid is None else valid.sum(1, keepdim=True)
    count = 1 if request.per_head else head_count if heads is None else heads.sum(1, keepdim=True)
    total = positions * count
    return total.clamp(min=1).to(dtype).reciprocal() if isinstance(total, Tensor) else 1.0 / max(total, 1)
