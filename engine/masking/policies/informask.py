"""Masks from which the rest of the caption learns most."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from crossmask.kernels import topk_mask

from ...recipe import Section
from ..draws import Draws
from ..plan import MaskContext, MaskPlan
from ..registry import Corpus, Policy, register_policy
from ..word_counts import PairPmi, Resident, prepared
from .random import drawn, random_patches

_COUNTED_CAPTIONS = 20_000  # of which rates are counted; the paper counts 10 million sentences
_AT_ONCE = 1024


@register_policy("informask")
class InforMask(Policy):
    """Of several random masks, take the one whose hidden words are best told by the visible ones.

    InforMask (Sadeq et al. 2022) scores a set of hidden words by

        score(hidden) = sum over hidden w_i and visible w_j of PMI(w_i, w_j)

    and keeps the best of ``candidates`` random masks. ``rule: rates`` is the paper's faster variant: how often each
    token is hidden by that procedure is counted once, and words are then drawn by their token's rate.

    A reconstruction: PMI is that of whole captions instead of a window of 11 words, words are pieces, function words
    count as visible, and words that share fewer than ``least`` captions have a PMI of 0. The paper hides each word by
    an independent draw at its rate; to keep to text_ratio, words are drawn here without replacement in proportion to
    rate / (1 - rate), to which independent draws with a given number of successes come close. Rates are counted at a
    ratio of 0.15. Patches are hidden at random.
    """

    class Options(Section):
        candidates: int = Field(30, ge=1, le=1000, description="random masks of which the best is taken")
        rule: Literal["candidates", "rates"] = Field("candidates", description="rates: one rate a token, counted once")
        vocabulary: int = Field(8192, ge=2, description="most frequent tokens whose pairs are counted")
        least: int = Field(1, ge=1, description="captions that two words must share for their PMI to count")

    options: Options
    pmi: PairPmi | None = None
    odds: Resident | None = None  # (vocabulary,) float32: rate / (1 - rate)

    def prepare(self, corpus: Corpus) -> None:
        self.pmi = PairPmi(corpus, self.options.vocabulary, self.options.least)
        if self.options.rule == "rates":
            self.odds = Resident(self._count_odds(corpus))

    def __call__(self, context: MaskContext) -> MaskPlan:
        ids, maskable = context.token_ids, context.maskable
        if self.options.rule == "candidates":
            text = self._best(ids, maskable, context.text_ratio, context.draws)
        else:
            (odds,) = prepared(self.odds, self.name).on(ids.device)
            text = drawn(odds[ids], context.text_ratio, context, "words by rate", maskable)
        return MaskPlan(random_patches(context), text)

    def _best(self, ids: Tensor, maskable: Tensor, ratio: float | Tensor, draws: Draws) -> Tensor:
        """(B, L) bool: the candidate with the highest score, the first of equals."""
        pmi = prepared(self.pmi, self.name)(ids)  # (B, L, L)
        B, L = ids.shape
        C = self.options.candidates
        # positions first: a number must not depend on how long the batch's longest caption is
        scores = draws.uniform("candidates", L, C).transpose(1, 2).reshape(B * C, L)
        valid = maskable[:, None].expand(B, C, L).reshape(B * C, L)
        share = ratio[:, None].expand(B, C).reshape(-1) if isinstance(ratio, Tensor) else ratio
        hidden = topk_mask(scores, ratio=share, valid=valid).view(B, C, L)
        # exact in float64 (word_counts.QUANTUM), so the best does not depend on how a batch is multiplied
        told = (hidden.double() @ pmi).masked_fill(hidden, 0.0).sum(2)  # (B, C)
        best = told.argmax(1)[:, None, None].expand(B, 1, L)
        return hidden.gather(1, best)[:, 0]

    def _count_odds(self, corpus: Corpus) -> Tensor:
        size = corpus.vocabulary_size
        seen, hidden = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        stride = -(-len(corpus.captions) // _COUNTED_CAPTIONS) or 1
        captions = [torch.tensor(caption, dtype=torch.int64) for caption in corpus.captions[::stride] if len(caption)]
        for start in range(0, len(captions), _AT_ONCE):
            some = captions[start : start + _AT_ONCE]
            ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-1)
            real = ids >= 0
            ids = ids.clamp(min=0)
            draws = Draws(0, 0, torch.arange(start, start + len(some)))
            chosen = self._best(ids, real, 0.15, draws)
            seen += torch.bincount(ids[real], minlength=size)
            hidden += torch.bincount(ids[chosen], minlength=size)
        # one more of each: a token that was always or never hidden in few captions is not always or never to be
        return ((hidden + 0.15) / (seen - hidden + 0.85)).float()
