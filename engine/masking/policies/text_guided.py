"""Patches that the caption as a whole corresponds to."""

from __future__ import annotations

from crossmask.kernels import topk_mask

from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words


@register_policy("text_guided")
class TextGuided(Policy):
    """Hide the patches that correspond most to the caption as a whole.

    Text-guided masking (Fan et al. 2024, "Text-guided video masked autoencoder"): c_i = cos(v_i, t) of a patch's and
    the caption's feature in the space of image-text contrast; the ``image_ratio`` of the patches with the largest c is
    hidden. A reconstruction: the paper takes a frozen CLIP and generated captions, here it is the momentum teacher and
    the caption of the pair; words are drawn at random, and a caption without a word that may be masked hides nothing.
    """

    needs = ("caption_similarity",)

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("caption_similarity", self.name)
        has_words = context.maskable.any(1, keepdim=True).expand_as(found)
        return MaskPlan(
            image=topk_mask(found, ratio=context.image_ratio, valid=has_words),
            text=random_words(context),
        )
