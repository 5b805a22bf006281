"""How a failure reaches the screen: once, in one line where it is a user's mistake, whichever rank it happened in."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import UserError

FAILURE_FILE = "CROSSMASK_FAILURE_FILE"  # environment variable that our launcher gives to its ranks
EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 1, 2, 130


@dataclass(frozen=True)
class Failure:
    """The first failure among the ranks of a run."""

    rank: int
    line: str
    traceback: str = ""  # empty: a user's mistake, the line says all


@contextmanager
def handle_user_errors() -> Iterator[None]:
    """Turn a :class:`UserError` into one red line on stderr and exit code 2; other errors keep their traceback."""
    try:
        yield
    except UserError as error:
        print_error(str(error))
        raise SystemExit(EXIT_USER_ERROR) from None


def print_error(line: str, style: str = "bold red") -> None:
    """One line on stderr, without colours where stderr is not a terminal."""
    from rich.console import Console

    # soft_wrap: the terminal wraps, the text keeps its one line for whoever greps it.
    Console(stderr=True).print(" ".join(line.split()), style=style, markup=False, highlight=False, soft_wrap=True)


def report_failure(error: BaseException, rank: int) -> int:
    """Tell the user, from inside a rank, why it ends. Returns the exit code.

    Under our launcher the first rank to fail leaves a note and the launcher prints it. Under another launcher rank 0
    speaks; the other ranks wait, are ended by the launcher when rank 0 failed as well, and speak when it did not.
    """
    user = isinstance(error, UserError)
    line = str(error) if user else f"{type(error).__name__}: {error}"
    failure = Failure(rank, line, "" if user else "".join(traceback.format_exception(error)))
    note = os.environ.get(FAILURE_FILE)
    if note:
        _leave_note(Path(note), failure)
    else:
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3.0)
        print_failure(failure)
    return EXIT_USER_ERROR if user else EXIT_FAILED


def print_failure(failure: Failure) -> None:
    if failure.traceback:
        sys.stderr.write(failure.traceback)
        print_error(f"rank {failure.rank} failed: {failure.line}")
    else:
        print_error(failure.line)


def read_note(note: Path) -> Failure | None:
    """What a rank left for the launcher; None as long as no rank has failed."""
    try:
        return Failure(**json.loads(note.read_text("utf-8")))
    except FileNotFoundError:
        return None


def _leave_note(note: Path, failure: Failure) -> None:
    draft = note.with_name(f"{note.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(failure)), "utf-8")
    try:
        os.link(draft, note)  # fails where a rank was first, and never shows half a note
    except FileExistsError:
        pass
    finally:
        draft.unlink()
