"""``crossmask::semi_hard_walk`` for torch.library: schema, fake kernel, and the reference where no other kernel stands.

``csrc/semi_hard_cpu.cpp`` registers under this name for CPUs when the extension loads. Called through ``torch.ops`` the
walk runs without Python's lock, so a thread that walks does not hold up one that trains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import reference

_NAME = "crossmask::semi_hard_walk"
SCHEMA = "(Tensor similarity, Tensor? groups, int similar, int start, int apart) -> Tensor"


def _fake(similarity: Tensor, groups: Tensor | None, similar: int, start: int, apart: int) -> Tensor:
    return torch.empty(similarity.shape[0], dtype=torch.int64)


if not hasattr(torch.ops.crossmask, _NAME.partition("::")[2]):
    # in a checkout, transformers imports this folder once more, as the package "kernels" it looks for
    torch.library.define(_NAME, SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_NAME, "default")(reference.walk)
    torch.library.register_fake(_NAME)(_fake)

WALK = torch.ops.crossmask.semi_hard_walk.default

native.status()  # loads the extension, whose kernel then stands before the reference
