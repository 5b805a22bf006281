"""Patches of the object that the model's own features set apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from crossmask.kernels import topk_mask

from ...recipe import Ratio, Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_patches, random_words

ITERATIONS = 16  # where the next eigenvalue is 0.8 of the second, leaves 0.03 of the next eigenvector
SAMPLES = 16  # at once on a CPU, whose cache then holds their features over all iterations


@register_policy("self_guided")
class SelfGuided(Policy):
    """Part the patches in two by the model's own features and hide the object.

    Self-guided masked autoencoder (Shin et al. 2024): a normalised cut (Shi and Malik 2000) parts the graph of patches
    in two; the object is the side of the patch with the largest |y|, y the second eigenvector (TokenCut, Wang et al.
    2022), sides being told apart by the mean of y. Patches are hidden by their relevance cos(x_i, mean of the object's
    x), and a few of the object's are shown as hints. The count is exact: other patches are hidden instead of hints. A
    reconstruction: W_ij = (1 + cos(x_i, x_j)) / 2, which has no negative weights; the object comes wholly before the
    rest, which follows by relevance; hints are drawn uniformly; ``start`` stands for the paper's measure of when the
    features are ready.
    """

    needs = ("image_features",)

    class Options(Section):
        hint_ratio: Ratio = Field(0.05, description="share of the object's patches that stays visible")
        start: Ratio = Field(0.0, description="share of the run before which patches are hidden at random")

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        if context.progress < self.options.start:
            return MaskPlan(random_patches(context), random_words(context))
        features = context.need("image_features", self.name)
        samples = SAMPLES if features.device.type == "cpu" else max(1, len(features))
        with torch.autocast(features.device.type, enabled=False):
            parts = [object_and_relevance(some.detach().float()) for some in features.split(samples)]
        found, relevance = (torch.cat(part) for part in zip(*parts, strict=True))
        draw = context.draws.uniform("hints", context.patches)
        hints = topk_mask(draw, ratio=self.options.hint_ratio, valid=found)
        order = relevance + 4.0 * found.float() - 8.0 * hints.float()
        return MaskPlan(topk_mask(order, ratio=context.image_ratio), random_words(context))


def object_and_relevance(features: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P, C) float32 to two of (B, P): is part of the object, and the cosine with the object's mean."""
    x = F.normalize(features, dim=-1)
    found = object_patches(second_eigenvector(x))
    centre = F.normalize(found.float()[:, None] @ x, dim=-1)
    return found, (centre @ x.mT)[:, 0]


def second_eigenvector(x: Tensor) -> Tensor:
    """(B, P): y of (D - W) y = l D y for the second smallest l, with W = (1 + x x') / 2 and D its row sums.

    That is D^-1/2 u for the second largest eigenvalue of D^-1/2 W D^-1/2, whose first eigenvector, D^1/2 1, is taken
    out at each step of a power iteration. W has no negative eigenvalue, so nothing needs a shift, and it is never
    formed: a step costs two products with x (B, P, C) of unit rows.
    """

    def times(v: Tensor) -> Tensor:  # W v
        return 0.5 * (v.sum(1, keepdim=True) + (v[:, None] @ x @ x.mT)[:, 0])  # rows are faster than columns

    degree = times(torch.ones_like(x[:, :, 0])).clamp(min=1e-6)
    root = degree.sqrt()
    first = F.normalize(root, dim=1)
    # The start is what is like the patch that is least like all others: large in what sets patches apart.
    odd = degree.argmin(1)[:, None]
    v = (x.take_along_dim(odd[:, :, None], 1) @ x.mT)[:, 0] / root
    for _ in range(ITERATIONS):
        v = v - first * (first * v).sum(1, keepdim=True)
        v = times(F.normalize(v, dim=1) / root) / root
    v = v - first * (first * v).sum(1, keepdim=True)
    return F.normalize(v, dim=1) / root


def object_patches(y: Tensor) -> Tensor:
    """(B, P) bool: the side of the mean of ``y`` on which its largest magnitude lies."""
    seed = y.take_along_dim(y.abs().argmax(1)[:, None], 1)
    apart = y - y.mean(1, keepdim=True)
    return torch.where(seed > 0, apart > 0, apart < 0)
