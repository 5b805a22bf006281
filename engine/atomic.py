"""Replacing a file as a whole: who reads it, or comes after a crash, finds the old contents or the new ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError


def replace_file(path: Path, contents: str | bytes, durable: bool = False) -> None:
    """Write ``contents``, text as UTF-8, in place of what ``path`` held; on failure that stays, and nothing else.

    Args:
        durable: force the contents to the disk first, which may take as long as all else that is being written.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    # Threads, too, may write the same file at once: a rank's own failure and its watchdog's.
    part = path.with_name(f"{path.name}.{threading.get_native_id()}.part")
    try:
        with part.open("wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Forces a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Whatever cannot be written becomes one line for the user.

    Raises:
        CheckpointError: in place of an OSError; names ``folder``.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror or error}; make room there, or make it writable"
        ) from error
