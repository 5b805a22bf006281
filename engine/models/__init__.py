"""Towers, fusion encoder and heads."""

from .fusion import Fused
from .pretraining import PretrainingModel
from .vision_language import Encoded, VisionLanguageModel
from .word_reader import WordReader, build_word_reader

__all__ = ["Encoded", "Fused", "PretrainingModel", "VisionLanguageModel", "WordReader", "build_word_reader"]
