"""Towers, fusion encoder and heads."""

from .fusion import Fused
from .pretraining import PretrainingModel
from .vision_language import Encoded, VisionLanguageModel

__all__ = ["Encoded", "Fused", "PretrainingModel", "VisionLanguageModel"]
