"""Filtered noise, cut at a level."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from crossmask.kernels import topk_mask

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Policy, register_policy
from .random import random_words


@register_policy("colour")
class Colour(Policy):
    """Hide where filtered noise is highest: blobs of one size, or none smaller or larger than that.

    ColorMAE (Hinojosa et al. 2024, "ColorMAE: exploring data-independent masking strategies in masked autoencoders"):
    white noise w and Gaussian filters G; red: G w (low-pass), blue: w - G w (high-pass), green: G_1 w - G_2 w with the
    wider G_2 (band-pass), purple: w less green (band-stop); the top ``image_ratio`` of it is hidden, exactly. A
    reconstruction: the noise is drawn afresh for each sample instead of cropped from a stored set, and the widths of
    the filters, in patches, are ours.
    """

    class Options(Section):
        colour: Literal["green", "red", "blue", "purple"] = Field("green", description="which frequencies remain")
        sigma: float = Field(1.0, gt=0.0, le=64.0, description="deviation of the (narrower) Gaussian, in patches")
        wide: float = Field(2.0, gt=0.0, le=64.0, description="green, purple: that of the wider one")

        @model_validator(mode="after")
        def _ordered(self) -> Colour.Options:
            if self.colour in ("green", "purple") and self.wide <= self.sigma:
                raise ValueError(f"wide ({self.wide:g}) is not above sigma ({self.sigma:g}), the narrower filter")
            return self

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        colour, (H, W) = self.options.colour, context.grid
        band = colour in ("green", "purple")
        border = math.ceil(3 * (self.options.wide if band else self.options.sigma))
        # A border of noise all round, so that the edge of the grid is like its middle.
        noise = context.draws.normal("noise", H + 2 * border, W + 2 * border)
        white = noise[:, border : border + H, border : border + W]
        kept = smooth(noise, self.options.sigma, border)
        if band:
            kept = kept - smooth(noise, self.options.wide, border)
        if colour in ("blue", "purple"):
            kept = white - kept
        return MaskPlan(topk_mask(kept.flatten(1), ratio=context.image_ratio), random_words(context))


def smooth(noise: Tensor, sigma: float, border: int) -> Tensor:
    """(B, H + 2 border, W + 2 border) to (B, H, W): a Gaussian filter, rows and columns apart."""

    def weights(size: int) -> Tensor:  # (size, size + 2 border)
        place = torch.arange(size + 2 * border, device=noise.device)
        distance = place - border - place[:size, None]
        weight = torch.exp(-0.5 * (distance / sigma) ** 2).where(distance.abs() <= border, 0.0)
        return weight / weight.sum(1, keepdim=True)

    # Rounded to bfloat16 many values would tie.
    with torch.autocast(noise.device.type, enabled=False):
        rows, columns = (weights(size - 2 * border) for size in noise.shape[1:])
        return rows @ noise @ columns.mT
