"""Which implementation of topk_mask runs. One that was asked for and cannot run is an error."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, get_args

import torch

from .. import native

Implementation = Literal["native", "triton", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
TRITON_POSITIONS = 16384  # a program holds its whole row
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looks for it without importing it


def _no_native() -> str | None:
    return native.status().missing("cpu")


# What torch.compiler.assume_constant_result sets, without importing the compiler, and Triton with it, for everybody:
# torch.compile would trace into what loads the extension.
_no_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(impl: str | None, device: torch.device, positions: int) -> str:
    """The name of the implementation that runs; ``impl`` None picks one.

    Raises:
        ValueError: ``impl`` is unknown or cannot run, with what can.
    """
    if impl is None:
        impl = _pick(device.type)
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {impl!r}; choose from {list(IMPLEMENTATIONS)}")
    elif impl == "native":
        if device.type != "cpu":
            raise ValueError(f"impl='native' runs on CPUs, but scores are on {device}: leave impl out")
        if missing := _no_native():
            raise ValueError(f"impl='native': {missing}; or use impl='reference'")
    elif impl == "triton":
        _require_triton(device)
    if impl == "triton" and positions > TRITON_POSITIONS:
        raise ValueError(
            f"impl='triton' takes at most {TRITON_POSITIONS} positions in a row, got {positions}: "
            "use impl='reference', or move scores to the CPU"
        )
    return impl


def _pick(device_type: str) -> str:
    if device_type == "cpu":
        return "reference" if _no_native() else "native"
    return "triton" if device_type == "cuda" and HAS_TRITON else "reference"  # ROCm too is called cuda by PyTorch


def _require_triton(device: torch.device) -> None:
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton: pip install triton, or use impl='reference'")
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"impl='triton' needs a CUDA or ROCm device, but scores are on {device}: leave impl out, or start Python "
            "with TRITON_INTERPRET=1 to run the kernel slowly in Triton's interpreter on a CPU"
        )


@functools.cache
def announce(device_type: str) -> None:
    """Say, once a process, that the reference runs and what is missing; sorts cost many times the selection."""
    if device_type == "cpu":
        native.announce("topk_mask", device_type)
    elif device_type == "cuda":
        warnings.warn(
            "crossmask: topk_mask runs in plain PyTorch on this GPU because triton is not installed: "
            "pip install triton",
            RuntimeWarning,
            stacklevel=3,
        )


def implementation(device_type: str) -> str:
    """What ``impl=None`` picks for tensors on this device type; ``crossmask doctor`` shows it."""
    return _pick(device_type)
