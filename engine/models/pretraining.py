"""The student: the mirrored model plus what only the student has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..recipe import MaskingSection, ModelSection, ObjectivesSection
from .dropping import restore
from .fusion import Attention
from .vision_language import Encoded, VisionLanguageModel

T = TypeVar("T")


class PatchDecoder(nn.Module):
    """Predicts hidden patches: one block in which image tokens read the words, then a linear head.

    Patches that were left out of the encoder come as placeholders that know of no other patch: with ``self_attention``
    image tokens look at each other before they read the words, as in MAE's decoder (He et al. 2022).
    """

    def __init__(
        self,
        width: int,
        text_width: int,
        heads: int,
        mlp_ratio: float,
        target_width: int,
        self_attention: bool = False,
    ) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width) if self_attention else None
        self.self_attention = Attention(width, width, heads) if self_attention else None
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, text_width, heads)
        self.feed_norm = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, target_width)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """(B, 1 + P, width) tokens of a masked image and (B, L, text width) words -> (B, 1 + P, target width)."""
        x = image_tokens
        if self.self_norm is not None and self.self_attention is not None:
            y = self.self_norm(x)
            x = x + self.self_attention(y, self.self_attention.project(y))
        x = x + self.attention(self.norm(x), self.attention.project(text_tokens), token_mask)
        x = x + self.feed_forward(self.feed_norm(x))
        return self.head(x)


def build_patch_decoder(section: ModelSection, objectives: ObjectivesSection, drops: bool = False) -> PatchDecoder:
    """Fresh: the decoder of a recipe. ``drops``: hidden patches are left out of the encoder."""
    image = section.image
    target = image.width if objectives.mim.target == "teacher_feature" else 3 * image.patch_size**2
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
    ) -> None:
        """``masking`` says whether hidden patches are left out, which the decoder has to make up for; default they are
        not. ``mask_network``, ``pad_id``, ``mask_id``: see :class:`VisionLanguageModel`."""
        super().__init__()
        self.model = VisionLanguageModel(section, vocabulary_size, max_length, pad_id, mask_network, mask_id)
        # One element, not none: DeepSpeed cannot broadcast a 0-d parameter.
        self.temperature = nn.Parameter(torch.tensor([objectives.itc.temperature]))
        drops = masking is not None and masking.hidden_patches == "drop"
        self.patch_decoder = build_patch_decoder(section, objectives, drops)

    def decode_patches(self, encoded: Encoded, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        """An image whose patches were hidden in either way and (B, L, text width) words -> (B, 1 + P, target width).

        Where patches were left out, the mask token with the tower's position embedding stands in for them.
        """
        tokens = encoded.tokens
        if encoded.visible is not None:
            places = self.model.image.placeholders()
            tokens = restore(tokens, encoded.visible.after(1), places, len(places))
        return self.patch_decoder(tokens, text_tokens, token_mask)

    def forward(self, visit: Callable[[PretrainingModel], T]) -> T:
        """Run ``visit(self)`` inside this module's forward, where DeepSpeed's hooks see it."""
        return visit(self)
