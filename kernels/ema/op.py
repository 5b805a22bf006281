"""``crossmask::ema_update_`` for torch.library: schema, fake kernel, and the reference where no native kernel stands.

The C++ and CUDA kernels (``csrc/ema_cpu.cpp``, ``csrc/ema_cuda.cu``) register under this name when the extension loads.
No gradient flows and no autograd is registered; a call through the dispatcher tells autograd that the tensors changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from .checks import check, refuse_inference
from .reference import ema_update_reference

# copies: as many as teachers, or none; seed: (1,) int64 for stochastic rounding, none for rounding to the nearest
SCHEMA = "ema_update_(Tensor(a!)[] teacher, Tensor[] student, float decay, Tensor(b!)[] copies, Tensor? seed) -> ()"


def _reference(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float, copies: Sequence[Tensor], seed: Tensor | None
) -> None:
    check(teacher, student, decay, copies, seed)
    ema_update_reference(teacher, student, decay, copies, seed)


def _fake(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float, copies: Sequence[Tensor], seed: Tensor | None
) -> None:
    check(teacher, student, decay, copies, seed, memory=False)


def _count_versions(keyset: Any, teacher: Sequence[Tensor], student: Any, decay: Any, copies: Any, seed: Any) -> None:
    refuse_inference(teacher, copies)
    below = keyset & torch._C._after_ADInplaceOrView_keyset
    torch.ops.crossmask.ema_update_.default.redispatch(below, teacher, student, decay, copies, seed)
    torch.autograd.graph.increment_version([*teacher, *copies])


if not hasattr(torch.ops.crossmask, "ema_update_"):
    # in a checkout, transformers imports this folder once more, as the package "kernels" it looks for
    _library = torch.library.Library("crossmask", "FRAGMENT")
    _library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl("ema_update_", _reference, "CompositeExplicitAutograd")
    _library.impl("ema_update_", _count_versions, "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake("crossmask::ema_update_", _fake, lib=_library)

OP = torch.ops.crossmask.ema_update_.default


def _nothing() -> None:
    pass


# loads the extension, whose kernels then stand before the reference
_extension = importlib.import_module(f"{native.__package__}._C") if native.status().loaded else None
# between the two the native kernel keeps its references to tensors, and lets them go in one piece: csrc/ema.h says why
HOLD: Callable[[], None] = getattr(_extension, "hold_tensors", _nothing)
RELEASE: Callable[[], None] = getattr(_extension, "release_tensors", _nothing)
