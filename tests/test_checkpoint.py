"""Checkpoints: equal continuation, damage found by name, and no moment of a crash that loses the previous one."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import ranks
from safetensors.torch import load_file

from crossmask.engine.errors import CheckpointError
from crossmask.engine.teacher import FeatureQueue
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.manifest import find_damage
from crossmask.engine.training.random_state import capture_random_state, restore_random_state, seed_random_state


def run(folder: Path, output: Path, count: int = 2, **plan: Any) -> tuple[list[int], list[dict[str, Any]]]:
    """Exit statuses and what each rank wrote."""
    plan = {"stage": 2, "dtype": "bf16"} | plan
    ended = ranks.start("checkpoint_run.py", folder, output, json.dumps(plan), ranks=count)
    codes = [code for code, _ in ended]
    assert any(codes) == ("kill_at" in plan), "\n".join(log for _, log in ended)
    return codes, [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Six steps on two ranks, ZeRO-2, bf16, with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    _, seen = run(folder / "run", folder / "seen", steps=6, save_at=[2, 4])
    return folder / "run", seen


@pytest.fixture
def copied(uninterrupted: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(uninterrupted[0], tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_resumes_bit_by_bit_from_the_one_before_a_damaged_one(
    uninterrupted: tuple[Path, list[dict[str, Any]]], copied: Path, tmp_path: Path
) -> None:
    flip(copied / "checkpoints/step-000004/teacher.safetensors")
    _, seen = run(copied, tmp_path / "seen", steps=6, resume=True)
    for rank, whole in zip(seen, uninterrupted[1], strict=True):
        assert rank["error"] is None
        assert (rank["extra"], rank["updates"]) == ({"skipped": 1}, 2)
        assert len(rank["losses"]) == 4
        for key in ("losses", "draws"):
            assert rank[key] == whole[key][2:]
        for key in ("teacher", "queue"):
            assert rank[key] == whole[key]
    (warning,) = seen[0]["warnings"]
    assert "step-000004 is damaged (teacher.safetensors: contents changed)" in warning
    assert "\n" not in warning
    assert seen[1]["warnings"] == []


def test_full_disk_then_a_killed_rank_leave_the_previous_checkpoint(copied: Path, tmp_path: Path) -> None:
    plan = {"full_disk_at": 5, "full_disk_rank": 1, "full_disk_file": "optim_states.pt"}
    plan |= {"kill_at": 6, "kill_rank": 0, "kill_file": "mp_rank_00_model_states.pt"}
    codes, seen = run(copied, tmp_path / "seen", steps=6, save_at=[5, 6], resume=True, **plan)
    assert codes[0] == -9
    for rank in seen:
        assert rank["error"].startswith("the checkpoint of step 5 could not be saved in ")
        full = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt: [Errno 28] No space left on device"
        assert f": rank 1: {full}; step-000004 is intact" in rank["error"]
        assert "\n" not in rank["error"]
    left = sorted(path.name for path in (copied / "checkpoints").iterdir())
    assert left == ["latest", "step-000002", "step-000004", "step-000006.partial"]
    folder, state = CheckpointManager(copied).verified()
    assert (folder.name, state.step) == ("step-000004", 4)


FILES = [
    "manifest.json",
    "queue.safetensors",
    "rng-rank01.safetensors",
    "state.json",
    "student/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "student/mp_rank_00_model_states.pt",
    "teacher.safetensors",
]


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_previous_one_used(copied: Path, name: str, harm: str) -> None:
    path = copied / "checkpoints/step-000004" / name
    if harm == "flipped":
        flip(path)
    elif harm == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    warnings: list[str] = []
    folder, state = CheckpointManager(copied, warn=warnings.append).verified()
    assert (folder.name, state.step) == ("step-000002", 2)
    assert len(warnings) == 1
    assert f"step-000004 is damaged ({name}: " in warnings[0]


def test_every_flipped_bit_of_the_manifest_is_found_or_harmless(copied: Path) -> None:
    folder = copied / "checkpoints/step-000004"
    manifest = folder / "manifest.json"
    original = manifest.read_bytes()
    for position in range(0, len(original), 7):
        manifest.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        damage = find_damage(folder)
        meaning = _parsed(manifest.read_bytes())
        assert damage is not None or all(meaning[k] == json.loads(original)[k] for k in ("files", "sha256"))
    manifest.write_bytes(original)
    assert find_damage(folder) is None


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_file_that_the_manifest_does_not_name_is_not_opened(copied: Path) -> None:
    (copied / "checkpoints/step-000004/student/extra.pt").write_bytes(b"x")
    assert find_damage(copied / "checkpoints/step-000004") == "student/extra.pt: not in the manifest"


def test_latest_missing_or_naming_nothing(copied: Path) -> None:
    warnings: list[str] = []
    latest = copied / "checkpoints/latest"
    latest.write_text("step-000400\n")
    assert CheckpointManager(copied, warn=warnings.append).verified()[0].name == "step-000004"
    latest.unlink()
    assert CheckpointManager(copied, warn=warnings.append).verified()[0].name == "step-000004"
    assert "names step-000400, which is missing" in warnings[0]
    assert "latest is missing" in warnings[1]


def test_nothing_usable_is_never_a_fresh_start(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        CheckpointManager(tmp_path / "elsewhere").verified()
    for folder in (copied / "checkpoints").glob("step-*"):
        flip(folder / "state.json")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        CheckpointManager(copied, warn=lambda line: None).verified()


def test_no_pickle_but_deepspeeds(copied: Path) -> None:
    folder = copied / "checkpoints/step-000004"
    ours = {path.suffix for path in folder.rglob("*") if path.is_file() and path.parent.name != "student"}
    assert ours == {".json", ".safetensors"}
    assert all(
        tensor.dtype is torch.float32
        for name, tensor in load_file(folder / "teacher.safetensors").items()
        if name not in ("calls", "mean")
    )


# -- one process, a stand-in for the engine: every moment of a save ------------------------------------------------


class Engine:
    """As much of a DeepSpeed engine as saving touches."""

    checkpoint_engine: Any = None

    def _copy_recovery_script(self, save_path: str) -> None:
        raise AssertionError("not wanted in our checkpoints")

    def zero_optimization_stage(self) -> int:
        return 2

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        with contextlib.suppress(OSError):  # DeepSpeed only logs this one; the files' own errors follow
            Path(folder, tag).mkdir()
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save({"weight": torch.ones(5)}, str(Path(folder, tag, name)))
        self._copy_recovery_script(folder)


TEACHER: Any = SimpleNamespace(updates=3, state_dict=lambda: {"weight": torch.ones(3)})


def save(run: Path, step: int, keep: int = 2) -> Path:
    return CheckpointManager(run, keep).save(step, Engine(), TEACHER, FeatureQueue(4, 2), {"step": step})


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (100, 200, 300, 1_000_000, 1_000_001):
        save(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-1000000", "step-1000001"]
    assert CheckpointManager(tmp_path).verified()[1].extra == {"step": 1_000_001}


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    first = save(tmp_path, 100, keep=1)
    flip(first / "state.json")
    save(tmp_path, 100, keep=1)
    assert CheckpointManager(tmp_path).verified()[1].step == 100
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000100"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


@pytest.mark.parametrize("failure", [Killed, OSError])
def test_every_system_call_of_a_save_may_be_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    save(tmp_path / "before", 100)
    moments = 0
    builtins_open = builtins.open
    completed = False
    while not completed:
        run_dir = tmp_path / f"moment{moments}"
        shutil.copytree(tmp_path / "before", run_dir)
        left = moments

        def counted(original: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                writes = original is not builtins_open or "w" in str(arguments[1:2])
                left -= writes
                if writes and left < 0:
                    raise failure(28, "No space left on device")
                return original(*arguments, **keywords)

            return call

        with monkeypatch.context() as patched:
            for module, name in ((builtins, "open"), (os, "replace"), (os, "fsync"), (os, "mkdir")):
                patched.setattr(module, name, counted(getattr(module, name)))
            with contextlib.suppress(Killed if failure is Killed else CheckpointError):
                save(run_dir, 200)
                completed = True
        warnings: list[str] = []
        _, state = CheckpointManager(run_dir, warn=warnings.append).verified()
        assert state.step in (100, 200)
        assert warnings == []  # latest has never named what is not whole
        if failure is OSError and not completed:
            assert not list((run_dir / "checkpoints").glob("*.partial"))
        assert save(run_dir, 300).name == CheckpointManager(run_dir).verified()[0].name == "step-000300"
        assert state.step == 200 or not completed
        moments += 1
    assert moments > 15  # the loop has really gone through a save


def test_random_state_round_trip() -> None:
    import random

    import numpy as np

    random.gauss(0, 1)  # leaves a half-used pair behind
    np.random.randn()  # noqa: NPY002
    state = capture_random_state()

    def draw() -> list[float]:
        from_numpy = [float(np.random.randn()), float(np.random.rand())]  # noqa: NPY002
        return [random.gauss(0, 1), random.random(), *from_numpy, *torch.rand(3)]

    first = draw()
    restore_random_state(state)
    assert draw() == first
    drawn = []
    for rank, step in ((4, 100), (5, 100), (4, 200), (4, 100)):
        seed_random_state(0, rank, step)
        drawn.append(draw())
    assert drawn[0] == drawn[3]
    assert all(len({one[i] for one in drawn[:3]}) == 3 for i in range(len(first)))
