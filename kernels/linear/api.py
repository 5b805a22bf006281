"""y = x Wᵀ + b in float32 on CPUs whose matrix units PyTorch's default library leaves half unused.

PyTorch multiplies float32 matrices on x86 with MKL, which keeps to 256-bit instructions on AMD's processors. oneDNN,
which PyTorch carries as well and uses for bfloat16, takes their 512-bit ones: on one core of an EPYC (Zen 5), MKL /
oneDNN at (2056, 768) x (768, 3072) and its gradients 106 / 220, 109 / 232 (of x) and 107 / 167 (of W) GFLOP/s. The
products are float32 sums of float32 terms either way. ``CROSSMASK_LINEAR=torch`` in the environment keeps to PyTorch's
choice, for comparison.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Multiply-adds below which Python's share of the work outweighs what is won: about 40 µs of MKL's time.
SMALLEST = 2**21


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: (..., in), (out, in), (out,) -> (..., out), with the same gradients.

    oneDNN's float32 products where :func:`applies` says so and the problem is not small; else, and for any other dtype
    or device, under autocast and in compiled code, PyTorch's own call.

    Which autograd node a product becomes never depends on how many rows there are: ranks differ in that, and ZeRO
    stage 2 adds up gradients in the order in which they arrive, which has to be the same on every rank.
    """
    if (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and weight.dtype is torch.float32
        and applies()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.layout is torch.strided
    ):
        found: Tensor = _Linear.apply(x, weight, bias)
        return found
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.t()) if of_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.numel() * len(weight) < SMALLEST:
        return F.linear(x, weight, bias)
    rows = _matrix(x.flatten(0, -2))
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, _matrix(weight), bias, "none", [], "")
    return found.view(*x.shape[:-1], len(weight))


def _matrix(x: Tensor) -> Tensor:
    """As oneDNN can read it: by rows or by columns."""
    return x if 1 in x.stride() else x.contiguous()


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_linear(module: nn.Module) -> None:
    """Every ``nn.Linear`` in ``module``, those of libraries included, multiplies by :func:`linear` from now on.

    Names, weights and ``isinstance(..., nn.Linear)`` stay. Subclasses are left as they are.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


@functools.cache
def applies() -> bool:
    """Whether this machine's float32 products are faster in oneDNN: an x86 of AMD's with AVX-512, and PyTorch on MKL.
    By how much, the generation decides: docs/performance.md has two.

    It asks for the machine, not for a stopwatch, so that all ranks and a resumed run answer alike.
    """
    return (
        os.environ.get("CROSSMASK_LINEAR") != "torch"
        and platform.machine().lower() in ("x86_64", "amd64")
        and _vendor() == "AuthenticAMD"
        and bool(torch.cpu.get_capabilities().get("avx512_f"))
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def implementation(device_type: str) -> str:
    """In words, what runs for tensors on this device type; ``crossmask doctor`` shows it."""
    return "oneDNN in float32, else PyTorch's" if device_type == "cpu" and applies() else "PyTorch's"
