"""What the figures were measured on: machine, threads, versions and commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import torch

from crossmask.engine.evaluation import describe_machine

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("flash-attn", "flash-attn-4", "xformers", "ema-pytorch", "open_clip_torch", "timm", "pytest-benchmark")


def describe(device: torch.device) -> dict[str, Any]:
    found = describe_machine()
    features = torch.cpu.get_capabilities()
    return {
        "device": device.type,
        "summary": torch.cuda.get_device_name(device) if device.type == "cuda" else found["summary"],
        "processor": found["processor"],
        "features": [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if features.get(name)],
        "cores": found["cores"],
        "threads": torch.get_num_threads(),
        "memory_gb": found["memory_gb"],
        "gpus": found["gpus"],
        "system": found["system"],
        "versions": found["versions"] | {name: v for name in PEERS if (v := version(name))},
        "commit": commit(),
    }


def line() -> str:
    """The processor, in one line."""
    found = describe(torch.device("cpu"))
    features = ", ".join(found["features"])
    return f"{found['processor']} ({features}), {found['threads']} threads, PyTorch {torch.__version__}"


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout, with "+" where files differ from it; None outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
