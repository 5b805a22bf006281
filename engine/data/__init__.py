"""Image-caption sources, their splits, tokenizer and sampling; samples are functions of seed, epoch and index."""

from __future__ import annotations

from ..recipe import Recipe
from .base import ALL, CaptionBatch, EvaluationSplit, PairData
from .batch import Batch
from .normalisation import HALF, NORMALISATIONS, Normalisation
from .sampler import StepSampler
from .tokenizer import CaptionTokenizer

__all__ = [
    "ALL",
    "HALF",
    "NORMALISATIONS",
    "Batch",
    "CaptionBatch",
    "CaptionTokenizer",
    "EvaluationSplit",
    "Normalisation",
    "PairData",
    "StepSampler",
    "load_data",
]


def load_data(recipe: Recipe, tokenizer: CaptionTokenizer | None = None) -> PairData:
    """Open the recipe's data source. Raises DataError, one line, for data that cannot be used.

    ``tokenizer``: of a trained model, in place of the recipe's. The data are then only evaluated on: the training split
    is not looked at, and of a file without splits every pair is evaluated, in a split :data:`ALL`.
    """
    if recipe.data.source == "emoji":
        from .emoji_pairs import EmojiPairs

        return EmojiPairs(recipe, tokenizer)
    from .pairs import FilePairs

    return FilePairs(recipe, tokenizer)
