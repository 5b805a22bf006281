"""Multi-head cross-attention as a module that says where it looked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cross_attention import AttentionStatistics
from .telling import Allowed, Asked, attend, slot_of

INITIAL_SHARPNESS = 8.0  # cosines of unrelated directions scatter by D ** -0.5, logits then by about one


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class Attended:
    """What :class:`CrossAttention` returns."""

    output: Tensor  # (B, S, query_dim)
    statistics: AttentionStatistics


class CrossAttention(nn.Module):
    """Queries of one sequence look at the keys and values of another: ``output(softmax(q k' / sqrt(D)) v)``.

    Its state_dict, with A = heads · head_dim: ``query.weight`` (A, query_dim), ``key.weight`` and ``value.weight``
    (A, context_dim), ``output.weight`` (query_dim, A); with ``bias`` ``query.bias``, ``key.bias``, ``value.bias`` (A,)
    and ``output.bias`` (query_dim,); with ``qk_norm`` ``sharpness`` (heads,).
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            query_dim: width of the queries' sequence, and of the output.
            context_dim: width of the sequence that is looked at; default ``query_dim``.
            head_dim: width of a head, at most 256; default ``query_dim / heads``.
            dropout: probability that a weight is dropped while training.
            bias: of the four projections.
            qk_norm: compare directions only, times a learned sharpness of each head (query-key normalisation, Henry et
                al. 2020).

        Raises:
            ValueError: sizes that do not fit.
        """
        super().__init__()
        if head_dim is None:
            if heads < 1 or query_dim % heads:
                raise ValueError(f"query_dim {query_dim} does not divide into {heads} heads; give head_dim")
            head_dim = query_dim // heads
        width, context_dim = heads * head_dim, context_dim or query_dim
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        self.query = nn.Linear(query_dim, width, **made)
        self.key = nn.Linear(context_dim, width, **made)
        self.value = nn.Linear(context_dim, width, **made)
        self.output = nn.Linear(width, query_dim, **made)
        sharpness = torch.full((heads,), INITIAL_SHARPNESS, device=device, dtype=dtype) if qk_norm else None
        self.sharpness = None if sharpness is None else nn.Parameter(sharpness)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        *,
        link_mask: Tensor | None = None,
        statistics: Collection[str] = (),
        per_head: bool = False,
    ) -> Attended:
        """
        Args:
            x: (B, S, query_dim).
            context: (B, P, context_dim); default ``x`` itself.
            key_mask: (B, P) bool, True = may be looked at.
            query_mask: (B, S) bool, True = counts in the key and query statistics; it does not change the output.
                Default: all, or without a context what ``key_mask`` leaves.
            link_mask: (B, S, P) or (1, S, P) bool, True = this query may look at this key.
            statistics, per_head: as for :func:`crossmask.kernels.cross_attention`.

        Raises:
            ValueError: shapes, dtypes, devices or statistics that :func:`crossmask.kernels.cross_attention` refuses.
        """
        context = x if context is None else context
        q, k, v = self._split(self.query(x)), self._split(self.key(context)), self._split(self.value(context))
        if self.sharpness is not None:
            q = F.normalize(q, dim=-1) * (self.sharpness * self.head_dim**0.5)[:, None, None].to(q.dtype)
            k = F.normalize(k, dim=-1).to(q.dtype)
            v = v.to(q.dtype)
        allowed = Allowed(key_mask, None if link_mask is None else link_mask[:, None], itself=context is x)
        dropped, slot = self.dropout if self.training else 0.0, slot_of(self)
        if slot is not None and not statistics:
            found = attend(q, k, v, allowed, slot, dropped)
            slot.keep(found.statistics)
            told = AttentionStatistics()
        else:
            found = attend(q, k, v, allowed, Asked(tuple(statistics), per_head, query_mask), dropped)
            told = found.statistics
            if slot is not None:
                slot.keep(attend(q, k, v, allowed, slot).statistics)
        return Attended(self.output(found.output.transpose(1, 2).flatten(-2)), told)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, A) -> (B, H, N, D)"""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, dropout={self.dropout}"


pytree.register_dataclass(Attended, serialized_type_name="crossmask.Attended")  # for torch.export
