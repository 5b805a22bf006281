"""The most memory a step takes, in a process that does nothing else.

python -m albef_step.memory common-fp32 25      (from benchmarks/; bench_albef_step.py starts it)
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from .sizes import BASE, Captioned, random_batch

SIDES = ("common-fp32", "ours-fp32", "common-autocast", "ours-autocast", "ours-bf16")
Step = Callable[[Captioned], Any]


def build(side: str, stage: int = 0) -> Step:
    who, precision = side.split("-")
    if who == "common":
        from .common import CommonStep

        step = CommonStep(BASE)
        return lambda batch: step(batch, bf16=precision == "autocast")
    from .ours import OurStep, Precision

    assert precision in get_args(Precision)
    return OurStep(BASE, precision, stage)  # type: ignore[arg-type]


def resident(peak: bool) -> int:
    """Bytes that lie in memory now, or the most there have been since the last :func:`forget`."""
    status = Path("/proc/self/status")
    if not status.exists():  # the most of the whole process
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5")


def tensors(device: str = "cpu") -> list[torch.Tensor]:
    """All there are on devices of that type."""
    found = [
        each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)
    ]  # none without memory
    batched = torch._C._functorch.is_batchedtensor  # an earlier vmap's, of no memory of their own
    return [x for x in found if not batched(x) and x.layout is torch.strided and x.device.type == device]


def tracked_peak(step: Step, batch: Captioned) -> int:
    """Bytes of tensors at their most during a step, by PyTorch's allocator."""
    for each in tensors():  # gradients of the last step, whose end the profiler would not see
        if each.is_leaf and each.grad is not None:
            each.grad = None
    gc.collect()
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(batch)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return sum(storages.values()) + max(itertools.accumulate(changes), default=0)


def measure(side: str, lengths: list[int], stage: int = 0) -> dict[str, Any]:
    """By text length, in bytes: ``resident`` beyond what the imports take, and ``tensors``."""
    if side.startswith("ours"):
        from . import ours  # noqa: F401
    random_batch(BASE, 25)
    imports = resident(peak=False)
    step = build(side, stage)
    found: dict[str, Any] = {"side": side, "imports": imports}
    for longest in lengths:
        batch = random_batch(BASE, longest)
        step(batch)  # Adam's state comes into being
        forget()
        step(batch)
        found[str(longest)] = {"resident": resident(peak=True) - imports, "tensors": tracked_peak(step, batch)}
    return found


def in_own_process(side: str, lengths: list[int], stage: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "albef_step.memory", side, str(stage), *map(str, lengths)]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], list(map(int, sys.argv[3:])), int(sys.argv[2]))))
