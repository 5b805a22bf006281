"""Python, the libraries that a run imports, and those that something more needs."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .finding import INSTALL, Finding, quietly

# what a run imports, by distribution; the others are checked by their version alone
IMPORTED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "triton": "triton",
    "deepspeed": "deepspeed",
    "timm": "timm",
    "transformers": "transformers",
}


class Extra(NamedTuple):
    """A library that some command or comparison asks for."""

    distribution: str
    module: str
    purpose: str
    install: str
    gpu_only: bool = False


EXTRAS = (
    Extra("h5py", "h5py", "FashionGen's published files", "pip install 'crossmask[hdf5]'"),
    Extra("pyarrow", "pyarrow", "folders of Hugging Face data sets", "pip install 'crossmask[arrow]'"),
    Extra("pycocoevalcap", "pycocoevalcap", "CIDEr of generated captions", "pip install 'crossmask[captioning]'"),
    Extra("sacrebleu", "sacrebleu", "BLEU-4 of generated captions", "pip install 'crossmask[captioning]'"),
    Extra("flash-attn", "flash_attn", "a peer in make bench-gpu", "pip install 'crossmask[flash]'", True),
    Extra("flash-attn-4", "flash_attn.cute", "a peer in make bench-gpu", "pip install flash-attn-4", True),
    Extra("xformers", "xformers", "a peer in make bench-gpu", "pip install 'crossmask[xformers]'", True),
    Extra("liger-kernel", "liger_kernel", "a peer in make bench-gpu", "pip install liger-kernel", True),
    Extra("ema-pytorch", "ema_pytorch", "a peer in make bench", "pip install 'crossmask[bench]'"),
    Extra("open_clip_torch", "open_clip", "a peer in make bench, and tests", "pip install 'crossmask[dev]'"),
)


def python() -> Iterator[Finding]:
    here = f"{platform.python_version()} at {sys.prefix}, {platform.system()} {platform.machine()}"
    if not (3, 10) <= sys.version_info < (3, 14):
        yield Finding("Python", here, "gap", "tested with 3.10 to 3.13: make a .venv with one of those")
    elif sys.flags.optimize:
        yield Finding("Python", f"{here}; -O or PYTHONOPTIMIZE leaves checks out", "gap", "unset PYTHONOPTIMIZE")
    else:
        yield Finding("Python", here)
    folder = Path(__file__).resolve().parents[2]
    kind = "a checkout" if (folder / "csrc").is_dir() else "installed"
    version = version_of("crossmask")
    if version is None:
        yield Finding("crossmask", f"{folder}, which was not installed", "gap", INSTALL)
    else:
        yield Finding("crossmask", f"{version}, {kind}: {folder}")


def libraries() -> Iterator[Finding]:
    """Every requirement in the metadata: there, within its range, and, for the large ones, importable."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("crossmask") or ()]
    except metadata.PackageNotFoundError:
        requirements = []
    wanted = {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    fine = []
    for name in dict.fromkeys([*IMPORTED, *wanted]):
        version = version_of(name)
        if version is None:
            if name == "triton":  # torch brings it on Linux, and only the fused kernels use it
                yield Finding(name, "not installed", "gap", "comes with torch on Linux; without it plain PyTorch runs")
            else:
                yield Finding(name, "not installed", "broken", INSTALL)
        elif name in wanted and not wanted[name].specifier.contains(version, prereleases=True):
            yield Finding(name, f"{version}, wanted {wanted[name].specifier}", "broken", INSTALL)
        elif name in IMPORTED:
            module = quietly(partial(importlib.import_module, IMPORTED[name]))
            if isinstance(module, ModuleType):
                bounds = sorted(map(str, wanted[name].specifier), reverse=True) if name in wanted else ()
                tested = f" (tested: {','.join(bounds)})" if bounds else ""
                yield Finding(name, version + _build_of(module) + tested + _elsewhere(module))
            else:
                yield Finding(name, f"{version}, but it does not import: {module}", "broken", INSTALL)
        else:
            fine.append(f"{name} {version}")
    if fine:
        yield Finding("other libraries", ", ".join(fine))


def _build_of(module: ModuleType) -> str:
    if module.__name__ != "torch":
        return ""
    if getattr(module.version, "hip", None):
        return f", ROCm {module.version.hip} build"
    return f", CUDA {module.version.cuda} build" if module.version.cuda else ", CPU build"


def _elsewhere(module: ModuleType) -> str:
    """Where a library came from if that is not this Python's own folder: PYTHONPATH, or the user's packages."""
    file = getattr(module, "__file__", None)
    if file is None or any(Path(file).is_relative_to(root) for root in {sys.prefix, sys.base_prefix}):
        return ""
    return f", from {Path(file).parent}"


def extras(gpu: bool = False) -> Iterator[Finding]:
    """What is installed by name alone; none is imported."""
    for extra in EXTRAS:
        if _there(extra.module):
            version = version_of(extra.distribution)
            yield Finding(extra.distribution, f"{version or 'installed'}: {extra.purpose}")
        else:
            needs = " (needs a GPU)" if extra.gpu_only and not gpu else ""
            yield Finding(extra.distribution, f"for {extra.purpose}{needs}: {extra.install}", "optional")


def _there(module: str) -> bool:
    """Whether it can be found, without importing more than the packages around it where they are installed."""
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or module == package:
        return spec is not None
    rest = Path(*module.split(".")[1:])
    return any((Path(root) / rest).exists() for root in spec.submodule_search_locations or ())


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
