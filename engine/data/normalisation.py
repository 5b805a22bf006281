"""Mean and deviation of pixels, which every image of a run is normalised with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Normalisation:
    """(pixel - mean) / std of each channel, for pixels in 0..1."""

    mean: Channels
    std: Channels

    def apply_(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) float32 in 0..1, changed in place."""
        return images.sub_(_planes(self.mean, images)).div_(_planes(self.std, images))

    def undo(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) as in a batch -> the same shape, float32 within 0..1."""
        pixels = images.float()
        return (pixels * _planes(self.std, pixels) + _planes(self.mean, pixels)).clamp(0, 1)


def _planes(values: Channels, images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]


HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # 0..1 becomes -1..1
# of the images that CLIP (Radford et al. 2021) was trained on; ALBEF's checkpoints expect it
CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALISATIONS = {"half": HALF, "clip": CLIP}  # by ``data.normalisation``
