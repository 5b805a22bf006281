"""The text tower: a transformers BERT encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ..recipe import TextTowerSection
from .dropping import keep_visible, restore


class TextTower(nn.Module):
    """BERT (Devlin et al. 2019). With ``depth: 0`` it is word and position embeddings with a layer norm."""

    def __init__(
        self, section: TextTowerSection, vocabulary_size: int, max_length: int, pad_id: int, mask_id: int
    ) -> None:
        super().__init__()
        self.mask_id = mask_id
        config = BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=section.width,
            num_hidden_layers=section.depth,
            num_attention_heads=section.heads,
            intermediate_size=int(section.width * section.mlp_ratio),
            hidden_dropout_prob=section.dropout,
            attention_probs_dropout_prob=section.dropout,
            max_position_embeddings=max_length,
            pad_token_id=pad_id,
            type_vocab_size=1,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        # BERT starts words and positions at one size, and the layer norm behind them mixes both. A text feature that
        # is a mean of embeddings then begins as mostly position, which stalls ITC: let words speak first.
        if section.depth == 0:
            with torch.no_grad():
                self.bert.embeddings.position_embeddings.weight.mul_(0.1)
                self.bert.embeddings.token_type_embeddings.weight.mul_(0.1)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    def forward(
        self, token_ids: Tensor, token_mask: Tensor, hidden: Tensor | None = None, links: Tensor | None = None
    ) -> Tensor:
        """(B, L) int64 ids and bool mask -> (B, L, width) tokens.

        Args:
            hidden: (B, L) bool, words that skip the blocks and come out as the embedding of [MASK] at their position
                ("mask more and mask later", Liao et al. 2022). The blocks read the other words alone, each at its own
                position, in rows as long as the longest of them, which the host has to know: this synchronises once.
            links: (B, L, L) bool, True = this word may look at that one in the blocks. A word that may look at nothing
                looks at itself.
        """
        if hidden is None:
            return self._encode(token_ids, token_mask, links)
        embeddings = self.bert.embeddings
        if self.bert.config.num_hidden_layers == 0:
            return embeddings(input_ids=token_ids.masked_fill(hidden, self.mask_id))
        placeholders = embeddings(input_ids=torch.full_like(token_ids, self.mask_id))
        visible = keep_visible(hidden | ~token_mask)
        if visible.index.shape[1] == 0:  # BERT cannot read rows without words
            return placeholders
        if links is not None:
            rows = torch.arange(len(links), device=links.device)[:, None, None]
            links = links[rows, visible.index[:, :, None], visible.index[:, None]]
        mask = torch.ones_like(visible.index, dtype=torch.bool) if visible.valid is None else visible.valid
        tokens = self._encode(token_ids.gather(1, visible.index), mask, links, visible.index)
        return restore(tokens, visible, placeholders, token_ids.shape[1])

    def _encode(
        self, token_ids: Tensor, token_mask: Tensor, links: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """(B, N) ids, mask and positions, (B, N, N) links -> (B, N, width)."""
        if self.bert.config.num_hidden_layers == 0:
            return self.bert.embeddings(input_ids=token_ids, position_ids=positions)
        mask = token_mask
        if links is not None:
            allowed = links & token_mask[:, None]
            itself = torch.eye(links.shape[1], dtype=torch.bool, device=links.device)
            mask = (allowed | (itself & ~allowed.any(2, keepdim=True)))[:, None]  # 4-d masks are taken as they are
        return self.bert(input_ids=token_ids, attention_mask=mask, position_ids=positions).last_hidden_state
