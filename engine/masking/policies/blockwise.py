"""Rectangles of patches."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from crossmask.kernels import topk_mask

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words

BLOCKS = 32  # drawn for each sample; at a ratio of 0.5 about eight cover nine tenths of a grid


@register_policy("blockwise")
class Blockwise(Policy):
    """Hide rectangles until the ratio is reached.

    Block-wise masking (BEiT, Bao et al. 2022; "block-wise" in MAE, He et al. 2022): a block's area is uniform between
    ``min_area`` and the number of patches to hide, the logarithm of its aspect ratio uniform between those of 0.3 and 1
    / 0.3, its place uniform; blocks are added until enough is hidden. A deviation: the ratio is met exactly, by cutting
    the last block at its top or bottom edge (BEiT stops short of it); a block that is longer than the grid is cut (BEiT
    draws again); the largest block is that of all patches to hide, not of those still to be hidden.
    """

    class Options(Section):
        min_area: int = Field(16, ge=1, description="patches of the smallest block")
        min_aspect: float = Field(0.3, gt=0.0, le=1.0, description="height over width is between this and its inverse")

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        (H, W), P = context.grid, context.patches
        area, aspect, top, left = context.draws.uniform("blocks", 4, BLOCKS).unbind(1)  # (B, BLOCKS)
        ratio = context.image_ratio
        most = P * (ratio[:, None] if isinstance(ratio, torch.Tensor) else ratio)
        smallest = min(self.options.min_area, P)
        area = (smallest + area * (most - smallest)).clamp(min=smallest)
        root = ((2 * aspect - 1) * -0.5 * math.log(self.options.min_aspect)).exp()  # of the aspect ratio
        height = (area.sqrt() * root).round().clamp(1, H)
        width = (area.sqrt() / root).round().clamp(1, W)
        top, left = (top * (H - height + 1)).floor(), (left * (W - width + 1)).floor()

        def inside(start: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:  # (B, BLOCKS, size)
            place = torch.arange(size, device=start.device)
            return (place >= start[..., None]) & (place < (start + length)[..., None])

        covered = inside(top, height, H)[..., :, None] & inside(left, width, W)[..., None, :]
        covered = covered.flatten(2)  # (B, BLOCKS, P)
        first = torch.where(covered.any(1), covered.to(torch.uint8).argmax(1), BLOCKS)
        # Within a block from one edge on, so that the last one, which is cut, stays a block.
        along = torch.arange(P, device=first.device) / P
        upwards = context.draws.uniform("direction", 1) < 0.5
        order = first + torch.where(upwards, 1 - 1 / P - along, along)
        return MaskPlan(topk_mask(order, ratio=ratio, largest=False), random_words(context))
