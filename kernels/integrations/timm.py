"""timm's attention modules that can also say cheaply where they looked.

Of timm's modules, ``Attention`` (ViT, DeiT, and what is built of their blocks) and ``AttentionPoolLatent`` (the pooling
of SigLIP). :func:`crossmask.kernels.modules.swap_attention` makes a model's modules these. Tested with timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent
from torch import Tensor, nn

from ..cross_attention import AttentionStatistics
from ..modules.telling import Allowed, Asked, attend, read_float, slot_of
from .recording import Slot


class TellingAttention(Attention):
    """timm's self-attention. Without ``statistics`` the call is timm's own, bit by bit."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        statistics: Collection[str] = (),
        per_head: bool = False,
        query_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, AttentionStatistics]:
        """As timm's ``Attention``, and:

        Args:
            statistics, per_head: as for :func:`crossmask.kernels.cross_attention`; the result is then the output and
                the statistics.
            query_mask: (B, N) bool, True = counts in the key and query statistics; default all. With the
                first token alone, ``key_attention`` is what [CLS] looks at.

        Raises:
            ValueError: statistics of keys in causal attention, or what the kernel refuses.
        """
        slot = slot_of(self)
        if slot is None and not statistics:
            return super().forward(x, attn_mask=attn_mask, **({"is_causal": True} if is_causal else {}))
        if slot is not None:
            output, noted = self._tell(x, attn_mask, is_causal, slot)
            slot.keep(noted)
        if statistics:
            return self._tell(x, attn_mask, is_causal, Asked(tuple(statistics), per_head, query_mask))
        return output

    def _tell(
        self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, asked: Asked | Slot
    ) -> tuple[Tensor, AttentionStatistics]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = same_dtype(self.q_norm(q), self.k_norm(k), v)
        dropped = self.attn_drop.p if self.training else 0.0
        found = attend(q, k, v, _read(attn_mask, q, k, is_causal), asked, dropped, "timm's Attention")
        y = self.norm(found.output.transpose(1, 2).flatten(-2))
        if getattr(self, "gate", None) is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y)), found.statistics


class TellingAttentionPool(AttentionPoolLatent):
    """timm's pooling by latent queries. Without ``statistics`` the call is timm's own, bit by bit."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        statistics: Collection[str] = (),
        per_head: bool = False,
        query_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, AttentionStatistics]:
        """As timm's ``AttentionPoolLatent``, with ``statistics``, ``per_head`` and ``query_mask`` (B, latents) as for
        :class:`TellingAttention`."""
        slot = slot_of(self)
        if slot is None and not statistics:
            return super().forward(x, attn_mask=attn_mask)
        if slot is not None:
            output, noted = self._tell(x, attn_mask, slot)
            slot.keep(noted)
        if statistics:
            return self._tell(x, attn_mask, Asked(tuple(statistics), per_head, query_mask))
        return output

    def _tell(self, x: Tensor, attn_mask: Tensor | None, asked: Asked | Slot) -> tuple[Tensor, AttentionStatistics]:
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = self.q(self.latent.expand(len(x), -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = same_dtype(self.q_norm(q), self.k_norm(k), v)
        found = attend(q, k, v, _read(attn_mask, q, k), asked)
        y = self.proj_drop(self.proj(found.output.transpose(1, 2).flatten(-2)))
        if self.mlp is not None:
            y = y + self.mlp(self.norm(y))
        if self.pool == "token":
            y = y[:, 0]
        elif self.pool == "avg":
            y = y.mean(1)
        return y, found.statistics


TELLING: dict[type[nn.Module], type[nn.Module]] = {
    Attention: TellingAttention,
    AttentionPoolLatent: TellingAttentionPool,
}


def same_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast a norm gives float32 beside values in half precision."""
    return q.to(v.dtype), k.to(v.dtype)


def _read(attn_mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool = False) -> Allowed:
    """The mask of ``scaled_dot_product_attention``: bool, True = attend, or floating, added to the logits. It
    broadcasts to (B, H, S, P)."""
    if attn_mask is None or is_causal:
        return Allowed(causal=is_causal)
    shape: Any = (*q.shape[:3], k.shape[2])
    whole = attn_mask[(None,) * (4 - attn_mask.ndim)]
    # dimensions of batch and heads that all share stay one
    whole = whole.expand(*(n if n > 1 else 1 for n in whole.shape[:2]), *shape[2:])
    if whole.dtype == torch.bool:
        return Allowed(links=whole)
    links, bias = read_float(whole)
    return Allowed(links=links, bias=bias)
