"""Two complementary views by cross-modal attention."""

from __future__ import annotations

from torch import Tensor

from crossmask.kernels import topk_mask

from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy


@register_policy("mascot")
class Mascot(Policy):
    """Two views of an image: one without what the caption looks at most, one without what it looks at least.

    MASCOT (Fang et al. 2023, "Mask to reconstruct: cooperative semantics completion for video-text retrieval"): patches
    are ranked by attention; the high-informed mask hides the top ``image_ratio``, the low-informed mask the bottom
    ``image_ratio``, and both views are learned from together. Here attention is a_i = mean over heads and words of the
    teacher's cross-attention softmax over patches, and words are hidden by its counterpart, the most attended first. A
    reconstruction: the paper's weights are of a video encoder, it reconstructs the high-informed view alone and uses
    the low-informed one as a second video feature; here each view is a view to reconstruct. A caption without a word
    that may be masked hides nothing.
    """

    needs = ("statistics",)

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("statistics", self.name)
        if found.key_attention is None or found.query_attention is None:
            raise ValueError("mascot needs the statistics key_attention and query_attention")
        has_words = context.maskable.any(1, keepdim=True).expand_as(found.key_attention)

        def informed(high: bool) -> Tensor:
            return topk_mask(found.key_attention, ratio=context.image_ratio, valid=has_words, largest=high)

        words = topk_mask(found.query_attention, ratio=context.text_ratio, valid=context.maskable)
        return MaskPlan(informed(high=True), words, more_images=(informed(high=False),))
