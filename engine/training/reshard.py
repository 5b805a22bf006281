"""``crossmask reshard``: the latest checkpoint of a run once more, in a form that loads into any number of ranks.

ZeRO cuts the optimizer's state into as many parts as there are ranks. The new checkpoint beside the old one holds it
whole, by parameter (DeepSpeed's universal format); everything else in it is a hard link to the verified file of the
old one. It is written, sealed and made the latest in the same order as any checkpoint, so a crash leaves the old one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..recipe_files import check_run_dir
from .checkpoint import LATEST, UNIVERSAL, UNREADABLE, CheckpointManager
from .manifest import (
    PARTIAL,
    STUDENT,
    entries,
    files_of,
    is_disk_full,
    one_line,
    replace_text,
    seal,
    start_afresh,
    system_error,
)
from .run_lock import run_lock
from .student_files import convert_student, is_universal, more_than_data

FULL = 1 << 20  # bytes: with less than this left, an error while writing is a full disk's


def reshard(run_dir: Path | str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Make the run's latest good checkpoint loadable by any number of ranks; returns its folder.

    One that is so already, or was saved under ZeRO stage 0, is left as it is. The ZeRO stage stays what it was.
    ``tell`` takes one line at a time.

    Raises:
        CheckpointError: no run, no usable checkpoint, no room, or the run is being trained; the old one is intact then.
    """
    manager = CheckpointManager(run_dir, warn=tell)
    if not manager.folder.is_dir():
        check_run_dir(manager.run_dir)
        manager.verified()  # says that there is none
    with run_lock(manager.run_dir, "resharded"):
        return _reshard(manager, tell)


def _reshard(manager: CheckpointManager, tell: Callable[[str], None]) -> Path:
    latest = manager.latest_name()
    source, state = manager.verified()
    if is_universal(source / STUDENT) or state.zero_stage == 0:
        tell(f"{source.name} loads into any number of ranks as it is")
        return source
    size = sum(path.stat().st_size for name, path in files_of(source).items() if name.startswith(f"{STUDENT}/"))
    tell(f"{source.name} is verified; converting {size / 1e6:,.0f} MB")
    final = source.with_name(source.name + UNIVERSAL)
    partial = final.with_name(final.name + PARTIAL)
    begun = partial
    try:
        if problem := more_than_data(source / STUDENT):
            raise CheckpointError(f"{problem}; it was not opened")
        start_afresh(partial)
        # what the manifest says of a file that did not change holds for the link to it
        kept = {name: entry for name, entry in entries(source).items() if not name.startswith(f"{STUDENT}/")}
        for name in kept:
            _link(source / name, partial / name)
        convert_student(source / STUDENT, partial / STUDENT, state.zero_stage)
        if manager.latest_name() != latest:
            raise CheckpointError("the run went on meanwhile; stop it first, and try again")
        seal(partial, final, kept)
        begun = final
        replace_text(manager.folder / LATEST, final.name)
    except (*UNREADABLE, CheckpointError) as error:
        reason = one_line(error)
        if isinstance(error, RuntimeError) and not system_error(error) and _free(source) < FULL:
            reason = f"No space left on device ({reason})"  # torch's own writer does not say
        if manager.latest_name() != begun.name:  # or the disk failed after all was done
            shutil.rmtree(begun, ignore_errors=True)
        remedy = ": make room" if is_disk_full(reason) else ""
        raise CheckpointError(f"{source} could not be resharded: {reason}; it is intact{remedy}") from None
    return final


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return FULL


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)
