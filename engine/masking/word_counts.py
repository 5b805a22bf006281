"""What the training captions say about words: how often each occurs, and which occur together more than by chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .registry import Corpus

QUANTUM = 2.0**-16  # PMI is kept in multiples of it: float64 then adds thousands of them exactly, in any order
_TOKENS_AT_ONCE = 1 << 16
_NO_PAIR = 2**62  # larger than any key

T = TypeVar("T")


def prepared(value: T | None, policy: str) -> T:
    """What a policy counted in ``prepare``."""
    if value is None:
        raise RuntimeError(
            f"mask policy {policy!r} has counted no captions: call prepare(corpus) before its first mask"
        )
    return value


class Resident:
    """Tensors that follow the context to its device: copied there at their first use, and kept."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = {tensors[0].device: tensors}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._copies:
            first = next(iter(self._copies.values()))
            self._copies[device] = tuple(tensor.to(device) for tensor in first)
        return self._copies[device]


class WordCounts:
    """Occurrences of every token in the captions. Special tokens and [UNK] are not counted: they are no words."""

    def __init__(self, corpus: Corpus) -> None:
        self.vocabulary_size = corpus.vocabulary_size
        self.captions = len(corpus.captions)
        self.occurrences = np.zeros(self.vocabulary_size, dtype=np.int64)  # how often a token occurs
        self.containing = np.zeros(self.vocabulary_size, dtype=np.int64)  # how many captions it occurs in
        for _, token in _chunks(corpus.captions):
            self.occurrences += np.bincount(token, minlength=self.vocabulary_size)
        for _, token in _chunks(corpus.captions, distinct=True):
            self.containing += np.bincount(token, minlength=self.vocabulary_size)
        for counts in (self.occurrences, self.containing):
            counts[[i for i in corpus.specials if i < self.vocabulary_size]] = 0

    @property
    def words(self) -> int:
        return int(self.occurrences.sum())

    def most_frequent(self, number: int) -> np.ndarray:
        """(vocabulary,) bool: at most ``number`` of the tokens that occur, ties to the lower id."""
        order = np.argsort(-self.containing, kind="stable")[:number]
        kept = np.zeros(self.vocabulary_size, dtype=bool)
        kept[order] = True
        return kept & (self.containing > 0)


class PairPmi:
    """Pointwise mutual information of two tokens in one caption: log p(a, b) / (p(a) p(b)), p over captions.

    Sparse: pairs that share a caption, of the ``vocabulary`` most frequent tokens. Everything else is 0, and so is a
    token with itself. Memory: 16 bytes a pair, so at most ``8 vocabulary ** 2``.
    """

    def __init__(self, corpus: Corpus, vocabulary: int, least: int, counts: WordCounts | None = None) -> None:
        counts = counts or WordCounts(corpus)
        self.vocabulary_size = counts.vocabulary_size
        pairs, together = _count_pairs(corpus.captions, counts.most_frequent(vocabulary), self.vocabulary_size)
        pairs, together = pairs[together >= least], together[together >= least]
        low, high = np.divmod(pairs, self.vocabulary_size)
        chance = counts.containing[low].astype(np.float64) * counts.containing[high]
        value = np.log(together * counts.captions / chance) if len(pairs) else np.zeros(0)
        self.low, self.high, self.value = low, high, np.round(value / QUANTUM) * QUANTUM
        # The last entry is one that nothing finds: a search never runs over the end, and the table is never empty.
        self._table = Resident(
            torch.from_numpy(np.append(pairs, _NO_PAIR)), torch.from_numpy(np.append(self.value, 0.0))
        )

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(B, L) int64 ids -> (B, L, L) float64, symmetric: PMI of every two tokens of a caption."""
        keys, values = self._table.on(token_ids.device)
        one, other = token_ids[:, :, None], token_ids[:, None, :]
        wanted = torch.minimum(one, other) * self.vocabulary_size + torch.maximum(one, other)
        place = torch.searchsorted(keys, wanted.contiguous())
        return torch.where(keys[place] == wanted, values[place], 0.0)


def _count_pairs(
    captions: Sequence[Sequence[int]], kept: np.ndarray, vocabulary_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``low * vocabulary_size + high`` of the pairs of kept tokens, ascending, and the captions each occurs in."""
    total: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    waiting = 0
    for caption, token in _chunks(captions, distinct=True):
        caption, token = caption[kept[token]], token[kept[token]]
        found = []
        # Tokens of a caption are distinct and ascend, so that each pair is seen once, the lower id first.
        for apart in range(1, len(token)):
            together = caption[apart:] == caption[:-apart]
            if not together.any():
                break
            found.append(token[:-apart][together] * vocabulary_size + token[apart:][together])
        if found:
            pending.append(np.unique(np.concatenate(found), return_counts=True))
            waiting += len(pending[-1][0])
        if waiting > max(len(total[0]), 1 << 22):  # merged seldom, so that the sum of all merges stays small
            total, pending, waiting = _merged([total, *pending]), [], 0
    return _merged([total, *pending])


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    keys, place = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, place, np.concatenate([part[1] for part in parts]))
    return keys, counts


def _chunks(captions: Sequence[Sequence[int]], distinct: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Captions some at a time as (caption, token) of each token; ``distinct`` once each, ascending within a caption."""
    start = 0
    while start < len(captions):
        end, tokens = start, 0
        while end < len(captions) and tokens < _TOKENS_AT_ONCE:
            tokens += len(captions[end])
            end += 1
        some = captions[start:end]
        lengths = np.fromiter(map(len, some), np.int64, len(some))
        token = np.fromiter(chain.from_iterable(some), np.int64, tokens)
        caption = np.repeat(np.arange(start, end), lengths)
        if distinct and len(token):
            size = int(token.max()) + 1
            caption, token = np.divmod(np.unique(caption * size + token), size)
        yield caption, token
        start = end
