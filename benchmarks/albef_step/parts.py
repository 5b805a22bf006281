"""Where the time of our step goes: forward by what is called, backward by what made each gradient's function."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from crossmask.engine.training import step as training_step
from crossmask.engine.training import systems

from . import flops
from .ours import OurStep
from .sizes import Captioned, Sizes

PREFIX = "part: "
REST = "everything else"
# Of flops.least, which parts below it is the cost of. The contrast's and the heads' are in the rest of their pass.
PARTS = {
    "image towers": ("image tower", "teacher's image tower"),
    "text towers": ("text tower", "teacher's text tower"),
    "images' keys and values": ("images' keys and values", "teacher's keys and values"),
    "fusion for ITM": ("fusion for ITM",),
    "fusion for MLM": ("fusion for MLM", "teacher's fusion"),
    "vocabulary": ("vocabulary",),
    "contrast": ("contrast",),
}


@contextmanager
def labelled(step: OurStep) -> Iterator[None]:
    """Inside, what is called carries the name of its part through the profiler."""
    student = step.pretrainer.engine.module.model
    teacher = step.pretrainer.teacher.model
    with ExitStack() as stack:
        for model, whose in ((student, ""), (teacher, "teacher's ")):
            for name, part in (("encode_image", "image tower"), ("encode_text", "text tower")):
                stack.enter_context(_wrapped(model, name, lambda named, label=whose + part: label))
            keys = f"{whose or 'images’ '}keys and values".replace("’", "'")
            stack.enter_context(_wrapped(model, "project_image", lambda named, label=keys: label))
        stack.enter_context(_wrapped(teacher, "fuse", lambda named: "teacher's fusion"))
        stack.enter_context(
            _wrapped(student, "fuse", lambda named: f"fusion for {'ITM' if named.get('image_index') else 'MLM'}")
        )
        stack.enter_context(_wrapped(training_step, "image_text_contrast", lambda named: "contrast"))
        stack.enter_context(_wrapped(training_step, "image_text_matching", lambda named: "rest of ITM"))
        stack.enter_context(_wrapped(training_step, "masked_language_modelling", lambda named: "vocabulary"))
        stack.enter_context(_wrapped(systems, "look", lambda named: "rest of the teacher"))
        stack.enter_context(_wrapped(step.pretrainer.engine, "step", lambda named: "optimizer"))
        stack.enter_context(_wrapped(step.pretrainer.teacher, "follow", lambda named: "average"))
        stack.enter_context(_wrapped(step.pretrainer.queue, "enqueue", lambda named: "queue"))
        yield


@contextmanager
def _wrapped(owner: Any, name: str, label: Callable[[dict[str, Any]], str]) -> Iterator[None]:
    called = getattr(owner, name)

    def wrapper(*given: Any, **named: Any) -> Any:
        with record_function(PREFIX + label(named)):
            return called(*given, **named)

    with patch.object(owner, name, wrapper):
        yield


def seconds(step: OurStep, batch: Captioned) -> tuple[dict[str, tuple[float, float]], float]:
    """Of one step: part -> (forward, backward) seconds, and the whole step's. Profiling itself costs some percent."""
    with labelled(step), profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        step(batch)
        whole = time.perf_counter() - start
    events = found.events() or []
    forward: dict[str, float] = defaultdict(float)
    backward: dict[str, float] = defaultdict(float)
    made_by: dict[int, str] = {}
    for event in events:
        if event.name.startswith(PREFIX):
            inner = sum(child.cpu_time_total for child in _nested(event))
            forward[event.name.removeprefix(PREFIX)] += event.cpu_time_total - inner
        elif event.sequence_nr >= 0 and event.scope == 0:
            made_by.setdefault(event.sequence_nr, _part(event))
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function"):
            backward[made_by.get(event.sequence_nr, REST)] += event.cpu_time_total
    named = {part: (forward[part] / 1e6, backward[part] / 1e6) for part in {*forward, *backward} - {REST}}
    left = whole - sum(map(sum, named.values()))
    return {**named, REST: (left - backward[REST] / 1e6, backward[REST] / 1e6)}, whole


def _nested(event: Any) -> Iterator[Any]:
    """The outermost parts inside a part."""
    for child in event.cpu_children:
        if child.name.startswith(PREFIX):
            yield child
        else:
            yield from _nested(child)


def _part(event: Any) -> str:
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return REST


def rows(sizes: Sizes, longest: int, found: dict[str, tuple[float, float]], rate: float) -> list[dict[str, Any]]:
    """Each part's seconds beside those that its multiplications alone need at ``rate`` FLOP/s."""
    least = flops.least(sizes, flops.Work.expected(sizes, longest))
    told: list[dict[str, Any]] = []
    left = dict(found)
    for name, parts in PARTS.items():
        taken = [left.pop(part, (0.0, 0.0)) for part in parts]
        row = {"part": name, "forward": taken[0][0], "backward": taken[0][1]}
        row |= {"teacher": sum(sum(pair) for pair in taken[1:]), "needed": least[name] / rate}
        told.append(row)
    told += [
        {"part": name, "forward": pair[0], "backward": pair[1], "teacher": 0.0, "needed": 0.0}
        for name, pair in sorted(left.items(), key=lambda item: -sum(item[1]))
    ]
    return told
