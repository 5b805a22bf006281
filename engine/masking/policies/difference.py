"""Words that make the captions different from other text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ...data.tokenizer import split_words
from ...errors import RecipeError
from ...recipe import Section
from ..common_words import COMMON_WORDS
from ..plan import MaskContext, MaskPlan
from ..registry import Corpus, Policy, register_policy
from ..word_counts import PairPmi, Resident, WordCounts, prepared
from .random import drawn, random_patches


@register_policy("difference")
class DifferenceMask(Policy):
    """Hide the words that are close to what sets the captions apart from the text of a reference.

    Difference-Masking (Wilf et al. 2023, "Difference-Masking: choosing what to mask in continued pretraining"). The
    anchors are the words of highest TF-ICF (Reed et al. 2006): frequent in the captions, rare in the reference,

        score(w) = log(1 + f_w) * log((R + 1) / (r_w + 1))

    with f_w its occurrences in the captions and r_w of the reference's R lines that hold it. Each word's closeness is
    its largest cosine with an anchor, and a caption's n words are drawn without replacement with weights n, n - 1, ...,
    1 from the closest to the farthest, as in the authors' code.

    A reconstruction: words are pieces; instead of BERT's embeddings, which a run from scratch does not have, a word's
    vector is what it shares captions with, in positive PMI and with itself (Levy and Goldberg 2014); equals get the
    mean of their weights. Without a ``reference`` the commonest English words stand in for one, the r-th of them in
    every r-th of 1000 lines, and any other word in none. Patches are hidden at random.
    """

    class Options(Section):
        anchors: int = Field(20, ge=1, description="words that stand for what is special about the captions")
        reference: Path | None = Field(None, description="a text file of other text, best a sentence a line")
        vocabulary: int = Field(8192, ge=2, description="most frequent tokens that are compared")

    options: Options
    closeness: Resident | None = None  # (vocabulary,) float32 in [0, 1]
    anchors: tuple[int, ...] = ()  # token ids, most telling first

    def prepare(self, corpus: Corpus) -> None:
        counts = WordCounts(corpus)
        lines, holding = self._reference(corpus)
        score = np.log1p(counts.occurrences) * np.log((lines + 1) / (holding + 1))
        score[~counts.most_frequent(self.options.vocabulary)] = -np.inf
        score[list(corpus.continuations)] = -np.inf  # a word's ending distinguishes no domain
        order = np.argsort(-score, kind="stable")[: self.options.anchors]
        self.anchors = tuple(int(i) for i in order if score[i] > 0)
        self.closeness = Resident(self._closeness(PairPmi(corpus, self.options.vocabulary, 1, counts), counts))

    def _reference(self, corpus: Corpus) -> tuple[int, np.ndarray]:
        """Lines of the reference, and (vocabulary,) float64 how many of them hold each token."""
        holding = np.zeros(corpus.vocabulary_size)
        path = self.options.reference
        if path is None:
            for rank, word in enumerate(COMMON_WORDS, start=1):
                ids = list(corpus.pieces(word))
                if len(ids) == 1:  # one that the captions' vocabulary had to take apart does not occur in them
                    holding[ids] = np.maximum(holding[ids], 1000 / rank)
            return 1000, holding
        lines, known = 0, dict[str, tuple[int, ...]]()
        try:
            with path.expanduser().open(encoding="utf-8-sig") as file:
                for line in file:
                    words = set(split_words(line))
                    known.update((word, tuple(corpus.pieces(word))) for word in words if word not in known)
                    holding[list({i for word in words for i in known[word]})] += 1
                    lines += bool(words)
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise RecipeError(
                f"mask policy {self.name!r} cannot read {path} ({why}): reference takes a text file"
            ) from None
        if not lines:
            raise RecipeError(f"mask policy {self.name!r}: reference {path} has no words; give a file of other text")
        return lines, holding

    def _closeness(self, pmi: PairPmi, counts: WordCounts) -> Tensor:
        """(vocabulary,) float32: the largest cosine with an anchor; 0 for words that are not compared."""
        found = torch.zeros(counts.vocabulary_size)
        if not self.anchors:
            return found
        kept = np.flatnonzero(counts.most_frequent(self.options.vocabulary))
        place = np.full(counts.vocabulary_size, -1)
        place[kept] = np.arange(len(kept))
        positive = pmi.value > 0
        one, other, value = place[pmi.low[positive]], place[pmi.high[positive]], pmi.value[positive]
        itself = np.arange(len(kept))
        own = np.log(counts.captions / counts.containing[kept]) + 1e-6  # also of a word that is in every caption
        rows, columns = np.concatenate([one, other, itself]), np.concatenate([other, one, itself])
        values = np.concatenate([value, value, own])
        values /= np.sqrt(np.bincount(rows, values**2))[rows]
        vectors = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([rows, columns])),
            torch.from_numpy(values),
            (len(kept), len(kept)),
            check_invariants=True,  # left unsaid, it warns
        )
        # the anchors' rows as dense columns: at most vocabulary x anchors numbers
        among = torch.from_numpy(place[list(self.anchors)])
        selector = torch.zeros(len(kept), len(among), dtype=torch.float64)
        selector[among, torch.arange(len(among))] = 1.0
        anchors = torch.sparse.mm(vectors.t(), selector)
        cosine = torch.sparse.mm(vectors, anchors).amax(1).clamp(0.0, 1.0)
        found[torch.from_numpy(kept)] = cosine.float()
        return found

    def __call__(self, context: MaskContext) -> MaskPlan:
        (closeness,) = prepared(self.closeness, self.name).on(context.token_ids.device)
        near = closeness[context.token_ids].masked_fill(~context.maskable, -1.0)
        one, other, counted = near[:, :, None], near[:, None, :], context.maskable[:, None, :]
        # the rank from below, of equals the mean: each has as many equals, itself among them, as there are
        weight = ((one > other) & counted).sum(2) + (((one == other) & counted).sum(2) + 1) / 2
        return MaskPlan(random_patches(context), drawn(weight, context.text_ratio, context, "words", context.maskable))
