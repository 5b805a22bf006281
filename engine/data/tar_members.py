"""The members of a tar file, each with where its bytes lie, from its headers alone.

POSIX ustar, GNU's and PAX archives. What is no plain file below the archive's folder is refused, and an archive that
does not end as one ends is told from a whole one, with the byte from which it cannot be trusted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_WINDOW = 4096  # read at once: a header, a caption, and the next header
_EXTENSION_BYTES = 2**20  # of a long name or of PAX records; a path has some 4,096
_ZEROS = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7", b"5")  # of today, of old, contiguous; and folders
_NOT_FILES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
}

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\3\4": "zip"}


class Member(NamedTuple):
    """A plain file in an archive."""

    name: str
    start: int  # of its first header
    offset: int  # of its contents
    size: int


class Damaged(Exception):
    """From ``byte`` on the archive cannot be read."""

    def __init__(self, byte: int, problem: str, truncated: bool = False) -> None:
        super().__init__(problem)
        self.byte, self.problem, self.truncated = byte, problem, truncated


class Window:
    """A file's bytes by place; those that lie together are read together."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._descriptor, self._start, self._bytes = descriptor, 0, b""

    def read(self, at: int, count: int) -> bytes:
        """Fewer than ``count`` at the end of the file alone."""
        start = at - self._start
        if start < 0 or start + count > len(self._bytes):
            if count > _WINDOW:
                return read_at(self._descriptor, at, count)
            self._start, self._bytes, start = at, read_at(self._descriptor, at, _WINDOW), 0
        return self._bytes[start : start + count]


def read_at(descriptor: int, at: int, count: int) -> bytes:
    """``count`` bytes from ``at``, fewer at the end of the file alone. Any thread may ask.

    Raises:
        OSError: the disk cannot give them.
    """
    found = os.pread(descriptor, count, at)
    while len(found) < count and (more := os.pread(descriptor, count - len(found), at + len(found))):
        found += more  # a signal came, or the file system gives as much at once as it likes
    return found


def members(window: Window, refused: Callable[[str, int, str], None]) -> Iterator[Member]:
    """The plain files of an archive in order, folders passed over.

    ``refused`` is told of a member that is something else, by its name, its byte and what it is; where it returns, that
    member is passed over.

    Raises:
        Damaged: the archive is cut short or no tar file.
    """
    at, start = 0, 0
    name: str | None = None  # by an extension header, for the member that follows
    size: int | None = None
    sparse = False
    while True:
        header = window.read(at, BLOCK)
        if len(header) < BLOCK:
            what = "in a header" if header else "before the two blocks of zeros that end an archive"
            raise Damaged(min(at, window.size), f"it is cut short {what}", truncated=True)
        if header == _ZEROS:
            if start != at:
                raise Damaged(start, "a header of extensions without a member behind it")
            return _end(window, at)
        if not _is_header(header):
            raise Damaged(at, _foreign(header) if at == 0 else "what stands there is no tar header")
        kind, length = header[156:157], _number(header[124:136], at)
        contents = at + BLOCK
        if kind in b"LKxg":  # not b"": a slice of one byte
            records = _contents(window, at, length)
            if kind == b"L":
                name = _text(records.rstrip(b"\0"), at)
            elif kind != b"K":  # the name that a link leads to
                found = _pax(records, at)
                if kind == b"g" and found.keys() & {"path", "size"}:
                    raise Damaged(at, "global PAX records that name a member or its size")
                name = _text(found["path"], at) if "path" in found else name
                size = _decimal(found["size"], at) if "size" in found else size
                sparse = sparse or any(key.startswith("GNU.sparse.") for key in found)
            at = contents + _whole(length)
            start = start if kind != b"g" else at
            continue
        if name is None:
            name = _name(header, at)
        if size is not None:
            length = size
        folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        end = contents if folder or kind in _NOT_FILES else contents + _whole(length)
        problem = _NOT_FILES.get(kind)
        plain = name if name.isprintable() else ascii(name)
        if kind == b"S":
            raise Damaged(start, f"{plain} is a sparse file of GNU tar, which is not read")
        if sparse:
            problem = "a sparse file"
        elif kind not in _FILES and problem is None:
            problem = f"of type {kind.decode('latin-1')!r}"
        elif name.startswith("/"):
            problem = "named from the root of a file system"
        elif ".." in name.split("/"):
            problem = "named with '..', outside the archive"
        elif plain != name:
            problem = "named with control characters"
        if contents + length > window.size and end > contents:
            raise Damaged(start, f"it is cut short in {plain}, of which {max(0, window.size - contents):,} of"
                          f" {length:,} bytes are there", truncated=True)  # fmt: skip
        if problem is not None:
            refused(plain, start, problem)
        elif not folder:
            yield Member(name, start, contents, length)
        at = start = end
        name, size, sparse = None, None, False


def _end(window: Window, at: int) -> None:
    """Behind the first block of zeros nothing but zeros may come."""
    while block := window.read(at, BLOCK):
        if block.strip(b"\0"):
            if not _is_header(block):
                raise Damaged(at, "zeros, and more behind them: a download that was not finished?")
            raise Damaged(at, "a second archive behind the end of the first, which readers of tar files do not see")
        at += BLOCK


def _is_header(header: bytes) -> bool:
    """By its checksum: the sum of its bytes, with the checksum's own as spaces. Very old writers added signed bytes."""
    if len(header) < BLOCK:
        return False
    try:
        given = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    own = sum(header) - sum(header[148:156]) + 8 * 32
    if given == own:
        return True
    high = sum(byte > 127 for byte in header[:148]) + sum(byte > 127 for byte in header[156:])
    return high > 0 and given == own - 256 * high


def _foreign(header: bytes) -> str:
    for magic, kind in _COMPRESSED.items():
        if header.startswith(magic):
            return f"it is compressed by {kind}"
    return "it is no tar file"


def _number(field: bytes, at: int) -> int:
    """Octal digits, or in GNU's way a binary number where they are too few."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
    else:
        try:
            number = int(field.strip(b" \0") or b"0", 8)
        except ValueError:
            raise Damaged(at, "a header without a size") from None
    if number < 0:
        raise Damaged(at, "a header with a negative size")
    return number


def _name(header: bytes, at: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""  # GNU keeps times there
    return _text(prefix + b"/" + name if prefix else name, at)


def _text(name: bytes, at: int) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise Damaged(at, f"the name {name[:60]!r} is not UTF-8") from None
    if not text or "\0" in text:
        raise Damaged(at, "a member without a usable name")
    return text


def _contents(window: Window, at: int, length: int) -> bytes:
    if length > _EXTENSION_BYTES:
        raise Damaged(at, f"an extension header of {length:,} bytes")
    found = window.read(at + BLOCK, length)
    if len(found) < length:
        raise Damaged(at, "it is cut short in an extension header", truncated=True)
    return found


def _pax(records: bytes, at: int) -> dict[str, bytes]:
    """``LENGTH KEY=VALUE\\n``, again and again; the length counts all of it."""
    found: dict[str, bytes] = {}
    begin = 0
    while begin < len(records) and records[begin]:
        space = records.find(b" ", begin, begin + 20)
        digits = records[begin:space] if space > 0 else b""
        end = begin + int(digits) if digits.isdigit() else 0
        key, equals, value = records[space + 1 : max(end - 1, 0)].partition(b"=")
        if end <= space or end > len(records) or records[end - 1 : end] != b"\n" or not equals:
            raise Damaged(at, "PAX records that cannot be read")
        found[key.decode("utf-8", "replace")] = value
        begin = end
    return found


def _decimal(value: bytes, at: int) -> int:
    if not value.isdigit() or len(value) > 19:
        raise Damaged(at, "a PAX record with a size that is no number")
    return int(value)


def _whole(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
