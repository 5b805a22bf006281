"""Files that are read at random all through a run: kept open, and still what they were when it began."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .tar_members import read_at

_MOST_OPEN = 128  # files; a process may often have 1,024
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # not waiting for the other end of what turns out to be a pipe


class Stamp(NamedTuple):
    """What a file has for as long as nobody writes to it."""

    size: int
    mtime_ns: int


def stamp_of(file: str | int) -> Stamp:
    """Of a path or a descriptor. Raises OSError."""
    found = os.stat(file)
    return Stamp(found.st_size, found.st_mtime_ns)


def read_regular(path: Path, most: int | None = None) -> bytes:
    """All of a plain file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read, is larger, or is a pipe or a device, from which reading might never end.
    """
    with open(os.open(path, _READ), "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than {most:,}")
        return read_at(file.fileno(), 0, found.st_size)


def changed(path: str, where: str) -> DataError:
    return DataError(f"{where}: {path} has changed since the run began; put the old file back, or start again")


@dataclass
class _Open:
    descriptor: int
    readers: int = 0


class OpenFiles:
    """Reads a file's bytes by place, in as many threads as like to; the files used last stay open."""

    def __init__(self, most: int = _MOST_OPEN) -> None:
        self._most, self._open, self._lock = most, OrderedDict[str, _Open](), threading.Lock()
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """No other thread came along. Reading by place needs no position, so the descriptors may be shared."""
        self._lock = threading.Lock()
        for file in self._open.values():
            file.readers = 0

    def read(self, path: str, at: int, count: int, stamp: Stamp, where: str) -> bytes:
        """``count`` bytes from ``at`` of a file that had ``stamp``.

        Raises:
            DataError: it has changed; ``where`` says who asks.
            OSError: it cannot be read.
        """
        file = self._take(path)
        try:
            if stamp_of(file.descriptor) != stamp:
                raise changed(path, where)
            found = read_at(file.descriptor, at, count)
        finally:
            self._give_back(file)
        if len(found) < count:
            raise changed(path, where)
        return found

    def _take(self, path: str) -> _Open:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _Open(os.open(path, _READ))
            self._open.move_to_end(path)
            file.readers += 1
            return file

    def _give_back(self, file: _Open) -> None:
        with self._lock:
            file.readers -= 1
            if len(self._open) > self._most:
                for path in [path for path, other in self._open.items() if not other.readers]:
                    os.close(self._open.pop(path).descriptor)
                    if len(self._open) <= self._most:
                        break
