"""The student: the mirrored model plus what only the student has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..data.classes import Classes
from ..recipe import MaskingSection, ModelSection, ObjectivesSection
from .dropping import restore
from .vision_language import Encoded, VisionLanguageModel
from .word_reader import WordReader, build_word_reader

T = TypeVar("T")


class PatchHead(nn.Module):
    """The patch decoder behind a :class:`WordReader` that lives elsewhere: feed-forward, then a linear head."""

    def __init__(self, width: int, mlp_ratio: float, target_width: int) -> None:
        super().__init__()
        self.feed_norm = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, target_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + P, width) image tokens that have read the words -> (B, 1 + P, target width)."""
        return self.head(x + self.feed_forward(self.feed_norm(x)))


class PatchDecoder(WordReader):
    """Predicts hidden patches: one block in which image tokens read the words, then a linear head."""

    def __init__(
        self,
        width: int,
        text_width: int,
        heads: int,
        mlp_ratio: float,
        target_width: int,
        self_attention: bool = False,
    ) -> None:
        super().__init__(width, text_width, heads, self_attention)
        self.feed_norm = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, target_width)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, 1 + P, width) tokens of a masked image and (B, L, text width) words -> (B, 1 + P, target width)."""
        x = self.read(image_tokens, text_tokens, token_mask)
        x = x + self.feed_forward(self.feed_norm(x))
        return self.head(x)


def target_width(section: ModelSection, objectives: ObjectivesSection) -> int:
    """Numbers that are predicted of a patch."""
    image = section.image
    return image.width if objectives.mim.target == "teacher_feature" else 3 * image.patch_size**2


def build_patch_decoder(section: ModelSection, objectives: ObjectivesSection, drops: bool = False) -> PatchDecoder:
    """Fresh: the decoder of a recipe. ``drops``: hidden patches are left out of the encoder."""
    image, target = section.image, target_width(section, objectives)
    return PatchDecoder(image.width, section.text.width, image.heads, image.mlp_ratio, target, self_attention=drops)


class PretrainingModel(nn.Module):
    """Student of a run. ``model`` is paired by name with the teacher; the rest has no teacher."""

    def __init__(
        self,
        section: ModelSection,
        objectives: ObjectivesSection,
        vocabulary_size: int,
        max_length: int,
        masking: MaskingSection | None = None,
        mask_network: nn.Module | None = None,
        pad_id: int = 0,
        mask_id: int = 4,
        classes: Classes | None = None,
    ) -> None:
        """``masking`` says whether hidden patches are left out, which the decoder has to make up for, and whether the
        block in which patches read the words is mirrored by the teacher; default neither. ``mask_network``, ``pad_id``,
        ``mask_id``, ``classes``: see :class:`VisionLanguageModel`."""
        super().__init__()
        reader = build_word_reader(section, masking)
        self.model = VisionLanguageModel(
            section, vocabulary_size, max_length, pad_id, mask_network, mask_id, reader, classes
        )
        # One element, not none: DeepSpeed cannot broadcast a 0-d parameter.
        self.temperature = nn.Parameter(torch.tensor([objectives.itc.temperature]))
        drops = masking is not None and masking.hidden_patches == "drop"
        self.patch_decoder: nn.Module = (
            build_patch_decoder(section, objectives, drops)
            if reader is None
            else PatchHead(section.image.width, section.image.mlp_ratio, target_width(section, objectives))
        )

    def decode_patches(self, encoded: Encoded, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """An image whose patches were hidden in either way and (B, L, text width) words -> (B, 1 + P, target width).

        Where patches were left out, the mask token with the tower's position embedding stands in for them.
        """
        tokens = encoded.tokens
        if encoded.visible is not None:
            places = self.model.image.placeholders()
            tokens = restore(tokens, encoded.visible.after(1), places, len(places))
        reader = self.model.word_reader
        found: Tensor
        if reader is None:
            found = self.patch_decoder(tokens, text_tokens, token_mask)
        else:
            found = self.patch_decoder(reader(tokens, text_tokens, token_mask))
        return found

    def forward(self, visit: Callable[[PretrainingModel], T]) -> T:
        """Run ``visit(self)`` inside this module's forward, where DeepSpeed's hooks see it."""
        return visit(self)
