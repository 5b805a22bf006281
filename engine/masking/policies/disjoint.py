"""Several views that hide different patches."""

from __future__ import annotations

import torch
from pydantic import Field

from crossmask.kernels import topk_mask

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words


@register_policy("disjoint")
class Disjoint(Policy):
    """Views of an image that hide different patches, as far as the ratio allows.

    DMJD (Ma et al. 2023, "Disjoint masking with joint distillation for efficient masked image modeling"): views are
    drawn one after the other, each at the full ratio r; a view hides first what no view before it hid, at random, so
    that every patch is reconstructed in as few views as possible. With V views the masks are disjoint where V r <= 1,
    what the views show is disjoint where V (1 - r) <= 1, and no patch is hidden more than once more often than another.
    A deviation: the paper has two views, and can stop short of all patches (its prediction rate); here it is 1.
    """

    class Options(Section):
        views: int = Field(2, ge=1, le=64, description="masks of one image")

    options: Options

    @property
    def views(self) -> int:
        return self.options.views

    def __call__(self, context: MaskContext) -> MaskPlan:
        draws = context.draws.uniform("views", self.options.views, context.patches)
        times = torch.zeros_like(draws[:, 0])  # a patch has been hidden
        masks = []
        for draw in draws.unbind(1):
            masks.append(topk_mask(draw - times, ratio=context.image_ratio))
            times = times + masks[-1]
        return MaskPlan(masks[0], random_words(context), more_images=tuple(masks[1:]))
