"""Words that their own caption makes likely."""

from __future__ import annotations

from pydantic import Field

from crossmask.kernels import topk_mask

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Corpus, Policy, register_policy
from ..word_counts import QUANTUM, PairPmi, prepared
from .random import random_patches


@register_policy("pmi")
class PmiMask(Policy):
    """Hide the words whose pointwise mutual information with the rest of their caption is highest.

    "Challenging decoder helps in masked auto-encoder pre-training for dense passage retrieval" (Li et al. 2023) masks
    the decoder's input by token importance: a token counts for as much as it has to do with its passage,

        importance(w_i) = sum over the caption's other words w_j of PMI(w_i, w_j),

    and the most important are hidden, so that what is left says little about them. A reconstruction, where the paper
    does not say or its passages differ from captions: p is counted over whole captions instead of windows, words that
    share fewer than ``least`` captions have a PMI of 0, and ties are broken at random. Patches are hidden at random.
    """

    class Options(Section):
        vocabulary: int = Field(8192, ge=2, description="most frequent tokens whose pairs are counted")
        least: int = Field(1, ge=1, description="captions that two words must share for their PMI to count")

    options: Options
    pmi: PairPmi | None = None

    def prepare(self, corpus: Corpus) -> None:
        self.pmi = PairPmi(corpus, self.options.vocabulary, self.options.least)

    def __call__(self, context: MaskContext) -> MaskPlan:
        importance = prepared(self.pmi, self.name)(context.token_ids).sum(2)  # (B, L) float64, exact
        ties = context.draws.uniform("ties", importance.shape[1]).double() * (QUANTUM / 2)
        text = topk_mask(importance + ties, ratio=context.text_ratio, valid=context.maskable)
        return MaskPlan(random_patches(context), text)
