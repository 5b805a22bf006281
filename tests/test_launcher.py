"""Ranks through the real DeepSpeed launcher: they come up, they stop with time to save, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from crossmask.engine import Recipe, UserError
from crossmask.engine.errors import RecipeError
from crossmask.engine.failures import FAILURE_FILE, Failure, left_a_note, read_note, report_failure
from crossmask.engine.training import launcher
from crossmask.engine.training.distributed import leave
from crossmask.engine.training.launcher import Plan, launcher_command, plan_ranks, rank_environment
from crossmask.engine.training.rank_processes import End
from crossmask.engine.training.watch import Watch

HERE = Path(__file__).parent
PARENT = """
import sys
from pathlib import Path
from crossmask.engine.training.launcher import Plan, launch
sys.exit(launch([sys.argv[1], sys.argv[2]], Path(sys.argv[1]), Plan(2, ()), module="stand_in_rank", grace=60))
"""


def start(run_dir: Path, behaviour: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(run_dir), behaviour],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def left_behind(run_dir: Path) -> list[psutil.Process]:
    def ours(process: psutil.Process) -> bool:
        try:
            return str(run_dir) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if ours(process)]


def test_ranks_come_up_and_a_signal_gives_each_of_them_time_to_save(tmp_path: Path) -> None:
    parent = start(tmp_path, "wait")
    try:
        wait_for(lambda: parent.poll() is not None or len(list(tmp_path.glob("up-*.json"))) == 2, 200)
        assert parent.poll() is None, parent.communicate()
        up = [json.loads((tmp_path / f"up-{rank}.json").read_text()) for rank in (0, 1)]
        asked_at = time.monotonic()
        parent.send_signal(signal.SIGTERM)
        out, err = parent.communicate(timeout=90)
        took = time.monotonic() - asked_at
    finally:
        parent.kill()
    assert [words["size"] for words in up] == [2, 2]
    assert {words["device"] for words in up} == {"cpu"}
    assert {words["agreed"] for words in up} == {"from 0"}, "every rank has rank 0's value"
    assert all(int(words["threads"]) >= 1 for words in up)
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"], "each was told exactly once"
    assert parent.returncode == 130
    assert took < 30, "a few seconds on an idle machine"
    assert out == "", "DeepSpeed's launcher keeps quiet"
    assert err.splitlines() == ["stopped at step 7; there is no checkpoint yet"]
    assert left_behind(tmp_path) == []


def test_a_mistake_that_only_rank_1_meets_is_told_once_and_ends_all(tmp_path: Path) -> None:
    parent = start(tmp_path, "mistake")
    try:
        out, err = parent.communicate(timeout=200)
    finally:
        parent.kill()
    assert parent.returncode == 2
    assert (out, err) == ("", "cat.png: not an image; remove it from the list\n")
    assert left_behind(tmp_path) == []


def test_the_first_failure_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "note"
    monkeypatch.setenv(FAILURE_FILE, str(note))
    assert read_note(note) is None
    assert report_failure(UserError("first"), rank=1) == 2
    assert report_failure(RuntimeError("second"), rank=0) == 1
    assert read_note(note) == Failure(1, "first", code=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["note", "note-0", "note-1"], "no drafts"
    assert left_a_note(note, 0)
    assert not left_a_note(note, 2)


@pytest.mark.parametrize(
    ("status", "failure", "stopped", "code", "words"),
    [
        ({"state": "finished"}, None, False, 0, ""),
        ({"state": "finished"}, Failure(0, "no report"), False, 1, "no report; the model is trained and evaluated"),
        ({"state": "finished"}, Failure(0, "the disk is full", code=2), False, 2, "the disk is full; the model is"),
        ({"state": "finished"}, Failure(0, "rank 0 was ended"), True, 0, ""),
        ({"state": "stopped", "step": 3}, None, True, 130, "stopped at step 3"),
        ({}, None, True, 130, "stopped before the run could save"),
        ({}, Failure(1, "connection closed", "Traceback"), True, 130, "stopped before the run could save"),
        ({"state": "running"}, Failure(1, "no such thing", code=2), False, 2, "no such thing"),
        ({"state": "running"}, Failure(1, "disk full", code=2, resumable=True), False, 2, "disk full; there is no"),
        ({}, Failure(1, "no such run", code=2, resumable=True), False, 2, "no such run\n"),
        ({"state": "running"}, Failure(1, "rank 1 was killed"), False, 1, "rank 1 was killed; there is no checkpoint"),
        ({"state": "stopped", "step": 3, "reason": "SIGTERM"}, None, False, 130, "stopped at step 3 (SIGTERM)"),
        ({"state": "failed", "reason": "the loss is nan"}, None, False, 1, "the loss is nan"),
        ({"state": "running"}, None, False, 1, "ended unexpectedly, with exit code -9"),
        ({}, None, False, 1, "ended unexpectedly"),
    ],
)
def test_the_status_file_decides_and_the_launchers_exit_code_does_not(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: dict[str, object],
    failure: Failure | None,
    stopped: bool,
    code: int,
    words: str,
) -> None:
    returncode = -9 if code else 250
    exit_code, reason = launcher._verdict(status, failure, tmp_path, stopped=stopped, returncode=returncode)
    assert exit_code == code
    assert bool(reason) == (status.get("state") not in ("finished", "stopped")), "what status.json is going to say"
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == bool(words)


@pytest.mark.parametrize(("state", "told"), [("running", "rank 1 ended without a word"), ("finished", None)])
def test_a_rank_that_left_unseen_has_failed_unless_the_run_was_finished(
    tmp_path: Path, state: str, told: str | None
) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    vigil = launcher._Vigil(process, [], tmp_path / "note", Watch(2, 60), 5, lambda: {"state": state})
    vigil.ranks.ended[1] = End(1, None, 0.0)
    failure = vigil.failure()
    assert failure is None if told is None else failure is not None and failure.line.startswith(told)


def test_a_rank_leaves_even_if_another_died_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.barrier", lost)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=r"^0$"):
        leave(0, together=True)


def test_a_crash_shows_its_traceback_and_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000004")
    failure = Failure(1, "rank 1 failed: KeyError: 'x'", "Traceback (most recent call last):\n  ...\nKeyError: 'x'\n")
    assert launcher._verdict({}, failure, tmp_path, stopped=False, returncode=1)[0] == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    last = err.splitlines()[-1]
    assert last.startswith("rank 1 failed: KeyError: 'x'; continue with: crossmask train --resume ")
    assert last.endswith(tmp_path.name)


def test_a_stale_status_is_not_this_runs_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    monkeypatch.setattr(launcher, "launcher_command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    assert launcher.launch([], tmp_path, Plan(1, ())) == 1
    assert "finished" in (tmp_path / "status.json").read_text(), "nothing is said of a run that has not begun"


def test_ranks_are_planned_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert plan_ranks(Recipe()) == Plan(2, ())
    assert plan_ranks(Recipe(), 3) == Plan(3, ())
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan_ranks(Recipe()) == Plan(2, (0, 1))
    assert plan_ranks(Recipe(), 1) == Plan(1, (0,))
    with pytest.raises(RecipeError, match="3 ranks but 2 GPUs"):
        plan_ranks(Recipe(), 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert "--include=localhost:5,7" in launcher_command(plan_ranks(Recipe()), "module", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0f1,GPU-2b3")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=GPU-0f1,GPU-2b3"):
        plan_ranks(Recipe())


def test_the_users_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    environment = rank_environment(Plan(2, ()), tmp_path / "note")
    assert environment["OMP_NUM_THREADS"] == "5"
    assert int(environment["MKL_NUM_THREADS"]) >= 1
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert "CUDA_VISIBLE_DEVICES" not in environment, "the launcher hands devices out by number"
    assert environment[launcher.LAUNCHER_PID] == str(os.getpid())


@pytest.mark.parametrize("status", [None, -9, -11, 3])
def test_what_a_launcher_does_to_the_others_is_not_the_cause(tmp_path: Path, status: int | None) -> None:
    """Rank 1 ended, perhaps before anyone could ask how, and the launcher ended rank 0 between two looks of ours."""
    seen: Any = SimpleNamespace(pid=os.getpid(), returncode=(status or -9) % 256)
    vigil = launcher._Vigil(seen, [], tmp_path / "note", Watch(2, 9.0), 1.0, dict)
    vigil.ranks.ended = {0: End(0, -signal.SIGTERM, 5.0), 1: End(1, status, 5.0)}
    failure = vigil.failure()
    assert failure is not None
    assert failure.rank == 1
