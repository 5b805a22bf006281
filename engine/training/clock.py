"""Where the wall time of a run goes."""

from __future__ import annotations

import time


class Clock:
    """Adds the wall time since its last lap to a named part of ``seconds``."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def lap(self, part: str) -> float:
        """Returns the time now."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now
        return now
