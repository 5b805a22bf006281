"""Write docs/public.md: every public name with its signature and its first sentence, from the code itself.

    python docs/write_public.py

tests/test_public_names.py holds the page to it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

PAGE = Path(__file__).with_name("public.md")
# group: what it is, and its packages; provisional ones may still change between minor versions
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Kernels": ("Tensors in, tensors out.", ("crossmask.kernels", "crossmask.kernels.linear")),
    "Modules": ("Attention as modules, and a record of what it did.", ("crossmask.kernels.modules",)),
    "Integrations": ("Inside other people's models.", ("crossmask.kernels.integrations.transformers",)),
    "Teacher": ("Momentum teachers, in any loop.", ("crossmask.engine.teacher",)),
    "Masking": ("Mask policies, by name or of your own.", ("crossmask.engine.masking",)),
    "Engine": (
        "Training, from a recipe or in your own loop: [the engine as a library](library.md).",
        ("crossmask.engine", "crossmask.engine.exported"),
    ),
    "Data": ("What trains on your pairs.", ("crossmask.engine.data",)),
}
PROVISIONAL = {
    "crossmask.engine": {"ObjectiveView", "PairList", "Pretrainer", "Sizes", "StepDetails", "System"}
    | {"register_objective", "register_source", "register_system", "pretrain"},
    "crossmask.engine.data": {"PairList"},
    "crossmask.engine.teacher": {"LightningEma", "initialize_untouched"},
    "crossmask.kernels.integrations.transformers": {"use_crossmask"},
}
VALUES = {  # they have no docstring of their own
    "ALL": "The name of the split with every pair of a source that has no splits.",
    "DTYPES": "What weights may be exported in: fp32, bf16 and fp16, and the dtypes of torch.",
    "HALF": "The normalisation of pixels to -1..1, the default.",
    "IMPLEMENTATION": "The name that Transformers knows our attention by.",
    "KEEP": "In a mask plan's `replacement`: the word itself is read.",
    "NORMALISATIONS": "The normalisations of pixels by their names in a recipe.",
    "Weights": "Which of a run's models: `teacher` or `student`.",
}
HEAD = """\
# Public names

What a program may rely on, written from the code by `docs/write_public.py`. Everything else may change without notice.

* **stable**: changes only with the next major version, and is deprecated for a minor version before.
* **provisional**: works and is tested; arguments may change with a minor version, which the changelog says.

"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, (what, packages) in GROUPS.items():
        parts.append(f"## {group}\n\n{what}\n\n")
        for package in packages:
            parts.append(f"### `{package}`\n\n| name | what it is | |\n|---|---|---|\n")
            parts += [row(package, name) for name in names(package)]
            parts.append("\n")
    parts.append(
        "## Command line\n\nAll stable; `crossmask COMMAND --help` tells the options.\n\n| command | what it does |\n"
    )
    parts.append("|---|---|\n")
    parts += [f"| `crossmask {name}` | {cell(told)} |\n" for name, told in commands()]
    return "".join(parts)


def names(package: str) -> list[str]:
    """The public names of a package."""
    return sorted(importlib.import_module(package).__all__)


def row(package: str, name: str) -> str:
    value = getattr(importlib.import_module(package), name)
    state = "provisional" if name in PROVISIONAL.get(package, ()) else "stable"
    return f"| `{cell(name + signature(value))}` | {cell(told(value, package, name))} | {state} |\n"


def signature(value: Any) -> str:
    """As Python tells it, without the package's own paths; nothing where a value is no function and no class."""
    if not inspect.isclass(value) and not inspect.isroutine(value):
        return ""
    if inspect.isclass(value) and issubclass(value, BaseModel):  # its fields are in the reference of the recipe
        return ""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parts, kind = [], None
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and kind not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL):
            parts.append("*")
        kind = p.kind
        name = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        typed = "" if p.annotation is p.empty else f": {plain(p.annotation)}"
        default = "" if p.default is p.empty else f"{' = ' if typed else '='}{shown(p.default)}"
        parts.append(f"{name}{typed}{default}")
    returned = (
        ""
        if inspect.isclass(value) or found.return_annotation is inspect.Signature.empty
        else (f" -> {plain(found.return_annotation)}")
    )
    return f"({', '.join(parts)}){returned}"


def plain(annotation: Any) -> str:
    """Without the paths of modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", text.strip("'\""))


def shown(default: Any) -> str:
    if inspect.isroutine(default) or inspect.isclass(default):
        return "…" if default.__name__ == "<lambda>" else str(default.__qualname__)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(default))


def told(value: Any, package: str, name: str) -> str:
    """The first sentence of its docstring; of a value, what VALUES says."""
    text = inspect.getdoc(value) if inspect.isclass(value) or inspect.isroutine(value) else None
    if not text or text.startswith(f"{name}("):  # which a tuple has of itself
        text = VALUES.get(name, "")
    first = text.strip().split("\n\n")[0]
    sentence = re.split(r"(?<=[.:;])\s+(?=[A-Z\W]|$)", " ".join(first.split()))[0]
    return re.sub(r":\w+:`~?\.?([^`]*)`", lambda found: f"`{found[1].rpartition('.')[2]}`", sentence).replace("``", "`")


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def commands() -> Iterator[tuple[str, str]]:
    """Every command and its first line, those of groups behind their group's name."""
    import typer

    from crossmask.engine.cli import app

    def walk(command: Any, path: str) -> Iterator[tuple[str, str]]:
        for name, inner in sorted(command.commands.items()):
            if hasattr(inner, "commands"):
                yield from walk(inner, f"{path}{name} ")
            else:
                yield f"{path}{name}", inner.get_short_help_str(200)

    yield from walk(typer.main.get_command(app), "")


if __name__ == "__main__":
    main()
