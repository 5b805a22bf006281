"""Compiles the CUDA kernel of the moving average for every architecture that ships, without a GPU.

    python benchmarks/prove_ema.py                   # writes benchmarks/static/ema.{csv,md}
    python benchmarks/prove_ema.py --arch sm_90      # prints, writes nothing
    python benchmarks/prove_ema.py --check           # 1 where a figure is worse than in the table; writes nothing

It is csrc/ema_cuda.cu as CMake compiles it, with nvcc; the disassembler is Triton's. Without an nvcc the table stays as
it is. The rules that a row has to keep are ``violations``; tests/test_roofline_static.py holds the committed table to
them. What each thread does, and in which order, is held by tests/test_ema_cuda_static.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ahead_of_time
import proof
import torch

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
THREADS = 256  # a block
BLOCKS = {"nearest": 6, "stochastic": 4}  # that a multiprocessor's registers have to hold: __launch_bounds__
WIDE = {"loads": 4, "stores": 6}  # two each for teacher and student; two forms of teacher and copy
CSRC = proof.ROOT / "csrc"
SOURCES = [CSRC / name for name in ("ema_cuda.cu", "ema_cuda_kernel.h", "ema.h", "ema_math.h", "philox.h")]
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-DTORCH_TARGET_VERSION=0x020d000000000000")


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel and what came out; the columns that every table has, and 128-bit stores."""

    kernel: str
    arch: str
    tensors: int  # that its argument holds
    rounding: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    blocks_per_processor: int
    tensor_memory: int
    matrix: str
    wide_loads: int
    wide_stores: int
    code_bytes: int
    job: str
    source: str  # hash of the sources, the compiler and what reads the figures


def nvcc() -> str | None:
    candidates = (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def violations(row: Row) -> list[str]:
    """What is wrong with a compile; nothing, for what ships."""
    wrong = proof.misfits(row)
    if row.blocks_per_processor < BLOCKS[row.rounding]:
        wrong.append(f"{row.blocks_per_processor} blocks a multiprocessor, wanted {BLOCKS[row.rounding]}")
    if row.wide_loads < WIDE["loads"]:
        wrong.append(f"{row.wide_loads} 128-bit loads, wanted {WIDE['loads']}")
    if row.wide_stores < WIDE["stores"]:
        wrong.append(f"{row.wide_stores} 128-bit stores, wanted {WIDE['stores']}")
    return wrong


def order(row: Row) -> tuple[Any, ...]:
    return ARCHITECTURES.index(row.arch), row.tensors, row.rounding


def line(row: Row) -> str:
    return f"{row.kernel} {row.arch} {row.tensors} tensors, {row.rounding}"


def summary(rows: Sequence[Row]) -> str:
    """The table for people."""
    text = [
        "# What the compiler makes of the moving average's CUDA kernel",
        "",
        "`python benchmarks/prove_ema.py` wrote this without a GPU, so nothing here is a time. Every figure is in "
        "[ema.csv](ema.csv).",
        "`tensors`: how many one launch takes; `registers` of a thread, `spill` bytes, `blocks` of 256 threads that",
        "fit a multiprocessor, loads and stores of 128 bits in the code, its KiB. No shared memory, no barrier.",
        "",
        "| architecture | tensors | rounding | registers | spill | blocks | 128-bit loads | 128-bit stores | code |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    text += [
        f"| {row.arch} | {row.tensors} | {row.rounding} | {row.registers} | {row.spill_bytes} "
        f"| {row.blocks_per_processor} | {row.wide_loads} | {row.wide_stores} | {row.code_bytes / 1024:.1f} |"
        for row in rows
    ]
    return "\n".join(text) + "\n"


PROOF: proof.Proof[Row] = proof.Proof(
    name="ema",
    script="prove_ema.py",
    row=Row,
    sources=[*SOURCES, proof.ROOT / "benchmarks/prove_ema.py"],
    describe=line,
    violations=violations,
    order=order,
    summary=summary,
)


def source(compiler: str) -> str:
    """What the figures depend on; rows with this one need no compile."""
    release = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return hashlib.sha256((release + PROOF.fingerprint()).encode()).hexdigest()[:12]


def compiled(compiler: str, arch: str) -> list[Row]:
    """The kernels of one architecture. Raises CalledProcessError where nvcc refuses, with what it says on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "ema.cubin"
        include = ["-isystem", str(Path(torch.__file__).parent / "include")]
        command = [compiler, *FLAGS, *include, f"-arch={arch}", "-cubin", str(CSRC / "ema_cuda.cu"), "-o", str(cubin)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(f"nvcc does not compile csrc/ema_cuda.cu for {arch}: {ran.stderr.strip()[-2000:]}")
        disassembled = subprocess.run(
            [ahead_of_time.NVDISASM, "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    code = {part.split(",", 1)[0]: part for part in disassembled.split(".section\t.text.")[1:]}
    made_from = source(compiler)
    return [
        _row(arch, part, code, made_from) for part in (ran.stdout + ran.stderr).split("Compiling entry function '")[1:]
    ]


def _row(arch: str, report: str, code: dict[str, str], made_from: str) -> Row:
    function = report.split("'", 1)[0]
    tensors, stochastic = re.search(r"ema_update_kernelILi(\d+)ELb(\d)E", function).groups()  # type: ignore[union-attr]
    text = code[function]
    names = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text, re.MULTILINE)
    found = ahead_of_time._count(Counter(name for _, name in names))
    found.registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    shared = re.search(r"(\d+) bytes smem", report)
    found.spill, found.shared = sum(map(int, spilled.groups())), int(shared[1]) if shared else 0  # type: ignore[union-attr]
    return Row(
        "ema_update",
        arch,
        int(tensors),
        "stochastic" if stochastic == "1" else "nearest",
        found.registers,
        found.spill,
        found.shared,
        1024 * ahead_of_time.PROCESSORS[arch].shared_block,
        ahead_of_time._blocks(found, THREADS // 32, arch),
        0,
        "",
        found.wide_loads,
        sum(name.startswith("STG.E.128") for _, name in names),
        int(names[-1][0], 16) + 16,
        hashlib.sha256(f"{arch} {tensors} {stochastic} {FLAGS}".encode()).hexdigest()[:16],
        made_from,
    )


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proof.arguments(parse)
    parse.add_argument("--arch", action="append", default=[], choices=ARCHITECTURES)
    options = parse.parse_args()
    compiler = nvcc()
    if compiler is None:
        print("no nvcc was found (install the CUDA toolkit, or set CUDACXX): benchmarks/static/ema.csv stays as it is")
        return 0
    archs = options.arch or ARCHITECTURES
    committed, made_from = PROOF.committed(), source(compiler)
    rows: list[Row] = []
    for arch in archs:
        before = [] if options.fresh else [row for row in committed if (row.arch, row.source) == (arch, made_from)]
        rows += before or compiled(compiler, arch)
    rows.sort(key=order)
    bad = [f"{line(row)}: {'; '.join(wrong)}" for row in rows if (wrong := violations(row))]
    print(*bad, sep="\n", end="\n" if bad else "")
    return max(int(bool(bad)), PROOF.settle(rows, committed, not options.arch, options))


if __name__ == "__main__":
    sys.exit(main())
