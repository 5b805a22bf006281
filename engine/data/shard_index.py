"""What is known of a shard, kept on disk: scanning ten million headers takes minutes, reading them again seconds.

One JSON file a shard in the cache folder, valid while the shard has the path, the size and the modification time it was
made for. ``CROSSMASK_CACHE`` names another folder, and ``CROSSMASK_CACHE=off`` none. Ranks that open the same shards at
once share the work: each scans shards that no other has begun. A file is written as a whole or not at all, an index
that does not fit is made anew, and where nothing can be written the shards are scanned every time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..atomic import replace_file
from ..beats import beat
from ..errors import DataError
from .complaints import Complain, refuse
from .open_files import Stamp, read_regular, stamp_of
from .shard_samples import Samples, read_samples

SETTING = "CROSSMASK_CACHE"
VERSION = 1  # of the files, and of the rules by which members become samples
_WAIT = 0.1  # seconds between two looks at a shard that another process scans
_PATIENCE = 60.0  # seconds; one that takes longer may be stopped, and a second scan does no harm
_TEXT: frozenset[type] = frozenset({str})
_COLUMNS = {  # of Samples, and what is in each; captions are lists of texts
    **dict.fromkeys(("keys", "images"), _TEXT),
    **dict.fromkeys(("offsets", "sizes"), frozenset({int})),
    "captions": frozenset({list}),
    **dict.fromkeys(("groups", "categories", "subcategories"), _TEXT | {type(None)}),
}


def index_folder() -> Path | None:
    """Where indices are kept; None where they are not."""
    given = os.environ.get(SETTING, "")
    if given.lower() in ("0", "off", "no", "none"):
        return None
    if given:
        return Path(given).expanduser() / "shards"
    cache = os.environ.get("XDG_CACHE_HOME", "")  # to be passed over where it is not absolute, says its specification
    return (Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()) / "crossmask" / "shards"


def index_shards(paths: list[str], complain: Complain) -> Iterator[tuple[int, Samples, Stamp]]:
    """Each shard's number, samples and stamp, in any order: from its index, or scanned.

    Raises:
        DataError: by way of ``complain``, for what cannot be used; a shard that cannot be read at all is passed over.
    """
    folder = index_folder()
    begun: list[int] = []  # by other processes
    for number, path in enumerate(paths):
        beat("indexing the shards")
        found = _index(path, folder, complain, wait=False)
        if found is None:
            begun.append(number)
        elif found:
            yield number, *found
    for number in begun:
        if found := _index(paths[number], folder, complain, wait=True):
            yield number, *found


def _index(path: str, folder: Path | None, complain: Complain, wait: bool) -> Any:
    """Samples and stamp; () for a shard that was complained of; None while another process scans it."""
    try:
        with open(path, "rb", buffering=0) as file:
            stamp = stamp_of(file.fileno())
            if complain is not refuse:  # a check looks at all of a shard, and an index does not name what is left out
                folder = None
            cached = None if folder is None else folder / f"{hashlib.sha256(path.encode()).hexdigest()[:40]}.json"
            if cached is not None and (samples := _read(cached, path, stamp)) is not None:
                return samples, stamp
            with _claim(cached, wait) as claimed:
                if not claimed:
                    return None
                if cached is not None and (samples := _read(cached, path, stamp)) is not None:
                    return samples, stamp  # another process has been faster
                samples = read_samples(path, file.fileno(), complain)
                if stamp_of(file.fileno()) != stamp:
                    raise DataError(f"{path}: it was written to while it was read; start again once it is whole")
                if cached is not None:
                    _write(cached, path, stamp, samples)
                return samples, stamp
    except OSError as error:
        complain("unreadable file", DataError(f"{path}: cannot be read ({error.strerror}); make it readable"))
        return ()


@contextlib.contextmanager
def _claim(cached: Path | None, wait: bool) -> Iterator[bool]:
    """Whether this process is to scan the shard: False where another one does, unless that is to be waited for: then
    only for a while.

    The claim is a lock on one byte of the folder's lock file, so it goes with its process and none is left behind.
    Where files cannot be locked or written, every process scans.
    """
    lock = -1
    try:
        if cached is not None:
            with contextlib.suppress(OSError):
                cached.parent.mkdir(parents=True, exist_ok=True)
                lock = os.open(cached.with_name("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        yield cached is None or lock < 0 or _locked(lock, int(cached.name[:12], 16), wait)
    finally:
        if lock >= 0:
            os.close(lock)


def _locked(lock: int, byte: int, wait: bool) -> bool:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return True
        if not wait:
            return False
        beat("waiting for the index of a shard")
        time.sleep(_WAIT)
    return True


def _write(cached: Path, path: str, stamp: Stamp, samples: Samples) -> None:
    record = {"version": VERSION, "path": path, "stamp": list(stamp), "samples": vars(samples)}
    with contextlib.suppress(OSError):
        replace_file(cached, json.dumps(record, ensure_ascii=False, separators=(",", ":")))


def _read(cached: Path, path: str, stamp: Stamp) -> Samples | None:
    """None where there is none, or not of this shard as it is."""
    try:
        record = json.loads(read_regular(cached))
        if (record["version"], record["path"], record["stamp"]) != (VERSION, path, list(stamp)):
            return None
        samples = Samples(**record["samples"])
        return samples if _is_sound(samples, stamp.size) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_sound(samples: Samples, size: int) -> bool:
    """Whether a scan of a shard of ``size`` bytes may have found that: the file may be anybody's, or damaged. Raises
    whatever comparing and unpacking raise."""
    for name, types in _COLUMNS.items():
        column = getattr(samples, name)
        if not isinstance(column, list) or len(column) != len(samples.keys) or not types.issuperset(map(type, column)):
            return False
    texts = itertools.chain.from_iterable(samples.captions)
    ends = zip(samples.offsets, samples.sizes, strict=True)
    told = samples.passed_over.items()
    return (
        all(samples.captions)
        and _TEXT.issuperset(map(type, texts))
        and all(at >= 0 and count >= 0 and at + count <= size for at, count in ends)
        and all(type(count) is int and type(first) is str for _, (count, first) in told)
    )
