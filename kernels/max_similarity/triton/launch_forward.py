"""Starts the forward kernel; and how tensors have to lie for all kernels here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import launch
from ...cross_attention.triton.configs import architecture
from . import configs
from .forward import forward as kernel

UNALIGNED = 16  # block of the width where rows do not begin at multiples of 16 bytes


def forward(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """score (B, P) float32 and argmax (B, P) int64 of (B, P, D) and (B, S, D) float16, bfloat16 or float32."""
    B, P, _ = image_tokens.shape
    score = torch.empty((B, P), dtype=torch.float32, device=image_tokens.device)
    argmax = torch.empty((B, P), dtype=torch.int64, device=image_tokens.device)
    image, text = dense(image_tokens), dense(text_tokens)
    arguments = {
        "Image": image,
        "Text": text,
        "TextMask": launch.byte(text_mask, image),
        "Score": score,
        "Argmax": argmax,
        "HAS_MASK": text_mask is not None,
    }
    start(kernel, B, P, text.shape[1], {"image": image, "text": text}, arguments)
    return score, argmax


def start(
    kernel: Any, samples: int, patches: int, words: int, matrices: dict[str, Tensor], arguments: dict[str, Any]
) -> None:
    """Start ``kernel`` over all its programs; ``matrices`` (B, length, D) by the names of their strides."""
    first = next(iter(matrices.values()))
    width, dtype, device = first.shape[-1], first.dtype, first.device
    tile = configs.select(kernel.__name__, architecture(device), dtype, words)
    unit = units(*matrices.values())
    # what is loaded element by element takes a pointer each, and spills sooner
    widest = tile.block_d if unit > 1 else min(tile.block_d, UNALIGNED)
    tile = replace(tile, block_d=min(widest, max(16, 1 << (width - 1).bit_length())))
    arguments |= {"P": patches, "S": words, "D": width // unit, "UNIT": unit, "EVEN_D": width % tile.block_d == 0}
    arguments |= {"BLOCK_P": tile.block_p, "BLOCK_S": tile.block_s, "BLOCK_D": tile.block_d}
    for name, x in matrices.items():
        arguments |= {f"{name}_batch": x.stride(0) // unit, f"{name}_row": x.stride(1) // unit}
    if kernel.__name__ == "backward_text":
        programs = -(-words // tile.block_s) * -(-width // tile.block_d)
    else:
        programs = -(-patches // tile.block_p)
    own = {name: arguments[name] for name in kernel.arg_names}
    launch.start(kernel, (samples * programs,), own, tile, device)


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy that the kernels can read: rows dense, a sample within 2**31 elements of its first."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def units(*tensors: Tensor) -> int:
    """Elements of 16 bytes where the strides and widths of all tensors are multiples of them, else 1."""
    elements = 16 // max(x.element_size() for x in tensors)
    multiples = all(n % elements == 0 for x in tensors for n in (*x.stride()[:-1], x.shape[-1]))
    return elements if multiples else 1
