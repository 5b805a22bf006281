"""What a mask policy reads and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossmask.kernels import AttentionStatistics

from ..errors import RecipeError
from .draws import Draws

# Inputs that not every run has, and what in a recipe provides them.
PROVIDED_BY = {
    "statistics": "a fusion encoder, which objectives.itm, mlm or mim switch on",
    "word_attention": "the block in which patches read the words, which objectives.mim trains,",
    "similarities": "both towers' projections (model.projection_width)",
    "caption_similarity": "both towers' projections (model.projection_width)",
    "image_attention": "an image tower with blocks (model.image.depth of at least 1)",
    "image_features": "an image tower",
    "priors": "masking.prior",
    "patch_losses": "your own loop, which measures them (the engine only predicts losses)",
    "patch_scores": "the policy's network, which objectives.mim trains,",
}


def missing_input(policy: str, name: str) -> RecipeError:
    return RecipeError(f"mask policy {policy!r} needs {name}, which is missing: {PROVIDED_BY[name]} provides it")


@dataclass(frozen=True)
class MaskContext:
    """B samples of P patches and L tokens as a mask policy sees them. Of the optional inputs, the engine computes those
    that the policy names in its ``needs``, all from the momentum teacher and the intact pair."""

    token_ids: Tensor  # (B, L) int64
    token_mask: Tensor  # (B, L) bool, True = a real token, special ones included
    maskable: Tensor  # (B, L) bool, True = a word that may be masked
    grid: tuple[int, int]  # rows and columns of patches; P is their product, patches lie row by row
    draws: Draws
    image_ratio: float | Tensor = 0.5  # of patches to hide; (B,) where it differs from sample to sample
    text_ratio: float | Tensor = 0.15  # of maskable words to hide
    step: int = 0
    progress: float = 0.0  # share of the run that is done, 0..1
    statistics: AttentionStatistics | None = None  # of the chosen fusion layer; patches only, without the image's CLS
    word_attention: Tensor | None = None  # (B, L) float32: mean over heads and patches of their softmax over the words
    similarities: Tensor | None = None  # (B, P) float32: max over maskable words of the cosine of patch and word
    caption_similarity: Tensor | None = None  # (B, P) float32: cosine of the patch and the caption's feature
    image_attention: Tensor | None = None  # (B, P) float32: the image tower's last [CLS] attention, mean over heads
    image_features: Tensor | None = None  # (B, P, width): the image tower's output
    priors: Tensor | None = None  # (B, P) float32, at least 0: how likely a patch is to be hidden
    patch_losses: Tensor | None = None  # (B, P) float32: reconstruction losses of the last pass, where a loop has them
    patch_scores: Tensor | None = None  # (B, P) float32: what the policy's own network says

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def special(self) -> Tensor:
        """(B, L) bool: real tokens that are no words to mask, such as [CLS] and [SEP]."""
        return self.token_mask & ~self.maskable

    def need(self, name: str, policy: str) -> Any:
        """An optional input.

        Raises:
            RecipeError: it is missing; names the policy and what provides the input.
        """
        value = getattr(self, name)
        if value is None:
            raise missing_input(policy, name)
        return value


@dataclass(frozen=True)
class MaskPlan:
    """What is hidden. A policy that has nothing to say on one side takes ``random_patches`` or
    ``random_words`` of ``policies/random.py`` there."""

    image: Tensor  # (B, P) bool, True = hide this patch
    text: Tensor  # (B, L) bool, True = predict this word
    more_images: tuple[Tensor, ...] = ()  # (B, P) bool each: further views of the same image, each reconstructed
    replacement: Tensor | None = None  # (B, L) int64: the id that is read instead, KEEP where the word itself is

    @property
    def images(self) -> tuple[Tensor, ...]:
        return (self.image, *self.more_images)

    def read(self, token_ids: Tensor) -> Tensor:
        """(B, L) int64: the ids that the student reads for ``token_ids``."""
        if self.replacement is None:
            raise ValueError("the plan has no replacement: a MaskPlanner fills it, or corrupt() of masking.corruption")
        return torch.where(self.replacement == KEEP, token_ids, self.replacement)


KEEP = -1
