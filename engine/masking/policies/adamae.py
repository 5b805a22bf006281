"""Patches that a network trained for it leaves to see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.kernels import topk_mask

from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words


@register_policy("adamae")
class AdaMAE(Policy):
    """Show the patches that a sampling network draws, and hide the rest.

    AdaMAE (Bandara et al. 2023, "AdaMAE: adaptive masking for efficient spatiotemporal learning with masked
    autoencoders"): p = softmax of the network's output over the patches; the visible ones are drawn without replacement
    in proportion to p. The network is trained by a policy gradient: minimise -mean over hidden i of L_i log p_i, with
    L_i the reconstruction loss, held constant, so that what is hard to reconstruct is shown more often. A
    reconstruction: the network reads the image tower's output, not its patch embedding, and the draw follows the
    teacher's copy of the network. The paper's weight of 1e-4 has no counterpart: no other parameter has a gradient
    of this loss, though it counts in a clipped gradient's norm.
    """

    needs = ("patch_scores",)

    def __call__(self, context: MaskContext) -> MaskPlan:
        scores = context.need("patch_scores", self.name).float()
        # The highest of score plus Gumbel noise are a draw in proportion to p; what is hidden are the lowest.
        image = topk_mask(scores, ratio=context.image_ratio, largest=False, **context.draws.gumbel("visible patches"))
        return MaskPlan(image, random_words(context))

    def network(self, width: int) -> nn.Module:
        return SamplingNetwork(width)

    def network_loss(self, scores: Tensor, hidden: Tensor, losses: Tensor) -> Tensor:
        reward = torch.where(hidden, losses.float() * scores.float().log_softmax(1), 0.0).sum(1)
        return -(reward / hidden.sum(1).clamp(min=1)).mean()


class SamplingNetwork(nn.Module):
    """(B, P, width) to logits (B, P): self-attention with a residual, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in (8, 4, 2, 1) if width % heads == 0)
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.logit(self.last_norm(x + self.out(attended)))[:, :, 0]
