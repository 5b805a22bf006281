"""The native extension: what is built, of which sources, for which GPUs; and the tools that build it again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import programs
from .finding import Finding
from .gpus import has_code

AGAIN = "build again: make install, or pip install --no-build-isolation --no-deps ."


class Tool(NamedTuple):
    """A build tool that was looked for."""

    what: str
    oldest: tuple[int, ...]  # that CMakeLists.txt and its C++17 take
    remedy: str
    path: str | None = None
    version: str = ""


def look_tools() -> list[Tool]:
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    nvcc = [os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    searched: list[tuple[Tool, list[str | None]]] = [
        (Tool("C++ compiler", (9,), "apt install g++ (Debian, Ubuntu), or set CXX"), compilers),
        (Tool("cmake", (3, 25), "pip install cmake"), ["cmake"]),
        (Tool("ninja", (1, 11), "pip install ninja"), ["ninja"]),
        (Tool("nvcc", (12, 0), "the CUDA toolkit; only GPUs need it"), nvcc),
    ]
    found = [(tool, programs.find(names)) for tool, names in searched]
    return [tool._replace(path=path, version=programs.version_of(path) if path else "") for tool, path in found]


def judge_tools(tools: list[Tool], gpus: bool) -> Iterator[Finding]:
    """Each tool; only needed to build the extension again."""
    for tool in tools:
        wanted = ".".join(map(str, tool.oldest))
        if tool.path is None:
            level = "gap" if gpus or tool.what != "nvcc" else "optional"
            here = "not found" if level == "gap" else f"not found: {tool.remedy}"
            yield Finding(tool.what, here, level, tool.remedy if level == "gap" else "")  # type: ignore[arg-type]
        elif tool.version and programs.numbers(tool.version) < tool.oldest:
            here = f"{tool.version} at {tool.path}, but {wanted} is needed to build the extension"
            yield Finding(tool.what, here, "gap", f"install {wanted} or newer: {tool.remedy}")
        elif tool.what == "nvcc" and tool.version and programs.numbers(tool.version) < (12, 8):
            here = f"{tool.version} at {tool.path}: knows no sm_100 and sm_120"
            yield Finding(
                tool.what, here, "fine" if not gpus else "gap", "for Blackwell install CUDA 12.8 or newer" * gpus
            )
        else:
            yield Finding(tool.what, f"{tool.version} at {tool.path}".removeprefix(" at "))


@dataclass(frozen=True)
class ExtensionFacts:
    loaded: bool
    path: str | None = None
    architectures: tuple[str, ...] = ()  # of its CUDA code: "80", "90"; the newest as PTX too
    reason: str | None = None  # why there is none
    cuda_reason: str | None = None
    built_with: str | None = None  # torch
    torch: str = ""
    newer: tuple[str, ...] = ()  # sources that changed after the build
    gpus: tuple[str, ...] = ()  # architectures of this machine's GPUs


def look_extension(gpus: tuple[str, ...] = ()) -> ExtensionFacts:
    import torch

    from crossmask.kernels import native

    status = native.status()
    library = Path(status.path) if status.path else None
    return ExtensionFacts(
        status.loaded,
        str(library) if library else None,
        status.cuda_architectures,
        status.reason,
        status.cuda_reason,
        built_with(Path(native.__file__).with_name("_C.json")),
        torch.__version__,
        newer_sources(library) if library else (),
        gpus,
    )


def built_with(report: Path) -> str | None:
    """The torch that setup.py found, as it noted beside the library."""
    try:
        found = json.loads(report.read_text()).get("torch")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found) if found else None


def newer_sources(library: Path) -> tuple[str, ...]:
    """Sources of a checkout that were written after its library."""
    root = library.resolve().parent.parent
    if not (root / "csrc").is_dir():
        return ()
    built = library.stat().st_mtime
    sources = [*sorted((root / "csrc").iterdir()), root / "CMakeLists.txt"]
    return tuple(str(file.relative_to(root)) for file in sources if file.is_file() and file.stat().st_mtime > built)


def judge_extension(facts: ExtensionFacts) -> Iterator[Finding]:
    if not facts.loaded:
        yield Finding("native extension", "not loaded; plain PyTorch runs instead", "gap", facts.reason or AGAIN)
        return
    compiled = " ".join(f"sm_{name}" for name in facts.architectures)
    here = f"loaded, CPU and CUDA ({compiled}): {facts.path}" if compiled else f"loaded, CPU kernels only: {facts.path}"
    if facts.newer:
        many = f" and {len(facts.newer) - 2} more" if len(facts.newer) > 2 else ""
        yield Finding(
            "native extension", f"{here}; older than {', '.join(facts.newer[:2])}{many}, so stale", "gap", AGAIN
        )
    elif not compiled and facts.gpus:
        yield Finding("native extension", here, "gap", facts.cuda_reason or AGAIN)
    else:
        yield Finding("native extension", here)
    if facts.built_with and facts.torch and facts.built_with.split("+")[0] != facts.torch.split("+")[0]:
        here = f"with torch {facts.built_with}; {facts.torch} loads it by torch's stable ABI"
        if programs.numbers(facts.built_with) > programs.numbers(facts.torch):
            yield Finding("built", f"with torch {facts.built_with}, newer than {facts.torch} here", "gap", AGAIN)
        else:
            yield Finding("built", here)
    codes = tuple(f"sm_{name}" for name in facts.architectures)
    codes += (f"compute_{facts.architectures[-1]}",) if facts.architectures else ()
    without = sorted({name for name in facts.gpus if name.startswith("sm_") and codes and not has_code(codes, name)})
    if without:
        wanted = ";".join(name.removeprefix("sm_") for name in without)
        yield Finding(
            "code for this GPU",
            f"the extension has none for {', '.join(without)}",
            "gap",
            f'CROSSMASK_CUDA_ARCHITECTURES="{wanted}" make install, after touch CMakeLists.txt',
        )


def judge_deepspeed(
    script: str | None, python: str, hostfile: bool, pdsh: str | None, built: list[str]
) -> Iterator[Finding]:
    """How runs are started, and what DeepSpeed compiles for itself."""
    if script:
        yield Finding("deepspeed launcher", script)
    else:
        here = f"{python} -m deepspeed.launcher.runner; no deepspeed command on PATH"
        yield Finding("deepspeed launcher", here, "gap", "crossmask train does not need it; else put .venv/bin on PATH")
    if hostfile:
        here = (
            "/job/hostfile is there: deepspeed on its own starts on those nodes; crossmask train stays on this machine"
        )
        yield Finding("hostfile", here, "optional")
    if pdsh:
        yield Finding("pdsh", pdsh)
    else:
        yield Finding("pdsh", "not found; only deepspeed across several nodes wants it: apt install pdsh", "optional")
    here = ", ".join(built) if built else "none built ahead, and no shipped recipe needs one"
    yield Finding("DeepSpeed's ops", f"{here}; offloading an optimizer compiles cpu_adam at its first run")


def look_deepspeed() -> Iterator[Finding]:
    import importlib.util
    import sys

    from .finding import INSTALL, quietly

    if importlib.util.find_spec("deepspeed") is None:
        yield Finding("deepspeed launcher", "not found", "broken", INSTALL)
        return

    def installed() -> list[str]:
        from deepspeed.git_version_info import installed_ops

        return sorted(name for name, there in installed_ops.items() if there)

    ops = quietly(installed)
    script = programs.find(["deepspeed"])
    pdsh = shutil.which("pdsh")
    built = ops if isinstance(ops, list) else []
    yield from judge_deepspeed(script, sys.executable, Path("/job/hostfile").is_file(), pdsh, built)
