"""``crossmask::ema_update_`` for torch.library: schema, fake kernel, and the reference where no native kernel stands.

The C++ and CUDA kernels (``csrc/ema_cpu.cpp``, ``csrc/ema_cuda.cu``) register under this name when the extension loads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .reference import ema_update_reference

STUDENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    """Refuse what the op does not handle, naming the tensor; ``csrc/ema.h`` refuses the same."""
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"ema_update_: decay must lie in [0, 1], got {decay}")
    if len(teacher) != len(student):
        raise ValueError(f"ema_update_: {len(teacher)} teacher tensors but {len(student)} student tensors")
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.dtype != torch.float32:
            raise TypeError(f"ema_update_: teacher[{i}] must be float32, got {t.dtype}")
        if s.dtype not in STUDENT_DTYPES:
            raise TypeError(f"ema_update_: student[{i}] must be float32, bfloat16 or float16, got {s.dtype}")
        if t.shape != s.shape:
            raise ValueError(f"ema_update_: teacher[{i}] is {tuple(t.shape)} but student[{i}] is {tuple(s.shape)}")
        if not (t.is_contiguous() and s.is_contiguous()):
            raise ValueError(f"ema_update_: teacher[{i}] and student[{i}] must be contiguous")
        if t.device != teacher[0].device or s.device != teacher[0].device:
            raise ValueError(
                f"ema_update_: teacher[{i}] is on {t.device} and student[{i}] on {s.device}, "
                f"but teacher[0] is on {teacher[0].device}"
            )


@torch.library.custom_op(
    "crossmask::ema_update_",
    mutates_args=("teacher",),
    schema="(Tensor(a!)[] teacher, Tensor[] student, float decay) -> ()",
)
def ema_update_op(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    check(teacher, student, decay)
    ema_update_reference(teacher, student, decay)


@ema_update_op.register_fake
def _(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float) -> None:
    check(teacher, student, decay)


native.status()  # loads the extension, whose kernels then stand before the reference
