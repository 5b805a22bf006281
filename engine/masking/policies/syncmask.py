"""Synchronised attentional masking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from crossmask.kernels import topk_mask

from ...recipe import MaskingSection, Section
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

    Which queries and keys the softmax over words is of: ``direction``. ``dual_softmax`` takes those of the fusion
    layer, whose logits it reads a second time along the other axis. ``two_blocks`` takes a block of its own in which
    the patches ask and the words answer: the cross-attention of the patch decoder, which masked image modelling trains
    and the teacher mirrors. Both are reconstructions.
    """

    needs: tuple[str, ...] = ("statistics",)
    reads_thresholds = True

    class Options(Section):
        direction: Literal["dual_softmax", "two_blocks"] = Field(
            "dual_softmax",
            description="whose softmax over words w_txt is: the fusion layer's logits along the other axis, or that of"
            " a block in which patches read the words",
        )

    options: Options

    def __init__(self, section: MaskingSection | None = None, options: Section | None = None) -> None:
        super().__init__(section, options)
        if self.options.direction == "two_blocks":
            self.needs = ("statistics", "word_attention")

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("statistics", self.name)
        words = found.query_attention
        if self.options.direction == "two_blocks":
            words = context.need("word_attention", self.name)
        return MaskPlan(self._patches(context, found.key_attention), self._words(context, words))

    def _patches(self, context: MaskContext, weights: Tensor | None) -> Tensor:
        if weights is None:
            raise ValueError("syncmask needs the statistics key_attention and query_attention")
        return topk_mask(
            weights,
            ratio=context.image_ratio,
            # A caption without a word that counts has looked nowhere: every patch would tie at 0.
            valid=context.maskable.any(1, keepdim=True).expand_as(weights),
            threshold=self.section.image_threshold,
        )

    def _words(self, context: MaskContext, weights: Tensor | None) -> Tensor:
        if weights is None:
            raise ValueError("syncmask needs the statistics key_attention and query_attention")
        return topk_mask(
            weights, ratio=context.text_ratio, valid=context.maskable, threshold=self.section.text_threshold
        )
