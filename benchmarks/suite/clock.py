"""A clock for a CPU or a GPU, the memory that a call takes, and alternatives that take turns.

In every round each alternative runs once, in an order drawn for the round: what else the machine does, and what ran
before, meets all of them alike, and ratios within a round are fair. On a GPU the cache is flushed before each run, as
in training something else has used it since; on a CPU it is left as the run before left it, whosever that was.
"""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

Stage = Callable[[], object]
FLUSHED = 256 * 2**20  # bytes; more than any GPU's last cache


class Clock:
    """Times stages that run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self, stages: Sequence[Stage]) -> list[float]:
        """Seconds of each stage."""
        if self.flushed is None:
            marks = [time.perf_counter()]
            for stage in stages:
                stage()
                marks.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(marks)]
        self.flushed.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        events[0].record()
        for stage, event in zip(stages, events[1:], strict=True):
            stage()
            event.record()
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def take_turns(
    clock: Clock,
    runs: Mapping[str, Callable[[], Sequence[Stage]]],
    rounds: int,
    seconds: float,
    at_least: int = 5,
    broken: Callable[[str, Exception], object] | None = None,
) -> dict[str, list[tuple[float, ...]]]:
    """Seconds of each run's stages in every round: ``rounds`` of them, or fewer once ``seconds`` are over.

    Args:
        runs: by name, what makes a run's stages; they are made anew for each round.
        at_least: so many rounds there are, however long they take.
        broken: told of a run that raises, which then leaves; the others go on. None: it raises here.
    """
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= at_least and time.perf_counter() > end:
            break
        for name, run in order.sample(list(runs.items()), len(runs)):
            if name not in found:
                continue
            try:
                found[name].append(tuple(clock(run())))
            except Exception as error:
                if broken is None:
                    raise
                del found[name]
                broken(name, error)
    return found


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that ``call`` had allocated at one time beyond what there was, its results included.

    On a CPU as PyTorch's allocator tells its profiler: what libraries below it allocate for themselves is not in it.
    There ``call`` runs in a thread of its own, so that memory which is kept for a thread's next call counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def traced() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            found = call()
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
        del found
        return max(itertools.accumulate(changes), default=0)

    _ready_to_trace()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(traced).result()


@functools.cache
def _ready_to_trace() -> None:
    """PyTorch's profiler wants to be used first where PyTorch was imported, and complains of other threads."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass
