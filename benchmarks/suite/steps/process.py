"""An entry in a process of its own, whose rows come back through a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..results import Job, ResultsError, Row, Status, read
from .planned import PENDING, Options

BENCHMARKS = Path(__file__).resolve().parents[2]
LIMIT = 600.0  # seconds; what takes so long hangs
# What a launcher, or this process as the only rank of a run of its own, would tell the other process that it is.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def in_own_process(name: str, options: Options, limit: float = LIMIT) -> list[Row]:
    """The rows of an entry, in the order planned. One without figures says why."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "rows.json"), Path(folder, "log")
        command = [sys.executable, "-m", "suite.steps.one", name, "--device", options.device, "--results", str(file)]
        command += ["--rounds", str(options.rounds), *(["--quick"] if options.quick else [])]
        command += ["--parent", str(os.getpid())]
        code = ended(command, environment(options.device), log, limit)
        status, reason = why(code, log.read_text(errors="replace"), limit)
        try:
            rows = read(file).rows
        except ResultsError:
            return [Row(Job("step", name, "", "", "", "step"), "crossmask", True, status, reason)]
    return [replace(row, status=status, reason=reason) if row.reason == PENDING else row for row in rows]


def end_with(parent: int) -> None:
    """Lets this process, and all of its group, end soon after the one that started it, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def environment(device: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return found | ({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def ended(command: list[str], environment: dict[str, str], log: Path, limit: float) -> int | None:
    """The exit code; None where it took longer than ``limit`` seconds. What it has started ends with it."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=BENCHMARKS, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def why(code: int | None, said: str, limit: float) -> tuple[Status, str]:
    """Why a process that ended with ``code`` left rows without figures."""
    if code is None:
        return "failed", f"did not end within {limit:.0f} s"
    if code == -signal.SIGKILL:
        return "out of memory", "its process was killed, as a system does that runs out of memory"
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    return "failed", f"its process ended with {code}: {last[:200]}"
