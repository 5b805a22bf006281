"""One process at a time writes into a run folder, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_checkpoint import save

from crossmask.engine.errors import CheckpointError
from crossmask.engine.recipe import Recipe
from crossmask.engine.training import loop
from crossmask.engine.training.reshard import reshard
from crossmask.engine.training.run_lock import run_lock

HOLD = """
import sys, time
from pathlib import Path
from crossmask.engine.training.run_lock import run_lock
with run_lock(Path(sys.argv[1]), "trained"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By reshard and by a second start; until that process is killed."""
    save(tmp_path, 100)
    half_written = tmp_path / "checkpoints/step-000200.partial"
    half_written.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told = f"{tmp_path} is being trained by process {holder.pid}: stop it first"
        with pytest.raises(CheckpointError) as error:
            reshard(tmp_path)
        assert str(error.value) == told
        assert half_written.is_dir()
        monkeypatch.setattr(loop, "join", lambda: (0, 1, torch.device("cpu")))
        for name in ("check_masking", "load_data", "quiet"):
            monkeypatch.setattr(loop, name, lambda *_, **__: None)
        pretrainer = SimpleNamespace(recipe=Recipe(), rank=0, world_size=1, close=lambda: None)
        monkeypatch.setattr(loop, "Pretrainer", lambda *_, **__: pretrainer)
        monkeypatch.setattr(loop.Run, "go", lambda *_: pytest.fail("it began"))
        with pytest.raises(CheckpointError) as error:
            loop.pretrain(Recipe(), tmp_path, resume=True)
        assert str(error.value) == told
    finally:
        holder.kill()
        holder.wait()
    with run_lock(tmp_path, "resharded"):
        assert (tmp_path / "lock").read_text().startswith(f"resharded by process {os.getpid()} on ")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path, "trained"), run_lock(tmp_path, "trained"):
        pass


def test_a_folder_that_cannot_be_written_is_for_others_to_report(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with run_lock(tmp_path / "file" / "run", "trained"):
        pass
