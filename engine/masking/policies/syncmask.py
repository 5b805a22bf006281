"""Synchronised attentional masking."""

from __future__ import annotations

from crossmask.kernels import topk_mask

from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy


@register_policy("syncmask")
class SyncMask(Policy):
    """Hide exactly the patches and words that the teacher's cross-attention connects.

    SyncMask (Song et al., CVPR 2024): w_img is the mean over heads and words of the softmax over patches, w_txt the
    mean over heads and patches of the softmax over words; the top ``image_ratio`` and ``text_ratio`` of them are
    hidden, where they exceed the thresholds. A reconstruction, where the paper does not say: the reduction over heads,
    the rounding, and that only words that may be masked count, in both means and in the softmax over words; special
    tokens and function words would otherwise draw much of it.
    """

    needs = ("statistics",)
    reads_thresholds = True

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("statistics", self.name)
        if found.key_attention is None or found.query_attention is None:
            raise ValueError("syncmask needs the statistics key_attention and query_attention")
        return MaskPlan(
            image=topk_mask(
                found.key_attention,
                ratio=context.image_ratio,
                # A caption without a word that counts has looked nowhere: every patch would tie at 0.
                valid=context.maskable.any(1, keepdim=True).expand_as(found.key_attention),
                threshold=self.section.image_threshold,
            ),
            text=topk_mask(
                found.query_attention,
                ratio=context.text_ratio,
                valid=context.maskable,
                threshold=self.section.text_threshold,
            ),
        )
