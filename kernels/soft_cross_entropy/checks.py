"""What a call must satisfy. Nothing is read but shapes, dtypes and devices, so that no device is waited for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .request import Inputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_types(inputs: Inputs) -> None:
    """
    Raises:
        TypeError: what must be a tensor is none, or the distillation is.
    """
    optional = ("bias", "teacher_hidden", "teacher_weight", "teacher_bias", "token_weights")
    for name, x in inputs._asdict().items():
        if name == "distillation":
            if isinstance(x, bool) or not isinstance(x, (int, float)):
                raise TypeError(f"distillation must be a number in [0, 1], got {type(x).__name__}")
        elif not isinstance(x, Tensor) and (x is not None or name not in optional):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check(inputs: Inputs) -> None:
    """
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a distillation outside [0, 1] or without a teacher.
    """
    hidden, weight = inputs.hidden, inputs.weight
    shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be (N, W) and weight (V, W), got {shapes}")
    if 0 in weight.shape:
        raise ValueError(f"there must be a word and a width, got {shapes}")
    (N, W), V = hidden.shape, len(weight)
    _expect("bias", inputs.bias, (V,))
    _expect("labels", inputs.labels, (N,))
    if inputs.labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {inputs.labels.dtype}: labels.long()")
    _check_teacher(inputs, N, V, W)
    _expect("token_weights", inputs.token_weights, (N,))
    if inputs.token_weights is not None and not inputs.token_weights.is_floating_point():
        raise ValueError(f"token_weights must be floating point, got {inputs.token_weights.dtype}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be float16, bfloat16, float32 or float64, got {hidden.dtype}")
    for name, x in inputs._asdict().items():
        if not isinstance(x, Tensor):
            continue
        if x.dtype != hidden.dtype and name not in ("labels", "token_weights"):
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {x.device}")


def _check_teacher(inputs: Inputs, N: int, V: int, W: int) -> None:
    if not 0 <= inputs.distillation <= 1:
        raise ValueError(f"distillation must be in [0, 1], got {inputs.distillation}")
    if inputs.distillation > 0 and (inputs.teacher_hidden is None or inputs.teacher_weight is None):
        missing = "teacher_hidden" if inputs.teacher_hidden is None else "teacher_weight"
        raise ValueError(f"distillation {inputs.distillation} needs a teacher: {missing} is missing")
    _expect("teacher_hidden", inputs.teacher_hidden, (N, W))
    _expect("teacher_weight", inputs.teacher_weight, (V, W))
    _expect("teacher_bias", inputs.teacher_bias, (V,))


def _expect(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def check_labels(labels: Tensor, words: int) -> None:
    """On a CPU, where looking costs nothing.

    Raises:
        ValueError: a label that is no word.
    """
    if labels.device.type == "cpu" and len(labels):
        lowest, highest = labels.aminmax()
        if lowest < 0 or highest >= words:
            wrong = int(lowest if lowest < 0 else highest)
            raise ValueError(f"labels must be words, 0 to {words - 1}, got {wrong}: leave rows without a label out")
