"""Which implementation of cross-attention runs, and why. One that was asked for and cannot run is an error."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Collection
from typing import Literal, get_args

import torch

Implementation = Literal["triton", "blockwise", "sdpa", "eager", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
PLAIN = ("sdpa", "eager")  # PyTorch's own attention: no statistics, no seeded dropout
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looks for it without importing it


def choose(
    impl: str | None,
    device: torch.device,
    dtype: torch.dtype,
    statistics: Collection[str],
    dropout_p: float,
    seeded: bool = True,
) -> str:
    """The name of the implementation that runs; ``impl`` None picks one.

    Args:
        seeded: whether a seed says which weights drop, or any draw will do.

    Raises:
        ValueError: ``impl`` is unknown or cannot do what is asked, with what can.
    """
    if impl is None:
        if dropout_p and not seeded and not statistics and device.type == "cpu":
            # PyTorch's own draws, which cost a few percent. Forward and backward at (8, 12, 50, 257, 64) on one core of
            # an EPYC with AVX512-BF16, fp32 / bfloat16: eager 26 / 16 ms, sdpa with dropout 27 / 31, blockwise 36 / 28.
            return "eager"
        return _pick(device.type, dtype, bool(statistics) or dropout_p > 0)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {impl!r}; choose from {list(IMPLEMENTATIONS)}")
    if impl in PLAIN and statistics:
        raise ValueError(f"impl={impl!r} cannot give statistics {sorted(statistics)}; leave impl out, or 'blockwise'")
    if impl in PLAIN and dropout_p and (seeded or impl == "sdpa"):
        raise ValueError(f"impl={impl!r} has no seeded dropout; leave impl out, or 'blockwise'")
    if impl == "triton":
        _require_triton(device, dtype)
    return impl


def _pick(device_type: str, dtype: torch.dtype, more_than_output: bool) -> str:
    if device_type == "cuda" and dtype in _TRITON_DTYPES:  # ROCm too is called cuda by PyTorch
        if HAS_TRITON:
            return "triton"
        warnings.warn(  # shown once, as warnings are
            "crossmask: cross_attention runs in plain PyTorch on this GPU because triton is not installed: "
            "pip install triton",
            stacklevel=4,
        )
    if more_than_output:
        return "blockwise"
    # PyTorch's fused CPU attention has no half-precision matrix products in its backward: 39 ms against 4 ms for plain
    # bfloat16 products at (192, 4, 16, 37, 32) on one core of an EPYC with AVX512-BF16.
    return "eager" if device_type == "cpu" and dtype in (torch.bfloat16, torch.float16) else "sdpa"


def _require_triton(device: torch.device, dtype: torch.dtype) -> None:
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton: pip install triton, or use impl='blockwise'")
    if dtype not in _TRITON_DTYPES:
        raise ValueError(f"impl='triton' takes float32, float16 and bfloat16, not {dtype}; use impl='blockwise'")
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        raise ValueError(
            f"impl='triton' needs a CUDA or ROCm device, but q is on {device}: use impl='blockwise', or start Python "
            "with TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter on a CPU"
        )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def implementation(device_type: str) -> str:
    """In words, what ``impl=None`` picks for tensors on this device type; ``crossmask doctor`` shows it."""
    plain, half, told = (
        _pick(device_type, *wanted)
        for wanted in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    )
    if plain == half == told:
        return plain
    without = plain if plain == half else f"{plain} ({half} in half precision)"
    return f"{without}, with statistics {told}"
