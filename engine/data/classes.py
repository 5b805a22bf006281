"""The classes that a source's images are of, for category and sub-category recognition."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ..errors import DataError
from ..recipe_section import Section
from .batch import Batch

if TYPE_CHECKING:
    from .base import EvaluationSplit, PairData

# Sources whose images have no class, and why.
_WITHOUT = {
    "scenes": ("a scene shows several things and has no one class", "data.source to emoji"),
    "composed_emoji": ("triplets are no pairs of an image and its text", "data.source to emoji"),
    "fashioniq": ("FashionIQ has triplets alone, and no pairs", "data.source to pairs"),
}


class Classes(Section):
    """What a classifier tells apart, in the order of its outputs."""

    column: Literal["category", "subcategory"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class TrainingClasses:
    """The classes of a column of the training set, in alphabetical order, and each sample's."""

    classes: Classes
    label: np.ndarray  # (train_size,) int64, place in ``classes.names``; -1 = unknown

    def add(self, batch: Batch) -> Batch:
        """A training batch, on the CPU, with its labels."""
        return replace(batch, label=torch.from_numpy(self.label[batch.index.numpy()]))

    def digest(self) -> str:
        """Changes when a sample's class does."""
        names = "\0".join((self.classes.column, *self.classes.names)).encode(errors="surrogatepass")
        return hashlib.sha256(names + self.label.tobytes()).hexdigest()


def classes_of(names: np.ndarray) -> list[str]:
    """The distinct ones of (N,) names in alphabetical order, without those that are unknown (empty)."""
    return sorted({name for name in names.tolist() if name})


def training_classes(data: PairData, column: Literal["category", "subcategory"]) -> TrainingClasses:
    """What ``objectives.recognition`` trains on.

    Raises:
        DataError: the training samples are not of two classes at least, or no held-out image has one; one line.
    """
    labels = data.train_labels()
    found = {level: classes_of(names) for level, names in labels.items()}
    names = found.get(column, [])
    other = next((level for level in found if level != column and len(found[level]) > 1), None)
    if len(names) > 1 and (not data.splits or any(column in split.labels for split in data.splits.values())):
        place = {name: i for i, name in enumerate(names)}
        label = np.array([place.get(name, -1) for name in labels[column].tolist()], np.int64)
        return TrainingClasses(Classes(column=column, names=tuple(names)), label)
    problem, remedy = f"the training pairs have no {column}", f"add the column {column}"
    if len(names) > 1:
        problem = f"the held-out pairs have no {column}"
    elif names:
        problem = f"all training pairs are of one {column}, {names[0]!r}"
    if other is not None:
        remedy += f", or set objectives.recognition.column to {other}"
    raise DataError(f"objectives.recognition: {problem}; {remedy}")


def require_classes(
    training: EvaluationSplit | None, splits: Mapping[str, EvaluationSplit], source: str = "pairs"
) -> list[str]:
    """The levels at which the training images are of two classes at least and held-out ones have a class, too.
    ``source``: ``data.source`` of the recipe.

    Raises:
        DataError: there is none; one line.
    """
    found = {} if training is None else {level: classes_of(names) for level, names in training.labels.items()}
    levels = [level for level, classes in found.items() if len(classes) > 1]
    tested = [level for level in levels if not splits or any(level in split.labels for split in splits.values())]
    if tested:
        return tested
    if source in _WITHOUT:
        why, other = _WITHOUT[source]
        raise DataError(f"evaluation.recognition: {why}; set {other}, or evaluation.recognition to false")
    problem = "the training images have no categories"
    if levels:
        problem = "the held-out images have no categories"
    for level, classes in found.items():
        if len(classes) == 1:
            problem = f"all training images are of one {level}, {classes[0]!r}"
    raise DataError(
        f"evaluation.recognition: {problem}; add the column category or subcategory, or set evaluation.recognition to"
        " false"
    )
