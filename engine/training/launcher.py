"""Starting the ranks of a run on this machine, stopping them with time to save, and saying how it ended.

The ranks are started by DeepSpeed's own launcher (``deepspeed.launcher.runner`` starts ``launch``, which starts the
ranks). They live in a process group of their own: a terminal's Ctrl-C reaches only this process, which hands it to each
rank once. DeepSpeed's launchers are left alone until the ranks have ended, because they answer a signal by ending the
ranks one after the other. Ranks write to the terminal directly, so that a live display works.

However a run fails, no process outlives :func:`launch` and it returns something other than 0: within
:data:`FAILURE_MARGIN` seconds of a rank's death or exception, and within ``training.rank_timeout`` (before the first
step :data:`watch.START_UP`, where that is longer) and :data:`watch.HANG_MARGIN` seconds of the last sign of progress.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import psutil

from ..errors import RecipeError, UserError
from ..failures import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    FAILURE_FILE,
    Failure,
    left_a_note,
    print_error,
    print_failure,
    read_note,
    resume_hint,
)
from ..recipe import Recipe
from .beat_board import FileBoard
from .distributed import free_port, threads_per_rank
from .rank_processes import LAUNCHER_PID, End, RankProcesses, members, rank_processes, send, send_group
from .stacks import collect_stacks, keep_stacks
from .status import STATUS, read_status, record_failure
from .watch import Hang, Watch

TRAIN_MODULE = "crossmask.engine.train"
GRACE = 30.0  # seconds from the wish to stop to SIGKILL
GRACE_AFTER_FAILURE = 5.0  # seconds the other ranks get when one has failed: they can only wait for it in vain
FAILURE_MARGIN = 10.0  # seconds from a rank's death or exception to the end of launch()
SAME_REQUEST = 2.0  # seconds in which further signals are echoes: a Ctrl-C reaches make, and make passes it on
POLL = 0.2


class Plan(NamedTuple):
    """Where the ranks of a run will be."""

    ranks: int
    gpus: tuple[int, ...]  # device numbers, empty on a machine without

    @property
    def device_type(self) -> str:
        return "cuda" if self.gpus else "cpu"


def plan_ranks(recipe: Recipe, ranks: int | None = None) -> Plan:
    """Every GPU where there are some, else ``training.cpu_ranks`` processes; ``ranks`` asks for another number.

    Raises:
        UserError: more ranks than GPUs; GPUs named in a way that DeepSpeed's launcher does not understand.
    """
    gpus = _visible_gpus()
    if not gpus:
        return Plan(ranks or recipe.training.cpu_ranks, ())
    if ranks and ranks > len(gpus):
        raise RecipeError(f"--ranks: {ranks} ranks but {len(gpus)} GPUs; ask for {len(gpus)} at most")
    chosen = gpus[: ranks or len(gpus)]
    return Plan(len(chosen), chosen)


def launch(
    arguments: Sequence[str],
    run_dir: Path,
    plan: Plan,
    *,
    rank_timeout: float = float("inf"),
    module: str = TRAIN_MODULE,
    grace: float = GRACE,
) -> int:
    """Run ``module`` with ``arguments`` on every rank of ``plan`` until it ends.

    SIGINT, SIGTERM and SIGHUP to this process become one SIGTERM to each rank, which has ``grace`` seconds to save and
    leave; a second request ends the ranks at once. Ranks that have not beaten for ``rank_timeout`` seconds are ended.
    No process outlives the call.

    Returns:
        0 finished, 130 stopped by the user, 2 a user's mistake, 1 anything else. ``status.json`` in ``run_dir`` and
        how the ranks ended decide, never the launcher's own exit code. The reason has been printed, once, and stands
        there, except of a run that was finished and failed or hung afterwards.
    """
    before = _status_text(run_dir)
    with tempfile.TemporaryDirectory(prefix="crossmask-") as folder, _stop_requests() as requests:
        note = Path(folder) / "failure.json"
        process = subprocess.Popen(
            launcher_command(plan, module, arguments),
            env=rank_environment(plan, note),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        watch = Watch(plan.ranks, rank_timeout)
        vigil = _Vigil(process, requests, note, watch, grace, lambda: _status_since(before, run_dir))
        try:
            vigil.wait()
            failure, stacks = vigil.failure(), vigil.stacks(run_dir)
            if process.poll() is None:  # out of patience
                send_group(process.pid, signal.SIGKILL)
        finally:
            _end_group(process, min(grace, GRACE_AFTER_FAILURE))
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a live display that was killed left the cursor hidden
        sys.stdout.flush()
    status = _status_since(before, run_dir)
    if failure is not None and stacks:
        failure = replace(failure, line=failure.line + stacks)
    code, reason = _verdict(status, failure, run_dir, stopped=bool(requests), returncode=process.returncode)
    if reason and status:
        with suppress(OSError):  # a full disk: the reason is on the screen
            record_failure(run_dir, reason, watch.step)
    return code


def launcher_command(plan: Plan, module: str, arguments: Sequence[str]) -> list[str]:
    where = (
        [f"--include=localhost:{','.join(map(str, plan.gpus))}"] if plan.gpus else [f"--num_accelerators={plan.ranks}"]
    )
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *where,
        f"--hostfile={os.devnull}",  # this machine only, whatever the default host file says
        f"--master_port={free_port()}",
        "--log_level=critical",
        "--module",
        module,
        *arguments,
    ]


def rank_environment(plan: Plan, note: Path) -> dict[str, str]:
    """This process's environment and what the ranks need besides; what the user has set is left as it is."""
    environment = dict(os.environ)
    # The launcher hands devices out itself and remarks on a selection made by the environment.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    threads = str(threads_per_rank(plan.ranks))
    quiet = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    for name, value in {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **quiet}.items():
        environment.setdefault(name, value)
    environment[FAILURE_FILE] = str(note)
    environment[LAUNCHER_PID] = str(os.getpid())
    if not plan.gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _visible_gpus() -> tuple[int, ...]:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return ()
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not count or not named:
        return tuple(range(count))
    try:
        return tuple(int(number) for number in named.split(","))[:count]
    except ValueError:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={named}: the deepspeed launcher knows GPUs by number only; write for instance 0,1"
        ) from None


@contextmanager
def _stop_requests() -> Iterator[list[float]]:
    """When the user asked to stop: one entry per request."""
    received: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not received or now - received[-1] > SAME_REQUEST:
            received.append(now)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in wanted}
    for number in wanted:
        if previous[number] is not signal.SIG_IGN:  # nohup, or a background job of a shell
            signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Vigil:
    """Waits for the ranks to end: hands signals on, loses patience, finds out why they fail."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        requests: Sequence[float],
        note: Path,
        watch: Watch,
        grace: float,
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.process, self.requests, self.note, self.watch, self.grace = process, requests, note, watch, grace
        self.status = status  # what the run has written so far
        self.ranks = RankProcesses(process.pid, watch.ranks)
        self.hang: Hang | None = None
        self._note_at = float("inf")
        self._launcher_died = False

    def wait(self) -> None:
        told: set[psutil.Process] = set()
        deadline = float("inf")
        board = FileBoard(self.note.parent)
        while self.process.poll() is None:
            now = time.monotonic()
            self._look(now)
            if self.requests:
                ranks = rank_processes(self.process.pid)
                for rank in ranks - told:
                    send(rank, signal.SIGTERM)
                if not ranks:  # none yet, or none any more: nothing to save
                    send_group(self.process.pid, signal.SIGTERM)
                told |= ranks
                deadline = min(deadline, now + self.grace)
            if self._note_at <= now or any(map(self._failed, self.ranks.ended.values())):
                deadline = min(deadline, now + GRACE_AFTER_FAILURE)
            hang = self.watch.look(board.read(), now)
            self.hang = hang if deadline == float("inf") else None
            if now > deadline or len(self.requests) > 1 or self.hang:
                break
            time.sleep(POLL)
        self._look(time.monotonic())
        self.watch.look(board.read(), time.monotonic())
        self._launcher_died = self.process.poll() is not None and self.ranks.all_alive and not self.requests

    def stacks(self, run_dir: Path) -> str:
        """Where the Python stacks of ranks that hang or crashed are kept, as the end of a line."""
        if self.hang:
            return collect_stacks(list(self.watch.seen.values()), run_dir)
        crashed = [rank for rank, end in self.ranks.ended.items() if end.status is None or end.status < 0]
        return keep_stacks({rank: self.note.with_name(f"stacks-{rank}.txt") for rank in crashed}, run_dir)

    def failure(self) -> Failure | None:
        """What ended the run; the first cause, not what the other ranks made of it. None where no rank failed."""
        if self.hang:
            return Failure(self.hang.rank or 0, self.hang.line)
        note, code = read_note(self.note), self.process.returncode
        end = self._first_end(note)
        if end is None and note is None and self._launcher_died:
            return Failure(0, f"DeepSpeed's launcher ended while its ranks were at work (exit code {code})")
        if end is None:
            return note
        if end.status is None and code:  # DeepSpeed's launcher ends as the rank did, modulo 256
            end = replace(end, status=code if code < 192 else code - 256)
        # A rank that was killed leaves others with all kinds of errors, and they are quick to tell.
        before = end.seen_at < self._note_at or (end.seen_at == self._note_at and end.status == -signal.SIGKILL)
        if note is None or note.lost_peer or before:
            return Failure(end.rank, end.describe(self.watch.where(end.rank)))
        return note

    def _look(self, now: float) -> None:
        self.ranks.look(now)
        if self._note_at == float("inf") and self.note.exists():
            self._note_at = now

    def _failed(self, end: End) -> bool:
        """A rank that ended before anyone looked has failed, unless nothing was left to it but to end."""
        return self.status().get("state") != "finished" if end.status is None else end.status != 0

    def _first_end(self, note: Failure | None) -> End | None:
        """The first rank that ended without an error of its own.

        Of one look, a kill comes before a crash, and SIGTERM last: launchers send it to the others when one has ended.
        """
        lost = note is not None and note.lost_peer
        ends = [
            end
            for end in self.ranks.ended.values()
            if not left_a_note(self.note, end.rank) and (lost or self._failed(end))
        ]

        def order(end: End) -> tuple[float, bool, bool, bool]:
            last, first = end.status == -signal.SIGTERM, end.status == -signal.SIGKILL
            return end.seen_at, last, not first, (end.status or 0) >= 0

        return min(ends, key=order, default=None)


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End whatever of the group still runs, such as ranks whose launcher was killed."""
    for rank in rank_processes(process.pid):
        send(rank, signal.SIGTERM)
    _, alive = psutil.wait_procs(members(process.pid), timeout=grace)
    if alive:
        send_group(process.pid, signal.SIGKILL)
    process.wait()


def _status_text(run_dir: Path) -> str:
    try:
        return (run_dir / STATUS).read_text("utf-8")
    except OSError:
        return ""


def _status_since(before: str, run_dir: Path) -> dict[str, Any]:
    """What this run has written, {} as long as it has written nothing."""
    return read_status(run_dir) if _status_text(run_dir) != before else {}


def _verdict(
    status: Mapping[str, Any], failure: Failure | None, run_dir: Path, *, stopped: bool, returncode: int
) -> tuple[int, str]:
    """Print how the run ended and choose the exit code; the second value is the reason of a run that failed.

    ``status``: what this run wrote, {} when it wrote none.
    """
    state, resume = status.get("state"), resume_hint(run_dir)
    if state == "finished":
        if failure is None or (stopped and failure.code == EXIT_FAILED):
            return 0, ""
        where = shlex.quote(os.path.relpath(run_dir))
        print_failure(failure, f"; the model is trained and evaluated, draw its report with: crossmask report {where}")
        return failure.code, ""
    if state == "stopped":
        why = "" if stopped or not status.get("reason") else f" ({status['reason']})"
        print_error(f"stopped at step {status.get('step', '?')}{why}{resume}", style="yellow")
        return EXIT_STOPPED, ""
    # Ranks that crash while the run is being stopped most likely miss one that has left already.
    if failure is not None and not (stopped and failure.code == EXIT_FAILED):
        begun = bool(status) and failure.resumable
        print_failure(failure, resume if begun or failure.code != EXIT_USER_ERROR else "")
        return failure.code, failure.line
    if stopped:
        line = "stopped before the run could save"
        print_error(f"{line}{resume}", style="yellow")
        return EXIT_STOPPED, line
    reason = status.get("reason") if state == "failed" else None
    line = reason or f"a rank ended unexpectedly, with exit code {returncode}"
    print_error(f"the run failed: {line}{resume}")
    return EXIT_FAILED, str(line)
