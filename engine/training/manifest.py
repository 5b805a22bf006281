"""Sealing a checkpoint's folder so that a crash at any moment shows, and finding out whether it is still as sealed.

A folder is written under a ``.partial`` name. The manifest, with size and SHA-256 of every other file, comes last; then
everything is forced to the disk and the folder takes its final name. A hash protects from damage, not from malice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..atomic import flush
from ..beats import beat

MANIFEST, PARTIAL = "manifest.json", ".partial"
STUDENT = "student"  # the folder inside a checkpoint in which DeepSpeed looks for files by pattern
FORMAT = 1
HASHED_AT_ONCE = 4  # files: hashlib works outside Python's lock, and disks like more than one request
Entry = dict[str, Any]  # {"bytes": size, "sha256": hexadecimal}


def describe(path: Path) -> Entry:
    """The manifest's entry of a file that has just been written; the file is forced to the disk."""
    return {"bytes": path.stat().st_size, "sha256": _digest(path, to_disk=True)}


def seal(partial: Path, final: Path, described: Mapping[str, Entry]) -> None:
    """Manifest, everything on the disk, then the final name; an earlier folder of that name is replaced.

    ``described`` has the entries that are known already, by path inside the folder: of files that another rank wrote,
    or that are links to files verified before. OSError where one of them is missing or has another size by now.
    """
    present = files_of(partial)
    for name in described.keys() - present.keys():
        raise OSError(f"{name} has been written but is not in {partial}: all ranks must see one file system")
    files = {name: described.get(name) or describe(path) for name, path in present.items()}
    for name, entry in files.items():
        if (size := present[name].stat().st_size) != entry["bytes"]:
            raise OSError(f"{name} has {size} bytes instead of the {entry['bytes']} that were written")
    write_json(partial / MANIFEST, {"format": FORMAT, "files": files, "sha256": _digest_of(files)})
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        flush(folder)
    replaced = final.with_name(f"{final.name}.replaced{PARTIAL}")
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def find_damage(
    checkpoint: Path, part: int = 0, parts: int = 1, needed: Callable[[str], bool] = lambda name: True
) -> str | None:
    """What is wrong with a checkpoint's files, naming the first bad one; None where all match the manifest.

    With ``parts`` > 1 only every ``parts``-th file is read, beginning with number ``part``, so that ranks can share
    the work, and only those are that ``needed`` says yes to; whether all are there, and of the right size, is looked
    at always. Files that the manifest does not name do harm among the student's only, where DeepSpeed finds them.
    """
    name = MANIFEST
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format {str(manifest['format'])[:20]}, it is of another version of crossmask"
        files = manifest["files"]
        if manifest["sha256"] != _digest_of(files):
            return f"{MANIFEST}: contents changed"
        for expected in files.values():
            if type(expected["bytes"]) is not int or not isinstance(expected["sha256"], str):
                return f"{MANIFEST}: other types, it is of another version of crossmask"
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST}: unreadable, {type(error).__name__}"
    try:
        present = files_of(checkpoint)
        for name in sorted(present.keys() - files.keys()):
            if name.startswith(f"{STUDENT}/"):
                return f"{name}: not in the manifest"
        for name, expected in files.items():
            if name not in present:
                return f"{name}: missing"
            if (size := present[name].stat().st_size) != expected["bytes"]:
                return f"{name}: {size} bytes instead of {expected['bytes']}"
        largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    except OSError as error:
        return f"{name}: {one_line(error)}"

    def compare(name: str) -> str | None:
        try:
            return None if _digest(present[name]) == files[name]["sha256"] else f"{name}: contents changed"
        except OSError as error:
            return f"{name}: {one_line(error)}"

    with hashing() as pool:
        found = pool.map(compare, filter(needed, largest_first[part::parts]))
        return next((damage for damage in found if damage), None)


@contextmanager
def hashing() -> Iterator[ThreadPoolExecutor]:
    """Threads for :func:`describe`; left early, they do not begin on what still waits."""
    pool = ThreadPoolExecutor(HASHED_AT_ONCE, "hash")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def entries(checkpoint: Path) -> dict[str, Entry]:
    """The manifest of a verified checkpoint: its files' entries by path inside the folder."""
    found: dict[str, Entry] = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    return found


def start_afresh(partial: Path) -> None:
    """An empty folder to write into; whatever a crash has left half-written beside it is removed.

    As far as possible: on NFS a file that some process has open cannot be, and the next save tries again.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left_over in partial.parent.glob("step-*" + PARTIAL):
        shutil.rmtree(left_over, ignore_errors=True)
    if partial.exists():
        os.replace(partial, partial.with_name(f"{partial.name}.{os.getpid()}{PARTIAL}"))
    partial.mkdir()


def files_of(checkpoint: Path) -> dict[str, Path]:
    """Every file but the manifest, by its path inside the checkpoint, sorted.

    Without what file systems and desktops hide there (.nfs0001, .DS_Store); DeepSpeed loads whatever ends in "pt".
    """
    found = {
        path.relative_to(checkpoint).as_posix(): path
        for path in checkpoint.rglob("*")
        if path.is_file() and (not path.name.startswith(".") or "pt" in path.name)
    }
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1))


def replace_text(path: Path, text: str) -> None:
    """The whole text or none of it, and what was there before until then."""
    temporary = path.with_name(f".{path.name}.new")
    write_text(temporary, text + "\n")
    os.replace(temporary, path)
    flush(path.parent)


def one_line(error: BaseException) -> str:
    """What the system said, where that is at the bottom of it: torch turns a full disk into words of its own."""
    said = system_error(error) or error
    return " ".join(str(said).split())[:300] or type(said).__name__


def is_disk_full(error: BaseException | str) -> bool:
    """By its words, as it may come from another rank, or from safetensors, whose errors are no OSError."""
    words = error if isinstance(error, str) else one_line(error)
    return any(said in words for said in ("No space left", "quota exceeded"))


def system_error(error: BaseException) -> OSError | None:
    """The OSError that ``error`` is, or was made from."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        if isinstance(current, OSError):
            return current
        seen.append(current)
        current = current.__cause__ or current.__context__
    return None


def _digest(path: Path, to_disk: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if to_disk:
            os.fsync(file.fileno())
        while block := file.read(1 << 20):
            beat("hashing checkpoint files")
            digest.update(block)
    return digest.hexdigest()


def _digest_of(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
