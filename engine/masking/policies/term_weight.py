"""Words drawn by how much they say about their caption."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Corpus, Policy, register_policy
from ..word_counts import Resident, WordCounts, prepared
from .random import drawn, random_patches


@register_policy("term_weight")
class TermWeightMask(Policy):
    """Retrieval oriented masking: words are drawn in proportion to the weight of their term.

    ROM (Long et al. 2022, "Retrieval oriented masking pre-training language model for dense passage retrieval") gives
    important terms a higher probability of being masked: P(w) ~ weight(w). The weight here is BM25's (Robertson and
    Zaragoza 2009), with tf the term's count in the caption:

        weight(w) = log(1 + (N - n_w + 0.5) / (n_w + 0.5)) * tf (k1 + 1) / (tf + k1 (1 - b + b |caption| / mean length))

    for N captions of which n_w hold w. A reconstruction: the paper also uses a weight that a supervised network
    estimates in context, which is not available; terms are pieces, and words are drawn without replacement until
    text_ratio is reached. ``k1: 0`` leaves the inverse document frequency alone. Patches are hidden at random.
    """

    class Options(Section):
        k1: float = Field(0.9, ge=0.0, description="how much more a term weighs that occurs again in its caption")
        b: float = Field(0.4, ge=0.0, le=1.0, description="how much less a term weighs in a long caption")

    options: Options
    mean_length: float = 1.0
    rarity: Resident | None = None  # (vocabulary,) float32 inverse document frequency, bool: is a term

    def prepare(self, corpus: Corpus) -> None:
        counts = WordCounts(corpus)
        n = counts.containing.astype(np.float64)
        rarity = np.log1p((counts.captions - n + 0.5) / (n + 0.5))
        terms = torch.ones(corpus.vocabulary_size, dtype=torch.bool)
        terms[[i for i in corpus.specials if i < len(terms)]] = False  # special tokens and [UNK] are no terms
        self.rarity = Resident(torch.from_numpy(rarity.astype(np.float32)), terms)
        self.mean_length = max(counts.words, 1) / max(counts.captions, 1)

    def __call__(self, context: MaskContext) -> MaskPlan:
        ids, k1, b = context.token_ids, self.options.k1, self.options.b
        rarity, terms = prepared(self.rarity, self.name).on(ids.device)
        term = context.token_mask & terms[ids]
        times = ((ids[:, :, None] == ids[:, None, :]) & term[:, None, :]).sum(2)  # (B, L)
        length = term.sum(1, keepdim=True) / self.mean_length
        weight = rarity[ids] * times * (k1 + 1) / (times + k1 * (1 - b + b * length)).clamp(min=1e-6)
        return MaskPlan(random_patches(context), drawn(weight, context.text_ratio, context, "terms", context.maskable))
