"""``crossmask doctor``: what this machine can run, what is missing, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata, resources
from types import ModuleType
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# what a run imports, by distribution; the others are checked by their version alone
IMPORTED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "triton": "triton",
    "deepspeed": "deepspeed",
    "timm": "timm",
    "transformers": "transformers",
}
PEERS = {"flash-attn": ("flash_attn", "flash"), "xformers": ("xformers", "xformers")}  # module, extra
INSTALL = "make install, or pip install -c constraints.txt -e ."


Level = Literal["fine", "optional", "gap", "broken"]
MARKS: dict[Level, str] = {"fine": "[green]✓[/]", "optional": "[dim]–[/]", "gap": "[yellow]•[/]", "broken": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``gap``: something is slower or absent; ``broken``: training cannot run."""

    what: str
    here: str
    level: Level = "fine"
    remedy: str = ""


def run_doctor(console: Console | None = None) -> int:
    """Print the report. Returns 0 when training can run here, 1 when something it needs is missing."""
    console = console or Console()
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    levels: list[Level] = []
    with console.status("looking around"):
        for section in examine():
            for finding in section:
                levels.append(finding.level)
                remedy = f"\n[dim]→ {escape(finding.remedy)}[/]" if finding.remedy else ""
                table.add_row(MARKS[finding.level], finding.what, escape(finding.here) + remedy)
            table.add_section()
    console.print(table)
    broken, gaps = levels.count("broken"), levels.count("gap")
    if broken:
        console.print(f"[red]Training cannot run here:[/] {broken} thing{'s' * (broken > 1)} missing, marked ✗.")
        return 1
    noted = f" {gaps} gap{'s' * (gaps > 1)}, marked •." if gaps else ""
    console.print(f"[green]Training can run here.[/]{noted}")
    return 0


def examine() -> Iterator[list[Finding]]:
    """The sections of the report, in its order; a look that fails is a finding too."""
    sections: tuple[dict[str, Callable[[], Iterable[Finding]]], ...] = (
        {"Python": _python, "libraries": _libraries},
        {"devices": _devices, "deepspeed launcher": _launcher},
        {"build tools": _tools, "native extension": _extension},
        {"kernels": _kernels},
        {"peers": _peers},
        {"recipes": _recipes, "embedded data set": _data_set},
    )
    for section in sections:
        findings: list[Finding] = []
        for what, look in section.items():
            try:
                findings.extend(look())
            except Exception as error:  # noqa: PERF203  # one broken library must not hide the rest
                findings.append(Finding(what, _one_line(error), "broken", INSTALL))
        yield findings


def _python() -> Iterator[Finding]:
    here = f"{platform.python_version()} at {sys.prefix}, {platform.system()} {platform.machine()}"
    if (3, 10) <= sys.version_info < (3, 14):
        yield Finding("Python", here)
    else:
        yield Finding("Python", here, "gap", "tested with 3.10 to 3.13: make a .venv with one of those")


def _libraries() -> Iterator[Finding]:
    """Every requirement in the metadata: there, within its range, and, for the large ones, importable."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("crossmask") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("crossmask", "runs from a folder that was not installed", "gap", INSTALL)
        requirements = []
    wanted = {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    fine = []
    for name in dict.fromkeys([*IMPORTED, *wanted]):
        version = _version(name)
        if version is None:
            if name == "triton":  # torch brings it on Linux, and only the fused kernels use it
                yield Finding(name, "not installed", "gap", "comes with torch on Linux; without it plain PyTorch runs")
            else:
                yield Finding(name, "not installed", "broken", INSTALL)
        elif name in wanted and not wanted[name].specifier.contains(version, prereleases=True):
            yield Finding(name, f"{version}, wanted {wanted[name].specifier}", "broken", INSTALL)
        elif name in IMPORTED:
            module = _quietly(partial(importlib.import_module, IMPORTED[name]))
            if isinstance(module, ModuleType):
                yield Finding(name, version + _build_of(module))
            else:
                yield Finding(name, f"{version}, but it does not import: {module}", "broken", INSTALL)
        else:
            fine.append(f"{name} {version}")
    if fine:
        yield Finding("other libraries", ", ".join(fine))


def _build_of(module: ModuleType) -> str:
    if module.__name__ != "torch":
        return ""
    return f", CUDA {module.version.cuda} build" if module.version.cuda else ", CPU build"


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = f"{cores} CPU core{'s' * (cores > 1)}"
    count = _quietly(torch.cuda.device_count)
    if isinstance(count, int) and count:
        names = [torch.cuda.get_device_name(i) for i in range(count)]
        listed = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
        yield Finding("devices", f"{listed}; {cpu}")
    else:
        yield Finding("devices", f"no GPU; {cpu}, on which training runs as CPU ranks")


def _launcher() -> Iterator[Finding]:
    if importlib.util.find_spec("deepspeed") is None:
        yield Finding("deepspeed launcher", "not found", "broken", INSTALL)
    elif script := shutil.which("deepspeed", path=_folders()):
        yield Finding("deepspeed launcher", script)
    else:
        here = f"{sys.executable} -m deepspeed.launcher.runner; no deepspeed command on PATH"
        yield Finding("deepspeed launcher", here, "gap", "crossmask train does not need the command")


def _tools() -> Iterator[Finding]:
    """What builds the extension: only needed to build it again."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    tools: list[tuple[str, list[str | None], str]] = [
        ("C++ compiler", compilers, "apt install g++ (Debian, Ubuntu), or set CXX"),
        ("cmake", ["cmake"], "pip install cmake"),
        ("ninja", ["ninja"], "pip install ninja"),
        (
            "nvcc",
            [os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"],
            "the CUDA toolkit; only GPUs need it",
        ),
    ]
    for what, names, remedy in tools:
        found = next(filter(None, (shutil.which(name, path=_folders()) for name in names if name)), None)
        if found:
            yield Finding(what, f"{_tool_version(found)} at {found}".removeprefix(" at "))
        else:
            yield Finding(what, "not found", "gap", remedy)


def _extension() -> Iterator[Finding]:
    from crossmask.kernels import native

    status = native.status()
    if not status.loaded:
        yield Finding("native extension", "not loaded; plain PyTorch runs instead", "gap", status.reason or "")
    elif not status.cuda_architectures:
        yield Finding("native extension", f"loaded, CPU kernels only: {status.path}", "gap", status.cuda_reason or "")
    else:
        compiled = " ".join(status.cuda_architectures)
        yield Finding("native extension", f"loaded, CPU and CUDA ({compiled}): {status.path}")


def _kernels() -> Iterator[Finding]:
    """Each op of crossmask.kernels, and what runs for it on the devices of this machine."""
    import torch

    kernels = importlib.import_module("crossmask.kernels")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.ispkg or importlib.util.find_spec(f"{kernels.__name__}.{module.name}.api") is None:
            continue
        api = importlib.import_module(f"{kernels.__name__}.{module.name}.api")
        # an op with more than its reference says which implementation runs for a device type
        tell: Callable[[str], str] = getattr(api, "implementation", lambda device: "reference")
        runs = {device: tell(device).replace("reference", "plain PyTorch") for device in devices}
        yield Finding(module.name, ", ".join(f"{what} on {device}" for device, what in runs.items()))


def _peers() -> Iterator[Finding]:
    for name, (module, extra) in PEERS.items():
        if importlib.util.find_spec(module):
            yield Finding(name, _version(name) or "installed")
        else:
            yield Finding(name, f"not installed: pip install 'crossmask[{extra}]' to compare with it", "optional")


def _recipes() -> Iterator[Finding]:
    files = (file.name for file in resources.files("crossmask.recipes").iterdir())
    names = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
    if names:
        yield Finding("recipes", ", ".join(names))
    else:
        yield Finding("recipes", "none found", "broken", INSTALL)


def _data_set() -> Iterator[Finding]:
    folder = resources.files("crossmask.engine.data").joinpath("emoji_set")
    sheets = sum(file.name.endswith(".png") for file in folder.iterdir())
    with folder.joinpath("captions.jsonl").open("rb") as captions:
        count = sum(1 for _ in captions)
    yield Finding("embedded data set", f"{sheets} picture sheets, {count} captions: {folder}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _folders() -> str:
    """Where programs are looked for: this Python's own scripts first, as setup.py does."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _tool_version(program: str) -> str:
    """The version number a build tool prints; empty when it prints none."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.findall(r"\d+(?:\.\d+)+", said)
    return (found[-1] if "nvcc" in said else found[0]) if found else ""


def _quietly(call: Callable[[], object]) -> object:
    """What a call returns, or its error as one line; nothing it logs, warns of or prints reaches the screen."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:  # a broken library may raise anything
        return _one_line(error)
    finally:
        logging.disable(logging.NOTSET)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
