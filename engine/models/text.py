"""The text tower: a transformers BERT encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ..recipe import TextTowerSection


class TextTower(nn.Module):
    """BERT (Devlin et al. 2019). With ``depth: 0`` it is word and position embeddings with a layer norm."""

    def __init__(self, section: TextTowerSection, vocabulary_size: int, max_length: int, pad_id: int) -> None:
        super().__init__()
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

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """(B, L) int64 ids and bool mask -> (B, L, width) tokens."""
        if self.bert.config.num_hidden_layers == 0:
            return self.bert.embeddings(input_ids=token_ids)
        return self.bert(input_ids=token_ids, attention_mask=token_mask).last_hidden_state
