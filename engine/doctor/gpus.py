"""GPUs: which there are, whether this torch and its driver can use them, and what of them the environment hides."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import programs
from .finding import GIB, Finding, quietly, size

SELECTING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# the oldest driver whose libraries run a CUDA of this major version, by minor-version compatibility
OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
QUERY = ("name", "driver_version", "memory.total", "memory.used", "mig.mode.current")


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: str  # "sm_90", "gfx942"
    memory: int  # bytes


@dataclass(frozen=True)
class Listed:
    """A GPU as ``nvidia-smi`` lists it, whether or not torch can use it."""

    name: str
    driver: str
    memory: int  # bytes
    used: int
    mig: bool


@dataclass(frozen=True)
class GpuFacts:
    torch: str
    built_for: str | None  # "CUDA 13.0" or "ROCm 7.0"; None: a CPU build
    code_for: tuple[str, ...] = ()  # architectures that torch has machine code for
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None  # what torch says where it can use none
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA that the driver runs
    listed: tuple[Listed, ...] = ()
    files: tuple[str, ...] = ()  # of devices, under /dev
    readable: bool = True  # whether this user may open those of AMD
    bf16: bool = False
    nccl: str | None = None
    apart: tuple[tuple[int, int], ...] = ()  # pairs of GPUs that cannot read each other's memory
    selected: tuple[tuple[str, str], ...] = ()  # variables of SELECTING that are set


def look() -> GpuFacts:
    import torch

    hip = getattr(torch.version, "hip", None)
    files = tuple(path for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd") if Path(path).exists())
    facts = GpuFacts(
        torch.__version__,
        f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else None,
        driver_cuda=None if hip else driver_cuda(),
        listed=listed(),
        files=files,
        readable="/dev/kfd" not in files or os.access("/dev/kfd", os.R_OK | os.W_OK),
        selected=tuple((name, os.environ[name]) for name in SELECTING if name in os.environ),
    )
    if facts.built_for is None:
        return facts
    told = quietly(torch.cuda.init)
    count = 0 if told is not None else torch.cuda.device_count()
    if not count:
        return replace(facts, error=str(told or "it finds no GPU"))
    code = quietly(torch.cuda.get_arch_list)
    nccl = quietly(torch.cuda.nccl.version)
    reach = torch.cuda.can_device_access_peer
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j] if count <= 16 else []
    return replace(
        facts,
        code_for=tuple(code) if isinstance(code, list) else (),
        gpus=tuple(_describe(i, bool(hip)) for i in range(count)),
        bf16=quietly(lambda: torch.cuda.is_bf16_supported(including_emulation=False)) is True,
        nccl=".".join(map(str, nccl)) if isinstance(nccl, tuple) else None,
        apart=tuple((i, j) for i, j in pairs if quietly(partial(reach, i, j)) is False),
    )


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that NVIDIA's driver runs, asked of the driver itself; no GPU is initialised."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or version.value < 1000 else (version.value // 1000, version.value % 1000 // 10)


def _describe(index: int, hip: bool) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    sm = f"sm_{properties.major}{properties.minor}"
    return Gpu(properties.name, properties.gcnArchName.split(":")[0] if hip else sm, properties.total_memory)


def listed() -> tuple[Listed, ...]:
    """What ``nvidia-smi`` lists; empty where there is none."""
    program = programs.find(["nvidia-smi"])
    return read_listed(
        programs.ask(program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits") if program else ""
    )


def read_listed(said: str) -> tuple[Listed, ...]:
    """A line for each GPU; a number that it does not know counts as 0."""

    def mebibytes(text: str) -> int:
        return int(text) * 2**20 if text.isdigit() else 0

    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines()]
    return tuple(
        Listed(name, driver, mebibytes(memory), mebibytes(used), mig == "Enabled")
        for name, driver, memory, used, mig in (row for row in rows if len(row) == len(QUERY))
    )


def judge(facts: GpuFacts) -> Iterator[Finding]:
    if not facts.gpus:
        yield from _none(facts)
        return
    kinds = {gpu: facts.gpus.count(gpu) for gpu in facts.gpus}
    told = [f"{n} × {gpu.name} ({gpu.architecture}, {size(gpu.memory)})" for gpu, n in kinds.items()]
    yield Finding("GPUs", "; ".join(told))
    if len(kinds) > 1:
        yield Finding(
            "different GPUs",
            "each step waits for the slowest, and the batch has to fit the smallest",
            "gap",
            f"name the equal ones: CUDA_VISIBLE_DEVICES={','.join(map(str, _alike(facts)))} crossmask train …",
        )
    yield from _driver(facts)
    old = sorted({gpu.architecture for gpu in facts.gpus if not has_code(facts.code_for, gpu.architecture)})
    if old:
        yield Finding(
            "GPU code of torch",
            f"torch {facts.torch} has none for {', '.join(old)}, only for {' '.join(facts.code_for)}",
            "broken",
            "hide these GPUs with CUDA_VISIBLE_DEVICES, or install a torch that was built for them",
        )
    if facts.bf16:
        yield Finding("bf16", "yes, in hardware")
    else:
        yield Finding(
            "bf16",
            "not in hardware: the recipes' bf16 steps are emulated, which is slow",
            "gap",
            "train with training.precision=fp16 or fp32",
        )
    yield from _busy(facts)
    yield from _selection(facts)
    if any(row.mig for row in facts.listed) or any("MIG" in gpu.name for gpu in facts.gpus):
        yield Finding(
            "MIG",
            "is on: a process sees one slice of a GPU, so only one rank runs, and slices cannot speak over NCCL",
            "gap",
            "for several ranks switch MIG off (nvidia-smi -mig 0, as root)",
        )
    if len(facts.gpus) > 1:
        yield from _together(facts)


def _driver(facts: GpuFacts) -> Iterator[Finding]:
    drivers = ", ".join(dict.fromkeys(row.driver for row in facts.listed))
    runs = f"runs CUDA up to {facts.driver_cuda[0]}.{facts.driver_cuda[1]}" if facts.driver_cuda else ""
    said = ", ".join(filter(None, [drivers, runs]))
    yield Finding("GPU driver", f"{said or 'present'}; torch is built for {facts.built_for}")


def _none(facts: GpuFacts) -> Iterator[Finding]:
    """Why there is no GPU to train on."""
    hidden = [f"{name}={value!r}" for name, value in facts.selected if value.strip() in ("", "-1", "NoDevFiles")]
    there = ", ".join(dict.fromkeys(row.name for row in facts.listed)) or ", ".join(facts.files)
    cpu = "training runs as CPU ranks"
    amd = "/dev/kfd" in facts.files
    if hidden:
        names = " ".join(entry.partition("=")[0] for entry in hidden)
        yield Finding("GPUs", f"hidden by {', '.join(hidden)}; {cpu}", "gap", f"to use GPUs: unset {names}")
    elif not there:
        yield Finding("GPUs", f"none; {cpu}")
    elif facts.built_for is None:
        kind = "ROCm" if amd and not facts.listed else "CUDA"
        remedy = (
            f"install the {kind} build of torch {facts.torch.split('+')[0]} (see pytorch.org), then make install again"
        )
        yield Finding("GPUs", f"{there}, but torch {facts.torch} is a CPU build; {cpu}", "gap", remedy)
    elif amd and not facts.readable:
        yield Finding(
            "GPUs",
            f"{there}, which this user may not open; {cpu}",
            "gap",
            "join the groups that own it: sudo usermod -aG render,video $USER, then log in again",
        )
    elif driver_is_old(facts):
        major = int(facts.built_for.split()[1].split(".")[0])
        have = ".".join(map(str, facts.driver_cuda or ()))
        driver = facts.listed[0].driver if facts.listed else "the installed one"
        yield Finding(
            "GPUs",
            f"{there}, but the driver ({driver}, up to CUDA {have}) is too old for torch's {facts.built_for}; {cpu}",
            "gap",
            f"update NVIDIA's driver to {OLDEST_DRIVER.get(major, 'the newest')} or newer",
        )
    else:
        remedy = "see that nvidia-smi lists it; in a container start it with --gpus all; reboot after a driver's update"
        if amd:
            remedy = "see that rocminfo lists it; in a container give it --device /dev/kfd --device /dev/dri"
        yield Finding("GPUs", f"{there}, but torch cannot use it: {_short(facts.error)}; {cpu}", "gap", remedy)


def driver_is_old(facts: GpuFacts) -> bool:
    if facts.built_for is None or not facts.built_for.startswith("CUDA") or facts.driver_cuda is None:
        return False
    return facts.driver_cuda[0] < int(facts.built_for.split()[1].split(".")[0])


def has_code(code_for: tuple[str, ...], architecture: str) -> bool:
    """Whether machine code for some architectures runs on another: same major version and not newer, or PTX that is
    not newer. Names end in letters where code is of one device alone (sm_90a); lists of ROCm's are exact."""
    if not code_for:
        return True  # unknown
    if not architecture.startswith("sm_"):
        return architecture in code_for
    wanted = int(architecture.removeprefix("sm_"))
    for name in code_for:
        kind, _, version = name.partition("_")
        if version.isdigit() and int(version) <= wanted and (kind == "compute" or int(version) // 10 == wanted // 10):
            return True
    return False


def _busy(facts: GpuFacts) -> Iterator[Finding]:
    full = [row for row in facts.listed if row.memory and row.used > max(0.1 * row.memory, 2 * GIB)]
    if full:
        worst = max(full, key=lambda row: row.used / row.memory)
        count = f"{len(full)} of {len(facts.listed)} GPUs, at most " if len(facts.listed) > 1 else ""
        yield Finding(
            "GPU memory",
            f"in use by other processes: {count}{size(worst.used)} of {size(worst.memory)}",
            "gap",
            "see whose with nvidia-smi; leave such GPUs out with CUDA_VISIBLE_DEVICES",
        )


def _selection(facts: GpuFacts) -> Iterator[Finding]:
    for name, value in facts.selected:
        if name == "CUDA_VISIBLE_DEVICES" and not all(part.strip().isdigit() for part in value.split(",")):
            yield Finding(name, f"{value}: DeepSpeed's launcher knows GPUs by number alone", "gap", f"write {name}=0,1")
        else:
            yield Finding(name, f"{value}: the other GPUs are left out", "optional")


def _together(facts: GpuFacts) -> Iterator[Finding]:
    if facts.nccl:
        yield Finding("NCCL", facts.nccl)
    else:
        yield Finding(
            "NCCL", "this torch has none, so several GPUs cannot train together", "broken", "install a torch with NCCL"
        )
    if facts.apart:
        pairs = ", ".join(f"{i}-{j}" for i, j in facts.apart[:4]) + (" …" if len(facts.apart) > 4 else "")
        yield Finding(
            "between GPUs",
            f"no direct access ({pairs}): gradients pass through the host's memory",
            "gap",
            "see nvidia-smi topo -m; in a virtual machine ask for NVLink, on a workstation switch ACS off",
        )
    else:
        yield Finding("between GPUs", "direct access, each to every other")


def _alike(facts: GpuFacts) -> list[int]:
    """The numbers of the most numerous kind."""
    most = max(facts.gpus, key=facts.gpus.count)
    return [i for i, gpu in enumerate(facts.gpus) if gpu == most]


def _short(text: str | None) -> str:
    line = " ".join((text or "").split()).removeprefix("RuntimeError: ")
    return line if len(line) <= 160 else line[:157] + "…"
