"""Programs that the doctor asks: where they are, and what they print, in no more time than it grants them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable

PATIENCE = 5.0  # seconds; a driver that hangs makes its tools hang


def folders() -> str:
    """Where programs are looked for: this Python's own scripts first, as setup.py does."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def find(names: Iterable[str | None]) -> str | None:
    """The first of some programs that is there."""
    return next(filter(None, (shutil.which(name, path=folders()) for name in names if name)), None)


def ask(program: str, *arguments: str) -> str:
    """What a program prints; empty where it cannot start, fails or takes longer than ``PATIENCE``."""
    try:
        ran = subprocess.run(
            [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return ran.stdout if ran.returncode == 0 else ""


def version_of(program: str) -> str:
    """The version number that a build tool prints; empty when it prints none."""
    said = ask(program, "--version")
    found = re.findall(r"\d+(?:\.\d+)+", said)
    return (found[-1] if "nvcc" in said else found[0]) if found else ""


def numbers(version: str) -> tuple[int, ...]:
    """ "12.8.1" -> (12, 8, 1), whatever letters stand around"""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
