"""Ctrl-C, SIGTERM and a dead launcher: every rank stops at the same step, soon."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from distributed import ranks

from crossmask.engine.training import signals
from crossmask.engine.training.signals import StopRequest

SCRIPT = str(ranks.HERE / "stop_loop.py")


def wait_for(path: Path, seconds: float = 30.0) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"no {path.name} after {seconds} s"
        time.sleep(0.05)
    return path.read_text()


@pytest.fixture
def stubborn(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that has been asked to stop once and does not."""
    process = subprocess.Popen([sys.executable, SCRIPT, str(tmp_path), "stubborn"])
    wait_for(tmp_path / "ready.0")
    process.send_signal(signal.SIGTERM)
    return process


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path: Path) -> None:
    asked: list[float] = []

    def ask() -> None:
        wait_for(tmp_path / "ready.0")
        pid = int(wait_for(tmp_path / "ready.1"))
        time.sleep(0.3)
        asked.append(time.monotonic())
        os.kill(pid, signal.SIGINT)

    thread = threading.Thread(target=ask)
    thread.start()
    ended = ranks.start("stop_loop.py", tmp_path, "loop")
    thread.join()
    assert [code for code, _ in ended] == [0, 0], ended
    assert time.monotonic() - asked[0] < 10.0
    first, second = (json.loads((tmp_path / f"end.{rank}").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] > 0
    assert (first["reason"], second["reason"]) == (None, "SIGINT")


def test_the_same_request_twice_is_one_and_a_later_signal_ends_at_once(stubborn: subprocess.Popen[bytes]) -> None:
    stubborn.send_signal(signal.SIGINT)  # as a launcher passes Ctrl-C on, at once
    time.sleep(0.2)
    assert stubborn.poll() is None
    time.sleep(0.5)
    stubborn.send_signal(signal.SIGINT)
    assert stubborn.wait(timeout=5) == 128 + signal.SIGINT


def test_a_killed_launcher_stops_its_rank(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, SCRIPT, str(tmp_path), "launcher"])
    wait_for(tmp_path / "ready.0")
    launcher.kill()
    launcher.wait()
    assert json.loads(wait_for(tmp_path / "end.0", seconds=5))["reason"] == "the launcher ended"


@pytest.fixture(params=["pidfd", "no pidfd"])
def pidfd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system call, and without: in kernels before 5.3 and in containers that forbid it."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if request.param == "no pidfd":
        monkeypatch.setattr(os, "pidfd_open", refuse)


@pytest.mark.usefixtures("pidfd")
def test_the_named_launcher_is_watched_even_as_a_zombie(monkeypatch: pytest.MonkeyPatch) -> None:
    command = subprocess.Popen(["sleep", "30"])
    monkeypatch.setenv(signals.LAUNCHER_PID, str(command.pid))
    with StopRequest() as stop:
        time.sleep(0.2)
        assert not stop.agree()
        command.kill()  # not waited for: stays a zombie
        deadline = time.monotonic() + 3
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stop.agree()
    command.wait()


def test_a_launcher_that_is_gone_already_and_handlers_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    gone = subprocess.Popen(["true"])
    gone.wait()
    with StopRequest(watch=[gone.pid]) as stop:
        assert signal.getsignal(signal.SIGINT) == stop._on_signal
        deadline = time.monotonic() + 3
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stop.reason == "the launcher ended"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_reason_can_be_agreed_on() -> None:
    with StopRequest() as stop:
        assert stop.agree(True)
        assert not stop.agree(False)
