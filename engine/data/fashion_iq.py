"""FashionIQ in its published layout (Wu et al., CVPR 2021), for text-guided retrieval.

``captions/cap.{dress,shirt,toptee}.{train,val}.json`` are lists of ``{"candidate": ID, "target": ID, "captions": [two
texts]}``: the texts say how the target differs from the candidate, which is the reference. ``image_splits/
split.{…}.{train,val}.json`` list the IDs of a split, and ``images/ID.png`` or ``.jpg`` is an image. A category's
gallery is its whole val split, the references included, as published. The public test split has no targets and is not
read.

The two texts are joined by "and": while training in either order, by a fair draw, and in evaluation as they stand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..beats import beat
from ..errors import DataError, RecipeError
from ..recipe import Recipe
from .base import ComposedSplit, PairData, Request
from .batch import Batch
from .captions import CaptionTable, token_limit
from .decoders import Decoders
from .normalisation import NORMALISATIONS
from .pair_layouts import lone_surrogate
from .pictures import Chances, augmented, read_picture, square
from .randomness import Draws
from .tokenizer import CaptionTokenizer, open_tokenizer

CATEGORIES = ("dress", "shirt", "toptee")
ENDINGS = (".png", ".jpg", ".jpeg")
_REFERENCES = 1 << 39  # added to the epoch: a reference is cropped by random numbers of its own
_SIDES = frozenset(("left", "right"))


@dataclass(frozen=True)
class Asked:
    """One entry of a caption file."""

    file: Path
    place: int  # from 1
    reference: str
    target: str
    texts: tuple[str, ...]


class FashionIQSplit(ComposedSplit):
    """A category's val split."""

    averaged = True

    def __init__(self, title: str, data: FashionIQ, asked: np.ndarray, images: np.ndarray) -> None:
        """``asked`` (T,) of the data's entries, ``images`` (G,) of its images."""
        self.title, self._data, self._asked = title, data, asked
        self.target, self.gallery = data.target[asked], images
        self.reference = np.full(len(asked), -1, np.int64)  # it stays a candidate

    def requests(self, rows: np.ndarray) -> Request:
        chosen = self._asked[rows]
        texts = self._data.texts(chosen, np.zeros(len(chosen), bool))
        return Request(self._data.pixels(self._data.reference[chosen]), texts.token_ids, texts.token_mask)

    def candidates(self, rows: np.ndarray) -> Tensor:
        return self._data.pixels(self.gallery[rows])


class FashionIQ(PairData):
    """Batches have the targets as ``images``, their references as ``reference`` and the words; group = the target.
    There are no splits for image–text retrieval: no text describes an image.

    Raises:
        DataError: a folder of another layout, an entry that is no triplet, or images that are missing; one line.
    """

    def __init__(self, recipe: Recipe, tokenizer: CaptionTokenizer | None = None) -> None:
        section, folder = recipe.data, recipe.data.path
        assert folder is not None
        if section.scenes.fraction > 0:
            raise RecipeError("data.scenes.fraction is only for data.source: emoji; set it to 0")
        self.section, self.seed, self.size, self.folder = section, recipe.seed, recipe.model.image.size, folder
        self.normalisation = NORMALISATIONS[section.normalisation]
        for name in ("captions", "image_splits", "images"):
            if not (folder / name).is_dir():
                raise DataError(f"{folder}: no folder '{name}' in it; set data.path to the folder of FashionIQ with it")
        val = {name: list(_entries(folder, name, "val")) for name in CATEGORIES}
        train = [] if tokenizer is not None else [e for name in CATEGORIES for e in _entries(folder, name, "train")]
        if tokenizer is None and not train:
            raise DataError(f"{folder}: no captions/cap.{{{','.join(CATEGORIES)}}}.train.json in it; add one")
        galleries = {name: _listed(folder, name) for name, found in val.items() if found}
        if tokenizer is not None and not galleries:
            raise DataError(f"{folder}: no captions/cap.{{{','.join(CATEGORIES)}}}.val.json in it; add one")
        self.asked = [*train, *(entry for found in val.values() for entry in found)]
        number: dict[str, int] = {}
        for entry in self.asked:
            number.setdefault(entry.reference, len(number))
            number.setdefault(entry.target, len(number))
        for names in galleries.values():
            for name in names:
                number.setdefault(name, len(number))
        self.images = self._found(list(number))
        self.reference = np.array([number[e.reference] for e in self.asked], np.int64)
        self.target = np.array([number[e.target] for e in self.asked], np.int64)

        both = [(" and ".join(e.texts), " and ".join(reversed(e.texts))) for e in self.asked]
        self._texts = sorted({text for pair in both[: len(train)] for text in pair})
        self.tokenizer = tokenizer or open_tokenizer(section, self._texts)
        split = self.tokenizer.split
        words = (split(text) for pair in both for text in pair)
        self.table = CaptionTable(self.tokenizer, words, None, section.max_words, token_limit(recipe))
        self.max_tokens = self.table.max_tokens
        self._sided = np.array([not _SIDES.isdisjoint(split(pair[0])) for pair in both])
        self.train_size, self.train_group_id = len(train), self.target[: len(train)]
        self.splits = {}
        self.composed, start = {}, len(train)
        for name, found in val.items():
            if found:
                images = np.array([number[image] for image in galleries[name]], np.int64)
                self._answered(name, found, set(galleries[name]))
                rows = np.arange(start, start + len(found))
                self.composed[name] = FashionIQSplit(f"FashionIQ's val split of {name}", self, rows, images)
            start += len(found)
        self._decoders = Decoders(section.workers)

    def _found(self, names: list[str]) -> list[str]:
        folder, found, missing = self.folder / "images", [], []
        present = set(os.listdir(folder))
        for name in names:
            ending = next((ending for ending in ENDINGS if name + ending in present), None)
            if ending is None:
                missing.append(name)
            found.append(str(folder / f"{name}{ending}"))
        if missing:
            more = f", and {len(missing) - 1} more of {len(names)} are missing" if len(missing) > 1 else ""
            raise DataError(
                f"{folder}: no image {missing[0]}.png or .jpg{more}; add them, or take their entries out of"
                " captions and image_splits"
            )
        return found

    @staticmethod
    def _answered(name: str, found: list[Asked], gallery: set[str]) -> None:
        for entry in found:
            if entry.target not in gallery:
                raise DataError(
                    f"{entry.file} entry {entry.place}: its target {entry.target} is not in image_splits/"
                    f"split.{name}.val.json, so it cannot be found; are they of one release?"
                )

    def train_batch(self, indices: np.ndarray, epoch: int, truth: bool = False) -> Batch:
        indices = np.array(indices, np.int64)
        draws, others = (Draws(self.seed, at, indices) for at in (epoch, epoch + _REFERENCES))
        texts = self.texts(indices, draws.uniform("order", 1)[:, 0] < 0.5)
        mirror = ~self._sided[indices]
        return Batch(
            images=self.pixels(self.target[indices], Chances(draws, self.section), mirror),
            token_ids=texts.token_ids,
            token_mask=texts.token_mask,
            maskable=texts.maskable,
            group_id=torch.from_numpy(self.target[indices]),
            index=torch.from_numpy(indices),
            reference=self.pixels(self.reference[indices], Chances(others, self.section), mirror),
        )

    def texts(self, rows: np.ndarray, turned: np.ndarray) -> Any:
        """The texts of some entries (B,), joined; ``turned`` (B,) bool: in the other order."""
        return self.table.assemble(self.table.whole(2 * rows + turned), len(rows))

    def pixels(self, images: np.ndarray, chances: Chances | None = None, mirror: np.ndarray | None = None) -> Tensor:
        """(B,) of the images -> (B, 3, H, W): whole, or by ``chances`` as for training."""

        def read(at: int) -> Image.Image:
            image = read_picture(self.images[images[at]], str(self.folder))
            if chances is None or not self.section.augment:
                return square(image, self.size)
            allowed = mirror is not None and bool(mirror[at])
            return augmented(image, self.size, self.section, chances, at, may_mirror=allowed)

        return self._decoders.images(read, len(images), self.size, self.normalisation)

    def training_captions(self) -> list[str]:
        return self._texts

    def name_of(self, index: int) -> str:
        return f"{self.asked[index].file.name} entry {self.asked[index].place}"

    def describe(self) -> dict[str, object]:
        return {
            "source": f"FashionIQ: {self.folder}",
            "images": len(self.images),
            "training triplets": self.train_size,
            "vocabulary": self.tokenizer.vocabulary_size,
            "text-guided": {
                name: f"{split.title}: {len(split.target)} triplets, {len(split.gallery)} candidates"
                for name, split in self.composed.items()
            },
        }


def _entries(folder: Path, category: str, split: str) -> Iterator[Asked]:
    """The entries of a caption file; none where there is no such file."""
    path = folder / "captions" / f"cap.{category}.{split}.json"
    if not path.is_file():
        return
    for place, entry in enumerate(_list(path), 1):
        if place % 1024 == 1:
            beat("reading the captions")
        where = f"{path} entry {place}"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: not an object; expected candidate, target and captions")
        reference, target = (_name(where, key, entry.get(key)) for key in ("candidate", "target"))
        texts = entry.get("captions")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: its captions are not a list of texts; correct it or remove the entry")
        if half := next(filter(None, map(lone_surrogate, texts)), None):
            raise DataError(f"{where}: a caption has {half}; write the whole character, or remove it")
        said = tuple(text.strip() for text in texts if text.strip())
        if not said:
            raise DataError(f"{where}: it has no caption; write one or remove the entry")
        yield Asked(path, place, reference, target, said)


def _listed(folder: Path, category: str) -> list[str]:
    path = folder / "image_splits" / f"split.{category}.val.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file, so the gallery of {category} is not known; add it")
    names = [_name(f"{path} entry {place}", "image", name) for place, name in enumerate(_list(path), 1)]
    return list(dict.fromkeys(names))


def _list(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({type(error).__name__}); is the file complete?") from None
    if not isinstance(found, list):
        raise DataError(f"{path}: not a list, so not one of FashionIQ's files; give those of its release")
    return found


def _name(where: str, key: str, value: Any) -> str:
    """An image's ID, which must not lead out of the folder of images."""
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: it has no {key}; add the ID of an image or remove the entry")
    if "/" in value or "\\" in value or value.startswith(".") or "\0" in value or lone_surrogate(value):
        raise DataError(f"{where}: {key} {value[:40]!r} is not the ID of an image; correct it or remove the entry")
    return value
