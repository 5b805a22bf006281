"""What the student reads in place of masked words.

80 / 10 / 10: BERT (Devlin et al. 2019). A corruption rate apart from the prediction rate: Wettig et al. 2023, "Should
you mask 15 % in masked language modeling?"
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossmask.kernels import topk_mask

from ..recipe import CorruptionSection
from .plan import KEEP, MaskContext
from .schedules import ratio_at

FIRST_WORD_ID = 5  # [PAD] [UNK] [CLS] [SEP] [MASK] come before, in vocabularies of our own


def corrupt(
    text: Tensor,
    context: MaskContext,
    section: CorruptionSection,
    mask_id: int,
    vocabulary_size: int,
    word_ids: Tensor | None = None,
) -> Tensor:
    """(B, L) int64: the id that is read at each position, :data:`KEEP` where it is the word itself.

    Args:
        text: (B, L) bool, the words to predict. Where ``section.rate`` is set, words are corrupted at that rate: fewer
            than are predicted, or all of them and others besides.
        word_ids: (words,) int64, the ids that random words are drawn from; default all from :data:`FIRST_WORD_ID`.
    """
    chosen = text
    if section.rate is not None:
        # predicted words come first, in random order
        order = text.float() + context.draws.uniform("corruption rate", text.shape[1])
        rate = ratio_at(section.rate, context.progress, context.draws, "corruption rate of a sample")
        chosen = topk_mask(order, ratio=rate, valid=context.maskable)
    draw = context.draws.uniform("corruption", text.shape[1])
    words = vocabulary_size - FIRST_WORD_ID if word_ids is None else len(word_ids)
    place = (context.draws.uniform("other words", text.shape[1]) * words).long().clamp(max=words - 1)
    other = place + FIRST_WORD_ID if word_ids is None else word_ids[place]
    read = torch.where(draw < section.mask, mask_id, torch.where(draw < section.mask + section.random, other, KEEP))
    return torch.where(chosen, read, KEEP)
