"""Transformer blocks of a contrastive captioner, in CLIP's layout: what each part reads is normalised first.

Queries, and keys with values, are projected apart; one behind the other their weights are the joint projection of
open_clip's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from ..recipe_sections_captioner import CaptionerSection
from .dropout import Dropout
from .fusion import Attention, KeyValue
from .packing import Packing


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(feed_norm(x)).

    With ``key_width`` the keys are of other tokens, which have a layer norm of their own; without, of x itself.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        key_width: int | None = None,
        quick_gelu: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.key_norm = None if key_width is None else nn.LayerNorm(key_width)
        self.attention = Attention(width, width if key_width is None else key_width, heads, qk_norm, dropout=dropout)
        self.feed_norm = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        activation = QuickGELU() if quick_gelu else nn.GELU()
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))
        self.dropout = Dropout(dropout)

    def project(self, tokens: Tensor, packing: Packing | None = None) -> KeyValue:
        """(B, S, key width), or (N, key width) packed -> keys and values, each (B, H, S, D), of other tokens or, in a
        block of self-attention, of what ``forward`` is given as ``x``."""
        norm = self.norm if self.key_norm is None else self.key_norm
        return self.attention.project(norm(tokens), packing)

    def forward(
        self,
        x: Tensor,
        keys: KeyValue | None = None,
        key_mask: Tensor | None = None,
        link_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, S, width), or (N, width) packed -> the same shape.

        Args:
            keys: what :meth:`project` gave. None: self-attention takes those of ``x``, cross-attention reads nothing
                and only the feed-forward part runs.
            key_mask: (B, P) bool, True = may be looked at.
            link_mask: (1, S, P) or (B, S, P) bool, True = this query may look at that key.
        """
        y = self.norm(x)
        if keys is None and self.key_norm is None:
            keys = self.attention.project(y, packing)
        if keys is not None:
            x = x + self.dropout(self.attention(y, keys, key_mask, link_mask, packing=packing))
        return x + self.dropout(self.feed_forward(self.feed_norm(x)))

    @torch.no_grad()
    def begin(self, depth: int, std: float | None) -> None:
        """First weights, of the deviation ``std`` or as CLIP's text tower of ``depth`` blocks begins."""
        width, wide = self.norm.weight.shape[0], self.attention.key_value.in_features
        out = width**-0.5 * (2 * depth) ** -0.5
        first, last = (part for part in self.feed_forward if isinstance(part, nn.Linear))
        for layer, scale in (
            (self.attention.query, width**-0.5),
            (self.attention.key_value, wide**-0.5),
            (self.attention.output, out),
            (first, (2 * width) ** -0.5),
            (last, out),
        ):
            nn.init.normal_(layer.weight, std=scale if std is None else std)
            nn.init.zeros_(layer.bias)


class Decoder(nn.Module):
    """``depth`` times self-attention among x, then cross-attention into a context; a layer norm at the end.

    The text decoder of CoCa, causal, and the image decoder of SyCoCa, which is not (a reconstruction).
    """

    def __init__(self, width: int, key_width: int, depth: int, section: CaptionerSection) -> None:
        super().__init__()
        shared: dict[str, Any] = {"quick_gelu": section.quick_gelu, "dropout": section.dropout}
        self.self_blocks = nn.ModuleList(Block(width, section.heads, section.mlp_ratio, **shared) for _ in range(depth))
        self.cross_blocks = nn.ModuleList(
            Block(width, section.heads, section.mlp_ratio, key_width=key_width, qk_norm=section.qk_norm, **shared)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        for block in (*self.self_blocks, *self.cross_blocks):
            assert isinstance(block, Block)
            block.begin(depth, section.initial_std)

    def layers(self) -> Iterator[tuple[Block, Block]]:
        """Self-attention and cross-attention, in the order in which they run."""
        for own, cross in zip(self.self_blocks, self.cross_blocks, strict=True):
            assert isinstance(own, Block)
            assert isinstance(cross, Block)
            yield own, cross

    def project(self, context: Tensor) -> list[KeyValue]:
        """(B, C, key width) -> per layer the keys and values of the context, each (B, H, C, D)."""
        return [cross.project(context) for _, cross in self.layers()]

    def forward(
        self,
        x: Tensor,
        context: Sequence[KeyValue] | None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """(B, S, width) -> (B, S, width). What comes out at padding says nothing.

        Args:
            context: what :meth:`project` gave; None: x reads nothing but itself.
            mask: (B, S) bool, True = a token.
            context_mask: (B, C) bool, True = may be looked at.
            causal: a token sees itself and those before it.
        """
        packing = None if mask is None else Packing.of(mask)
        links = causal_links(x.shape[1], x.device) if causal else None
        x = x if packing is None else packing.pack(x)
        for number, (own, cross) in enumerate(self.layers()):
            x = own(x, None, mask, links, packing)
            x = cross(x, None if context is None else context[number], context_mask, None, packing)
        x = self.norm(x)
        return x if packing is None else packing.pad(x)


class AttentionalPooler(nn.Module):
    """Learned queries that read tokens (Lee et al. 2019, "Set transformer"; CoCa, section 3.2)."""

    def __init__(self, width: int, key_width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(key_width)
        self.attention = Attention(width, key_width, heads)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, N, key width) -> (B, queries, width). ``key_mask`` (B, N) bool, True = may be looked at."""
        asked = self.attention.ask(self.query_norm(self.query)[None]).expand(len(tokens), -1, -1, -1)
        keys = self.attention.project(self.key_norm(tokens))
        return self.attention.give(self.attention.attend(asked, keys, key_mask))

    def alone(self, tokens: Tensor) -> Tensor:
        """(B, N, key width) -> (B, N, width): what a query would read if a token were all there is to look at.

        The value and output projections, which make dense features of CLIP's pooled ones (MaskCLIP, Zhou et al. 2022,
        "Extract free dense labels from CLIP")."""
        value = self.attention.key_value(self.key_norm(tokens)).chunk(2, dim=-1)[1]
        found: Tensor = self.attention.output(value)
        return found


def causal_links(length: int, device: torch.device) -> Tensor:
    """(1, L, L) bool: each place sees itself and those before it."""
    return torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
