"""What the processor is called, precisely enough to know whether two figures are of the same one."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Its name, and its family and model or what ARM has for them: virtual machines have one name for generations that
    differ twofold."""
    try:
        told = named_in(Path("/proc/cpuinfo").read_text())
    except OSError:
        told = ""
    return told or platform.processor() or platform.machine()


def named_in(cpuinfo: str) -> str:
    """Of the first core in the text of Linux's ``/proc/cpuinfo``; empty where that says nothing.

    >>> named_in("model name : AMD EPYC\\ncpu family : 25\\nmodel : 17\\n")
    'AMD EPYC, family 25 model 17'
    """
    first = cpuinfo.strip().partition("\n\n")[0]
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    name, family, model = (told.get(key, "") for key in ("model name", "cpu family", "model"))
    if name and family and model:
        return f"{name}, family {family} model {model}"
    maker, part, variant = (told.get(f"CPU {key}", "") for key in ("implementer", "part", "variant"))
    if maker and part:
        return f"{name or 'ARM'}, implementer {maker} part {part}{variant and f' variant {variant}'}"
    return name
