"""The fusion encoder: words that read the image, and say where they looked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.kernels import AttentionStatistics, cross_attention

from ..masking.heads import head_importance

KeyValue = tuple[Tensor, Tensor]  # each (B, H, P, D)
TEACHER_STATISTICS = ("entropy", "key_attention", "query_attention")
INITIAL_SHARPNESS = 8.0  # cosines of unrelated directions scatter by D ** -0.5, logits then by about one


@dataclass(frozen=True)
class Fused:  # of modules without parameters of their own, so ZeRO-3 needs no hook on it
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
        # Of each head, (H,) float32, from the backwards through what ran while recording; a buffer would change dtype.
        self.importance: Tensor | None = None
        self.recording = False
        self.anew = False  # the next backward replaces what was recorded before

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

    def forward(
        self,
        x: Tensor,
        key_value: KeyValue,
        key_mask: Tensor | None = None,
        link_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> Tensor:
        # Values that are not finite reach the loss, where the loop leaves the step out on every rank together.
        out = cross_attention(
            self.ask(x),
            *key_value,
            key_mask=key_mask,
            head_mask=head_mask,
            link_mask=link_mask,
            check_finite=False,
        ).output
        if self.recording and out.requires_grad:
            # detached: a hook that held the tensor it hangs on would never be freed
            out.register_hook(self._recorder(out.detach(), head_mask))
        return self.output(out.transpose(1, 2).flatten(2))

    def _recorder(self, output: Tensor, head_mask: Tensor | None) -> Callable[[Tensor], None]:
        """A tensor hook that adds up the heads' importance. One that is off, and so moves nothing, keeps its last."""

        def record(gradient: Tensor) -> None:
            found, before = head_importance(output, gradient), self.importance
            if before is not None and self.anew and head_mask is not None:
                on = head_mask if head_mask.ndim == 1 else head_mask.any(0)
                before = before.where(~on, 0.0)
            elif self.anew:
                before = None
            self.importance, self.anew = found if before is None else before + found, False

        return record

    @torch.no_grad()
    def statistics(
        self,
        x: Tensor,
        key_value: KeyValue,
        query_mask: Tensor,
        key_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
    ) -> AttentionStatistics:
        """Where ``x`` looks among the keys. Valid queries are those of ``query_mask`` (B, L)."""
        return cross_attention(
            self.ask(x),
            *key_value,
            key_mask=key_mask,
            query_mask=query_mask,
            head_mask=head_mask,
            statistics=TEACHER_STATISTICS,
            check_finite=False,
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

    def forward(
        self,
        x: Tensor,
        word_mask: Tensor | None,
        image: KeyValue,
        links: Tensor | None = None,
        head_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the layer's output and the queries it put to the image, both (B, L, width)."""
        y = self.self_norm(x)
        x = x + self.dropout(self.self_attention(y, self.self_attention.project(y), word_mask, link_mask=links))
        asked = self.cross_norm(x)
        x = x + self.dropout(self.cross_attention(asked, image, image_mask, head_mask=head_mask))
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
        *,
        links: Tensor | None = None,
        head_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Fused:
        """Fuse (B, L, width) words with the projected image.

        Args:
            statistics_layer: (negative from the end) the layer whose cross-attention is described; the image's CLS
                token is left out before the softmax, so that a patch competes with patches only.
            query_mask: (B, L) bool, which words count in the statistics; default ``token_mask``.
            links: (B, L, L) bool, True = this word may look at that one.
            head_mask: (layers, H) or (layers, B, H) bool, True = this head of the cross-attention is on.
            image_mask: (B, 1 + P) bool, True = this token of the image, CLS first, may be looked at.
        """
        chosen = None if statistics_layer is None else range(len(self.layers))[statistics_layer]
        found = None
        x = text_tokens
        for i, layer in enumerate(self._layers()):
            heads = None if head_mask is None else head_mask[i]
            x, asked = layer(x, token_mask, image[i], links, heads, image_mask)
            if i == chosen:
                key, value = image[i]
                words = token_mask if query_mask is None else query_mask
                patches = None if image_mask is None else image_mask[:, 1:]
                of_patches = (key[:, :, 1:], value[:, :, 1:])
                found = layer.cross_attention.statistics(asked, of_patches, words, patches, heads)
        return Fused(self.norm(x), found)

    def record_importance(self, on: bool = True) -> None:
        """From the next forward on, note in each backward how much every head of the cross-attentions matters. Call it
        anew at each step: what is noted then replaces what was noted before, but for heads that are off."""
        for layer in self._layers():
            layer.cross_attention.recording = layer.cross_attention.anew = on

    def head_importance(self) -> Tensor:
        """(layers, H) float32: what was noted since the last :meth:`record_importance`, summed over forwards; of a head
        that has been off, what was noted when it was last on; 0 before the first backward.

        Of this rank's batch, and of a loss that may be scaled: compare heads of a layer, not steps.
        """
        rows = []
        for layer in self._layers():
            attention = layer.cross_attention
            empty = torch.zeros(attention.heads, device=attention.output.weight.device)
            rows.append(empty if attention.importance is None else attention.importance)
        return torch.stack(rows)

    def restore_importance(self, importance: Tensor) -> None:
        """Take (layers, H) float32 for what was noted, as a resumed run does."""
        for layer, row in zip(self._layers(), importance, strict=True):
            layer.cross_attention.importance = row.clone()
