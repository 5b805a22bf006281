"""Image-caption sources, their splits, tokenizer and sampling; samples are functions of seed, epoch and index."""

from __future__ import annotations

from ..recipe import Recipe
from .base import IMAGE_MEAN, IMAGE_STD, CaptionBatch, EvaluationSplit, PairData, denormalise
from .batch import Batch
from .sampler import StepSampler
from .tokenizer import CaptionTokenizer

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "Batch",
    "CaptionBatch",
    "CaptionTokenizer",
    "EvaluationSplit",
    "PairData",
    "StepSampler",
    "denormalise",
    "load_data",
]


def load_data(recipe: Recipe) -> PairData:
    """Open the recipe's data source. Raises DataError, one line, for data that cannot be used."""
    if recipe.data.source == "emoji":
        from .emoji_pairs import EmojiPairs

        return EmojiPairs(recipe)
    from .pairs import FilePairs

    return FilePairs(recipe)
