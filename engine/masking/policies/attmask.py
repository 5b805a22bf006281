"""Patches that the image tower itself attends to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from crossmask.kernels import topk_mask

from ...recipe import Ratio, Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words


@register_policy("attmask")
class AttMask(Policy):
    """Hide the patches that the teacher's [CLS] attends to most.

    AttMask (Kakogeorgiou et al. 2022, "What to hide from your students: attention-guided masked image modeling"): the
    last block's attention of [CLS] to the patches, mean over heads. High: the top r = ``image_ratio`` is hidden. Hint:
    of these, a few are shown again, drawn at random from the s = ``hint_ratio`` of all patches that are attended most:
    s r of the patches, so that r (1 - s) stay hidden. Low: the bottom r is hidden. A deviation: every image is masked
    (the paper masks half of them) and at least one hint is given.
    """

    needs = ("image_attention",)

    class Options(Section):
        mode: Literal["high", "hint", "low"] = Field("high", description="most attended, those with hints, or least")
        hint_ratio: Ratio = Field(0.1, description="hint: share of the patches, most attended, that hints come from")

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("image_attention", self.name)
        image = topk_mask(found, ratio=context.image_ratio, largest=self.options.mode != "low")
        if self.options.mode == "hint":
            salient = topk_mask(found, ratio=self.options.hint_ratio)
            draw = context.draws.uniform("hints", context.patches)
            image = image & ~topk_mask(draw, ratio=context.image_ratio, valid=salient & image)
        return MaskPlan(image, random_words(context))
