"""Signs of life: ``beat("backward")`` says that this rank has moved on, and what it is about to do.

Called wherever a rank works, from every room of the engine; ``training/watchdog.py`` hands the last beat on and ends a
run in which no rank beats any more. Costs a few microseconds and takes part in no computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Beat(NamedTuple):
    number: int  # beats so far
    step: int | None  # optimizer step that is being worked on; None before the first
    phase: str  # what has begun, in a few words
    at: float  # time.time() of this machine


_last = Beat(0, None, "starting", time.time())
_listener: Callable[[Beat], None] | None = None


def beat(phase: str, step: int | None = None) -> None:
    """This process has moved on to ``phase``, of ``step`` or of the step last named."""
    global _last
    _last = Beat(_last.number + 1, _last.step if step is None else step, phase, time.time())
    if _listener is not None:
        _listener(_last)


def last_beat() -> Beat:
    return _last


def tell_beats(listener: Callable[[Beat], None]) -> None:
    """Call ``listener`` at every beat, in the thread that beats: it must be quick and not raise."""
    global _listener
    _listener = listener
