"""ema_update_'s CPU kernel on another processor: compiled for AArch64, whose vectors are NEON's, and run by QEMU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NATIVE, CROSS, RUNNER = "g++", "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not all(map(shutil.which, (NATIVE, CROSS, RUNNER))),
    reason=f"needs {NATIVE}, {CROSS} and {RUNNER} (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)",
)
def test_neon_computes_the_same_bits(tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-Wall", "-Werror", "-static", f"-I{ROOT / 'csrc'}"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include"), "-DTORCH_TARGET_VERSION=0x020d000000000000"]
    printed = []
    for compiler, runner in ((NATIVE, []), (CROSS, [RUNNER])):
        program = tmp_path / compiler
        subprocess.run([compiler, *flags, ROOT / "tests/ema_cpu_digest.cpp", "-o", program], check=True)
        printed.append(
            subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout.splitlines()
        )
    here, there = printed
    assert len(set(here)) == 3 * 3 * 4
    assert there == here
