"""What semi_hard_order refuses, each with the argument's name and what was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check(image: Any, text: Any, groups: Any, similar: Any, start: Any, apart: Any) -> None:
    for name, x in (("image_features", image), ("text_features", text)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    shapes = f"image_features {tuple(image.shape)} and text_features {tuple(text.shape)}"
    if image.ndim != 2 or image.shape != text.shape or 0 in image.shape:
        raise ValueError(f"features must be (samples, width), both alike and not empty, got {shapes}")
    if image.device != text.device:
        raise ValueError(f"features must be on one device, got {image.device} and {text.device}")
    samples = len(image)
    for name, number, least, most in (
        ("similar", similar, 1, None),
        ("start", start, 0, samples - 1),
        ("apart", apart, 1, None),
    ):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
        if number < least or (most is not None and number > most):
            wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
            raise ValueError(f"{name} must be {wanted}, got {number}")
    if groups is None:
        return
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups must be an int64 tensor ({samples},) or None, got {type(groups).__name__}")
    if groups.dtype != torch.int64 or groups.shape != (samples,):
        raise ValueError(f"groups must be int64 ({samples},), got {groups.dtype} {tuple(groups.shape)}")
