"""Image-caption sources, their splits, tokenizer and sampling; samples are functions of seed, epoch and index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..recipe import Recipe
from ..registry import SOURCES, sources
from .base import ALL, CaptionBatch, EvaluationSplit, PairData
from .batch import Batch
from .classes import require_classes, training_classes
from .normalisation import HALF, NORMALISATIONS, Normalisation
from .sampler import StepSampler
from .tokenizer import CaptionTokenizer

if TYPE_CHECKING:
    from .pair_list import PairList

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
    "PairList",
    "StepSampler",
    "load_data",
]


def __getattr__(name: str) -> Any:
    if name == "PairList":  # it brings Pillow, which those who only want words and batches need not have loaded
        from .pair_list import PairList

        return PairList
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    if recipe.data.source not in SOURCES:
        return _open_registered(recipe, tokenizer)
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


def _open_registered(recipe: Recipe, tokenizer: CaptionTokenizer | None) -> PairData:
    source = recipe.data.source
    make = sources.find(source, "data.source").made
    data = make(recipe, sources.options(source, recipe.data.options, "data.options"), tokenizer)
    if not isinstance(data, PairData):
        raise TypeError(f"data.source {source!r} returned a {type(data).__name__}: derive it from crossmask's PairData")
    return data
