"""Similarities of every image with every text of a slice, on the host, computed a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # images of a block: of 1,920 samples it is 3.9 MB on the device


@torch.no_grad()
def similarities(image: Tensor, text: Tensor, rows: int = ROWS) -> Tensor:
    """(M, M) float32 on the CPU, ``[i, j] = <image[i], text[j]>``; sums in float32 on the features' device.

    The device never holds more of it than ``rows`` x M. What float32 products are made of there is PyTorch's setting
    (``torch.set_float32_matmul_precision``). Waits for the current stream of a GPU.
    """
    device, M = image.device, len(image)
    whole = torch.empty(M, M, dtype=torch.float32, pin_memory=device.type == "cuda")
    with torch.autocast(device.type, enabled=False):
        image, text = image.float(), text.float().T
        for begin in range(0, M, rows):
            block = whole[begin : begin + rows]
            if device.type == "cpu":
                torch.mm(image[begin : begin + rows], text, out=block)
            else:
                block.copy_(torch.mm(image[begin : begin + rows], text), non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return whole
