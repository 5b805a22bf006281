"""Processor, memory, disk and limits: what decides how fast CPU ranks are, and what ends a run early."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..processor import processor_name
from .finding import GIB, Finding, size

BF16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16", "arm_bf16": "Arm BF16"}
VECTORS = {"avx512_f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "neon": "NEON"}  # the widest first
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # bytes; what control groups of version 1 say for none


@dataclass(frozen=True)
class HostFacts:
    processor: str
    cores: int  # that this process may use
    machine_cores: int
    quota: float | None = None  # CPUs that the container may use at a time
    capabilities: frozenset[str] = frozenset()  # as torch names them
    onednn: bool = True
    onednn_bf16: bool | None = None  # whether oneDNN takes bf16 at all; None: it does not say
    threads: str | None = None  # OMP_NUM_THREADS
    memory: int = 0
    memory_limit: int | None = None  # of the container
    memory_free: int = 0
    shared: tuple[int, int] | None = None  # of /dev/shm: all, free
    runs: str = ""  # the folder that runs are written to
    writable: bool = True
    disk_free: int = 0
    open_files: tuple[int, int] = (1024, 4096)  # soft and hard limit
    gpus: int = 0


def look(gpus: int = 0) -> HostFacts:
    import psutil
    import torch

    said = torch.cpu.get_capabilities()
    memory = psutil.virtual_memory()
    folder = Path("runs").absolute()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    shm = Path("/dev/shm")
    used = shutil.disk_usage(shm) if shm.is_dir() else None
    onednn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return HostFacts(
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        machine_cores=os.cpu_count() or 1,
        quota=quota(CGROUP),
        capabilities=frozenset(name for name, there in said.items() if there is True),
        onednn=bool(torch.backends.mkldnn.is_available()),
        onednn_bf16=None if onednn is None else bool(onednn()),
        threads=os.environ.get("OMP_NUM_THREADS"),
        memory=memory.total,
        memory_limit=memory_limit(CGROUP),
        memory_free=memory.available,
        shared=(used.total, used.free) if used else None,
        runs=str(folder),
        writable=os.access(folder, os.W_OK),
        disk_free=shutil.disk_usage(folder).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        gpus=gpus,
    )


def quota(groups: Path) -> float | None:
    """CPUs that a container's control group grants; None: all."""
    if (limit := _text(groups / "cpu.max")) is not None:
        allowed, _, period = limit.partition(" ")
        return None if allowed == "max" else int(allowed) / int(period or 100000)
    allowed, period = (_text(groups / "cpu" / f"cpu.cfs_{name}_us") or "-1" for name in ("quota", "period"))
    return int(allowed) / int(period) if int(allowed) > 0 and int(period) > 0 else None


def memory_limit(groups: Path) -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _text(groups / name)
        if limit is not None and limit.isdigit() and int(limit) < UNLIMITED:
            return int(limit)
    return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def judge(facts: HostFacts) -> Iterator[Finding]:
    yield from _processor_findings(facts)
    yield from _threads(facts)
    yield from _memory(facts)
    yield from _limits(facts)


def _processor_findings(facts: HostFacts) -> Iterator[Finding]:
    vectors = next((name for key, name in VECTORS.items() if key in facts.capabilities), None)
    many = f"{facts.cores} core{'s' * (facts.cores > 1)}"
    of = f" of {facts.machine_cores}" if facts.cores < facts.machine_cores else ""
    here = f"{facts.processor}: {many}{of}, {vectors or 'no vector instructions that torch knows'}"
    if vectors or not facts.capabilities:
        yield Finding("CPU", here)
    else:
        yield Finding("CPU", here, "gap", "train on another machine: without AVX2 every step is slow")
    if not facts.onednn:
        remedy = "install a torch that has oneDNN: the builds of pytorch.org do"
        yield Finding("oneDNN", "this torch has none: bf16 and fp32 products are slow", "gap", remedy)
    units = [name for key, name in BF16.items() if key in facts.capabilities]
    if units:
        yield Finding("bf16 on the CPU", f"in hardware ({units[0]})")
    elif facts.gpus:
        yield Finding("bf16 on the CPU", "not in hardware; the GPUs do the work", "optional")
    else:
        how = "not at all by oneDNN" if facts.onednn_bf16 is False else "emulated"
        yield Finding(
            "bf16 on the CPU",
            f"{how}: a recipe's bf16 steps may well be slower than fp32",
            "gap",
            "time a few steps of both: crossmask train RECIPE training.max_steps=20 training.precision=fp32",
        )


def _threads(facts: HostFacts) -> Iterator[Finding]:
    usable = max(1, min(facts.cores, int(facts.quota))) if facts.quota else facts.cores
    if facts.quota is not None and facts.quota < facts.cores:
        yield Finding(
            "CPU quota",
            f"the container may use {facts.quota:g} CPUs, but {facts.cores} cores are seen: too many threads wait",
            "gap",
            f"on CPU ranks: export OMP_NUM_THREADS={max(1, usable // 2)} (for two ranks)",
        )
    if facts.threads is None:
        return
    count = int(facts.threads) if facts.threads.isdigit() else 0
    if count > usable:
        yield Finding(
            "OMP_NUM_THREADS",
            f"{facts.threads}, more than the {usable} CPUs there are: every rank starts as many",
            "gap",
            "unset OMP_NUM_THREADS; the ranks then share the cores evenly",
        )
    elif not facts.gpus and count < usable // 2:
        yield Finding(
            "OMP_NUM_THREADS",
            f"{facts.threads}: a rank computes with so many threads, though there are {usable} CPUs",
            "gap",
            "unset OMP_NUM_THREADS; the ranks then share the cores evenly",
        )
    else:
        yield Finding("OMP_NUM_THREADS", facts.threads, "optional")


def _memory(facts: HostFacts) -> Iterator[Finding]:
    limited = facts.memory_limit is not None and facts.memory_limit < facts.memory
    total = facts.memory_limit if limited and facts.memory_limit else facts.memory
    here = f"{size(total)}{', the limit of the container' if limited else ''}, {size(facts.memory_free)} free"
    if facts.memory_free < 3 * GIB:
        yield Finding(
            "memory", here, "gap", "close other programs, or lower training.batch_size: crossmask plan says what fits"
        )
    else:
        yield Finding("memory", here)
    if facts.shared is not None:
        total, free = facts.shared
        if free < GIB:
            yield Finding(
                "/dev/shm",
                f"{size(free)} free of {size(total)}; ranks and workers pass data through it, and end in a bus error",
                "gap",
                "start the container with --shm-size=8g or --ipc=host; else mount -o remount,size=8G /dev/shm",
            )
        else:
            yield Finding("/dev/shm", f"{size(free)} free")


def _limits(facts: HostFacts) -> Iterator[Finding]:
    here = f"{size(facts.disk_free)} free in {facts.runs}, where runs are written"
    if not facts.writable:
        remedy = "start crossmask in a folder of yours, or give --output DIR"
        yield Finding("disk", f"{facts.runs}, where runs would go, is not writable", "gap", remedy)
    elif facts.disk_free < 5 * GIB:
        remedy = "make room, or give --output DIR on another disk; training.keep_checkpoints=1 keeps fewer"
        yield Finding("disk", here, "gap", remedy)
    else:
        yield Finding("disk", here)
    soft, hard = facts.open_files
    if 0 <= soft < 1024:
        most = "" if hard < 0 else f" (up to {hard})"
        yield Finding("open files", f"{soft} a process", "gap", f"ulimit -n 4096{most}")
    else:
        yield Finding("open files", "no limit" if soft < 0 else f"{soft} a process")
