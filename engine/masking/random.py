"""Random masking, the baseline every attentive policy is held against."""

from __future__ import annotations

import torch

from crossmask.kernels import topk_mask

from ..recipe import MaskingSection
from .plan import MaskContext, MaskPlan
from .registry import register_policy


@register_policy("random")
class RandomMask:
    """Patches and words drawn uniformly at the recipe's ratios (MAE, He et al. 2022; BERT, Devlin et al. 2019)."""

    def __init__(self, section: MaskingSection) -> None:
        self.section = section

    def __call__(self, context: MaskContext) -> MaskPlan:
        patches = context.statistics.key_attention
        if patches is None:
            raise ValueError("random masking reads the number of patches from key_attention, which is missing")
        return MaskPlan(
            image=topk_mask(torch.rand_like(patches), ratio=self.section.image_ratio),
            text=topk_mask(
                torch.rand(context.maskable.shape, device=patches.device),
                ratio=self.section.text_ratio,
                valid=context.maskable,
            ),
        )
