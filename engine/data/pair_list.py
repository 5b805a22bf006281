"""Pairs of your own as data to train on: a list, or a map-style dataset, of pictures with captions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..beats import beat
from ..errors import DataError
from ..recipe import Recipe
from .base import ALL, CaptionBatch, EvaluationSplit, PairData
from .batch import Batch
from .captions import CaptionTable, token_limit
from .decoders import Decoders
from .normalisation import NORMALISATIONS
from .pair_groups import held_out
from .pictures import Chances, augmented, lights, on_white, read_picture, square, upright
from .randomness import Draws
from .tokenizer import CaptionTokenizer, open_tokenizer

_BEAT_EVERY = 1024  # pairs


class Pairs(Protocol):
    """What a list offers, and a map-style ``torch.utils.data.Dataset``: pair ``i`` is a picture and a caption, in that
    order. A picture is a PIL image, a path to one, or (H, W, 3) uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class PairList(PairData):
    """Training data of anything that has a length and gives a picture and a caption for each index.

    Pictures are augmented as the recipe says (``data.augment``, ``crop_area``, ``rand_augment``, ``mirror``), captions
    get the recipe's vocabulary or one that is trained on them, pairs with the same caption match one another, and
    ``data.validation_fraction`` of the captions is held out, unless there are pairs for ``validation``. Pairs may be
    asked for in several threads at once.
    """

    def __init__(
        self,
        recipe: Recipe,
        pairs: Pairs,
        *,
        validation: Pairs | None = None,
        captions: Sequence[str] | None = None,
        tokenizer: CaptionTokenizer | None = None,
        name: str = "pairs",
    ) -> None:
        """
        Args:
            captions: of ``pairs``, one each; default: every pair is asked for its own once, picture and all.
            tokenizer: of a trained model: all pairs are then evaluated on, and none is trained on.
            name: what messages call them.

        Raises:
            DataError: no pairs, or a caption without a word.
        """
        self._recipe, self._name, section = recipe, name, recipe.data
        self._size, self._seed, self._section = recipe.model.image.size, recipe.seed, section
        self.normalisation = NORMALISATIONS[section.normalisation]
        self._decoders = Decoders(section.workers)
        self._lists = [pairs] if validation is None else [pairs, validation]
        own = [_captions(pairs, name) if captions is None else list(captions)]
        own += [_captions(more, f"{name}, validation") for more in self._lists[1:]]
        if len(own[0]) != len(pairs):
            raise DataError(f"{name}: {len(pairs)} pairs with {len(own[0])} captions; give one each")
        self._where = [(which, i) for which, texts in enumerate(own) for i in range(len(texts))]
        self._texts = [text for texts in own for text in texts]
        if not self._texts:
            raise DataError(f"{name}: there are no pairs; give some")
        given = np.array([which for which, _ in self._where])
        trained = open_tokenizer(section, self._texts[: len(own[0])]) if tokenizer is None else tokenizer
        self.tokenizer = trained
        words = [trained.split(text) for text in self._texts]
        for row in (row for row, found in enumerate(words) if not found):
            raise DataError(f"{self._title(row)}: the caption {self._texts[row][:40]!r} has no word; write one")
        self._table = CaptionTable(trained, words, None, section.max_words, token_limit(recipe))
        self.max_tokens = self._table.max_tokens
        lines = [" ".join(found) for found in words]
        number: dict[str, int] = {}
        self._group = np.array([number.setdefault(line, len(number)) for line in lines], np.int64)
        if tokenizer is not None:
            out = given == given.max()
        elif validation is not None:
            out = given == 1
        else:
            out = held_out(self._group, lines, section.validation_fraction)
        self._train = np.flatnonzero(~out if tokenizer is None else np.zeros_like(out))
        if tokenizer is None and not len(self._train):
            raise DataError(f"{name}: nothing is left to train on; add pairs or set data.validation_fraction to 0")
        self.train_size, self.train_group_id = len(self._train), self._group[self._train]
        title = f"held-out captions of {name}" if tokenizer is None else f"all pairs of {name}"
        rows = np.flatnonzero(out)
        key = "held-out" if tokenizer is None else ALL
        self.splits = {key: ListSplit(title, self, rows)} if len(rows) else {}

    def _title(self, row: int) -> str:
        which, index = self._where[row]
        return f"{self._name}{', validation' if which else ''}, pair {index}"

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        indices = np.asarray(indices, np.int64)
        draws = Draws(self._seed, epoch, indices)
        return self.load(self._train[indices], indices, draws)

    def training_captions(self) -> list[str]:
        return sorted({" ".join(self.tokenizer.split(self._texts[row])) for row in self._train.tolist()})

    def name_of(self, index: int) -> str:
        row = int(self._train[index])
        return f"{self._title(row)}: {self._texts[row][:40]!r}"

    def fingerprint(self) -> str:
        lines = "\n".join(f"{self._where[row]} {self._texts[row]}" for row in self._train.tolist())
        return hashlib.sha256((super().fingerprint() + lines).encode(errors="surrogatepass")).hexdigest()

    def describe(self) -> dict[str, object]:
        return {
            "source": self._name,
            "pairs": len(self._texts),
            "training pairs": self.train_size,
            "captions cut": int(self._table.is_cut.sum()),
            "vocabulary": self.tokenizer.vocabulary_size,
            "splits": {name: split.describe() for name, split in self.splits.items()},
        }

    def load(self, rows: np.ndarray, index: np.ndarray, draws: Draws | None) -> Batch:
        """Pairs ``rows`` of all, as samples ``index``; ``draws`` augments them, None takes the whole pictures."""
        section = self._section
        chances = Chances(draws, section) if draws is not None and section.augment else None
        light = None if chances is None else lights(section, chances)
        read = lambda at: self._picture(int(rows[at]), at, chances)  # noqa: E731
        images = self._decoders.images(read, len(rows), self._size, self.normalisation, light)
        phrases = self._table.whole(rows)
        if draws is not None and section.word_drop > 0:
            words = draws
            texts = self._table.assemble(phrases, len(rows), section.word_drop, lambda n: words.uniform("words", n))
        else:
            texts = self._table.assemble(phrases, len(rows))
        return Batch(
            images=images,
            token_ids=texts.token_ids,
            token_mask=texts.token_mask,
            maskable=texts.maskable,
            group_id=torch.from_numpy(self._group[rows]),
            index=torch.from_numpy(np.array(index, np.int64)),
        )

    def _picture(self, row: int, at: int, chances: Chances | None) -> Image.Image:
        """S pixels a side."""
        which, index = self._where[row]
        picture = _opened(_pair(self._lists[which], index, self._title(row))[0], self._title(row))
        if chances is None:
            return square(picture, self._size)
        return augmented(picture, self._size, self._section, chances, at, may_mirror=self._section.mirror)

    def captions_of(self, rows: np.ndarray, index: np.ndarray) -> CaptionBatch:
        """The captions of some pairs."""
        texts = self._table.assemble(self._table.whole(rows), len(rows))
        group = torch.from_numpy(self._group[rows])
        return CaptionBatch(texts.token_ids, texts.token_mask, texts.maskable, group, torch.from_numpy(index))

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """(N,) int64 of some pairs."""
        return self._group[rows]


class ListSplit(EvaluationSplit):
    """Some pairs of a list, and their distinct captions."""

    def __init__(self, title: str, data: PairList, rows: np.ndarray) -> None:
        self.title, self._data, self._rows = title, data, rows
        self.image_group_id = data.group_of(rows)
        self._captions = rows[np.unique(self.image_group_id, return_index=True)[1]]  # the first pair with each
        self.gallery_group_id = data.group_of(self._captions)
        self.image_is_flag = np.zeros(len(rows), bool)
        self.gallery_is_flag = np.zeros(len(self._captions), bool)

    def take(self, rows: np.ndarray) -> Batch:
        return self._data.load(self._rows[rows], np.asarray(rows, np.int64), None)

    def gallery(self, batch_size: int) -> Iterator[CaptionBatch]:
        for start in range(0, len(self._captions), batch_size):
            rows = self._captions[start : start + batch_size]
            yield self._data.captions_of(rows, np.arange(start, start + len(rows)))


def _captions(pairs: Pairs, name: str) -> list[str]:
    found = []
    for index in range(len(pairs)):
        if index % _BEAT_EVERY == 0:
            beat("reading the captions")
        caption = _pair(pairs, index, f"{name}, pair {index}")[1]
        if not isinstance(caption, str):
            raise DataError(f"{name}, pair {index}: its caption is {type(caption).__name__}; give (picture, text)")
        found.append(caption)
    return found


def _pair(pairs: Pairs, index: int, where: str) -> Any:
    """DataError, one line that names the pair, for whatever another's code raises and for what is no pair."""
    try:
        found = pairs[index]
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{where}: cannot be had: {said}; mend or remove it") from error
    if not isinstance(found, (tuple, list)) or len(found) < 2:
        raise DataError(f"{where}: it is a {type(found).__name__}; give (picture, text)")
    return found


def _opened(picture: Any, where: str) -> Image.Image:
    if isinstance(picture, (str, os.PathLike)):
        return read_picture(str(Path(picture)), where)
    if isinstance(picture, Image.Image):
        return on_white(upright(picture))
    array = np.asarray(picture)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return Image.fromarray(array)
    raise DataError(f"{where}: {type(picture).__name__} is no picture; give a PIL image, a path or (H, W, 3) uint8")
