"""ALBEF's largest linear layers in float32 on a CPU, against PyTorch's own; elsewhere they are PyTorch's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels.linear import linear
from crossmask.kernels.linear.api import implementation
from crossmask.kernels.roofline import linear as needed
from crossmask.kernels.roofline import linear_backward

from ..cases import Case
from ..problem import Implementation, Outputs, Problem

SIZES = {  # rows, in, out; of a batch of 8 images of 257 tokens, and of 8 sentences of 30
    "ViT-B/16 MLP, up": (2056, 768, 3072),
    "BERT MLP, up": (240, 768, 3072),
}
NAMES = ("crossmask", "F.linear")


def solve(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    return {"output": linear(x, weight, bias)}


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    return {"output": F.linear(x, weight, bias)}


def problem(shape: str, size: tuple[int, int, int], device: torch.device) -> Problem:
    rows, inputs, outputs = size
    thrice = linear_backward(*size, "fp32")  # which reads the output's gradient for each of three gradients
    return Problem(
        op="linear",
        shape=shape,
        size=f"{rows} x {inputs} -> {outputs}",
        what="",
        inputs=(
            torch.randn(rows, inputs, device=device),
            torch.randn(outputs, inputs, device=device) / inputs**0.5,
            torch.randn(outputs, device=device),
        ),
        reference=plain,
        plain=plain,
        implementations=[
            Implementation("crossmask", lambda: solve, ours=True, note=implementation(device.type)),
            Implementation("F.linear", lambda: plain),
        ],
        work={"forward": needed(*size, "fp32"), "backward": replace(thrice, kept=2.0 * 4 * rows * outputs)},
        upstream={"output": torch.randn(rows, outputs, device=device)},
    )


def cases(device: str) -> Iterator[Case]:
    if device != "cpu":
        return
    for shape, size in SIZES.items():
        build = functools.partial(problem, shape, size)
        yield Case("linear", shape, "", "fp32", ("forward", "backward", "both"), NAMES, build)
