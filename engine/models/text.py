"""The text tower: a transformers BERT encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crossmask.kernels import cross_attention

from ..errors import RecipeError
from ..recipe import TextTowerSection
from .dropout import use_own_dropout
from .dropping import keep_visible, restore
from .packing import Packing

ATTENTION = "crossmask_words"  # the name under which transformers finds it; plain "crossmask" is for models of users


@dataclass(frozen=True)
class Words:
    """Which words a packed batch has, and which of them may look at which."""

    packing: Packing
    mask: Tensor  # (B, L) bool
    links: Tensor | None  # (B, L, L) bool


def attend(
    module: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    words: Words | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers asks for it, and of ``words`` that lie one after another, (1, H, N, D).

    Returns:
        (B, L, H, D) or (1, N, H, D), and no weights.
    """
    if words is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, queries, keys, values, attention_mask, dropout=dropout, scaling=scaling, **other
        )
        return found
    q, k, v = (words.packing.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (queries, keys, values))
    read = cross_attention(
        q,
        k,
        v,
        key_mask=words.mask if words.links is None else None,
        link_mask=words.links,
        scale=scaling,
        dropout_p=dropout,
        check_finite=False,
    ).output
    return words.packing.pack(read.transpose(1, 2))[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class TextTower(nn.Module):
    """BERT (Devlin et al. 2019). With ``depth: 0`` it is word and position embeddings with a layer norm."""

    def __init__(
        self, section: TextTowerSection, vocabulary_size: int, max_length: int, pad_id: int, mask_id: int
    ) -> None:
        """RecipeError where ``section.positions`` is below ``max_length``."""
        super().__init__()
        if section.positions is not None and section.positions < max_length:
            raise RecipeError(
                f"model.text.positions: {section.positions} are fewer than the {max_length} tokens of the longest "
                "caption; raise it, or lower data.max_tokens"
            )
        self.mask_id = mask_id
        config = BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=section.width,
            num_hidden_layers=section.depth,
            num_attention_heads=section.heads,
            intermediate_size=int(section.width * section.mlp_ratio),
            hidden_dropout_prob=section.dropout,
            attention_probs_dropout_prob=section.dropout,
            max_position_embeddings=section.positions or max_length,
            pad_token_id=pad_id,
            type_vocab_size=section.segments,
            attn_implementation=ATTENTION,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        use_own_dropout(self.bert)
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
        """(B, L) int64 ids and bool mask -> (B, L, width) tokens; what comes out at padding says nothing.

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
        if links is not None:
            allowed = links & token_mask[:, None]
            itself = torch.eye(links.shape[1], dtype=torch.bool, device=links.device)
            links = allowed | (itself & ~allowed.any(2, keepdim=True))
        packing = Packing.of(token_mask)
        if packing is None:
            mask = token_mask if links is None else links[:, None]  # 4-d masks are taken as they are
            return self.bert(input_ids=token_ids, attention_mask=mask, position_ids=positions).last_hidden_state
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
        x = self.bert.embeddings(packing.pack(token_ids)[None], position_ids=packing.pack(positions)[None])
        for layer in self.bert.encoder.layer:
            x = layer(x, words=Words(packing, token_mask, links))
        return packing.pad(x[0])
