"""Compiles a Triton kernel for a GPU that is not there, and reads off what the compiler made of it.

Specialisation (types, divisibility by 16, ones) is left to the JIT's own functions, so that what is compiled is what a
launch with these arguments would compile. The tools are those that Triton ships: ptxas, nvdisasm and LLVM. Not under
TRITON_INTERPRET, which replaces the kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
MATRIX = {  # instruction in the disassembly: what the table calls it
    "HMMA": "HMMA",  # a warp's, 16 rows
    "HGMMA": "HGMMA",  # Hopper: four warps', 64 rows
    "UTCHMMA": "UTCHMMA",  # datacentre Blackwell: 64 or 128 rows, accumulators in tensor memory
    "v_mfma": "MFMA",
}
WIDE_LOADS = (
    "LDG.E.128",
    "LDGSTS.E.128",
    "LDGSTS.E.BYPASS.128",
    "UTMALDG",
    "global_load_dwordx4",
    "buffer_load_dwordx4",
)


@dataclass(frozen=True)
class Processor:
    """What a multiprocessor (compute unit) has: CUDA C++ programming guide, compute capabilities; CDNA 3 ISA."""

    shared: int  # KiB it shares among its blocks
    shared_block: int  # KiB one block may have
    warps: int  # it can hold
    registers: int = 65536


PROCESSORS = {
    "sm_80": Processor(164, 163, 64),
    "sm_86": Processor(100, 99, 48),
    "sm_89": Processor(100, 99, 48),
    "sm_90": Processor(228, 227, 64),
    "sm_100": Processor(228, 227, 64),
    "sm_120": Processor(100, 99, 48),
    "gfx942": Processor(64, 64, 32, 131072),  # four SIMDs of 512 registers a lane, 64 lanes a wave
}


@dataclass(frozen=True)
class Job:
    """A kernel and all that decides what the compiler makes of it; plain data, to hand to another process."""

    kernel: str  # module:name
    arch: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[Any]]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass
class Figures:
    registers: int = 0  # a thread's; on AMD vector registers, accumulators included
    spill: int = 0  # bytes a thread stores to and loads from memory for want of registers
    shared: int = 0  # bytes a block
    shared_limit: int = 0
    ctas: int = 0  # blocks that fit a multiprocessor
    tensor_memory: int = 0  # columns of the 512
    matrix: dict[str, int] = field(default_factory=dict)
    wide_loads: int = 0
    code: int = 0  # bytes
    seconds: float = 0.0


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def specialise(kernel: Any, arguments: dict[str, Any], arch: str, warps: int, stages: int) -> Job:
    """What the JIT would compile for a launch with ``arguments``; tensors may be on the meta device."""
    backend = make_backend(target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": warps, "num_stages": stages}
    bound, specialisation, _ = bind(**arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialisation, None)
    names = list(bound)
    return Job(
        f"{kernel.fn.__module__}:{kernel.fn.__name__}",
        arch,
        signature,
        {names[path[0]]: value for path, value in constants.items()},
        attributes,
        warps,
        stages,
    )


def compile(job: Job, kernel: Any) -> Figures:
    start = time.monotonic()
    constants = {(list(job.signature).index(name),): value for name, value in job.constants.items()}
    source = ASTSource(kernel, job.signature, constants, job.attributes)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = cache  # a hit would bring no log
        triton.knobs.nvidia.dump_ptxas_log = True  # printed
        with contextlib.redirect_stdout(log):
            options = {"num_warps": job.warps, "num_stages": job.stages}
            compiled = triton.compile(source, target=target(job.arch), options=options)
        found = (
            _amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia(compiled.asm["cubin"], log.getvalue())
        )
    processor = PROCESSORS[job.arch]
    found.shared = compiled.metadata.shared
    found.shared_limit = 1024 * processor.shared_block
    found.tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    found.ctas = _blocks(found, compiled.metadata.num_warps, job.arch)
    found.seconds = time.monotonic() - start
    return found


def _nvidia(cubin: bytes, log: str) -> Figures:
    """From ptxas's own report of the run that made ``cubin``, and from its disassembly."""
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    if not spilled or not used:
        raise RuntimeError(f"ptxas said nothing of registers: {log!r}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text, re.MULTILINE)
    found = _count(Counter(name for _, name in names))
    found.registers, found.spill = int(used[1]), int(spilled[1]) + int(spilled[2])
    found.code = int(names[-1][0], 16) + 16
    return found


def _amd(assembly: str) -> Figures:
    found = _count(Counter(re.findall(r"^\s+([a-z][a-z0-9_]+)", assembly, re.MULTILINE)))

    def number(pattern: str) -> int:
        return int(re.search(pattern, assembly)[1])  # type: ignore[index]

    found.registers = number(r"\.vgpr_count:\s+(\d+)")
    found.spill = max(4 * number(r"\.vgpr_spill_count:\s+(\d+)"), number(r"\.private_segment_fixed_size:\s+(\d+)"))
    found.code = number(r"codeLenInByte = (\d+)")
    return found


def _count(instructions: Counter[str]) -> Figures:
    found = Figures()
    for name, times in instructions.items():
        base = name.split(".")[0]
        for prefix, kind in MATRIX.items():
            if base == prefix or (prefix.islower() and base.startswith(prefix)):
                found.matrix[kind] = found.matrix.get(kind, 0) + times
        found.wide_loads += times * name.startswith(WIDE_LOADS)
    return found


def _blocks(found: Figures, warps: int, arch: str) -> int:
    """Blocks a multiprocessor can hold, by registers, shared memory, warps and tensor memory."""
    processor = PROCESSORS[arch]
    lanes, granule = (32, 8) if arch.startswith("sm_") else (64, 8)
    per_warp = -(-max(found.registers, 1) // granule) * granule * lanes
    limits = [processor.registers // per_warp // warps, processor.warps // warps, 32]
    if found.shared:
        reserved = 1024 if arch.startswith("sm_") else 0
        limits.append(processor.shared * 1024 // (found.shared + reserved))
    if found.tensor_memory:
        limits.append(512 // found.tensor_memory)
    return min(limits)
