"""The Arrow files of one saved Hugging Face data set, mapped into memory, and its rows by their place.

Nothing is read of a file but where the wanted rows of the wanted columns lie.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..beats import beat
from ..errors import DataError
from .complaints import Complain, refuse
from .open_files import Stamp, changed, read_regular, stamp_of

STATE = "state.json"
OLDEST = (14, 0, 1)  # pyarrow; those before it load extension types by unpickling what a file holds
_FILES, _INDICES = "_data_files", ("_indices_files", "_indices_data_files")
_DICTIONARY, _RECORDS = 2, 3  # kinds of messages
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream that was closed


def pyarrow(path: Path | str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise DataError(
            f"{path}: Arrow files are read by pyarrow, which is not installed; install it with: pip install pyarrow"
        ) from None
    version = tuple(int(part) for part in pyarrow.__version__.split(".")[:3] if part.isdigit())
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DataError(
            f"{path}: pyarrow {pyarrow.__version__} runs code that a file may hold; install {oldest} or later:"
            f" pip install 'pyarrow>={oldest}'"
        )
    return pyarrow


def is_name(name: object) -> bool:
    """Whether it names a file or folder right below another, and nothing else."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and name.isprintable()


def read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); save the data set again") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON; save the data set again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a JSON object; save the data set again")
    return found


@dataclass(frozen=True)
class Mapped:
    """A data set's record batches, in the order in which they are stored."""

    folder: Path
    stamps: dict[str, Stamp]  # of each file
    batches: list[tuple[str, Any]]  # file, and its batch
    ends: np.ndarray  # (batches,) int64, rows up to the end of each
    order: np.ndarray  # (N,) int64, stored row of each row of the data set

    @property
    def schema(self) -> Any:
        """None where there are no rows."""
        return self.batches[0][1].schema if self.batches else None

    def check(self, names: list[str]) -> None:
        """Raises DataError where the bytes of some columns are no values: they might lead outside of the file."""
        arrow = pyarrow(self.folder)
        for file, batch in self.batches:
            beat("checking the Arrow files")
            try:
                for name in names:
                    batch.column(name).validate(full=True)
            except (arrow.ArrowException, ValueError) as error:
                reason = str(error).split("\n")[0][:120]
                raise DataError(f"{file}: column {name} is damaged ({reason}); save the data set again") from None

    def texts(self, rows: np.ndarray, names: list[str]) -> dict[str, list[Any]]:
        """Some stored rows of some columns as Python's values, and as ``image`` each image's path: "" where the row
        holds the image itself, None where it has neither."""
        found: dict[str, list[Any]] = {name: [None] * len(rows) for name in (*names, "image")}
        for at, batch, take in self._parts(rows):
            columns = {name: take(batch.column(name)).to_pylist() for name in names}
            for name, values in {
                **columns,
                "image": _paths(pyarrow(self.folder).types, batch.column("image"), take),
            }.items():
                for place, value in zip(at, values, strict=True):
                    found[name][place] = value
        return found

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[list[int], Any, Callable[[Any], Any]]]:
        """By batch: places in ``rows``, the batch, and what takes those rows of a column of it."""
        numbers = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(numbers).tolist():
            at = np.flatnonzero(numbers == number)
            batch = self.batches[number][1]
            inside = rows[at] - (int(self.ends[number]) - batch.num_rows)
            yield at.tolist(), batch, _taker(pyarrow(self.folder), inside)

    def image(self, row: int, where: str) -> bytes:
        """The encoded image that a stored row holds. Any thread may ask. Raises DataError: its file has changed."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        file, batch = self.batches[number]
        if _stamp(file) != self.stamps[file]:  # to read beyond the end of a mapped file would end the process
            raise changed(file, where)
        column = batch.column("image")
        value = column[row - int(self.ends[number]) + batch.num_rows]
        return bytes((value["bytes"] if pyarrow(file).types.is_struct(column.type) else value).as_buffer())


def _stamp(file: str) -> Stamp | None:
    try:
        return stamp_of(file)
    except OSError:
        return None


def _taker(arrow: Any, inside: np.ndarray) -> Callable[[Any], Any]:
    first, count = int(inside[0]), len(inside)
    if bool((np.diff(inside) == 1).all()):
        return lambda column: column.slice(first, count)
    which = arrow.array(inside)
    return lambda column: column.take(which)


def _paths(types: Any, column: Any, take: Callable[[Any], Any]) -> list[str | None]:
    """As :meth:`Mapped.texts` says; the bytes of images are not touched."""
    parts = {"path" if types.is_string(column.type) or types.is_large_string(column.type) else "bytes": column}
    if types.is_struct(column.type):
        names = [column.type.field(at).name for at in range(column.type.num_fields)]
        parts = dict(zip(names, column.flatten(), strict=True))  # a struct that is null has no part
    count = len(take(column))
    paths = take(parts["path"]).to_pylist() if "path" in parts else [None] * count
    held = take(parts["bytes"].is_valid()).to_pylist() if "bytes" in parts else [False] * count
    return ["" if there else path or None for there, path in zip(held, paths, strict=True)]


def open_mapped(folder: Path, complain: Complain = refuse) -> Mapped:
    """Raises DataError: a file that is not there, is cut short, or is no Arrow stream."""
    state = read_object(folder / STATE)
    stamps: dict[str, Stamp] = {}
    batches = list(_batches(_named(folder, state.get(_FILES)), stamps, complain))
    for (_, first), (file, batch) in itertools.pairwise(batches):
        if not batch.schema.equals(first.schema):
            raise DataError(f"{file}: its columns are not those of the file before; save the data set again")
    ends = np.cumsum([batch.num_rows for _, batch in batches], dtype=np.int64)
    stored = int(ends[-1]) if len(ends) else 0
    order = np.arange(stored)
    if listed := next((state[key] for key in _INDICES if state.get(key)), None):
        parts = [batch.column(0) for _, batch in _batches(_named(folder, listed), stamps, complain)]
        try:
            for part in parts:
                part.validate(full=True)
        except (pyarrow(folder).ArrowException, ValueError):
            raise DataError(f"{folder}: its indices are damaged; save the data set again") from None
        given = [np.asarray(part.to_numpy(zero_copy_only=False)) for part in parts]
        order = np.concatenate(given) if given else order[:0]
        if order.dtype.kind not in "iu" or (len(order) and not 0 <= int(order.min()) <= int(order.max()) < stored):
            raise DataError(f"{folder}: its indices lead outside of its {stored:,} rows; save the data set again")
        order = order.astype(np.int64)
    return Mapped(folder, stamps, batches, ends, order)


def _named(folder: Path, listed: object) -> list[Path]:
    found = []
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not is_name(name):
            raise DataError(f"{folder / STATE}: {str(name)[:60]!r} is no file in this folder; save the data set again")
        found.append(folder / str(name))
    if not found:
        raise DataError(f"{folder / STATE}: it names no Arrow files; save the data set again")
    return found


def _batches(paths: list[Path], stamps: dict[str, Stamp], complain: Complain) -> Iterator[tuple[str, Any]]:
    for path in paths:
        beat("opening the Arrow files")
        arrow, rows = pyarrow(path), 0
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its other end
                raise DataError(f"{path}: no plain file; save the data set again")
            stamps[str(path)] = stamp_of(str(path))
            with path.open("rb") as file:
                file.seek(max(0, stamps[str(path)].size - len(_END)))
                closed = file.read() == _END
            _refuse_compressed(arrow, path)
            with arrow.ipc.open_stream(arrow.memory_map(str(path))) as stream:
                for batch in stream:
                    yield str(path), batch
                    rows += batch.num_rows
            problem = None if closed else "no mark of its end"
        except FileNotFoundError:
            complain("truncated", DataError(f"{path}: no such file; copy it, or save the data set again"))
            continue
        except (arrow.ArrowException, OSError, ValueError, LookupError, struct.error) as error:
            problem = str(error).split("\n")[0][:120] or type(error).__name__
        if problem is not None:
            line = f"{path}: cut short or damaged behind its first {rows:,} rows ({problem})"
            complain("truncated", DataError(f"{line}; copy it again, or save the data set again"))


def _refuse_compressed(arrow: Any, path: Path) -> None:
    """Raises DataError before anything is unpacked: a few kilobytes may become any number of gigabytes, in memory."""
    with (
        arrow.memory_map(str(path)) as file,
        contextlib.suppress(arrow.ArrowException, OSError),
    ):  # told of by the caller
        for message in arrow.ipc.MessageReader.open_stream(file):
            if _is_compressed(message.metadata.to_pybytes()):
                raise DataError(
                    f"{path}: its columns are compressed, so that no row can be read by its place; load and save the"
                    " data set with the package datasets, which does not compress"
                )


def _is_compressed(message: bytes) -> bool:
    """Whether a message says so, by the layout of Arrow's ``Message.fbs``: a flatbuffer, whose fields are found by
    their numbers in a table of offsets."""

    def field(table: int, number: int) -> int:
        """Where a field of a table begins; 0 where it is left out."""
        offsets = table - _at("<i", message, table)
        if 4 + 2 * number >= _at("<H", message, offsets):
            return 0
        offset = _at("<H", message, offsets + 4 + 2 * number)
        return table + offset if offset else 0

    def follow(at: int) -> int:
        return at + _at("<I", message, at)

    root = follow(0)
    kind, header = field(root, 1), field(root, 2)
    if not kind or not header or message[kind] not in (_DICTIONARY, _RECORDS):
        return False
    batch = follow(header)
    if message[kind] == _DICTIONARY:
        batch = follow(field(batch, 1))
    return field(batch, 3) > 0


def _at(form: str, message: bytes, place: int) -> int:
    number: int = struct.unpack_from(form, message, place)[0]
    return number


_mapped: dict[str, Mapped] = {}
_lock = threading.Lock()


def mapped(folder: str, stamps: object, where: str) -> Mapped:
    """The open data set in a folder, whose files had ``stamps``. Any thread may ask.

    Raises:
        DataError: they have changed; ``where`` says who asks.
    """
    found = _mapped.get(folder)
    if found is None or found.stamps != stamps:
        with _lock:
            found = _mapped.get(folder)
            if found is None or found.stamps != stamps:
                found = open_mapped(Path(folder))
                if found.stamps != stamps:
                    raise changed(folder, where)
                _mapped[folder] = found
    return found


def keep(found: Mapped) -> None:
    """So that :func:`mapped` need not open it again."""
    with _lock:
        _mapped[str(found.folder)] = found


def _forked() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)
