"""Two towers and a fusion encoder: the part of the student that the momentum teacher mirrors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.kernels.linear import use_linear

from ..data.classes import Classes
from ..recipe import ModelSection
from .classifier import Classifier
from .dropping import Visible
from .fusion import BERT_EPS, Fused, FusionEncoder, ImageIndex, KeyValue, Rows
from .text import TextTower
from .vision import ImageTower
from .word_reader import WordReader

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """An image or a caption through its tower: tokens, and the feature that is compared."""

    tokens: Tensor  # (B, N, width) in the tower's dtype
    feature: Tensor  # (B, E) float32, length 1; (B, 0) where it was not asked for
    visible: Visible | None = None  # of an image whose hidden patches were left out: N = 1 + V, CLS and what was kept
    attention: Tensor | None = None  # (B, P) float32: how much of the last block's attention each patch gets
    pooled: Tensor | None = None  # (B, queries, width): what a captioner's pooler read of an image's visible tokens

    @property
    def image_mask(self) -> Tensor | None:
        """(B, 1 + V) bool: tokens that count, where rows differ in how many patches they kept; None = all."""
        return None if self.visible is None else self.visible.after(1).valid

    def rows(self, which: slice) -> Encoded:
        """The same of some samples."""
        visible = None if self.visible is None else self.visible.rows(which)
        attention, pooled = (None if x is None else x[which] for x in (self.attention, self.pooled))
        return Encoded(self.tokens[which], self.feature[which], visible, attention, pooled)


class VisionLanguageModel(nn.Module):
    """ALBEF's layout (Li et al. 2021): image tower, text tower, projections, fusion encoder, word and match heads.

    All names in this class are shared by student and teacher; heads that the teacher has no use for live in
    :class:`~crossmask.engine.models.pretraining.PretrainingModel`.
    """

    def __init__(
        self,
        section: ModelSection,
        vocabulary_size: int,
        max_length: int,
        pad_id: int = 0,
        mask_network: nn.Module | None = None,
        mask_id: int = 4,
        word_reader: WordReader | None = None,
        classes: Classes | None = None,
    ) -> None:
        """``mask_network``: a mask policy's own module (B, P, image width) -> (B, P); student and teacher get one each.
        ``pad_id``, ``mask_id``: the words [PAD] and [MASK] of the tokenizer. ``word_reader``: the block in which
        patches read the words, where masks are chosen by it; one each, too. ``classes``: what its classifier tells
        apart; default there is none."""
        super().__init__()
        width, fusion = section.text.width, section.fusion
        self.pool = section.pool
        self.image = ImageTower(section.image)
        self.text = TextTower(section.text, vocabulary_size, max_length, pad_id, mask_id)
        self.image_projection = nn.Linear(section.image.width, section.projection_width)
        self.text_projection = nn.Linear(width, section.projection_width)
        self.fusion = FusionEncoder(width, section.image.width, fusion)
        self.match_head = nn.Linear(width, 2)
        self.word_head = build_word_head(section)
        self.word_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.mask_network = mask_network
        self.word_reader = word_reader
        self.classifier = None if classes is None else Classifier(width, classes)
        if fusion.norm == "post":
            self.fusion.apply(begin_as_bert)
        use_linear(self)

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.image.patch_grid

    @property
    def patch_size(self) -> int:
        return self.image.patch_size

    @property
    def dtype(self) -> torch.dtype:
        return self.word_bias.dtype

    def forward(self, visit: Callable[[VisionLanguageModel], T]) -> T:
        """Run ``visit(self)`` inside this module's forward: ZeRO-3 gathers parameters only there."""
        return visit(self)

    def encode_image(
        self,
        images: Tensor,
        patch_mask: Tensor | None = None,
        *,
        drop: bool = False,
        drop_after: int = 0,
        visible_count: int | None = None,
        attention: bool = False,
    ) -> Encoded:
        """(B, 3, H, W) -> tokens (B, 1 + P, width), CLS first. ``patch_mask`` (B, P) bool hides patches.

        ``drop``, ``drop_after``, ``visible_count``: leave hidden patches out, see :class:`ImageTower`; the tokens are
        then (B, 1 + V, width) and ``visible`` says which. ``attention``: also fill ``Encoded.attention``, seen from the
        token, or the tokens, that ``pool`` reads.
        """
        seen = self.image(
            images.to(self.dtype),
            patch_mask,
            drop=drop,
            drop_after=drop_after,
            visible_count=visible_count,
            attention_of=self.pool if attention else None,
        )
        tokens, visible = seen.tokens, seen.visible
        feature = F.normalize(self.image_projection(self.pool_image(tokens, visible)).float(), dim=-1)
        return Encoded(tokens, feature, visible, seen.attention)

    def pool_image(self, tokens: Tensor, visible: Visible | None = None) -> Tensor:
        """(B, N, width), [CLS] first -> (B, width): what stands for an image, before its projection."""
        return pool_patches(tokens, visible, self.pool)

    def encode_text(
        self, token_ids: Tensor, token_mask: Tensor, hidden: Tensor | None = None, links: Tensor | None = None
    ) -> Encoded:
        """(B, L) ids and mask -> tokens (B, L, width). ``hidden`` (B, L) and ``links`` (B, L, L): :class:`TextTower`.

        Hidden words have no part in the feature.
        """
        tokens = self.text(token_ids, token_mask, hidden, links)
        pooled = self.pool_text(tokens, token_mask if hidden is None else token_mask & ~hidden)
        return Encoded(tokens, self.project_text(pooled))

    def pool_text(self, tokens: Tensor, read: Tensor) -> Tensor:
        """(B, L, width), [CLS] first, and (B, L) bool -> (B, width): what stands for a text, before its projection."""
        if self.pool == "cls":
            return tokens[:, 0]
        # the mean over everything but [CLS], whose embedding says nothing without self-attention
        words = read.to(tokens.dtype)[:, 1:, None]
        return (tokens[:, 1:] * words).sum(1) / words.sum(1).clamp(min=1)

    def project_text(self, pooled: Tensor) -> Tensor:
        """(B, width) -> (B, E) float32 of length 1: a text's feature, or that of an image and a text fused."""
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def patch_features(self, image_tokens: Tensor) -> Tensor:
        """(B, 1 + P, width) -> (B, P, E) float32, length 1: the patches where features are compared."""
        return F.normalize(self.image_projection(image_tokens[:, 1:]).float(), dim=-1)

    def word_features(self, text_tokens: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, E) float32, length 1: the words where features are compared."""
        return F.normalize(self.text_projection(text_tokens).float(), dim=-1)

    def score_patches(self, image_tokens: Tensor) -> Tensor:
        """(B, 1 + P, width) -> (B, P) float32: what the mask network says of every patch."""
        if self.mask_network is None:
            raise ValueError("the model has no mask network to score patches with: pass mask_network")
        scores: Tensor = self.mask_network(image_tokens[:, 1:])
        return scores.float()

    def word_attention(self, image_tokens: Tensor, text_tokens: Tensor, words: Tensor) -> Tensor:
        """(B, 1 + P, width) and (B, L, text width) -> (B, L) float32: how much of the patches' attention each of
        ``words`` (B, L) bool gets, see :class:`WordReader`."""
        if self.word_reader is None:
            raise ValueError("the model has no block in which patches read the words: pass word_reader")
        return self.word_reader.word_attention(image_tokens, text_tokens, words)

    def project_image(self, image_tokens: Tensor) -> list[KeyValue]:
        """(B, 1 + P, width) -> per fusion layer the keys and values, each (B, H, 1 + P, D)."""
        return self.fusion.project_image(image_tokens)

    def fuse(
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
        image_index: ImageIndex | None = None,
        rows: Rows | None = None,
    ) -> Fused:
        """See :meth:`FusionEncoder.forward`."""
        return self.fusion(
            text_tokens,
            token_mask,
            image,
            statistics_layer,
            query_mask,
            links=links,
            head_mask=head_mask,
            image_mask=image_mask,
            image_index=image_index,
            rows=rows,
        )

    def match_logits(self, fused_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, L, width) -> (B, 2) float32; class 1 says the pair belongs together."""
        return self.match_head(self.pool_fused(fused_tokens, token_mask)).float()

    def pool_fused(self, fused_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, L, width) -> (B, width): what stands for an image and a text together."""
        if self.pool == "cls":
            return fused_tokens[:, 0]
        words = token_mask.to(fused_tokens.dtype)[..., None]
        return (fused_tokens * words).sum(1) / words.sum(1).clamp(min=1)

    def composed_feature(self, image_tokens: Tensor, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, 1 + P, width) of reference images and (B, L, width) of words that say how another image differs
        -> (B, E) float32 of length 1: what to look for among images' features."""
        fused = self.fuse(text_tokens, token_mask, self.project_image(image_tokens)).tokens
        return self.project_text(self.pool_fused(fused, token_mask))

    def word_hidden(self, rows: Tensor) -> Tensor:
        """(N, width) fused rows -> (N, width): the word head before its decoder."""
        hidden: Tensor = self.word_head(rows)
        return hidden

    @property
    def word_decoder(self) -> tuple[Tensor, Tensor]:
        """(V, width) and (V,): weight, tied to the word embeddings, and bias of the decoder behind ``word_hidden``.

        Under ZeRO stage 3 only inside this module's forward, or the teacher's ``weights()``.
        """
        return self.text.word_embeddings.weight, self.word_bias

    def word_logits(self, rows: Tensor) -> Tensor:
        """(N, width) fused rows -> (N, V)."""
        return F.linear(self.word_hidden(rows), *self.word_decoder)


def build_word_head(section: ModelSection) -> nn.Sequential:
    """Fresh: what stands before the decoder."""
    width, post = section.text.width, section.fusion.norm == "post"
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, BERT_EPS if post else 1e-5))
    return head.apply(begin_as_bert) if post else head


def begin_as_bert(module: nn.Module) -> None:
    """BERT's first weights, N(0, 0.02) (Devlin et al. 2019), which its kind of layers is made for."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def pool_patches(tokens: Tensor, visible: Visible | None, pool: str) -> Tensor:
    """(B, N, width) of an image, [CLS] first -> (B, width): [CLS], or the mean of the patches that are visible."""
    if pool == "cls":
        return tokens[:, 0]
    return masked_mean(tokens[:, 1:], None if visible is None else visible.valid)


def masked_mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """(B, V, width) -> (B, width): the mean over places that count, 0 where there are none."""
    if valid is None:
        return tokens.mean(1) if tokens.shape[1] else tokens.sum(1)
    counts = valid[..., None]
    return tokens.where(counts, 0.0).sum(1) / counts.sum(1).clamp(min=1)
