"""Patches that are hard to reconstruct, ever more of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crossmask.kernels import topk_mask

from ...recipe import Ratio, Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words


@register_policy("hard_patches")
class HardPatches(Policy):
    """Hide the patches whose reconstruction is predicted to fail, from easy to hard.

    Hard patches mining (Wang et al. 2023, "Hard patches mining for masked image modeling", and its journal version,
    "Bootstrap masked visual modeling via hard patches mining"): of the hidden patches, the share alpha_t = alpha_0 +
    t/T (alpha_T - alpha_0) are those of highest predicted loss, the rest is drawn from the others. The predictor learns
    which of two hidden patches has the larger loss L: with p_ij = sigmoid(s_i - s_j), the mean over pairs with L_i >
    L_j of -log p_ij, the binary cross-entropy of the paper, each pair taken once. A reconstruction: the predictor is a
    layer norm and two linear layers on the intact image's features, not a transformer decoder, and the mean is taken
    within a sample before it is taken over samples.
    """

    needs = ("patch_scores",)

    class Options(Section):
        start: Ratio = Field(0.0, description="share of hidden patches that are the hardest, at the start of the run")
        end: Ratio = Field(0.5, description="the same at its end")

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        hardness = context.patch_losses
        if hardness is None:
            hardness = context.need("patch_scores", self.name)
        alpha = self.options.start + (self.options.end - self.options.start) * context.progress
        total = topk_mask(hardness, ratio=context.image_ratio).sum(1)
        hardest = topk_mask(hardness, k=(alpha * (1 + 1e-9) * total.double()).long())
        draw = context.draws.uniform("the rest", context.patches)
        return MaskPlan(topk_mask(draw + hardest.float(), k=total), random_words(context))

    def network(self, width: int) -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1), nn.Flatten(start_dim=1)
        )

    def network_loss(self, scores: Tensor, hidden: Tensor, losses: Tensor) -> Tensor:
        scores, losses = scores.float(), losses.float()
        harder = losses[:, :, None] > losses[:, None, :]  # i is harder than j
        harder = harder & hidden[:, :, None] & hidden[:, None, :]
        loss = F.softplus(scores[:, None, :] - scores[:, :, None])  # -log sigmoid(s_i - s_j)
        pairs = harder.sum((1, 2))
        of_sample = torch.where(harder, loss, 0.0).sum((1, 2)) / pairs.clamp(min=1)
        return of_sample.sum() / (pairs > 0).sum().clamp(min=1)
