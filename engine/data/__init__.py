"""Image-caption sources, their splits, tokenizer and sampling; samples are functions of seed, epoch and index."""

from __future__ import annotations

from ..recipe import Recipe
from .base import ALL, CaptionBatch, EvaluationSplit, PairData
from .batch import Batch
from .classes import require_classes, training_classes
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


def load_data(recipe: Recipe, tokenizer: CaptionTokenizer | None = None, training: bool | None = None) -> PairData:
    """Open the recipe's data source. Raises DataError, one line, for data that cannot be used.

    ``tokenizer``: of a trained model, in place of the recipe's. The data are then only evaluated on: the training split
    is not looked at, and of a file without splits every pair is evaluated, in a split :data:`ALL`. With ``training``
    they are split as for training all the same.
    """
    data = _open(recipe, tokenizer, training)
    if recipe.evaluation.recognition and (tokenizer is None or training):
        require_classes(data.training_split(), data.splits, recipe.data.source)
    if recipe.objectives.recognition.weight > 0 and tokenizer is None:
        data.classes = training_classes(data, recipe.objectives.recognition.column)
    return data


def _open(recipe: Recipe, tokenizer: CaptionTokenizer | None, training: bool | None) -> PairData:
    if recipe.data.source == "emoji":
        from .emoji_pairs import EmojiPairs

        return EmojiPairs(recipe, tokenizer)
    if recipe.data.source == "scenes":
        from .scene_pairs import ScenePairs

        return ScenePairs(recipe, tokenizer)
    if recipe.data.source == "composed_emoji":
        from .composed_emoji import ComposedEmoji

        return ComposedEmoji(recipe, tokenizer)
    if recipe.data.source == "fashioniq":
        from .fashion_iq import FashionIQ

        return FashionIQ(recipe, tokenizer)
    from .pairs import FilePairs

    return FilePairs(recipe, tokenizer, training)
