"""Drawings on a canvas: rotate, scale, mirror, recolour and lay over one another, a whole batch at a time.

Only element-wise operations and ``grid_sample`` are used (no matrix products, whose rounding depends on the batch), so
a sample's pixels do not depend on its neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_SMALL = 0.62  # share of the canvas up to which a drawing is rendered as a tile of its own size


@dataclass(frozen=True)
class Placements:
    """Where drawings go: M placements, float64 unless said otherwise."""

    sample: np.ndarray  # (M,) int64, canvas
    slot: np.ndarray  # (M,) int64, paint order from 0; thing ``slot + 1`` in the truth
    drawing: np.ndarray  # (M,) int64, row of the art
    centre: np.ndarray  # (M, 2) x and y in 0..1 of the canvas
    scale: np.ndarray  # (M,) side of the drawing, 0..1 of the canvas
    angle: np.ndarray  # (M,) radians
    mirror: np.ndarray  # (M,) bool
    gain: np.ndarray  # (M, 3) factor on each channel
    saturation: np.ndarray  # (M,) 0 = grey, 1 = as drawn

    @classmethod
    def plain(
        cls, sample: np.ndarray, slot: np.ndarray, drawing: np.ndarray, centre: np.ndarray, scale: np.ndarray
    ) -> Placements:
        """Upright and as drawn."""
        still, same = np.zeros(len(sample)), np.ones((len(sample), 3))
        return cls(sample, slot, drawing, centre, scale, still, still > 0, same, same[:, 0])

    def take(self, rows: np.ndarray) -> Placements:
        return Placements(**{name: value[rows] for name, value in vars(self).items()})


def paint(
    rgba: Tensor, placements: Placements, size: int, background: Tensor, truth: bool
) -> tuple[Tensor, Tensor | None]:
    """Compose canvases of ``size`` pixels.

    rgba (N, 4, R, R) uint8 premultiplied; background (B, 3) float32 in 0..1.
    Returns images (B, 3, size, size) float32 in 0..1 and, with ``truth``, things (B, size, size) uint8.
    """
    images = background[:, :, None, None].repeat(1, 1, size, size)
    things = torch.zeros(len(images), size, size, dtype=torch.uint8) if truth else None
    small = placements.scale <= _SMALL
    for slot in range(int(placements.slot.max(initial=-1)) + 1):
        for part in (~small, small):
            rows = np.flatnonzero(part & (placements.slot == slot))
            if len(rows):
                _lay(images, things, rgba, placements.take(rows), slot)
    return images, things


def _lay(images: Tensor, things: Tensor | None, rgba: Tensor, at: Placements, slot: int) -> None:
    """Lay at most one drawing on each canvas, in place."""
    size, resolution = images.shape[-1], rgba.shape[-1]
    source = rgba.index_select(0, torch.from_numpy(at.drawing)).float()  # far faster than rgba[...]
    if resolution % 2 == 0 and resolution >= 1.4 * size * _SMALL and at.scale.max() <= _SMALL:
        # Bilinear sampling alone would skip pixels. Four times faster than avg_pool2d.
        pairs = source.view(*source.shape[:2], resolution // 2, 2, resolution)
        rows = pairs[:, :, :, 0] + pairs[:, :, :, 1]
        source = (rows[..., 0::2] + rows[..., 1::2]).mul_(1 / 4)
    source = _recolour(source.mul_(1 / 255), at)

    cos, sin = np.cos(at.angle), np.sin(at.angle)
    extent = at.scale * (np.abs(cos) + np.abs(sin)) * size
    tile = min(size, int(np.ceil(extent.max())) + 1)
    origin = np.clip(np.floor(at.centre * size - tile / 2), 0, size - tile).astype(np.int64)  # (m, 2) x, y
    pixel = (origin[:, :, None] + np.arange(tile) + 0.5) / size - at.centre[:, :, None]  # (m, 2, tile)
    dx, dy = torch.from_numpy((pixel * (2 / at.scale)[:, None, None]).astype(np.float32)).unbind(1)
    flip = np.where(at.mirror, -1.0, 1.0)
    c, s, fc, fs = (torch.from_numpy(v.astype(np.float32))[:, None] for v in (cos, sin, flip * cos, flip * sin))
    grid = torch.empty(len(at.sample), tile, tile, 2)
    torch.add((fc * dx)[:, None, :], (fs * dy)[:, :, None], out=grid[..., 0])
    torch.sub((c * dy)[:, :, None], (s * dx)[:, None, :], out=grid[..., 1])
    drawn = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    sample = torch.from_numpy(at.sample)
    if tile == size:
        canvas = images.index_select(0, sample)
        images.index_copy_(0, sample, canvas.sub_(drawn[:, 3:] * canvas).add_(drawn[:, :3]))
        if things is not None:
            things[sample] = torch.where(drawn[:, 3] > 0.5, slot + 1, things[sample]).to(torch.uint8)
        return
    for row, (b, (x, y)) in enumerate(zip(at.sample.tolist(), origin.tolist(), strict=True)):
        window = images[b, :, y : y + tile, x : x + tile]
        window.sub_(drawn[row, 3] * window).add_(drawn[row, :3])
        if things is not None:
            things[b, y : y + tile, x : x + tile][drawn[row, 3] > 0.5] = slot + 1


def _recolour(source: Tensor, at: Placements) -> Tensor:
    """Channel gains and saturation on premultiplied colour (m, 4, R, R) in 0..1, kept within 0..alpha."""
    if np.all(at.gain == 1) and np.all(at.saturation == 1):
        return source
    gain = torch.from_numpy(at.gain.astype(np.float32))[:, :, None, None]
    saturation = torch.from_numpy(at.saturation.astype(np.float32))[:, None, None, None]
    colour, alpha = source[:, :3], source[:, 3:]
    luma = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    colour = ((colour - luma) * saturation + luma) * gain
    return torch.cat([torch.minimum(colour, alpha).clamp_(min=0), alpha], dim=1)
