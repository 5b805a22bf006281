"""On what a run ran: the machine and the versions, for the display's first lines and the report's last."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from ..processor import processor_name

PACKAGES = ("crossmask", "torch", "deepspeed", "timm", "transformers", "numpy")


def describe_machine(ranks: int = 1) -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPUs and versions, with a one-line ``summary``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    processor = processor_name()
    cpu = f"{cores} CPU core{'s' if cores != 1 else ''} ({processor})"
    same = len(set(gpus)) == 1
    summary = f"{len(gpus)} x {gpus[0]}" if same else ", ".join(gpus) or cpu
    return {
        "summary": summary,
        "processor": processor,
        "cores": cores,
        "memory_gb": _memory_gb(),
        "gpus": gpus,
        "ranks": ranks,
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := _version(p))}},
    }


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
