"""How the attention kernels are started, and how tensors have to lie for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import launch
from ..request import Masks
from .configs import Config


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], config: Config, device: torch.device) -> None:
    """Start ``kernel`` on the current stream of ``device``.

    ``arguments`` holds all of the kernel's parameters by name but those the configuration names: BLOCK_S, BLOCK_P,
    TRANSPOSED and STAGES, each passed where the kernel has it.
    """
    tiles = {
        "BLOCK_S": config.block_s,
        "BLOCK_P": config.block_p,
        "TRANSPOSED": config.transposed,
        "STAGES": config.stages,
    }
    arguments = {**arguments, **{name: value for name, value in tiles.items() if name in kernel.arg_names}}
    launch.start(kernel, grid, arguments, config, device)


def readable(x: Tensor) -> bool:
    """Whether the kernels can read or write ``x`` as it lies: rows dense, and within 2**31 elements of their first."""
    return (x.stride(-1) == 1 or x.shape[-1] == 1) and x.shape[-2] * x.stride(-2) < 2**31


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy that the kernels can read."""
    return x if readable(x) else x.contiguous()


def writable(x: Tensor) -> Tensor:
    """``x``, or a stand-in for it whose values are to be copied."""
    return x if readable(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def unit(*tensors: Tensor) -> int:
    """Elements of 16 bytes where the strides and widths of all tensors are multiples of them, else 1."""
    elements = 16 // max(x.element_size() for x in tensors)
    multiples = all(n % elements == 0 for x in tensors for n in (*x.stride()[:-1], x.shape[-1]))
    return elements if multiples else 1


def strides(name: str, x: Tensor, unit: int) -> dict[str, int]:
    """Strides of a (B, H, length, width) tensor as the kernels take them."""
    return {f"{name}_{axis}": x.stride(i) // unit for i, axis in enumerate(("batch", "head", "row"))}


def masks_of(masks: Masks, stand_in: Tensor) -> dict[str, Any]:
    """The masks as the kernels take them. Without a link mask its parameters are None, so that what is compiled is as
    if they were not there."""
    link = None if masks.link is None else _in_sixteens(masks.link)
    return {
        "KeyMask": launch.byte(masks.key, stand_in),
        "QueryMask": launch.byte(masks.query, stand_in),
        "HeadMask": launch.byte(masks.head, stand_in),
        "LinkMask": link,
        "link_batch": None if link is None else link.stride(0) // 16 if len(link) > 1 else 0,
        "link_row": None if link is None else link.stride(1) // 16,
        "HAS_KEY_MASK": masks.key is not None,
        "HAS_QUERY_MASK": masks.query is not None,
        "HAS_HEAD_MASK": masks.head is not None,
        "HAS_LINK_MASK": link is not None,
    }


def _in_sixteens(link: Tensor) -> Tensor:
    """A (samples or 1, S, P) bool mask as uint8 that can be read 16 bytes at a time, to the end of the sixteen that a
    row ends in: itself where it lies so, or a copy."""
    if link.stride(0) == 0:  # expanded
        link = link[:1]
    (samples, S, P), (batch, row, dense) = link.shape, link.stride()
    read = -(-P // 16) * 16
    end = link.storage_offset() + (samples - 1) * batch + (S - 1) * row + read
    lies = dense == 1 and row >= P and row % 16 == batch % 16 == 0 and end <= link.untyped_storage().nbytes()
    if not lies or (link.device.type != "meta" and link.data_ptr() % 16):
        link = torch.empty((samples, S, read), dtype=torch.bool, device=link.device)[..., :P].copy_(link)
    return link.view(torch.uint8)
