"""Patches that a map from outside says matter."""

from __future__ import annotations

from pydantic import Field

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import drawn, random_words


@register_policy("prior")
class Prior(Policy):
    """Hide patches in proportion to a map of weights, such as where a human body is.

    HAP (Yuan et al. 2023, "HAP: structure-aware masked image modeling for human-centric perception"): patches on body
    parts have priority over others when patches are hidden. Here the map is any, and patches are drawn without
    replacement with p_i proportional to w_i^``power``, exactly ``image_ratio`` of them; those of weight 0 come last. A
    deviation: the paper hides up to 30 % of the patches of some parts, drawn at random, before all others; a soft
    weight takes the place of this order.
    """

    needs = ("priors",)

    class Options(Section):
        power: float = Field(1.0, gt=0.0, le=16.0, description="large: almost only the heaviest; small: almost uniform")

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        weights = context.need("priors", self.name).float().clamp(min=0.0)
        # the heaviest is 1, lest a power underflow
        weights = weights / weights.amax(1, keepdim=True).clamp(min=1e-30)
        return MaskPlan(
            drawn(weights**self.options.power, context.image_ratio, context, "prior"), random_words(context)
        )
