"""The whole examination: sections of findings, in the report's order. A look that fails is a finding too."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import NamedTuple

from . import building, environment, gpus, host, libraries, ops
from .finding import INSTALL, Finding, one_line, quietly


class Section(NamedTuple):
    title: str
    findings: list[Finding]


class Machine:
    """What several looks ask; found once."""

    _gpus: gpus.GpuFacts | None = None

    def gpus(self) -> gpus.GpuFacts:
        if self._gpus is None:
            self._gpus = gpus.look()
        return self._gpus

    @property
    def count(self) -> int:
        """GPUs that torch can use; 0 where torch cannot say."""
        try:
            return len(self.gpus().gpus)
        except Exception:  # the section on GPUs tells why
            return 0

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(gpu.architecture for gpu in self.gpus().gpus) if self.count else ()


def sections(machine: Machine | None = None) -> dict[str, dict[str, Callable[[], Iterable[Finding]]]]:
    """Title -> what is looked at -> the look. Nothing has been looked at yet."""
    here = machine or Machine()
    return {
        "Python and libraries": {"Python": libraries.python, "libraries": libraries.libraries},
        "GPUs": {"GPUs": lambda: gpus.judge(here.gpus())},
        "Processor, memory, limits": {"host": lambda: host.judge(host.look(here.count))},
        "Kernels": {
            "native extension": lambda: building.judge_extension(building.look_extension(here.architectures)),
            "kernels": lambda: ops.kernels(here.architectures),
        },
        "To build the extension again": {
            "build tools": lambda: building.judge_tools(building.look_tools(), here.count > 0),
        },
        "Starting runs": {
            "deepspeed launcher": building.look_deepspeed,
            "environment": lambda: environment.findings(here.count > 0),
            "recipes": recipes,
            "embedded data set": data_set,
        },
        "For something more": {"extras": lambda: libraries.extras(here.count > 0)},
    }


def examine() -> Iterator[Section]:
    """One section after the other, as soon as it is done."""
    for title, looks in sections().items():
        found: list[Finding] = []
        for what, look in looks.items():
            try:
                found.extend(look())
            except Exception as error:  # noqa: PERF203  # one broken library must not hide the rest
                found.append(_failed(what, error))
        if found:
            yield Section(title, found)


def _failed(what: str, error: Exception) -> Finding:
    if isinstance(error, (ImportError, AttributeError)) and isinstance(quietly(_import_torch), str):
        return Finding(what, "not looked at: torch does not import", "gap", "mend torch, named above")
    return Finding(what, one_line(error), "broken", INSTALL)


def _import_torch() -> object:
    return importlib.import_module("torch")


def recipes() -> Iterator[Finding]:
    files = (file.name for file in resources.files("crossmask.recipes").iterdir())
    names = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
    if names:
        yield Finding("recipes", ", ".join(names))
    else:
        yield Finding("recipes", "none found", "broken", INSTALL)


def data_set() -> Iterator[Finding]:
    folder = resources.files("crossmask.engine.data").joinpath("emoji_set")
    sheets = sum(file.name.endswith(".png") for file in folder.iterdir())
    with folder.joinpath("captions.jsonl").open("rb") as captions:
        count = sum(1 for _ in captions)
    yield Finding("embedded data set", f"{sheets} picture sheets, {count} captions: {folder}")


def main() -> None:
    """In a process of its own: a line of JSON for each section on standard output, and nothing else there."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    for section in examine():
        findings = [dataclasses.asdict(finding) for finding in section.findings]
        told.write(json.dumps({"title": section.title, "findings": findings}) + "\n")
        told.flush()
    told.write(json.dumps({"title": "", "findings": []}) + "\n")  # whole
    told.flush()
    sys.stdout.flush()
    os._exit(0)  # a library's own end may hang or crash, and all has been said
