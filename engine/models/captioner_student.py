"""The student of a contrastive captioner: the mirrored model and the temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..recipe import ModelSection, ObjectivesSection
from .captioner import CaptioningModel

T = TypeVar("T")


class CaptioningStudent(nn.Module):
    """``model`` is paired by name with the teacher, its image decoder too, so that what is exported can reconstruct."""

    def __init__(
        self,
        section: ModelSection,
        objectives: ObjectivesSection,
        vocabulary_size: int,
        max_length: int,
        pad_id: int = 0,
        mask_id: int = 4,
    ) -> None:
        super().__init__()
        self.model = CaptioningModel(
            section,
            vocabulary_size,
            max_length,
            pad_id,
            reconstructs=objectives.tg_mim.weight > 0,
            mask_id=mask_id,
        )
        # One element, not none: DeepSpeed cannot broadcast a 0-d parameter.
        self.temperature = nn.Parameter(torch.tensor([objectives.itc.temperature]))

    @property
    def clamped_temperature(self) -> Tensor:
        return self.temperature.float()[0].clamp(0.001, 0.5)

    def forward(self, visit: Callable[[CaptioningStudent], T]) -> T:
        """Run ``visit(self)`` inside this module's forward, where DeepSpeed's hooks see it."""
        return visit(self)
