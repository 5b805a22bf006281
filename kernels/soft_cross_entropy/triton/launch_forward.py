"""Starts the forward kernels; and how tensors have to lie for all kernels here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import launch
from ...cross_attention.triton.configs import architecture
from ..request import Forward, Inputs
from . import configs
from .configs import Config
from .forward import PARTIALS, forward_rows, forward_words

UNALIGNED = 16  # block of the width where rows do not begin at multiples of 16 bytes


@torch.no_grad()
def forward(inputs: Inputs) -> Forward:
    """Losses and what the backward needs. float16, bfloat16 or float32; N above 0."""
    run = Run(inputs)
    rows, words, device = run.rows, run.words, run.device
    tile = run.tile(forward_words)
    parts = -(-words // tile.block_v)
    given: dict[str, Any] = {
        "Partial": torch.empty((PARTIALS, parts, rows), dtype=torch.float32, device=device),
        "PartialArgmax": torch.empty((parts, rows), dtype=torch.int32, device=device),
        "LabelLogit": torch.empty(rows, dtype=torch.float32, device=device),
    }
    run.start(forward_words, -(-rows // tile.block_n) * parts, tile, given)

    loss, lse = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((rows,), (2, rows)))
    teacher_lse = torch.empty((2, rows if run.given["HAS_TEACHER"] else 0), dtype=torch.float32, device=device)
    argmax = torch.empty(rows, dtype=torch.int64, device=device)
    weights = inputs.token_weights
    given |= {"parts": parts, "Loss": loss, "Argmax": argmax, "Lse": lse, "TeacherLse": teacher_lse}
    given |= {"TokenWeights": loss if weights is None else weights.float(), "HAS_WEIGHTS": weights is not None}
    tile = run.tile(forward_rows)
    run.start(forward_rows, -(-rows // tile.block_n), tile, given)
    return Forward(loss, argmax, lse, teacher_lse)


class Run:
    """One call: what all of its kernels are given."""

    def __init__(self, inputs: Inputs) -> None:
        hidden, weight = dense(inputs.hidden), dense(inputs.weight)
        matrices = {"Hidden": hidden, "Weight": weight, "TeacherHidden": hidden, "TeacherWeight": weight}
        teacher = inputs.teacher_hidden is not None and inputs.teacher_weight is not None
        if inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
            matrices |= {"TeacherHidden": dense(inputs.teacher_hidden), "TeacherWeight": dense(inputs.teacher_weight)}
        (self.rows, self.width), self.words = hidden.shape, len(weight)
        self.hidden, self.weight, self.dtype, self.device = hidden, weight, hidden.dtype, hidden.device
        self.arch, self.unit = architecture(hidden.device), units(*matrices.values())
        bias, teacher_bias = inputs.bias, inputs.teacher_bias
        self.given: dict[str, Any] = {
            **matrices,
            "Bias": hidden if bias is None else bias.contiguous(),
            "TeacherBias": hidden if teacher_bias is None else teacher_bias.contiguous(),
            "Labels": inputs.labels.contiguous(),
            "HAS_BIAS": bias is not None, "HAS_TEACHER": teacher, "HAS_TEACHER_BIAS": teacher_bias is not None,
            "distillation": float(inputs.distillation),
            "N": self.rows, "V": self.words, "D": self.width // self.unit, "UNIT": self.unit,
        }  # fmt: skip
        for name, x in zip(("h", "w", "th", "tw"), matrices.values(), strict=True):
            self.given[f"{name}_row"] = x.stride(0) // self.unit

    def tile(self, kernel: Any) -> Config:
        tile = configs.select(kernel.__name__, self.arch, self.dtype, self.rows)
        # what is loaded element by element takes a pointer each, and spills sooner
        widest = tile.block_d if self.unit > 1 else min(tile.block_d, UNALIGNED)
        return replace(tile, block_d=min(widest, max(16, 1 << (self.width - 1).bit_length())))

    def start(self, kernel: Any, programs: int, tile: Config, given: dict[str, Any]) -> None:
        """``given`` are the arguments of this kernel alone."""
        every = self.given | given | {"BLOCK_V": tile.block_v, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d}
        every["EVEN_D"] = tile.block_d > 0 and self.width % tile.block_d == 0
        launch.start(kernel, (programs,), {name: every[name] for name in kernel.arg_names}, tile, self.device)


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy that the kernels can read: rows dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def units(*tensors: Tensor) -> int:
    """Elements of 16 bytes where the strides and widths of all tensors are multiples of them, else 1."""
    elements = 16 // tensors[0].element_size()
    multiples = all(n % elements == 0 for x in tensors for n in (x.stride(0), x.shape[-1]))
    return elements if multiples else 1
