"""Patches that the words match best, or least."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from crossmask.kernels import topk_mask

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words


@register_policy("sycoca")
class SyCoCa(Policy):
    """Hide the patches that some word of the caption matches, and let the words bring them back.

    SyCoCa (Ma et al. 2024, "SyCoCa: symmetrizing contrastive captioners with attentive masking for multimodal
    alignment"): s_i = max_j <v_i, w_j> over the words (its eq. 7). High: the ``image_ratio`` of the patches with the
    largest s, which text-guided image modelling reconstructs; low: those with the smallest, so that captioning reads
    the patches that matter. ``both`` gives the two as views of one image, high first. A reconstruction: only words that
    may be masked count, a caption without one hides nothing, both sides are reconstructed by one objective, and words
    are drawn at random.
    """

    needs = ("similarities",)

    class Options(Section):
        side: Literal["high", "low", "both"] = Field("high", description="which patches are hidden")

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("similarities", self.name)
        has_words = context.maskable.any(1, keepdim=True).expand_as(found)

        def side(largest: bool) -> Tensor:
            return topk_mask(found, ratio=context.image_ratio, valid=has_words, largest=largest)

        return MaskPlan(
            image=side(largest=self.options.side != "low"),
            text=random_words(context),
            more_images=(side(largest=False),) if self.options.side == "both" else (),
        )
