"""Random masking, the baseline every attentive policy is held against."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from crossmask.kernels import topk_mask

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy


@register_policy("random")
class RandomMask(Policy):
    """Patches and words drawn uniformly at the recipe's ratios (MAE, He et al. 2022; BERT, Devlin et al. 2019)."""

    class Options(Section):
        independent_words: bool = Field(
            False,
            description="hide each word with the chance text_ratio, whatever happens to the others, as ALBEF does;"
            " else exactly that share of each caption's words",
        )
        low_ratio: float | None = Field(
            None, ge=0.0, le=1.0, description="also draw such a share of patches that captioning does without"
        )

    options: Options

    @property
    def views(self) -> int:
        return 1 if self.options.low_ratio is None else 2

    def __call__(self, context: MaskContext) -> MaskPlan:
        words = independent_words if self.options.independent_words else random_words
        low = self.options.low_ratio
        more = () if low is None else (topk_mask(context.draws.uniform("low patches", context.patches), ratio=low),)
        return MaskPlan(random_patches(context), words(context), more_images=more)


def random_patches(context: MaskContext, purpose: str = "random patches") -> Tensor:
    """(B, P) bool: ``image_ratio`` of the patches, all equally likely."""
    return topk_mask(context.draws.uniform(purpose, context.patches), ratio=context.image_ratio)


def random_words(context: MaskContext, purpose: str = "random words") -> Tensor:
    """(B, L) bool: ``text_ratio`` of the maskable words, all equally likely."""
    scores = context.draws.uniform(purpose, context.maskable.shape[1])
    return topk_mask(scores, ratio=context.text_ratio, valid=context.maskable)


def independent_words(context: MaskContext, purpose: str = "random words") -> Tensor:
    """(B, L) bool: each maskable word by itself with the chance ``text_ratio``; a caption may keep all of them."""
    ratio = context.text_ratio[:, None] if isinstance(context.text_ratio, Tensor) else context.text_ratio
    return (context.draws.uniform(purpose, context.maskable.shape[1]) < ratio) & context.maskable


def drawn(
    weights: Tensor, ratio: float | Tensor, context: MaskContext, purpose: str, valid: Tensor | None = None
) -> Tensor:
    """Positions drawn without replacement in proportion to ``weights`` (B, N), at least 0; zero weights come last."""
    return topk_mask(
        weights.clamp(min=torch.finfo(torch.float32).tiny).log(),
        ratio=ratio,
        valid=valid,
        **context.draws.gumbel(purpose),
    )
