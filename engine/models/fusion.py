"""The fusion encoder: words that read the image, and say where they looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.kernels import AttentionStatistics, cross_attention

KeyValue = tuple[Tensor, Tensor]  # each (B, H, P, D)
TEACHER_STATISTICS = ("entropy", "key_attention", "query_attention")
INITIAL_SHARPNESS = 8.0  # cosines of unrelated directions scatter by D ** -0.5, logits then by about one


@dataclass(frozen=True)
class Fused:
    tokens: Tensor  # (B, L, width)
    statistics: AttentionStatistics | None  # of the patches only, the image's CLS left out


class Attention(nn.Module):
    """Multi-head attention whose keys and values are projected separately, so that pairs can share them.

    ``qk_norm`` compares directions only, times a learned scale per head (query-key normalisation, Henry et al. 2020):
    attention can then be selective before its projections have grown.
    """

    def __init__(self, width: int, key_width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(key_width, 2 * width)
        self.output = nn.Linear(width, width)
        # In units of the softmax's logits, before the D ** -0.5 that every attention applies.
        self.sharpness = nn.Parameter(torch.full((heads,), INITIAL_SHARPNESS)) if qk_norm else None

    def split(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, H, N, D)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def ask(self, x: Tensor) -> Tensor:
        """(B, S, width) -> queries (B, H, S, D)"""
        q = self.split(self.query(x))
        if self.sharpness is None:
            return q
        return F.normalize(q, dim=-1) * (self.sharpness * q.shape[-1] ** 0.5)[:, None, None].to(q.dtype)

    def project(self, tokens: Tensor) -> KeyValue:
        """(B, P, key width) -> keys and values, each (B, H, P, D)"""
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        key = self.split(key)
        return key if self.sharpness is None else F.normalize(key, dim=-1), self.split(value)

    def forward(self, x: Tensor, key_value: KeyValue, key_mask: Tensor | None = None) -> Tensor:
        # Values that are not finite reach the loss, where the loop leaves the step out on every rank together.
        out = cross_attention(self.ask(x), *key_value, key_mask=key_mask, check_finite=False).output
        return self.output(out.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def statistics(self, x: Tensor, key_value: KeyValue, query_mask: Tensor) -> AttentionStatistics:
        """Where ``x`` looks among the keys. Valid queries are those of ``query_mask`` (B, L)."""
        return cross_attention(
            self.ask(x), *key_value, query_mask=query_mask, statistics=TEACHER_STATISTICS, check_finite=False
        ).statistics


class FusionLayer(nn.Module):
    """Self-attention over words, cross-attention into the image, feed-forward; pre-norm, which trains from scratch
    at the learning rates small models want."""

    def __init__(
        self, width: int, image_width: int, heads: int, mlp_ratio: float, dropout: float, qk_norm: bool
    ) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, image_width, heads, qk_norm)
        self.feed_norm = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, word_mask: Tensor | None, image: KeyValue) -> tuple[Tensor, Tensor]:
        """Returns the layer's output and the queries it put to the image, both (B, L, width)."""
        y = self.self_norm(x)
        x = x + self.dropout(self.self_attention(y, self.self_attention.project(y), word_mask))
        asked = self.cross_norm(x)
        x = x + self.dropout(self.cross_attention(asked, image))
        return x + self.dropout(self.feed_forward(self.feed_norm(x))), asked


class FusionEncoder(nn.Module):
    def __init__(
        self, width: int, image_width: int, depth: int, heads: int, mlp_ratio: float, dropout: float, qk_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FusionLayer(width, image_width, heads, mlp_ratio, dropout, qk_norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def _layers(self) -> Iterator[FusionLayer]:
        for layer in self.layers:
            assert isinstance(layer, FusionLayer)
            yield layer

    def project_image(self, image_tokens: Tensor) -> list[KeyValue]:
        """Keys and values of every layer, once per image however many captions it meets."""
        return [layer.cross_attention.project(image_tokens) for layer in self._layers()]

    def forward(
        self,
        text_tokens: Tensor,
        token_mask: Tensor,
        image: Sequence[KeyValue],
        statistics_layer: int | None = None,
        query_mask: Tensor | None = None,
    ) -> Fused:
        """Fuse (B, L, width) words with the projected image.

        ``statistics_layer`` (negative from the end) names the layer whose cross-attention is described; the image's
        CLS token is left out before the softmax, so that a patch competes with patches only. ``query_mask`` (B, L)
        says which words count; default ``token_mask``.
        """
        chosen = None if statistics_layer is None else range(len(self.layers))[statistics_layer]
        found = None
        x = text_tokens
        for i, layer in enumerate(self._layers()):
            x, asked = layer(x, token_mask, image[i])
            if i == chosen:
                key, value = image[i]
                words = token_mask if query_mask is None else query_mask
                found = layer.cross_attention.statistics(asked, (key[:, :, 1:], value[:, :, 1:]), words)
        return Fused(self.norm(x), found)
