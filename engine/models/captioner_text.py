"""The causal text tower of a contrastive captioner: a GPT whose last token reads them all."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RecipeError
from ..recipe import TextTowerSection
from ..recipe_sections_captioner import CaptionerSection
from .captioner_blocks import Block, causal_links
from .packing import Packing


class TextTokens(NamedTuple):  # a tuple: DeepSpeed's ZeRO-3 finds no tensor to hook in a dataclass
    tokens: Tensor  # (B, L, width), what the decoders read: not normalised
    pooled: Tensor  # (B, width), normalised


class CausalTextTower(nn.Module):
    """Each word sees itself and those before it. A learned [CLS], which has the last position of the table however long
    the caption is, stands behind the words and sees all of them (CoCa, Yu et al. 2022); ``pool: mean`` has none and
    takes the mean over the words instead.

    With ``depth: 0`` a token is the embedding of its word and of its position.
    """

    def __init__(
        self,
        section: TextTowerSection,
        captioner: CaptionerSection,
        vocabulary_size: int,
        max_length: int,
        pad_id: int,
        pool: str,
    ) -> None:
        """RecipeError where ``section.positions`` is below ``max_length``."""
        super().__init__()
        if section.positions is not None and section.positions < max_length:
            raise RecipeError(
                f"model.text.positions: {section.positions} are fewer than the {max_length} tokens of the longest "
                "caption; raise it, or lower data.max_tokens"
            )
        self.pad_id, self.shifted = pad_id, captioner.cls_mask == "shifted"
        width, self.max_length = section.width, section.positions or max_length
        self.word_embeddings = nn.Embedding(vocabulary_size, width)
        self.cls_embedding = nn.Parameter(torch.empty(width)) if pool == "cls" else None
        self.position_embeddings = nn.Parameter(torch.empty(self.max_length + (pool == "cls"), width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                section.heads,
                section.mlp_ratio,
                quick_gelu=captioner.quick_gelu,
                dropout=section.dropout,
            )
            for _ in range(section.depth)
        )
        self.norm = nn.LayerNorm(width)
        std = captioner.initial_std
        nn.init.normal_(self.word_embeddings.weight, std=0.02 if std is None else std)
        # A feature that is a mean of embeddings would begin as mostly position: let words speak first.
        nn.init.normal_(self.position_embeddings, std=0.002 if section.depth == 0 else 0.01)
        if self.cls_embedding is not None:
            nn.init.normal_(self.cls_embedding, std=0.01)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.begin(section.depth, std)

    def embed(self, token_ids: Tensor, start: int = 0) -> Tensor:
        """(B, L) ids of the words from place ``start`` on -> (B, L, width): what the first block reads."""
        positions = self.position_embeddings[start : start + token_ids.shape[1]]
        words: Tensor = self.word_embeddings(token_ids)
        return words + positions.to(words.dtype)

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> TextTokens:
        """(B, L) int64 ids and bool mask, padding behind the words. What comes out at padding says nothing."""
        length = token_ids.shape[1]
        if self.cls_embedding is None:
            packing = Packing.of(token_mask)
            tokens = self._run(self.embed(token_ids), token_mask, causal_links(length, token_ids.device), packing)
            return TextTokens(tokens, _mean_words(self.norm(tokens), token_mask))
        if self.shifted and length < self.max_length:  # [CLS] sees the first padding, which there then has to be
            beyond = (0, self.max_length - length)
            token_ids, token_mask = F.pad(token_ids, beyond, value=self.pad_id), F.pad(token_mask, beyond)
        cls = self.cls_embedding + self.position_embeddings[-1]
        x = self.embed(token_ids)
        x = torch.cat([x, cls.to(x.dtype).expand(len(x), 1, -1)], 1)
        links = causal_links(x.shape[1], x.device)
        if self.shifted:
            seen = F.pad(token_mask, (1, 0), value=True)  # (B, L + 1): of place j whether j - 1 is a word
            last = torch.arange(x.shape[1], device=x.device)[:, None] == x.shape[1] - 1
            links = links & (seen[:, None] | ~last)
            x = self._run(x, None, links, None)
        else:
            mask = F.pad(token_mask, (0, 1), value=True)
            x = self._run(x, mask, links, Packing.of(mask))
        return TextTokens(x[:, :length], self.norm(x[:, -1]))

    def _run(self, x: Tensor, mask: Tensor | None, links: Tensor, packing: Packing | None) -> Tensor:
        if packing is None or not len(self.blocks):
            for block in self.blocks:
                x = block(x, None, mask, links)
            return x
        x = packing.pack(x)
        for block in self.blocks:
            x = block(x, None, mask, links, packing)
        return packing.pad(x)


def _mean_words(tokens: Tensor, token_mask: Tensor) -> Tensor:
    """(B, L, width) -> (B, width): the mean over everything but the token that begins every caption."""
    words = token_mask.to(tokens.dtype)[:, 1:, None]
    return (tokens[:, 1:] * words).sum(1) / words.sum(1).clamp(min=1)
