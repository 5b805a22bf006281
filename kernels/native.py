"""The native extension: loads it, and says what is missing where it is not there.

Its kernels register themselves under the ops that Python defines, so an op's caller never asks for the extension:
PyTorch's dispatcher picks the native kernel where one is registered, and the op's plain-PyTorch reference elsewhere.
``CROSSMASK_NATIVE=0`` in the environment keeps the extension out, for comparison.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  # before the extension: it links against libraries that this import loads

_FOLDER = Path(__file__).parent
_AGAIN = "then reinstall crossmask (make install, or pip install --no-build-isolation --no-deps .)"


@dataclass(frozen=True)
class NativeStatus:
    """What the extension is on this machine.

    ``reason`` says why there is none, ``cuda_reason`` why it has no CUDA kernels; each is one line with its remedy.
    """

    loaded: bool
    path: Path | None = None
    cuda_architectures: tuple[str, ...] = ()
    reason: str | None = None
    cuda_reason: str | None = None

    def missing(self, device_type: str) -> str | None:
        """Why there are no native kernels for tensors on this device type; None where there are."""
        if not self.loaded:
            return self.reason
        if device_type == "cpu" or (device_type == "cuda" and self.cuda_architectures):
            return None
        return self.cuda_reason if device_type == "cuda" else f"the native extension has no kernels for {device_type}"


@functools.cache
def status() -> NativeStatus:
    """Load the extension, once a process; no GPU is asked for anything."""
    if os.environ.get("CROSSMASK_NATIVE") == "0":
        return NativeStatus(
            loaded=False, reason="the native extension is switched off by CROSSMASK_NATIVE=0 (unset it)"
        )
    report = _build_report()
    try:
        module = importlib.import_module("._C", __package__)
    except ModuleNotFoundError:
        told = (
            report.get("reason")
            or "the native extension was not built (crossmask runs from a folder that was not installed)"
        )
        return NativeStatus(loaded=False, reason=f"{told}; {_AGAIN}")
    except ImportError as error:  # built, but against a torch or a C++ library that this is not
        why = " ".join(str(error).split())
        return NativeStatus(
            loaded=False, reason=f"the native extension does not load ({why}); {_AGAIN.removeprefix('then ')}"
        )
    cuda_reason = f"of the native extension, {report.get('cuda_reason') or 'its CUDA kernels were not built'}; {_AGAIN}"
    architectures = tuple(module.CUDA_ARCHITECTURES.split())
    path = Path(module.__file__) if module.__file__ else None
    return NativeStatus(True, path, architectures, cuda_reason=None if architectures else cuda_reason)


def _build_report() -> dict[str, str | None]:
    """What setup.py wrote about the build; empty where nothing was built."""
    try:
        report: dict[str, str | None] = json.loads((_FOLDER / "_C.json").read_text())
    except (OSError, ValueError):
        return {}
    return report


@functools.cache
def announce(op: str, device_type: str) -> None:
    """Say, once a process, that an op runs by its reference and why; nothing where the native kernel runs."""
    if missing := status().missing(device_type):
        warnings.warn(
            f"crossmask: {op} runs in plain PyTorch on {device_type}: {missing}", RuntimeWarning, stacklevel=3
        )
