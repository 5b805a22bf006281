"""Position tables of image towers, for images of another size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, side: int) -> Tensor:
    """(1, 1 + P, width) -> (1, 1 + side², width): patches' positions bicubic, [CLS]'s as it is, as ALBEF does it.

    ``table`` itself where it is of that size. ValueError where its patches are no square.
    """
    before = math.isqrt(table.shape[1] - 1)
    if before * before != table.shape[1] - 1:
        raise ValueError(f"{table.shape[1] - 1} patches are no square")
    if before == side:
        return table
    grid = table[:, 1:].float().unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)
