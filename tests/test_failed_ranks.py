"""A rank that is killed, fails or hangs ends the run in the stated time: one reason on the screen, no process left.

Two ranks without training (stand_in_rank.py). Most are started by a launcher that does what DeepSpeed's does without
its imports; see REAL for those that DeepSpeed's own starts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_launcher import HERE, left_behind, wait_for

from crossmask.engine.beats import beat, last_beat
from crossmask.engine.errors import DataError
from crossmask.engine.failures import FAILURE_FILE, describe_failure, keep_tracebacks_in
from crossmask.engine.recipe import TrainingSection
from crossmask.engine.training import launcher, watch, watchdog
from crossmask.engine.training.beat_board import FileBoard, Record, StoreBoard
from crossmask.engine.training.launcher import FAILURE_MARGIN
from crossmask.engine.training.rank_processes import LAUNCHER_PID, End, start_ticks
from crossmask.engine.training.stacks import remove_earlier
from crossmask.engine.training.watch import HANG_MARGIN, START_UP, Watch

TIMEOUT = 6.0  # rank_timeout of these runs
STARTER = """
import os, signal, subprocess, sys, time
environments = [dict(os.environ, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2") for r in range(2)]
ranks = [subprocess.Popen([sys.executable, "-m", sys.argv[1], f"--local_rank={r}", *sys.argv[2:]], env=environments[r])
         for r in range(2)]
codes = [rank.poll() for rank in ranks]
while None in codes and not any(codes):
    time.sleep(1)  # as rarely as DeepSpeed's
    codes = [rank.poll() for rank in ranks]
for rank in ranks:
    rank.terminate()
time.sleep(1)
for rank in ranks:
    rank.kill()
sys.exit(next(filter(None, codes), 0))  # of the rank that failed, not of one that was then ended
"""
OURS = """
import sys
from pathlib import Path
from crossmask.engine.training import launcher
if sys.argv[3]:
    launcher.launcher_command = lambda plan, module, given: [sys.executable, "-c", sys.argv[3], module, *given]
run, timeout = Path(sys.argv[1]), float(sys.argv[4])
plan = launcher.Plan(2, ())
sys.exit(launcher.launch([sys.argv[1], sys.argv[2]], run, plan, module="stand_in_rank", rank_timeout=timeout))
"""
IDLE = [
    *("kill-0", "kill-1", "stop-0", "stop-1", "sleep-1", "hold-0", "abort-1", "fault-0", "exit-1", "memory-1"),
    *("exception-1", "alone-0", "late-0"),
]
LIGHT = [f"idle-{behaviour}" for behaviour in IDLE] + ["deadlock-0", "exception-0"]
REAL = ["kill-1", "sleep-1"]
FOREIGN = ["stop-0", "stop-1"]  # under a launcher that is not ours


@dataclass
class Ended:
    code: int
    seconds: float  # from the moment all ranks were up
    out: str
    err: str
    left: list[Any]
    run: Path

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return found


def command(run: Path, behaviour: str, kind: str) -> list[str]:
    if kind == "foreign":
        return [sys.executable, "-c", STARTER, "stand_in_rank", str(run), behaviour]
    return [sys.executable, "-c", OURS, str(run), behaviour, STARTER if kind == "light" else "", str(TIMEOUT)]


def start(run: Path, behaviour: str, kind: str) -> subprocess.Popen[str]:
    run.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WATCH_TIMEOUT": str(TIMEOUT),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TMPDIR": str(run.parent),
    }  # fmt: skip
    for name in (FAILURE_FILE, LAUNCHER_PID):
        environment.pop(name, None)
    return subprocess.Popen(
        command(run, behaviour, kind), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(run: Path, behaviour: str, kind: str) -> Ended:
    parent = start(run, behaviour, kind)
    try:
        wait_for(lambda: parent.poll() is not None or len(list(run.glob("up-*.json"))) == 2, 200)
        since = time.monotonic()
        out, err = parent.communicate(timeout=100)
        return Ended(parent.returncode, time.monotonic() - since, out, err, left_behind(run), run)
    finally:
        parent.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Future[Ended]]:
    """All of them, a few at a time: they mostly wait."""
    folder = tmp_path_factory.mktemp("failed")
    cases = [("real", b) for b in REAL] + [("foreign", b) for b in FOREIGN] + [("light", b) for b in LIGHT]
    with ThreadPoolExecutor(4) as pool:
        return {(kind, b): pool.submit(ended, folder / f"{kind}-{b}", b, kind) for kind, b in cases}


def check(run: Ended, within: float, reason: str, lines: int = 1) -> None:
    assert run.code == 1, run.err
    assert run.seconds < within, run.err
    assert run.out == ""
    assert len(run.lines) == lines, run.err
    assert run.lines[-1].startswith(reason), run.err
    assert run.lines[-1].endswith("; there is no checkpoint yet")
    assert run.left == []
    assert run.status["state"] == "failed"
    assert run.status["reason"].startswith(reason.partition(":")[0])


@pytest.mark.parametrize(
    ("kind", "behaviour", "reason"),
    [
        (
            "light",
            "idle-kill-0",
            "rank 0 was killed (SIGKILL; last seen in step 3, backward): most likely ",
        ),
        (
            "light",
            "idle-kill-1",
            "rank 1 was killed (SIGKILL; last seen in step 3, backward): most likely ",
        ),
        ("light", "idle-abort-1", "rank 1 crashed in native code (SIGABRT; last seen in step 3, backward); stacks: "),
        ("light", "idle-fault-0", "rank 0 crashed in native code (SIGSEGV; last seen in step 3, backward); stacks: "),
        ("light", "idle-exit-1", "rank 1 ended without a word (exit code 3; last seen in step 3, backward)"),
        # rank 0 is in a collective with it, and at once has an error of its own to tell
        ("real", "kill-1", "rank 1 was killed (SIGKILL; last seen in step 3, backward): most likely "),
    ],
)
def test_a_rank_that_is_killed(
    runs: dict[tuple[str, str], Future[Ended]], kind: str, behaviour: str, reason: str
) -> None:
    run = runs[kind, behaviour].result()
    check(run, FAILURE_MARGIN, reason)
    kept = [file.read_text() for file in run.run.glob("stacks-rank*.txt")]
    assert len(kept) == ("stacks" in reason)
    assert all("in misbehave" in text for text in kept)


def test_running_out_of_memory_as_an_exception(runs: dict[tuple[str, str], Future[Ended]]) -> None:
    run = runs["light", "idle-memory-1"].result()
    check(run, FAILURE_MARGIN, "rank 1 ran out of memory (RuntimeError: ")
    assert "training.accumulation_steps" in run.err
    assert "can't allocate memory" in (run.run / "traceback-rank1.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("behaviour", ["idle-exception-1", "exception-0"])
def test_an_exception_on_one_rank(runs: dict[tuple[str, str], Future[Ended]], behaviour: str) -> None:
    """Alone, and while the other rank is in a collective."""
    run, rank = runs["light", behaviour].result(), behaviour[-1]
    check(run, FAILURE_MARGIN, f"rank {rank} failed: KeyError: 'x'", len(run.lines))
    assert run.err.count("Traceback") == 1
    assert run.lines[-2] == "KeyError: 'x'"


@pytest.mark.parametrize(
    ("kind", "behaviour", "reason", "stacks"),
    [
        ("light", "idle-stop-0", "rank 0 has not answered for 6 s (last seen in step 3, backward): the run was", "1"),
        ("light", "idle-stop-1", "rank 1 has not answered for 6 s (last seen in step 3, backward): the run was", "0"),
        ("light", "idle-hold-0", "rank 0 has not answered for 6 s (last seen in step 3, backward): the run was", "01"),
        ("light", "idle-sleep-1", "no rank has made progress for 6 s (rank ", "01"),
        ("light", "deadlock-0", "no rank has made progress for 6 s (rank ", "01"),
        ("real", "sleep-1", "rank 1 has made no progress for 6 s (last seen in step 3, backward) and the others", "01"),
        ("foreign", "stop-0", "rank 0 has not answered for 6 s (", "1"),
        ("foreign", "stop-1", "rank 1 has not answered for 6 s (", "0"),
    ],
)
def test_a_rank_that_hangs(
    runs: dict[tuple[str, str], Future[Ended]], kind: str, behaviour: str, reason: str, stacks: str
) -> None:
    """Stopped, asleep, inside C with the interpreter's lock, and all of them in collectives that do not match."""
    run = runs[kind, behaviour].result()
    if kind == "foreign":  # as this starter: minus the signal that its fellow had to send
        run = replace(run, code=1 if run.code else 0)
    check(run, TIMEOUT + HANG_MARGIN + 30 * (kind == "foreign"), reason)
    kept = {file.name[-5]: file.read_text() for file in run.run.glob("stacks-rank*.txt")}
    assert "if it was at work, raise training.rank_timeout" in run.lines[-1]
    assert sorted(kept) == list(stacks)
    assert all("in steps" in text for text in kept.values())
    culprit = behaviour[-1]
    if culprit in kept and "deadlock" not in behaviour:
        assert "in misbehave" in kept[culprit]


def test_a_rank_at_work_alone_is_left_alone(runs: dict[tuple[str, str], Future[Ended]]) -> None:
    run = runs["light", "idle-alone-0"].result()
    assert (run.code, run.out, run.err) == (0, "", "")
    assert run.status["state"] == "finished"


def test_a_hang_after_the_run_was_finished_is_told(runs: dict[tuple[str, str], Future[Ended]]) -> None:
    run = runs["light", "idle-late-0"].result()
    assert run.code == 1, run.err
    assert run.seconds < TIMEOUT + HANG_MARGIN
    assert len(run.lines) == 1, run.err
    assert "for 6 s (" in run.lines[0]
    assert f"draw its report with: crossmask report {os.path.relpath(run.run)}" in run.lines[0]
    assert "resume" not in run.lines[0]
    assert run.left == []
    assert run.status["state"] == "finished", "the model is there, trained and evaluated"


def test_ranks_end_a_hang_by_themselves_when_every_launcher_was_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    parent = start(run, "idle-stop-1", "light")
    wait_for(lambda: parent.poll() is not None or len(list(run.glob("up-*.json"))) == 2, 60)
    starters = [process for process in left_behind(run) if process.ppid() == parent.pid]
    for process in [parent.pid, *(process.pid for process in starters)]:
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: left_behind(run) == [], TIMEOUT + HANG_MARGIN)
    assert "rank 1 has not answered" in json.loads((run / "status.json").read_text())["reason"]
    parent.communicate(timeout=10)


# -- the rule -------------------------------------------------------------------------------------------------------


def record(rank: int, count: int, pulse: int, step: int | None = 4, collectives: int = 9, at: float = 0.0) -> Record:
    return Record(rank, "host", 1, 0, "", step, "backward", count, at, pulse, collectives)


def test_one_rank_that_beats_is_enough() -> None:
    rule = Watch(3, timeout=30)
    for second in range(100):
        ranks = [record(0, count=second, pulse=second), record(1, 5, second), record(2, 5, 5)]
        assert rule.look({r.rank: r for r in ranks}, second) is None


def test_the_rank_whose_process_stands_still_is_named_before_the_one_that_is_behind() -> None:
    rule = Watch(3, timeout=30)
    hang = None
    for second in range(32):
        ranks = [record(0, 5, second, collectives=8), record(1, 5, min(second, 3)), record(2, 5, second)]
        hang = rule.look({r.rank: r for r in ranks}, second)
        assert (hang is not None) == (second >= 30), second
    assert hang is not None
    assert (hang.rank, hang.silent) == (1, (1,))
    assert hang.reason == "rank 1 has not answered for 30 s (last seen in step 4, backward)"


def test_a_watcher_that_was_suspended_with_its_job_accuses_nobody() -> None:
    rule = Watch(1, timeout=30)
    for now in (0, 1, 2, 7200, 7201):
        assert rule.look({0: record(0, 5, int(now))}, now) is None
    assert rule.look({0: record(0, 5, 7202)}, 7202) is None


def test_ranks_that_never_come_up_get_longer() -> None:
    rule = Watch(2, timeout=30)
    seconds, hang = 0, None
    while hang is None:
        hang = rule.look({0: record(0, 1, seconds, step=None)}, seconds)
        seconds += 1
    assert seconds - 1 == START_UP
    assert hang.reason == "rank 1 did not come up within 180 s"


def test_a_meeting_place_that_is_gone_is_rank_0s_fault() -> None:
    rule = Watch(2, timeout=30)
    for second in range(30):
        assert rule.look({0: record(0, 1, 1), 1: record(1, 1, second)}, second, store=second < 10) is None
    hang = rule.look({0: record(0, 1, 1), 1: record(1, 1, 30)}, 30, store=False)
    assert hang is not None
    assert hang.rank == 0


def test_the_floor_before_the_first_step_is_said_where_the_timeout_is() -> None:
    assert f"{START_UP:g} at least" in (TrainingSection.model_fields["rank_timeout"].description or "")
    for module in (launcher, watchdog):
        assert "watch.START_UP" in (module.__doc__ or "")


def test_more_ranks_look_less_often() -> None:
    assert watch.interval(2) == watch.INTERVAL
    assert watch.interval(512) == 8.0


# -- where beats are published -------------------------------------------------------------------------------------


def test_a_beat_is_on_the_board_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmask.engine.beats._listener", None)  # who listened before is restored afterwards
    board = FileBoard(tmp_path)
    board.publish(record(1, 0, 0, step=None))
    before = last_beat().number
    beat("backward", 12)
    seen = FileBoard(tmp_path).read()[1]
    assert (seen.step, seen.phase, seen.count) == (12, "backward", before + 1)
    beat("optimizer")
    assert board.read()[1].step == 12, "the step stays until another is named"
    (tmp_path / "rank-0.json").write_text('{"rank": 0, "ho')
    assert list(board.read()) == [1], "half a record is no record"
    assert board._file is not None
    os.close(board._file)


def test_a_store_that_does_not_answer_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "WORLD_SIZE": "2"}
    first, second = StoreBoard(where), StoreBoard(where)
    assert list(first.exchange(record(0, 1, 1))) == [0]
    assert second.exchange(record(1, 2, 2)) == {0: record(0, 1, 1), 1: record(1, 2, 2)}
    with pytest.raises(OSError, match="refused"):
        StoreBoard(where | {"MASTER_PORT": "1"}).exchange(record(0, 1, 1))


# -- processes and what they leave ------------------------------------------------------------------------------------


def test_a_stopped_process_is_ended_although_the_clock_was_put_right_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        at_birth, ticks = psutil.Process(process.pid).create_time(), start_ticks(process.pid)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: at_birth + 3600)
        monkeypatch.setattr(psutil.Process, "is_running", lambda self: True)  # it asks the same
        mine = replace(record(0, 1, 1), pid=process.pid)
        watchdog.end_process(replace(mine, started=ticks - 1))
        time.sleep(0.2)
        assert process.poll() is None, "an earlier process had this id"
        watchdog.end_process(replace(mine, started=ticks))
        assert process.wait(5) == -signal.SIGKILL
    assert start_ticks(process.pid) == 0


def test_an_earlier_ends_stacks_and_tracebacks_go_and_nothing_else(tmp_path: Path) -> None:
    for name in ("stacks-rank0.txt", "traceback-rank12.txt", "status.json", "stacks.txt"):
        (tmp_path / name).touch()
    remove_earlier(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stacks.txt", "status.json"]


# -- words ------------------------------------------------------------------------------------------------------------


def out_of_memory() -> list[BaseException]:
    errors: list[BaseException] = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        errors.append(error)
    wrapped = ValueError("the batch could not be read")
    wrapped.__cause__ = OSError(12, "Cannot allocate memory")
    return [*errors, wrapped]


def test_running_out_of_memory_is_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmask.engine.failures._folder", None)
    monkeypatch.delenv("CROSSMASK_VERBOSE", raising=False)
    errors = out_of_memory()
    assert len(errors) == 4
    for error in errors:
        failure = describe_failure(error, 3)
        assert failure.line.startswith("rank 3 ran out of memory")
        assert "training.batch_size" in failure.line
        assert (failure.traceback, failure.code) == ("", 1)
    keep_tracebacks_in(tmp_path)
    assert "traceback-rank3.txt" in describe_failure(errors[0], 3).line
    assert (tmp_path / "traceback-rank3.txt").read_text().strip() == "MemoryError"
    monkeypatch.setenv("CROSSMASK_VERBOSE", "1")
    assert describe_failure(errors[0], 3).traceback == "MemoryError\n"


def test_a_lost_connection_is_another_ranks_story() -> None:
    peer = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4242")
    assert describe_failure(peer, 0).lost_peer
    assert not describe_failure(KeyError("x"), 0).lost_peer
    assert describe_failure(DataError("cat.png: no image"), 0).code == 2


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "rank 1 was killed (SIGKILL): most likely the machine ran out of memory; lower training.batch_size"),
        (-15, "rank 1 was ended from outside (SIGTERM)"),
        (-11, "rank 1 crashed in native code (SIGSEGV)"),
        (-63, "rank 1 crashed in native code (signal 63)"),
        (4, "rank 1 ended without a word (exit code 4)"),
        (None, "rank 1 ended without a word"),
    ],
)
def test_the_end_of_a_process_in_words(status: int | None, words: str) -> None:
    assert End(1, status, 0.0).describe().startswith(words)
