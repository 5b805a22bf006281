"""What a run says when it begins in its folder: that it cannot write there, or that nothing is left to train."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crossmask.engine import Recipe
from crossmask.engine.atomic import replace_file
from crossmask.engine.errors import CheckpointError
from crossmask.engine.failures import EXIT_STOPPED, describe_failure
from crossmask.engine.training import loop


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Resumes a run of 10 steps at ``step``, up to where training would begin; what it says goes into ``said``."""
    said: list[str] = []

    class Display:
        message = staticmethod(said.append)

    monkeypatch.setattr(loop, "CheckpointManager", lambda *_: SimpleNamespace(load=lambda *_: None))
    monkeypatch.setattr(loop, "TrainingDisplay", lambda *_, **__: nullcontext(Display()))
    monkeypatch.setattr(loop.Run, "_restore", lambda *_: None)
    monkeypatch.setattr(loop.Run, "_train", lambda *_: True)

    def resume(step: int) -> tuple[int, list[str]]:
        recipe = Recipe.model_validate({"training": {"max_steps": 10}})
        pretrainer: Any = SimpleNamespace(
            next_step=step, engine=None, teacher=None, queue=None, device=SimpleNamespace(type="cpu"), notices=list
        )
        said.clear()
        stop: Any = SimpleNamespace(reason="enough")
        return loop.Run(recipe, tmp_path, pretrainer, rank=0, world_size=1).go(stop, resume=True), said

    return resume


def test_resuming_a_finished_run_says_that_it_is_only_evaluated_again(resumed: Any) -> None:
    code, said = resumed(9)
    assert code == EXIT_STOPPED
    assert not any("evaluating" in line for line in said)
    _, said = resumed(10)
    assert "trained to step 10 already: evaluating again, in place of the last evaluation" in said


def test_a_run_folder_that_cannot_be_written_is_one_line(resumed: Any, tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    line = r"cannot be written: Is a directory; make room there, or make it writable$"
    with pytest.raises(CheckpointError, match=line) as caught:
        resumed(5)
    assert describe_failure(caught.value, 0).resumable, "a run that had begun is told how to go on"
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    replace_file(file, "old ü")
    replace_file(file, b"new", durable=True)
    assert file.read_bytes() == b"new"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, "newer", durable=True)
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]
