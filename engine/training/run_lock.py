"""One process at a time may write into a run folder: an exclusive ``flock`` on ``RUN/lock``.

The system lets go of it when the process ends, however it ends, so a lock cannot be left behind; the file stays, and
means nothing by itself. It names the process that holds the lock, for others' messages.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

LOCK = "lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what file systems answer where another process has it


@contextmanager
def run_lock(run_dir: Path, doing: str) -> Iterator[None]:
    """Inside, no other process that asks for the lock writes into ``run_dir``. ``doing``: "trained", "resharded".

    A folder in which nothing can be written, and a file system that has no locks, are no reason to stop here.

    Raises:
        CheckpointError: another process has it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise CheckpointError(f"{run_dir} is being {_holder(descriptor)}: stop it first") from None
        else:
            _name_holder(descriptor, doing)
        yield
    finally:
        os.close(descriptor)


def _name_holder(descriptor: int, doing: str) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{doing} by process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:  # a full disk: the lock holds without a name
        pass


def _holder(descriptor: int) -> str:
    """For instance "trained by process 4711"; the machine too where it is another one."""
    try:
        text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    except OSError:
        text = ""
    return text.removesuffix(f" on {socket.gethostname()}") or "used by another process"
