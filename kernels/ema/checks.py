"""What ema_update_ refuses, each in one line that names the tensor; ``csrc/ema_checks.cpp`` refuses the same.

The C++ kernels check for themselves, so these run where they do not: before the reference, for fake tensors, and to say
after a refusal what kind of error it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_COPY = torch.uint8  # the dtype of the empty tensor that stands for no copy


def check(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    copies: Sequence[Tensor] = (),
    seed: Tensor | None = None,
    *,
    any_order: bool = False,
    memory: bool = True,
) -> None:
    """Raise ValueError or TypeError. ``any_order``: students and copies may have strides of their own, if dense.

    ``memory``: look at addresses and whether they can be written, which fake tensors do not have.
    """
    if not isinstance(decay, (int, float, torch.SymFloat)):
        raise TypeError(f"ema_update_: decay must be a number, got {type(decay).__name__}")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"ema_update_: decay must lie in [0, 1], got {decay}")
    if len(teacher) != len(student):
        raise ValueError(f"ema_update_: {len(teacher)} teacher tensors but {len(student)} student tensors")
    if copies and len(teacher) != len(copies):
        raise ValueError(f"ema_update_: {len(teacher)} teacher tensors but {len(copies)} copies")
    for name, x in named(teacher, student, copies):
        if not isinstance(x, Tensor):
            raise TypeError(f"ema_update_: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"ema_update_: {name} must be float32, bfloat16 or float16, got {x.dtype}")
        i = int(name[name.index("[") + 1 : -1])
        _check_partner(name, x, teacher[i], f"teacher[{i}]", any_order)
        if x.device != teacher[0].device:
            raise ValueError(f"ema_update_: {name} is not on the device of teacher[0], {teacher[0].device}: {x.device}")
    if seed is not None and teacher:
        where = teacher[0].device
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != where:
            raise ValueError("ema_update_: seed must be one int64, shape (1,), on the device of teacher[0]")
    if memory and not any(x.is_meta or isinstance(x, FakeTensor) for x in teacher):
        refuse_inference(teacher, copies)
        _refuse_overlap(teacher, student, copies, seed)
        if teacher and teacher[0].device.type == "cpu":
            _refuse_read_only(teacher, copies)


def named(
    teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, in the order in which they are checked; placeholders for no copy are left out."""
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        yield f"teacher[{i}]", t
        yield f"student[{i}]", s
        if copies and not is_placeholder(copies[i]):
            yield f"copies[{i}]", copies[i]


def is_placeholder(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dtype == NO_COPY and x.numel() == 0


def _check_partner(name: str, x: Tensor, t: Tensor, teacher: str, any_order: bool) -> None:
    if x.shape != t.shape:
        raise ValueError(f"ema_update_: {teacher} is {tuple(t.shape)} but {name} is {tuple(x.shape)}")
    if x.layout != torch.strided:
        raise ValueError(f"ema_update_: {name} is {x.layout}, not strided (call to_dense())")
    if x.numel() == 0:
        return
    if not dense(x):
        raise ValueError(
            f"ema_update_: {name} is not dense: elements share memory or leave gaps (make it contiguous); "
            f"its shape is {tuple(x.shape)}, its strides {x.stride()}"
        )
    if not any_order and not same_order(x, t):
        raise ValueError(f"ema_update_: {name} has strides {x.stride()} but {teacher} has {t.stride()}")


def dense(x: Tensor) -> bool:
    """Every element has a place of its own, and together they leave no gap: a flat array in some order."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """The same element lies at the same place of both, which have the same shape."""
    return all(size == 1 or m == n for size, m, n in zip(a.shape, a.stride(), b.stride(), strict=True))


def refuse_inference(teacher: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Every call asks this; the rest of this module is for refusals."""
    if torch.is_inference_mode_enabled() or not (
        any(map(Tensor.is_inference, teacher)) or any(map(Tensor.is_inference, copies))
    ):
        return
    for list_name, tensors in (("teacher", teacher), ("copies", copies)):
        for i, x in enumerate(tensors):
            if x.is_inference():
                raise ValueError(
                    f"ema_update_: {list_name}[{i}] was made in inference mode, read-only outside of it (clone it)"
                )


def _refuse_overlap(
    teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor], seed: Tensor | None
) -> None:
    extents = [
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), name, not name.startswith("student"))
        for name, x in named(teacher, student, copies)
        if x.numel()
    ]
    if seed is not None:
        extents.append((seed.data_ptr(), seed.data_ptr() + seed.element_size(), "seed", False))
    furthest = furthest_written = (0, "")
    for begin, end, name, written in sorted(extents, key=lambda extent: (extent[0], not extent[3])):
        other_end, other = furthest if written else furthest_written  # what is only read may share its memory
        if begin < other_end:
            raise ValueError(f"ema_update_: {other} and {name} overlap in memory")
        furthest = max(furthest, (end, name))
        if written:
            furthest_written = max(furthest_written, (end, name))


def _refuse_read_only(teacher: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    for list_name, tensors in (("teacher", teacher), ("copies", copies)):
        for i, x in enumerate(tensors):
            if x.numel() and not _writable(x.data_ptr()):
                raise ValueError(f"ema_update_: {list_name}[{i}] is in memory that is mapped read-only (clone it)")


def _writable(address: int) -> bool:
    """By the operating system, which says so where a store would end the process: a byte into a pipe and back."""
    if not hasattr(os, "readv"):
        return True
    try:
        reader, writer = os.pipe()
    except OSError:
        return True
    byte = (ctypes.c_char * 1).from_address(address)
    try:
        os.writev(writer, [byte])
        os.readv(reader, [byte])
    except OSError as error:
        return error.errno != errno.EFAULT
    finally:
        os.close(reader)
        os.close(writer)
    return True
