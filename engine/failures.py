"""How a failure reaches the screen: once, in one line where it is a user's mistake, whichever rank it happened in."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .atomic import replace_file
from .errors import CheckpointError, UserError, printable

FAILURE_FILE = "CROSSMASK_FAILURE_FILE"  # environment variable that our launcher gives to its ranks
EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 1, 2, 130
LESS_MEMORY = (
    "lower training.batch_size, raise training.accumulation_steps, or let DeepSpeed shard or offload more "
    "(deepspeed.zero_optimization.stage, offload_optimizer)"
)
# What torch and CUDA say, besides the types that mean nothing else.
_MEMORY_WORDS = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory",
    "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "unable to mmap",
)  # fmt: skip
_LOST_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_WORDS = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "connection refused")


@dataclass(frozen=True)
class Failure:
    """Why a rank ended."""

    rank: int
    line: str
    traceback: str = ""  # shown above the line
    code: int = EXIT_FAILED
    resumable: bool = False  # a user's mistake after whose mending a run that had begun goes on
    lost_peer: bool = False  # it lost the connection to another rank: that one's end is the reason


_folder: Path | None = None


def keep_tracebacks_in(run_dir: Path) -> None:
    """From now on, tracebacks that are no reading for the screen go into a file there."""
    global _folder
    _folder = run_dir


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
    Console(stderr=True).print(
        printable(" ".join(line.split())), style=style, markup=False, highlight=False, soft_wrap=True
    )


def describe_failure(error: BaseException, rank: int) -> Failure:
    """What there is to tell of an exception that ended ``rank``."""
    if isinstance(error, UserError):
        return Failure(rank, str(error), code=EXIT_USER_ERROR, resumable=isinstance(error, CheckpointError))
    whole = "".join(traceback.format_exception(error))
    said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    memory, lost_peer = _out_of_memory(error), _lost_a_peer(error)
    if not memory and not lost_peer:
        return Failure(rank, f"rank {rank} failed: {said}", whole)
    what = "ran out of memory" if memory else "lost the connection to another rank, which ended or hangs"
    line = f"rank {rank} {what} ({_shortened(said)}){f': {LESS_MEMORY}' if memory else ''}"
    if os.environ.get("CROSSMASK_VERBOSE", "0") not in ("", "0"):
        return Failure(rank, line, whole, lost_peer=not memory)
    return Failure(rank, line + _keep_traceback(whole, rank), lost_peer=not memory)


def report_failure(error: BaseException, rank: int) -> int:
    """Tell the user, from inside a rank, why it ends. Returns the exit code.

    Under our launcher every rank that fails leaves a note and the launcher prints one. Under another launcher rank 0
    speaks; the other ranks, and one that only lost another, wait, are ended by the launcher when there is more to say
    elsewhere, and speak when there is not.
    """
    failure = describe_failure(error, rank)
    note = os.environ.get(FAILURE_FILE)
    if note:
        _leave_note(Path(note), failure)
    else:
        if rank or failure.lost_peer:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3.0)
        print_failure(failure)
    return failure.code


def print_failure(failure: Failure, more: str = "") -> None:
    """``more`` goes to the end of the line."""
    sys.stderr.write(failure.traceback)
    print_error(failure.line + more)


def resume_hint(run_dir: Path | None) -> str:
    """How to go on with a run that ended early, as the end of a line."""
    if run_dir is None:
        return ""
    if not (run_dir / "checkpoints" / "latest").is_file():
        return "; there is no checkpoint yet"
    return f"; continue with: crossmask train --resume {shlex.quote(os.path.relpath(run_dir))}"


def read_note(note: Path) -> Failure | None:
    """What a rank left for the launcher; None as long as no rank has failed."""
    try:
        return Failure(**json.loads(note.read_text("utf-8")))
    except FileNotFoundError:
        return None


def left_a_note(note: Path, rank: int) -> bool:
    """Whether ``rank`` ended with an error of its own, the first of all or a later one."""
    return _note_of(note, rank).exists()


def _leave_note(note: Path, failure: Failure) -> None:
    mine = _note_of(note, failure.rank)
    replace_file(mine, json.dumps(asdict(failure)))
    with suppress(FileExistsError):  # another rank was first
        os.link(mine, note)


def _note_of(note: Path, rank: int) -> Path:
    return note.with_name(f"{note.stem}-{rank}{note.suffix}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        yield current
        seen.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _out_of_memory(error: BaseException) -> bool:
    def is_memory(e: BaseException) -> bool:
        if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
            return True
        return isinstance(e, (RuntimeError, OSError)) and any(words in str(e).lower() for words in _MEMORY_WORDS)

    return any(map(is_memory, _chain(error)))


def _lost_a_peer(error: BaseException) -> bool:
    def is_loss(e: BaseException) -> bool:
        if {kind.__name__ for kind in type(e).__mro__} & _LOST_TYPES:
            return True
        return isinstance(e, (RuntimeError, OSError)) and any(words in str(e).lower() for words in _LOST_WORDS)

    return any(map(is_loss, _chain(error)))


def _keep_traceback(text: str, rank: int) -> str:
    """Into the run folder; returns what to add to the line that the user reads."""
    if _folder is None or not _folder.is_dir():
        return "; CROSSMASK_VERBOSE=1 shows where"
    path = _folder / f"traceback-rank{rank}.txt"
    try:
        path.write_text(text, "utf-8")
    except OSError:
        return "; CROSSMASK_VERBOSE=1 shows where"
    return f"; where: {os.path.relpath(path)}"


def _shortened(text: str, limit: int = 160) -> str:
    """torch adds a paragraph on its allocator's settings to the first sentence."""
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"
