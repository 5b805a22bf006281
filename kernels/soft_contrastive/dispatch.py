"""Which implementation of the contrastive loss runs, and why. One that was asked for and cannot run is an error."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Literal, get_args

import torch

Implementation = Literal["triton", "blockwise", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looks for it without importing it


def choose(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation that runs; ``impl`` None picks one.

    Raises:
        ValueError: ``impl`` is unknown or cannot run here, with what can.
    """
    if impl is None:
        return _pick(device.type, dtype)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {impl!r}; choose from {list(IMPLEMENTATIONS)}")
    if impl == "triton":
        _require_triton(device, dtype)
    return impl


def _pick(device_type: str, dtype: torch.dtype) -> str:
    if device_type == "cuda" and dtype in _TRITON_DTYPES:  # ROCm too is called cuda by PyTorch
        if HAS_TRITON:
            return "triton"
        warnings.warn(  # shown once, as warnings are
            "crossmask: soft_contrastive runs in plain PyTorch on this GPU because triton is not installed: "
            "pip install triton",
            stacklevel=4,
        )
    return "blockwise"


def _require_triton(device: torch.device, dtype: torch.dtype) -> None:
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton: pip install triton, or use impl='blockwise'")
    if dtype not in _TRITON_DTYPES:
        raise ValueError(f"impl='triton' takes float32, float16 and bfloat16, not {dtype}; use impl='blockwise'")
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"impl='triton' needs a CUDA or ROCm device, but queries is on {device}: use impl='blockwise', or start "
            "Python with TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter on a CPU"
        )


def implementation(device_type: str) -> str:
    """What ``impl=None`` picks for tensors on this device type; ``crossmask doctor`` shows it."""
    return _pick(device_type, torch.float32)
