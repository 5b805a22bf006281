"""Exponential moving average of many tensors at once: the public face of the op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import native
from .checks import NO_COPY, check, is_placeholder, refuse_inference, same_order
from .op import HOLD, OP, RELEASE

_SEEDS = (-(2**63), 2**63 - 1)


def ema_update_(
    teacher: Iterable[Tensor],
    student: Iterable[Tensor],
    decay: float,
    *,
    copies: Iterable[Tensor | None] | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int | Tensor | None = None,
) -> None:
    """``teacher ← teacher + (1 − decay)·(student − teacher)`` for every pair: in place, one pass over memory.

    The momentum encoder of MoCo (He et al., 2020) and ALBEF (Li et al., 2021). The arithmetic is float32 whatever is
    stored, from the nearer end as ``torch.lerp``: with ``decay = 1`` the teacher stays, with ``decay = 0`` it becomes
    the student, whatever the other holds. Native kernels, the reference and any number of threads give the same bits,
    and so does, rounding to the nearest, any way of cutting tensors into shards. Not promised are a float32 NaN's sign
    and payload, and anything under ``torch.set_flush_denormal``, which holds for one thread. No gradient flows; tensors
    without elements are allowed.

    Args:
        teacher: tensors of any shapes, each float32, bfloat16 or float16, in any mix.
        student: as many tensors of the same shapes on the same device, each of one of these dtypes.
        decay: in [0, 1].
        copies: as many tensors of the same shapes and device, or None for a tensor that needs none: each gets what its
            teacher then holds, rounded to the nearest in its own dtype, as ``copy.copy_(teacher)``. For a float32
            teacher and the bfloat16 weights that the forward pass reads.
        rounding: how a teacher stored in 16 bits is rounded. ``"stochastic"``: up or down at random so that the mean is
            the float32 result (Gupta et al., 2015), without which such a teacher stops where an update is smaller than
            half its spacing. Float32 teachers and copies are not affected.
        seed: for stochastic rounding alone: an int, or a (1,) int64 tensor on the teacher's device, which is read when
            the kernel runs, so that a CUDA graph's replays draw anew. The draws depend on it and on an element's place
            in the list and in its tensor's memory. Default: drawn from PyTorch's CPU generator.

    Teachers may have any strides that leave no gaps, such as channels_last or a transposed matrix. Students and copies
    with other such strides go through a temporary.

    Under ``torch.compile`` addresses are not known, and memory that overlaps or is read-only goes unnoticed.

    Runs the native kernel where the extension has one for the device, else plain PyTorch, and says so once.

    Raises:
        ValueError: decay out of range; unequal lists; shapes or devices that differ; tensors that are not dense; a
            tensor that is written and overlaps another of the call; one that is read-only, as from inference mode or
            a file mapped for reading; an unknown rounding, or a seed without stochastic rounding. Nothing has changed
            then.
        TypeError: another dtype, or something that is not a tensor.
    """
    teacher, student = list(teacher), list(student)
    copied = [] if copies is None else _with_placeholders(copies, teacher)
    drawn = _seed(rounding, seed, teacher)
    if not teacher:
        return check(teacher, student, decay, copied, drawn)
    if torch.compiler.is_compiling():
        with torch.no_grad():
            _in_teachers_order(teacher, student, decay, copied, drawn)
        return None
    try:
        native.announce("ema_update_", teacher[0].device.type)
        refuse_inference(teacher, copied)
        HOLD()
        # the dispatcher would ask Python to count versions and to leave autograd out, with every tensor unpacked for it
        with torch._C._AutoDispatchBelowADInplaceOrView():
            OP(teacher, student, decay, copied, drawn)
        torch.autograd.graph.increment_version(teacher + copied)
    except (RuntimeError, ValueError, TypeError, AttributeError):  # refused: nothing has changed
        check(teacher, student, decay, copied, drawn, any_order=True)
        if all(map(same_order, student, teacher)) and all(map(_fits, copied, teacher)):
            raise
        with torch.no_grad():
            _in_teachers_order(teacher, student, decay, copied, drawn)
    finally:
        RELEASE()
    return None


def implementation(device_type: str) -> Literal["native", "reference"]:
    """Which implementation runs for tensors on this device type."""
    return "reference" if native.status().missing(device_type) else "native"


def _in_teachers_order(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float, copies: Sequence[Tensor], seed: Tensor | None
) -> None:
    """The op, with temporaries for students and copies that lie in memory in another order than their teacher."""
    check(teacher, student, decay, copies, seed, any_order=True, memory=False)
    pairs = zip(student, teacher, strict=True)
    read = [s if same_order(s, t) else torch.empty_like(t, dtype=s.dtype).copy_(s) for s, t in pairs]
    pairs = zip(copies, teacher if copies else (), strict=True)
    written = [c if _fits(c, t) else torch.empty_like(t, dtype=c.dtype) for c, t in pairs]
    OP(teacher, read, decay, written, seed)
    for c, w in zip(copies, written, strict=True):
        if w is not c:
            c.copy_(w)


def _fits(copy: Tensor, teacher: Tensor) -> bool:
    return is_placeholder(copy) or same_order(copy, teacher)


def _with_placeholders(copies: Iterable[Tensor | None], teacher: list[Tensor]) -> list[Tensor]:
    copies = list(copies)
    given = [c for c in copies if c is not None]
    if len(given) == len(copies):
        return given
    none = torch.empty(0, dtype=NO_COPY, device=getattr(teacher[0], "device", None) if teacher else None)
    return [none if c is None else c for c in copies]


def _seed(rounding: str, seed: int | Tensor | None, teacher: list[Tensor]) -> Tensor | None:
    if rounding == "nearest":
        if seed is not None:
            raise ValueError('ema_update_: seed is for rounding="stochastic", which was not asked for')
        return None
    if rounding != "stochastic":
        raise ValueError(f'ema_update_: rounding must be "nearest" or "stochastic", got {rounding!r}')
    if isinstance(seed, Tensor) or not teacher:
        return seed if isinstance(seed, Tensor) else None
    device = getattr(teacher[0], "device", None)
    if device is None:
        return None  # no tensor, and about to be refused
    if seed is None:
        return torch.randint(*_SEEDS, (1,), dtype=torch.int64).to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"ema_update_: seed must be an int or a tensor, got {type(seed).__name__}")
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise ValueError(f"ema_update_: seed must fit into 64 bits with a sign, got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)
