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
    the patches that matter. ``both`` gives the two as views of one image, high first: a captioner (model.captioner)
    does with each what the paper does. A reconstruction: only words that may be masked count, a caption without one
    hides nothing, a fusion model reconstructs both sides by one objective, and words are drawn at random.
    """

    needs = ("similarities",)

    class Options(Section):
        side: Literal["high", "low", "both"] = Field("high", description="which patches are hidden")
        low_ratio: float | None = Field(
            None, ge=0.0, le=1.0, description="share of the patches that are low; default: image_ratio"
        )

    options: Options

    @property
    def views(self) -> int:
        return 2 if self.options.side == "both" else 1

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("similarities", self.name)
        has_words = context.maskable.any(1, keepdim=True).expand_as(found)

        low_ratio = self.options.low_ratio

        def side(largest: bool) -> Tensor:
            ratio = context.image_ratio if largest or low_ratio is None else low_ratio
            return topk_mask(found, ratio=ratio, valid=has_words, largest=largest)

        return MaskPlan(
            image=side(largest=self.options.side != "low"),
            text=random_words(context),
            more_images=(side(largest=False),) if self.options.side == "both" else (),
        )
