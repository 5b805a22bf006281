"""The CUDA kernel of ema_update_ as the compiler makes it, for every architecture that ships; no GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
REGISTERS = {
    "nearest": 40,
    "stochastic": 64,
}  # six and four blocks of 256 threads in the 65536 registers of a processor


@dataclass(frozen=True)
class Kernel:
    arch: str
    tensors: int  # that the argument holds
    rounding: str
    registers: int
    report: str  # of ptxas
    code: tuple[str, ...]  # SASS, an instruction a line, without addresses and predicates

    def count(self, instruction: str) -> int:
        return sum(line.split()[0] == instruction for line in self.code)

    def name(self) -> str:
        return f"{self.arch}, {self.tensors} tensors, {self.rounding}"


def _tool(name: str, *candidates: str | None) -> str:
    import triton  # brings the disassembler where the toolkit has none

    bundled = str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
    found = next(filter(None, map(shutil.which, filter(None, [*candidates, name, bundled]))), None)
    if found is None:
        pytest.skip(f"no {name} was found (install the CUDA toolkit)")
    return found


def _architectures(nvcc: str) -> list[str]:
    """Those of CMakeLists.txt that this compiler knows."""
    text = (ROOT / "CMakeLists.txt").read_text()
    known = set(subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split())
    named = re.findall(r"(?:set|APPEND)[( ]+?CROSSMASK_CUDA_ARCHITECTURES ([\d ]+)\)", text)
    return [arch for numbers in named for arch in numbers.split() if f"sm_{arch}" in known]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    nvcc = _tool("nvcc", os.environ.get("CUDACXX"), "/usr/local/cuda/bin/nvcc")
    disassembler = _tool("cuobjdump", str(Path(nvcc).parent / "cuobjdump"))
    binary = tmp_path_factory.mktemp("static") / "ema.fatbin"
    architectures = _architectures(nvcc)
    flags = [
        "-std=c++17",
        "-O3",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        "-DTORCH_TARGET_VERSION=0x020d000000000000",
    ]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include")]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    source = ROOT / "csrc/ema_cuda.cu"
    ran = subprocess.run([nvcc, *flags, "-fatbin", source, "-o", binary], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    sass = subprocess.run([disassembler, "-sass", binary], capture_output=True, text=True, check=True).stdout
    code = {}
    for part in re.split(r"^arch = ", sass, flags=re.MULTILINE)[1:]:
        for function in part.split("Function : ")[1:]:
            lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][^;]*);", function)
            code[part.split()[0], function.split()[0]] = tuple(lines)
    found = []
    for part in (ran.stdout + ran.stderr).split("Compiling entry function '")[1:]:
        function, arch = re.match(r"(\S+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        tensors, stochastic = re.search(r"ema_update_kernelILi(\d+)ELb(\d)E", function).groups()  # type: ignore[union-attr]
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        rounding = "stochastic" if stochastic == "1" else "nearest"
        found.append(Kernel(arch, int(tensors), rounding, registers, part, code[arch, function]))
    assert sorted({kernel.arch for kernel in found}) == sorted(f"sm_{arch}" for arch in architectures)
    assert len(found) == 4 * len(architectures)
    return found


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        print(f"{kernel.name()}: {kernel.registers} registers, {len(kernel.code)} instructions")
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.report, kernel.name()
        assert not [line for line in kernel.code if line.startswith(("LDL", "STL"))], kernel.name()
        assert kernel.registers <= REGISTERS[kernel.rounding], kernel.name()


def test_aligned_tensors_move_by_128_bits(kernels: list[Kernel]) -> None:
    """Two loads each for teacher and student; a float32 and a 16-bit way for what is stored, teacher and copy."""
    for kernel in kernels:
        assert kernel.count("LDG.E.128") >= 4, kernel.name()
        assert kernel.count("STG.E.128") >= 6, kernel.name()
        assert kernel.count("LDG.E.U16") >= 16, kernel.name()  # and the scalar way is there


def test_every_wide_load_is_under_way_before_one_is_used(kernels: list[Kernel]) -> None:
    """Else a thread would wait for its student before it asks for its teacher."""
    for kernel in kernels:
        wide = [i for i, line in enumerate(kernel.code) if line.startswith("LDG.E.128")]
        arriving: set[str] = set()
        for line in kernel.code[wide[0] : wide[-1] + 1]:
            target, _, sources = line.partition(",")
            used = set(re.findall(r"\bR\d+", target if line.startswith("STG") else "") + re.findall(r"\bR\d+", sources))
            assert not used & arriving, (kernel.name(), line)
            if line.startswith("LDG.E.128"):
                first = int(re.search(r"R(\d+)$", target)[1])  # type: ignore[index]
                arriving |= {f"R{first + i}" for i in range(4)}


def test_no_multiplication_is_fused_with_an_addition(kernels: list[Kernel]) -> None:
    """As on the CPU, each operation of the formula is rounded by itself."""
    for kernel in kernels:
        assert not [line for line in kernel.code if re.match(r"(FFMA|DFMA)", line)], kernel.name()
        # a move of a constant, which some architectures write this way, is no arithmetic
        fused = [line for line in kernel.code if line.startswith("HFMA2") and "-RZ, RZ" not in line]
        assert not fused, (kernel.name(), fused)
        assert kernel.count("FMUL") >= 16, kernel.name()  # eight elements, two forms of the formula
        assert kernel.count("FADD") >= 32, kernel.name()


def test_nothing_waits_for_other_threads(kernels: list[Kernel]) -> None:
    """No barrier, no shared memory, no atomics: which is why running the threads one by one proves what they do."""
    for kernel in kernels:
        assert "used 0 barriers" in kernel.report, kernel.name()
        shared = [line for line in kernel.code if re.match(r"(BAR\b|LDS|STS|ATOM|RED\b|SHFL|MEMBAR)", line)]
        assert not shared, (kernel.name(), shared)
