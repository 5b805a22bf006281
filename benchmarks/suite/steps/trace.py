"""Where the time of a training step goes, and the most memory it allocates: one step under PyTorch's profiler.

Forward is told by what is called, backward by what made each gradient's function. On a CPU the seconds are the
clock's; on a GPU those of the kernels that a part launched, and what the GPU waits is in the rest. Profiling itself
costs some percent, so a step that is traced is no step that is timed.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from crossmask.engine.training import caption_step, systems
from crossmask.engine.training import step as training_step
from crossmask.engine.training.pretrainer import Pretrainer

PREFIX = "part: "
REST = "everything else"
Seconds = dict[str, tuple[float, float]]  # part -> forward, backward
# Functions of an objective, by the module that calls them: which label their own work has, and the fusion in them.
OBJECTIVES = (
    (training_step, "image_text_contrast", "contrast", ""),
    (training_step, "image_text_matching", "rest of ITM", "ITM"),
    (training_step, "masked_language_modelling", "vocabulary", "MLM"),
    (training_step, "masked_image_modelling", "rest of MIM", "MIM"),
    (training_step, "text_guided_retrieval", "rest of text-guided retrieval", "text-guided retrieval"),
    (training_step, "recognise", "rest of recognition", "recognition"),
    (caption_step, "image_text_contrast", "contrast", ""),
    (caption_step, "image_captioning", "vocabulary", ""),
    (caption_step, "text_guided_image_modelling", "rest of TG-MIM", ""),
)
TOWERS = {"encode_image": "image tower", "encode_text": "text tower"}
DECODERS = {"caption_hidden": "text decoder", "reconstruct": "image decoder", "context": "what the decoder reads"}
WHOLE = {  # what the suite tells of a step: each part's larger one, of all others "objectives"
    **{name: name for name in ("data", "image tower", "text tower", "masks", "optimizer", "average", "queue", REST)},
    "images' keys and values": "fusion",
    **dict.fromkeys((*DECODERS.values(), "patch decoder"), "decoders"),
}


@dataclass(frozen=True)
class Traced:
    seconds: float
    parts: Seconds  # they sum to ``seconds``
    allocated: int  # most bytes beyond those at the start; 0 unless asked for

    def whole(self) -> dict[str, float]:
        """Forward and backward in one, in the parts that steps of all kinds share."""
        found: dict[str, float] = defaultdict(float)
        for part, pair in self.parts.items():
            found[larger(part)] += sum(pair)
        return dict(sorted(found.items(), key=lambda item: (item[0] == REST, -item[1])))


def larger(part: str) -> str:
    if part.startswith(("teacher's", "rest of the teacher")):
        return "teacher"
    return "fusion" if part.startswith("fusion") else WHOLE.get(part, "objectives")


@contextmanager
def labelled(pretrainer: Pretrainer) -> Iterator[None]:
    """Inside, what a step of ours calls carries the name of its part through the profiler."""
    student, engine = pretrainer.engine.module, pretrainer.engine
    objective = [""]

    def fusion(named: dict[str, Any]) -> str:
        return f"fusion for {objective[-1]}"

    with ExitStack() as stack:

        def add(owner: Any, name: str, label: str | Callable[[dict[str, Any]], str], inside: str = "") -> None:
            if hasattr(owner, name):
                stack.enter_context(part(owner, name, label, inside, objective))

        teacher = getattr(pretrainer.teacher, "model", None)
        for model, whose in ((student.model, ""), (teacher, "teacher's ")):
            for name, label in (TOWERS | DECODERS).items():
                add(model, name, whose + label)
            add(model, "project_image", (whose or "images' ") + "keys and values")
        add(teacher, "fuse", "teacher's fusion")
        add(student.model, "fuse", fusion)
        add(student, "decode_patches", "patch decoder")
        for module, name, label, inside in OBJECTIVES:
            add(module, name, label, inside)
        add(systems, "look", "rest of the teacher")
        add(pretrainer.masks, "plan", "masks")
        add(pretrainer.data, "train_batch", "data")
        add(engine, "step", "optimizer")
        add(pretrainer.teacher, "follow", "average")
        add(pretrainer.queue, "enqueue", "queue")
        yield


@contextmanager
def part(
    owner: Any,
    name: str,
    label: str | Callable[[dict[str, Any]], str],
    inside: str = "",
    objective: list[str] | None = None,
) -> Iterator[None]:
    """Calls of ``owner.name`` under a label, which may depend on the named arguments; ``inside`` is the ``objective``
    meanwhile."""
    called = getattr(owner, name)

    def wrapper(*given: Any, **named: Any) -> Any:
        with record_function(PREFIX + (label if isinstance(label, str) else label(named))):
            if objective is None or not inside:
                return called(*given, **named)
            objective.append(inside)
            try:
                return called(*given, **named)
            finally:
                objective.pop()

    with patch.object(owner, name, wrapper):
        yield


def trace(
    step: Callable[[], object], labels: AbstractContextManager[None], device: torch.device, memory: bool = False
) -> Traced:
    """One step. ``labels`` is entered around it."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with labels, profile(activities=activities, profile_memory=memory and not gpu) as found:
        start = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    allocated = 0
    if memory:
        allocated = torch.cuda.max_memory_allocated(device) - before if gpu else most_allocated(found)
    return Traced(seconds, parts(found, seconds, "device_time_total" if gpu else "cpu_time_total"), allocated)


def most_allocated(found: Any) -> int:
    """Most bytes on the CPU beyond those at the start, by PyTorch's allocator."""
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def parts(found: Any, seconds: float, clock: str) -> Seconds:
    events = [e for e in found.events() or () if e.device_type == torch.autograd.DeviceType.CPU]
    forward: dict[str, float] = defaultdict(float)
    backward: dict[str, float] = defaultdict(float)
    made_by: dict[int, str] = {}
    for event in events:
        if event.name.startswith(PREFIX):
            inner = sum(getattr(child, clock) for child in nested(event))
            forward[event.name.removeprefix(PREFIX)] += getattr(event, clock) - inner
        elif event.sequence_nr >= 0 and event.scope == 0:
            made_by.setdefault(event.sequence_nr, owner_of(event))
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function"):
            backward[made_by.get(event.sequence_nr, REST)] += getattr(event, clock)
    named = {name: (forward[name] / 1e6, backward[name] / 1e6) for name in {*forward, *backward} - {REST}}
    left = seconds - sum(map(sum, named.values()))
    return {**named, REST: (left - backward[REST] / 1e6, backward[REST] / 1e6)}


def nested(event: Any) -> Iterator[Any]:
    """The outermost parts inside a part."""
    for child in event.cpu_children:
        if child.name.startswith(PREFIX):
            yield child
        else:
            yield from nested(child)


def owner_of(event: Any) -> str:
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return REST
