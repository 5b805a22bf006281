"""The Python reference: for each package its public names, documented by their docstrings."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

# page: title, what it says first, and its packages, each with what to call it (one package: no heading)
PAGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "reference/kernels.md": (
        "crossmask.kernels",
        "Tensors in, tensors out. What each is for, with pictures and costs: [the kernels](../kernels/index.md).",
        {"crossmask.kernels": "", "crossmask.kernels.linear": "crossmask.kernels.linear"},
    ),
    "reference/modules.md": (
        "crossmask.kernels.modules",
        "Attention as modules. With examples: [inside your own project](../embedding.md).",
        {"crossmask.kernels.modules": ""},
    ),
    "reference/integrations.md": (
        "crossmask.kernels.integrations",
        "Inside Hugging Face Transformers. With examples: [in Transformers models](../transformers.md).",
        {"crossmask.kernels.integrations.transformers": ""},
    ),
    "reference/masking.md": (
        "crossmask.engine.masking",
        "Mask policies as functions and classes. What there is: [the overview](../policies.md).",
        {"crossmask.engine.masking": ""},
    ),
    "reference/teacher.md": (
        "crossmask.engine.teacher",
        "Momentum teachers. How they work: [the momentum teacher](../teacher.md).",
        {"crossmask.engine.teacher": ""},
    ),
    "reference/engine.md": (
        "crossmask.engine",
        "Recipes, training and models, for programs that use the engine without its command.",
        {"crossmask.engine": "", "crossmask.engine.exported": "Exported models"},
    ),
}


def pages() -> dict[str, str]:
    seen: set[str] = set()
    return {uri: page(*told, seen) for uri, told in PAGES.items()}


def page(title: str, lead: str, packages: dict[str, str], seen: set[str]) -> str:
    """``seen``: what earlier pages document; such a name is a link to it."""
    lines = [f"# {title}", "", lead, ""]
    for package, heading in packages.items():
        names = public(package)
        again = [name for name in names if name in seen]
        if heading:
            lines += [f"## {heading}", ""]
        if again:
            lines += [f"From here too: {', '.join(map(link, again))}.", ""]
        for name in (each for each in names if each not in seen):
            lines += [f"::: {name}", *(["    options:", "      heading_level: 3"] if heading else []), ""]
        seen.update(names)
    return "\n".join(lines)


def link(name: str) -> str:
    return f"[`{name.rpartition('.')[2]}`][{name}]"


def public(package: str) -> list[str]:
    """Where each public function and class of a package is defined."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if home(v) == package]
    found = [getattr(module, name) for name in names if not name.startswith("_")]
    return [f"{home(each)}.{each.__qualname__}" for each in found if home(each)]


def home(value: Any) -> str | None:
    known = inspect.isclass(value) or inspect.isfunction(value)
    module = getattr(value, "__module__", "") or ""
    return module if known and module.startswith("crossmask.") else None
