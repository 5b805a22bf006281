"""Stopping on request: Ctrl-C, SIGTERM, or the launcher's death end every rank at the same step, with a checkpoint."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from types import FrameType

from .agreement import any_rank
from .rank_processes import LAUNCHER_PID, exit_status, process_descriptor

# One Ctrl-C arrives several times: from the terminal, and passed on by each launcher in between.
SAME_REQUEST_S = 2.0


class StopRequest:
    """A flag that SIGINT and SIGTERM raise; the loop asks for it between steps.

    A second signal, more than two seconds after the first, ends the process at once with status 128 + its number.
    The death of the parent process, and of the process named in CROSSMASK_LAUNCHER_PID (the command that a user
    started, which a dying launcher in between would otherwise hide), raises the flag too: a rank whose launcher was
    killed must not train on alone.

    DeepSpeed's launcher sends SIGKILL 30 seconds after it passed SIGTERM on: step and checkpoint must fit in that.

    >>> stop = StopRequest()
    >>> with stop:
    ...     while not stop.agree():
    ...         train_one_step()
    """

    def __init__(self, watch: Iterable[int] | None = None) -> None:
        """``watch``: process ids whose death asks to stop; default the parent and CROSSMASK_LAUNCHER_PID."""
        self.reason: str | None = None
        self._first = 0.0
        self._handlers: dict[int, object] = {}
        self._closed = threading.Event()
        if watch is None:
            launcher = os.environ.get(LAUNCHER_PID, "")
            watch = [os.getppid(), *([int(launcher)] if launcher.isdigit() else [])]
        self._watch = [pid for pid in dict.fromkeys(watch) if pid > 1]  # init never dies before us

    def __enter__(self) -> StopRequest:
        """Installs the handlers (main thread only) and starts the watch."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        if self._watch:
            threading.Thread(target=self._wait_for_deaths, name="launcher-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the earlier handlers and ends the watch."""
        self._closed.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop. No communication."""
        return self.reason is not None

    def agree(self, local_flag: bool | None = None) -> bool:
        """Whether any rank has been asked to stop (or passes True), the same answer on all. Collective: once a step."""
        return any_rank(self.requested if local_flag is None else local_flag)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._first = signal.Signals(number).name, now
        elif now - self._first > SAME_REQUEST_S:
            os._exit(128 + number)

    def _wait_for_deaths(self) -> None:
        """Runs in a daemon thread until a watched process is gone, a new parent appears, or the watch is closed."""
        parent = os.getppid()
        with ExitStack() as descriptors:
            poll = select.poll()
            gone, looked_up = False, []
            for pid in self._watch:
                try:
                    descriptor = process_descriptor(pid)
                except OSError:  # unless processes of other users are hidden from us
                    looked_up += [] if exit_status(pid)[0] else [pid]
                    continue
                if descriptor is None:
                    gone = True
                else:
                    descriptors.callback(os.close, descriptor)
                    poll.register(descriptor, select.POLLIN)
            while not self._closed.is_set():
                looked_for_in_vain = any(exit_status(pid)[0] for pid in looked_up)
                if gone or looked_for_in_vain or poll.poll(500) or os.getppid() != parent:
                    if self.reason is None:
                        self.reason, self._first = "the launcher ended", time.monotonic()
                    return
