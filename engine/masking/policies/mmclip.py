"""Patches that the words look at, and the words that name things."""

from __future__ import annotations

from crossmask.kernels import topk_mask

from ..entities import Entities, EntityOptions
from ..plan import MaskContext, MaskPlan
from ..registry import Corpus, Policy, register_policy
from ..word_counts import prepared


@register_policy("mmclip")
class MmClip(Policy):
    """Hide the patches that respond most to the caption, and the caption's entities.

    MMCLIP (Wu et al. 2024, "MMCLIP: cross-modal attention masked modelling for medical language-image pre-training").
    Attention-masked image modelling: the ``image_ratio`` of the patches with the largest mean softmax weight over heads
    and words. Entity-driven masked language modelling: words of a list first, as in ``entity_words``.

    A reconstruction: attention is the momentum teacher's, words that may be masked alone ask, a caption without one
    hides no patch, and entities are listed instead of recognised. Without a list, the words that the image attends to
    most (query_attention) are hidden in their place; that is not the paper's.
    """

    needs = ("statistics",)

    class Options(EntityOptions):
        pass

    options: Options
    entities: Entities | None = None

    def prepare(self, corpus: Corpus) -> None:
        if self.options.given:
            self.entities = Entities(self.options.read(self.name), corpus, self.name)

    def __call__(self, context: MaskContext) -> MaskPlan:
        found = context.need("statistics", self.name)
        if found.key_attention is None or found.query_attention is None:
            raise ValueError("mmclip needs the statistics key_attention and query_attention")
        has_words = context.maskable.any(1, keepdim=True).expand_as(found.key_attention)
        image = topk_mask(found.key_attention, ratio=context.image_ratio, valid=has_words)
        if self.options.given:
            return MaskPlan(image, prepared(self.entities, self.name).choose(context))
        return MaskPlan(image, topk_mask(found.query_attention, ratio=context.text_ratio, valid=context.maskable))
