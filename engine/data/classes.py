"""The classes that a source's images are of, for category and sub-category recognition."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import DataError
from .base import EvaluationSplit


def classes_of(names: np.ndarray) -> list[str]:
    """The distinct ones of (N,) names in alphabetical order, without those that are unknown (empty)."""
    return sorted({name for name in names.tolist() if name})


def require_classes(training: EvaluationSplit | None, splits: Mapping[str, EvaluationSplit]) -> list[str]:
    """The levels at which the training images are of two classes at least and held-out ones have a class, too.

    Raises:
        DataError: there is none; one line.
    """
    found = {} if training is None else {level: classes_of(names) for level, names in training.labels.items()}
    levels = [level for level, classes in found.items() if len(classes) > 1]
    tested = [level for level in levels if not splits or any(level in split.labels for split in splits.values())]
    if tested:
        return tested
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
