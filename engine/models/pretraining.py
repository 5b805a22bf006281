"""The student: the mirrored model plus what only the student has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..recipe import ModelSection, ObjectivesSection
from .fusion import Attention
from .vision_language import VisionLanguageModel

T = TypeVar("T")


class PatchDecoder(nn.Module):
    """Predicts hidden patches: one block in which image tokens read the words, then a linear head."""

    def __init__(self, width: int, text_width: int, heads: int, mlp_ratio: float, target_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, text_width, heads)
        self.feed_norm = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, target_width)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, 1 + P, width) tokens of a masked image and (B, L, text width) words -> (B, 1 + P, target width)."""
        x = image_tokens
        x = x + self.attention(self.norm(x), self.attention.project(text_tokens), token_mask)
        x = x + self.feed_forward(self.feed_norm(x))
        return self.head(x)


class PretrainingModel(nn.Module):
    """Student of a run. ``model`` is paired by name with the teacher; the rest has no teacher."""

    def __init__(
        self, section: ModelSection, objectives: ObjectivesSection, vocabulary_size: int, max_length: int
    ) -> None:
        super().__init__()
        image = section.image
        self.model = VisionLanguageModel(section, vocabulary_size, max_length)
        # One element, not none: DeepSpeed cannot broadcast a 0-d parameter.
        self.temperature = nn.Parameter(torch.tensor([objectives.itc.temperature]))
        target = image.width if objectives.mim.target == "teacher_feature" else 3 * image.patch_size**2
        self.patch_decoder = PatchDecoder(image.width, section.text.width, image.heads, image.mlp_ratio, target)

    def forward(self, visit: Callable[[PretrainingModel], T]) -> T:
        """Run ``visit(self)`` inside this module's forward, where DeepSpeed's hooks see it."""
        return visit(self)
