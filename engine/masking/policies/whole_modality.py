"""The whole image, or the whole caption."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field, model_validator

from ...recipe import Ratio, Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_patches, random_words


@register_policy("whole_modality")
class WholeModality(Policy):
    """Hide one modality as a whole, so that each has to be told from the other.

    VLM (Xu et al. 2021, "VLM: task-agnostic video-language model pre-training for video understanding"), its masked
    modality model; MMP (Nezakati et al. 2024, "MMP: towards robust multi-modal learning with masked modality
    projection"). A sample hides its whole image with the chance ``image``, all its words that may be masked with the
    chance ``text``, never both, and then leaves the other modality whole; the rest of the samples is masked at random
    at the recipe's ratios. With a ``text_policy`` beside it, words are hidden as that says. A reconstruction: the
    chances, and [CLS] and other special tokens, which stay.
    """

    class Options(Section):
        image: Ratio = Field(0.25, description="chance of a sample that its whole image is hidden")
        text: Ratio = Field(0.25, description="chance of a sample that all its words are hidden")

        @model_validator(mode="after")
        def _at_most_all(self) -> WholeModality.Options:
            if self.image + self.text > 1.0 + 1e-9:
                raise ValueError(f"image ({self.image:g}) and text ({self.text:g}) are more than 1 together")
            return self

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        draw = context.draws.uniform("modality")
        image, text = draw < self.options.image, draw >= 1.0 - self.options.text

        def ratio(usual: float | torch.Tensor, whole: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
            usual = usual + torch.zeros_like(draw)
            return usual.masked_fill(whole, 1.0).masked_fill(none, 0.0)

        context = replace(
            context,
            image_ratio=ratio(context.image_ratio, image, text),
            text_ratio=ratio(context.text_ratio, text, image),
        )
        return MaskPlan(random_patches(context), random_words(context))
