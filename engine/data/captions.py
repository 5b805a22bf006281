"""Captions as arrays: each word is tokenised once, and a batch of texts is assembled without a loop over samples."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from ..beats import beat
from ..errors import RecipeError
from ..recipe import Recipe
from .tokenizer import CaptionTokenizer

_BEAT_EVERY = 4096  # captions
NOT_DRAWN = 255  # ``Batch.words``: the word names a thing that is not in the picture


@dataclass(frozen=True)
class Phrases:
    """Stretches of caption words, in reading order: R stretches, all arrays (R,) int64, sorted by sample.

    ``thing`` is the truth that ``Batch.words`` carries; ``mention`` numbers what a stretch belongs to (a name and its
    tags share one), -1 for a conjunction, which is never dropped.
    """

    sample: np.ndarray
    start: np.ndarray
    length: np.ndarray
    thing: np.ndarray
    mention: np.ndarray


def merge(first: Phrases, second: Phrases) -> Phrases:
    """Two sets of phrases about different samples as one, sorted by sample."""
    offset = int(first.mention.max(initial=-1)) + 1
    second = replace(second, mention=np.where(second.mention < 0, -1, second.mention + offset))
    order = np.concatenate([first.sample, second.sample]).argsort(kind="stable")
    return Phrases(*(np.concatenate([value, getattr(second, name)])[order] for name, value in vars(first).items()))


@dataclass(frozen=True)
class Texts:
    """The textual half of a :class:`Batch`; L tokens, padded to the longest text."""

    token_ids: Tensor  # (B, L) int64
    token_mask: Tensor  # (B, L) bool
    maskable: Tensor  # (B, L) bool
    words: Tensor  # (B, L) uint8


def ragged(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each n of ``lengths``, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def token_limit(recipe: Recipe) -> int:
    """Tokens of the longest text, [CLS] and [SEP] included: ``data.max_tokens``, or else twice the words and 2.

    Raises:
        RecipeError: the text tower has fewer positions.
    """
    data, positions = recipe.data, recipe.model.text.positions
    limit = data.max_tokens or 2 * data.max_words + 2
    if positions is None or limit <= positions:
        return limit
    asked = f"data.max_tokens ({limit})"
    if data.max_tokens is None:
        asked = f"data.max_tokens, by default 2 x data.max_words ({data.max_words}) + 2 = {limit},"
    raise RecipeError(
        f"{asked} is longer than the text tower: model.text.positions is {positions}; set data.max_tokens to at most"
        f" {positions}, or raise model.text.positions"
    )


class CaptionTable:
    """Every caption of a data source as word numbers. A caption is a name, then tags; plain captions are all name.

    ``names`` and ``tags`` are lists of words, one list a caption, read once; no ``tags`` at all where None. A tag word
    that was read before in its caption is left out: a repeated word is a masked word that the text itself gives away.
    Captions are cut at ``max_words`` words and ``max_tokens`` tokens, [CLS] and [SEP] included, by default
    2 max_words + 2.

    All words may be masked but the tokenizer's function words; all their pieces but [UNK].
    """

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        names: Iterable[Sequence[str]],
        tags: Iterable[Sequence[str]] | None,
        max_words: int,
        max_tokens: int | None = None,
    ) -> None:
        types: dict[str, int] = {"and": 0}
        flat, lengths, name_lengths, too_long = array("i", [0]), array("i"), array("i"), array("b")
        for name, extra in zip(names, repeat(()) if tags is None else tags, strict=tags is not None):
            if len(lengths) % _BEAT_EVERY == 0:
                beat("reading the captions")
            words = [*name, *(w for w in dict.fromkeys(extra) if w not in name)] if extra else name
            flat.extend([types.setdefault(w, len(types)) for w in words[:max_words]])
            lengths.append(min(len(words), max_words))
            name_lengths.append(min(len(name), max_words))
            too_long.append(len(words) > max_words)
        pieces = [tokenizer.pieces(word) for word in types]
        self.tokenizer, self.max_words = tokenizer, max_words
        self.max_tokens = 2 * max_words + 2 if max_tokens is None else max_tokens
        self.length = np.asarray(lengths, np.int64)  # (C,) words
        self.name_length = np.asarray(name_lengths, np.int64)
        self.start = np.cumsum(self.length) - self.length + 1  # word 0 of ``flat`` is the conjunction
        self._flat = np.asarray(flat, np.int64)
        unknown = {tokenizer.unknown_id}
        self._unknown = np.array([unknown.issuperset(p) for p in pieces])
        self._content = np.array([w not in tokenizer.function_words for w in types]) & ~self._unknown
        self._piece_count = np.array([len(p) for p in pieces])
        self._piece_start = np.cumsum(self._piece_count) - self._piece_count
        self._pieces = np.array([i for p in pieces for i in p])
        tokens = np.add.reduceat(self._piece_count[np.append(self._flat, 0)], np.append(self.start, len(self._flat)))
        tokens = tokens[:-1] * (self.length > 0)
        self.is_cut = np.asarray(too_long, bool) | (tokens + 2 > self.max_tokens)  # (C,) bool: not read to its end

    def __len__(self) -> int:
        return len(self.length)

    def maskable_words(self) -> np.ndarray:
        """(C,) int64: words of each caption that may be masked, and that begin before it is cut."""
        owner, word = np.repeat(np.arange(len(self)), self.length), self._flat[1:]
        count = self._piece_count[word]
        before = count.cumsum() - count  # pieces before each word, of all captions
        first = np.append(before, 0)[self.start - 1]  # an empty caption at the end has no first word
        column = before - np.repeat(first, self.length) + 1
        counted = self._content[word] & (column < self.max_tokens - 1)
        return np.bincount(owner, counted, minlength=len(self)).astype(np.int64)

    def unknown_share(self, captions: np.ndarray) -> float:
        """Of all words of these captions, those that the vocabulary has no piece of; 0 where there are none."""
        owned = np.zeros(len(self), bool)
        owned[captions] = True
        words = self._flat[1:][np.repeat(owned, self.length)]
        return float(self._unknown[words].mean()) if len(words) else 0.0

    def whole(self, captions: np.ndarray) -> Phrases:
        """Each caption in full, as the text of one sample; its words name thing 1."""
        sample = np.arange(len(captions))
        return Phrases(sample, self.start[captions], self.length[captions], np.ones_like(sample), sample)

    def assemble(
        self, phrases: Phrases, batch: int, drop: float = 0.0, draw: Callable[[int], np.ndarray] | None = None
    ) -> Texts:
        """Tokens of ``batch`` texts.

        ``draw(n)`` gives (batch, n) numbers in [0, 1): a word is left out where its number is below ``drop``. The word
        with the highest number stays in each mention, content words first, so nothing is ever left empty.
        """
        sample = np.repeat(phrases.sample, phrases.length)
        word = self._flat[np.repeat(phrases.start, phrases.length) + ragged(phrases.length)]
        thing, content = np.repeat(phrases.thing, phrases.length), self._content[word]
        if drop > 0 and draw is not None:
            mention = np.repeat(phrases.mention, phrases.length)
            place = ragged(np.bincount(sample, minlength=batch))
            luck = draw(int(place.max(initial=0)) + 1)[sample, place]
            rank = luck + content
            best = np.full(int(mention.max(initial=0)) + 1, -1.0)
            np.maximum.at(best, mention, np.where(mention < 0, -1.0, rank))
            keep = (mention < 0) | (luck >= drop) | (rank == best[mention])
            sample, word, thing, content = sample[keep], word[keep], thing[keep], content[keep]
        keep = ragged(np.bincount(sample, minlength=batch)) < self.max_words
        sample, word, thing, content = sample[keep], word[keep], thing[keep], content[keep]

        count = self._piece_count[word]
        token = self._pieces[np.repeat(self._piece_start[word], count) + ragged(count)]
        row, content, thing = (np.repeat(v, count) for v in (sample, content, np.where(content, thing, 0)))
        column = ragged(np.bincount(row, minlength=batch)) + 1
        fits = column < self.max_tokens - 1
        row, column, token, content, thing = (v[fits] for v in (row, column, token, content, thing))
        lengths = np.bincount(row, minlength=batch)
        shape = (batch, int(lengths.max(initial=0)) + 2)
        ids = np.full(shape, self.tokenizer.pad_id, np.int64)
        maskable, words = np.zeros(shape, bool), np.zeros(shape, np.uint8)
        ids[:, 0], ids[np.arange(batch), lengths + 1] = self.tokenizer.cls_id, self.tokenizer.sep_id
        ids[row, column] = token
        maskable[row, column] = content & (token != self.tokenizer.unknown_id)
        words[row, column] = thing
        mask = np.arange(shape[1]) < (lengths + 2)[:, None]
        return Texts(*map(torch.from_numpy, (ids, mask, maskable, words)))
