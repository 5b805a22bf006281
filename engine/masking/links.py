"""Which token may look at which: (B, L, L) bool link masks, True = this query (row) may look at this key (column).

For ``cross_attention(link_mask=...)`` and for BERT-like towers. No padded key is looked at, and every real token looks
at one key at least. What padded queries look at is of no consequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe import LinksSection
from .draws import Draws


def build_links(section: LinksSection, token_mask: Tensor, draws: Draws, purpose: str = "links") -> Tensor | None:
    """A recipe's links for captions whose first token is [CLS]; None where every token sees all.

    Args:
        token_mask: (B, L) bool, True = a real token; they stand first.
        purpose: the stream that is drawn from; another one for each layer gives each layer links of its own.
    """
    if section.kind == "none":
        return None
    if section.kind == "token_level":
        return token_level(token_mask, section.rate, draws, purpose)
    place = torch.arange(token_mask.shape[1], device=token_mask.device).expand(token_mask.shape)
    if section.kind == "segment":
        # [CLS] belongs to the first words: alone it could look at nothing else
        words = (place - 1).clamp(min=0)
        return segments(token_mask, torch.div(words, section.segment_words, rounding_mode="floor"))
    # The image is a prefix too, read by cross-attention.
    one_by_one = draws.uniform(purpose)[:, None, None] < section.share
    return torch.where(one_by_one, sequence_to_sequence(token_mask, place < 1), everything(token_mask))


def everything(token_mask: Tensor) -> Tensor:
    """Bidirectional: every token looks at every real one."""
    return token_mask[:, None, :].expand(-1, token_mask.shape[1], -1)


def causal(token_mask: Tensor) -> Tensor:
    """Every token looks at itself and at those before it."""
    return sequence_to_sequence(token_mask, torch.zeros_like(token_mask))


def sequence_to_sequence(token_mask: Tensor, prefix: Tensor) -> Tensor:
    """Everybody looks at the prefix, and nobody in it elsewhere; the rest looks at itself and at what came before.

    Unified VLP (Zhou et al. 2020, "Unified vision-language pre-training for image captioning and VQA"), where regions
    of the image are the prefix and the caption is the target; it draws this mask for 75 % of the samples and the
    bidirectional one for the rest.

    Args:
        token_mask: (B, L) bool.
        prefix: (B, L) bool, True = of the prefix.
    """
    place = torch.arange(token_mask.shape[1], device=token_mask.device)
    before = place[:, None] >= place  # (L, L)
    allowed = prefix[:, None, :] | (before & ~prefix[:, :, None])
    return allowed & token_mask[:, None, :]


def segments(token_mask: Tensor, segment: Tensor, answer: Tensor | None = None) -> Tensor:
    """Every token looks at its whole segment and at all that came before.

    Masked attention by segment (Katz et al. 2024, "Segment-based attention masking for GPTs"): the segments of a prompt
    are read as a whole, the answer token by token.

    Args:
        token_mask: (B, L) bool.
        segment: (B, L) int64, the segment of each token; a segment's tokens stand together.
        answer: (B, L) bool, True = sees what came before alone; default no token.
    """
    place = torch.arange(token_mask.shape[1], device=token_mask.device)
    together = segment[:, :, None] == segment[:, None, :]
    if answer is not None:
        together = together & ~answer[:, :, None] & ~answer[:, None, :]
    return (together | (place[:, None] >= place)) & token_mask[:, None, :]


def token_level(token_mask: Tensor, rate: float, draws: Draws, purpose: str = "links") -> Tensor:
    """Links of a random share of the tokens are cut.

    Token-level masking (Wu et al. 2023, "TLM: token-level masking for transformers"). Each token is cut with chance
    ``rate``, and half of the cut ones in either way:

        siblings-masking: it looks at itself alone, and the other tokens have to do without it;
        self-masking: it looks at all others but not at itself.

    As in the authors' code, tokens that are not cut look at no cut token of either kind, and the kind is drawn for each
    token. That code lets self-masked tokens look at padding, which is left out here, and draws anew in each layer:
    pass a ``purpose`` a layer; the engine draws once for all. A self-masked token that is alone looks at itself.
    """
    draw = draws.uniform(purpose, token_mask.shape[1])
    # one number says both: below half of the rate, and below the rate
    siblings, cut = (draw < rate / 2) & token_mask, (draw < rate) & token_mask
    itself = torch.eye(token_mask.shape[1], dtype=torch.bool, device=token_mask.device)
    others = token_mask[:, None, :] & ~itself
    of_cut = torch.where(siblings[:, :, None], itself, others)
    links = torch.where(cut[:, :, None], of_cut, (token_mask & ~cut)[:, None, :])
    return links | (itself & token_mask[:, :, None] & ~links.any(2, keepdim=True))
