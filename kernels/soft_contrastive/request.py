"""What an implementation of the contrastive loss is asked for, and what it hands back.

Every implementation is two functions over these types, and none imports another:

    forward(contrast) -> Forward
    backward(grad_loss, contrast, found, for_queries, for_keys) -> (d queries, d keys)

With z_ij = <query_i, key_j> / tau over the in-batch keys and then the queue, z'_ij the same of the teacher's query,
p = softmax(z), q = softmax(z') without a gradient, n_i the keys of query i's group, and c_i = 1, or a where n_i = 0:

    L_i           = c_i lse(z_i) - a sum_j q_ij z_ij - (1 - a) / n_i sum over matches of z_ij
    dL_i / dz_ij  = c_i p_ij - a q_ij - (1 - a) / n_i [j matches i]
    dL_i / dtau   = -1 / tau sum_j z_ij dL_i / dz_ij

so that a row of it needs of each softmax its log-sum-exp and its mean of z, and nothing of the size of z is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contrast:
    """One call, checked. float16, bfloat16, float32 or float64; the queue may have another dtype, read as ``dtype``."""

    queries: Tensor  # (N, E)
    keys: Tensor  # (M, E), of the dtype of the queries, as the teacher's
    teacher_queries: Tensor  # (N, E)
    query_groups: Tensor  # (N,) int64
    key_groups: Tensor  # (M,) int64
    temperature: Tensor  # () float32, float64 for float64; tau
    queue: Tensor | None  # (Q, E)
    queue_groups: Tensor | None  # (Q,) int64
    distillation: float  # a

    @property
    def dtype(self) -> torch.dtype:
        return self.queries.dtype

    def sources(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows to contrast with and their groups: the keys and the queue, where there are any, each where it lies."""
        if len(self.keys):
            yield self.keys, self.key_groups
        if self.queue is not None and self.queue_groups is not None and len(self.queue):
            yield self.queue, self.queue_groups


class Forward(NamedTuple):
    """All but ``d_queries`` (N,), float32 (float64 for float64)."""

    loss: Tensor
    d_temperature: Tensor  # dL_i / dtau
    d_queries: Tensor  # dL_i / dquery_i (N, E), by an implementation that has it from the same pass; else (0, E)
    lse: Tensor  # of z, in the base that the implementation reads it in again
    teacher_lse: Tensor  # of z'; anything without distillation
    matches: Tensor  # n_i


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """What sums, losses and statistics are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
