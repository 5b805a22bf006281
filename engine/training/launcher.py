"""Starting the ranks of a run on this machine, stopping them with time to save, and saying how it ended.

The ranks are started by DeepSpeed's own launcher (``deepspeed.launcher.runner`` starts ``launch``, which starts the
ranks). They live in a session of their own: a terminal's Ctrl-C reaches only this process, which hands it to each
rank once. DeepSpeed's launchers are left alone until the ranks have ended, because they answer a signal by ending the
ranks one after the other. Ranks write to the terminal directly, so that a live display works.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    print_error,
    print_failure,
    read_note,
)
from ..recipe import Recipe
from .distributed import free_port, threads_per_rank

TRAIN_MODULE = "crossmask.engine.train"
LAUNCHER_PID = "CROSSMASK_LAUNCHER_PID"  # a rank whose launcher has died stops itself, see signals.py
GRACE = 30.0  # seconds from the wish to stop to SIGKILL
GRACE_AFTER_FAILURE = 5.0  # seconds the other ranks get when one has failed: they can only wait for it in vain
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
    arguments: Sequence[str], run_dir: Path, plan: Plan, *, module: str = TRAIN_MODULE, grace: float = GRACE
) -> int:
    """Run ``module`` with ``arguments`` on every rank of ``plan`` until it ends.

    SIGINT, SIGTERM and SIGHUP to this process become one SIGTERM to each rank, which has ``grace`` seconds to save and
    leave; a second request ends the ranks at once. No process outlives the call.

    Returns:
        0 finished, 130 stopped by the user, 2 a user's mistake, 1 anything else. ``status.json`` in ``run_dir``
        decides, never the launcher's own exit code. The reason has been printed, once.
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
        try:
            _wait(process, requests, note, grace)
        finally:
            _end_group(process, min(grace, GRACE_AFTER_FAILURE))
        failure = read_note(note)
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a live display that was killed left the cursor hidden
        sys.stdout.flush()
    after = _status_text(run_dir)
    status = json.loads(after) if after and after != before else {}
    return _verdict(status, failure, run_dir, stopped=bool(requests), returncode=process.returncode)


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


def _wait(process: subprocess.Popen[bytes], requests: Sequence[float], note: Path, grace: float) -> None:
    """Until the launcher has ended: hand signals on, and lose patience."""
    told: set[psutil.Process] = set()
    deadline = float("inf")
    while process.poll() is None:
        now = time.monotonic()
        if requests:
            ranks = _rank_processes(process.pid)
            for rank in ranks - told:
                _send(rank, signal.SIGTERM)
            if not ranks:  # none yet, or none any more: nothing to save
                _send_group(process.pid, signal.SIGTERM)
            told |= ranks
            deadline = min(deadline, now + grace)
        if note.exists():
            deadline = min(deadline, now + GRACE_AFTER_FAILURE)
        if now > deadline or len(requests) > 1:
            _send_group(process.pid, signal.SIGKILL)
        time.sleep(POLL)


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End whatever of the session still runs, such as ranks whose launcher was killed."""
    for rank in _rank_processes(process.pid):
        _send(rank, signal.SIGTERM)
    _, alive = psutil.wait_procs(_members(process.pid), timeout=grace)
    if alive:
        _send_group(process.pid, signal.SIGKILL)
    process.wait()


def _members(group: int) -> list[psutil.Process]:
    """Living processes of a process group; orphans, which a process tree no longer shows, included."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.Error):
            return False

    return [process for process in psutil.process_iter() if belongs(process)]


def _rank_processes(group: int) -> set[psutil.Process]:
    """The ranks: what DeepSpeed started with ``--local_rank``. What they forked in turn looks alike and is left out."""

    def look(process: psutil.Process) -> tuple[bool, int]:
        try:
            return any(word.startswith("--local_rank=") for word in process.cmdline()), process.ppid()
        except psutil.Error:
            return False, 0

    parents = {process: parent for process in _members(group) for alike, parent in [look(process)] if alike}
    pids = {process.pid for process in parents}
    return {process for process, parent in parents.items() if parent not in pids}


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)


def _send_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _status_text(run_dir: Path) -> str:
    try:
        return (run_dir / "status.json").read_text("utf-8")
    except OSError:
        return ""


def _verdict(
    status: Mapping[str, Any], failure: Failure | None, run_dir: Path, *, stopped: bool, returncode: int
) -> int:
    """Print how the run ended and choose the exit code. ``status``: what this run wrote, {} when it wrote none."""
    state = status.get("state")
    resume = f"; continue with: crossmask train --resume {shlex.quote(os.path.relpath(run_dir))}"
    if not (run_dir / "checkpoints" / "latest").is_file():
        resume = "; there is no checkpoint yet"
    if state == "finished":
        return 0
    if state == "stopped":
        print_error(f"stopped at step {status.get('step', '?')}{resume}", style="yellow")
        return EXIT_STOPPED
    # Ranks that crash while the run is being stopped most likely miss one that has left already.
    if failure is not None and not (stopped and failure.traceback):
        print_failure(failure)
        return EXIT_FAILED if failure.traceback else EXIT_USER_ERROR
    if stopped:
        print_error(f"stopped before the run could save{resume}", style="yellow")
        return EXIT_STOPPED
    reason = status.get("reason") if state == "failed" else None
    print_error(f"the run failed: {reason or f'a rank ended unexpectedly, with exit code {returncode}'}{resume}")
    return EXIT_FAILED
