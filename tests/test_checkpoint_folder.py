"""What lies in a run's checkpoints folder: what is kept, what is in the way, and what is of another version."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import TEACHER, Engine, flip, save

from crossmask.engine.errors import CheckpointError
from crossmask.engine.teacher import FeatureQueue
from crossmask.engine.training import checkpoint as module
from crossmask.engine.training import manifest
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.manifest import MANIFEST, _digest_of, describe, files_of, find_damage, start_afresh
from crossmask.engine.training.reshard import reshard


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def sealed_again(checkpoint: Path, **others: Any) -> None:
    files = {name: describe(path) for name, path in files_of(checkpoint).items()}
    values = {"format": manifest.FORMAT, "files": files, "sha256": _digest_of(files)} | others
    (checkpoint / MANIFEST).write_text(json.dumps(values))


def test_damaged_checkpoints_go_first_and_later_ones_do_not_count(tmp_path: Path) -> None:
    for step in (40, 45, 60):
        save(tmp_path, step, keep=9)
    flip(tmp_path / "checkpoints/step-000045/state.json")
    (tmp_path / "checkpoints/latest").write_text("step-000045\n")
    shutil.move(tmp_path / "checkpoints/step-000060", tmp_path / "aside")
    manager = CheckpointManager(tmp_path, keep=2, warn=lambda line: None)
    assert manager.verified()[1].step == 40
    shutil.move(tmp_path / "aside", tmp_path / "checkpoints/step-000060")
    for step, left in ((47, [40, 47]), (48, [47, 48])):
        manager.save(step, Engine(), TEACHER, FeatureQueue(4, 2))
        assert names(tmp_path) == ["latest", *(f"step-{one:06d}" for one in (*left, 60))]
    manager.save(61, Engine(), TEACHER, FeatureQueue(4, 2))
    assert names(tmp_path) == ["latest", "step-000060", "step-000061"]


def test_a_checkpoint_that_could_not_be_made_the_latest_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 100)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(module, "replace_text", fail)
        with pytest.raises(CheckpointError, match=r"Input/output error; step-000100 is intact$"):
            save(tmp_path, 200)
    assert names(tmp_path) == ["latest", "step-000100"]


def test_the_system_s_own_words_for_a_full_disk_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's zip writer, in the midst of an OSError, raises an error that does not mention the disk."""

    def full(*_: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(module, "_save_pickled", full)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 200)
    assert str(error.value).endswith(
        ": model.pt: [Errno 28] No space left on device; there is no earlier one: make room"
    )


def test_stray_files_harm_only_where_deepspeed_would_find_them(tmp_path: Path) -> None:
    folder = save(tmp_path, 100)
    for name in (".nfs0001", ".DS_Store", "student/.nfs0001", "student/.DS_Store", "notes.txt", "copy of state.json"):
        (folder / name).write_bytes(b"x")
    assert find_damage(folder) is None
    for name in ("student/extra.pt", "student/.extra.pt.Xa3b", "student/extra"):
        (folder / name).write_bytes(b"x")
        assert find_damage(folder) == f"{name}: not in the manifest"
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ({"format": 2}, "manifest.json: format 2, it is of another version"),
        ({"files": [], "sha256": _digest_of([])}, "manifest.json: unreadable"),  # type: ignore[arg-type]
        ({"files": {"a": 3}, "sha256": _digest_of({"a": 3})}, "manifest.json: unreadable"),
        (
            {"files": {"a": {"bytes": "3", "sha256": ""}}, "sha256": _digest_of({"a": {"bytes": "3", "sha256": ""}})},
            "manifest.json: other types",
        ),
    ],
)
def test_a_manifest_of_another_version_is_passed_over(tmp_path: Path, harm: dict[str, Any], told: str) -> None:
    save(tmp_path, 100)
    sealed_again(save(tmp_path, 200), **harm)
    warnings: list[str] = []
    assert CheckpointManager(tmp_path, warn=warnings.append).verified()[1].step == 100
    assert told in warnings[0]


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ([], "state.json: other keys"),
        ({"step": 200}, "state.json: other keys"),
        ({"step": "200"} | dict.fromkeys(("world_size", "zero_stage", "teacher_updates"), 1) | {"extra": {}}, "types"),
        (
            {"step": 2, "world_size": 2, "zero_stage": 1, "teacher_updates": 1, "extra": {}},
            "rng-rank01.safetensors: not in",
        ),
    ],
)
def test_a_state_of_another_version_is_passed_over(tmp_path: Path, state: Any, told: str) -> None:
    save(tmp_path, 100)
    folder = save(tmp_path, 200)
    (folder / "state.json").write_text(json.dumps(state))
    sealed_again(folder)
    warnings: list[str] = []
    assert CheckpointManager(tmp_path, warn=warnings.append).verified()[1].step == 100
    assert told in warnings[0]
    assert "of another version of crossmask" in warnings[0]


def test_files_are_hashed_several_at_a_time_and_only_those_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 100)
    two, digest, seen = threading.Barrier(2), manifest._digest, list[str]()

    def together(path: Path) -> str:
        two.wait(10)
        seen.append(path.name)
        return digest(path)

    monkeypatch.setattr(manifest, "_digest", together)
    needed = {"state.json", "teacher.safetensors"}
    told: list[str] = []
    CheckpointManager(tmp_path).verified(None, needed.__contains__, told.append)
    assert set(seen) == needed
    assert told == ["verifying 0.0 MB of step-000100"]
    monkeypatch.undo()
    (folder / "queue.safetensors").write_bytes(b"")  # sizes always count
    assert find_damage(folder, needed=needed.__contains__) is not None


def test_what_cannot_be_removed_does_not_end_every_later_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "step-000100.partial"
    start_afresh(partial)
    (partial / ".nfs0001").write_text("")

    def stuck(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", stuck)
    start_afresh(partial)
    assert list(partial.iterdir()) == []
    monkeypatch.undo()
    start_afresh(partial)
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]


def test_what_is_no_run_is_said_as_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1/recipe.yaml").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"run-2: not a run folder, recipe.yaml is not in it; did you mean .*run-1"
    ):
        reshard(tmp_path / "run-2")
    with pytest.raises(CheckpointError, match="file: not a run folder"):
        reshard(tmp_path / "file")
    with pytest.raises(CheckpointError, match="run-1 has no checkpoints yet"):
        reshard(tmp_path / "run-1")
    save(tmp_path / "run-1", 100)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there is 100"):
        CheckpointManager(tmp_path / "run-1").verified(3)
