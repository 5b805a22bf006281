"""Exponential moving average of many tensors at once: the public face of the op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from .. import native
from .op import check


def ema_update_(teacher: Iterable[Tensor], student: Iterable[Tensor], decay: float) -> None:
    """``teacher ← teacher + (1 − decay)·(student − teacher)`` for every pair: in place, in float32, one call.

    The momentum encoder of MoCo (He et al., 2020) and ALBEF (Li et al., 2021). With ``decay = 1`` the teacher stays,
    with ``decay = 0`` it becomes the student. No gradient flows; tensors without elements are allowed.

    Args:
        teacher: float32 tensors of any shapes, contiguous, none of them listed twice.
        student: as many tensors of the same shapes and device, contiguous, each float32, bfloat16 or float16.
        decay: in [0, 1].

    Runs the native kernel where the extension has one for the device, else plain PyTorch, and says so once.

    Raises:
        ValueError: decay out of range, unequal lists, tensors that differ in shape or device or are not contiguous.
        TypeError: a dtype other than the above.
    """
    teacher, student = list(teacher), list(student)
    check(teacher, student, decay)
    if not teacher:
        return
    native.announce("ema_update_", teacher[0].device.type)
    with torch.no_grad():
        torch.ops.crossmask.ema_update_(teacher, student, decay)


def implementation(device_type: str) -> Literal["native", "reference"]:
    """Which implementation runs for tensors on this device type."""
    return "reference" if native.status().missing(device_type) else "native"
