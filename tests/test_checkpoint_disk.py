"""Full disks and crashes, on real files: whatever could not be finished, the checkpoint before it is intact."""

from __future__ import annotations

import builtins
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import ranks
from safetensors.torch import load_file
from test_checkpoint import Engine, Killed

from crossmask.engine.errors import CheckpointError
from crossmask.engine.teacher import FeatureQueue
from crossmask.engine.training import reshard as module
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.manifest import find_damage
from crossmask.engine.training.reshard import reshard


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, ZeRO-2, bf16, with the checkpoints of steps 2 and 4; nobody writes into it."""
    folder = tmp_path_factory.mktemp("run")
    plan = '{"stage": 2, "dtype": "bf16", "steps": 4, "save_at": [2, 4]}'
    ended = ranks.start("checkpoint_run.py", folder / "run", folder / "seen", plan)
    assert [code for code, _ in ended] == [0, 0], "\n".join(log for _, log in ended)
    return folder / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"this user may not mount a file system: {mount.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def leave_free(disk: Path, wanted: int) -> None:
    """Fills the disk up to about ``wanted`` bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    state = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - wanted)))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class LargeEngine(Engine):
    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        with contextlib.suppress(OSError):
            Path(folder, tag).mkdir()
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save({"weight": torch.rand(20_000)}, str(Path(folder, tag, name)))


def test_a_disk_that_fills_up_anywhere_in_a_save(small_disk: Path) -> None:
    run = small_disk / "run"
    teacher: Any = SimpleNamespace(updates=3, state_dict=lambda: {"weight": torch.ones(20_000)})

    def save(step: int) -> Path:
        return CheckpointManager(run, 2).save(step, LargeEngine(), teacher, FeatureQueue(2000, 4), {})

    save(100)
    whole = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    assert whole > 240_000
    failures = set()
    for free in range(0, whole + 60_000, 12_288):
        leave_free(small_disk, free)
        try:
            save(200)
        except CheckpointError as error:
            told = str(error)
            end = r"No space left on device( \(os error 28\))?\W*; step-000100 is intact: make room"
            assert re.fullmatch(rf"the checkpoint of step 200 could not be saved in .*{end}", told)
            failures.add(re.sub(r"\d+", "N", told))
            found, _ = CheckpointManager(run).verified()
            assert found.name == "step-000100"
            assert not list((run / "checkpoints").glob("*.partial"))
        else:
            break
    else:
        pytest.fail("never enough room")
    assert len(failures) >= 3, failures  # different files, different libraries, different words
    assert CheckpointManager(run).verified()[0].name == "step-000200"


def test_a_disk_that_fills_up_anywhere_in_resharding(small_disk: Path, sharded: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(sharded, run)
    before = names(run)
    failed = 0
    for free in range(0, 1_500_000, 40_960):
        leave_free(small_disk, free)
        try:
            reshard(run)
        except CheckpointError as error:
            told = str(error)
            end = r"No space left on device( \(.*\))?\W*; it is intact: make room"
            assert re.fullmatch(rf".*step-000004 could not be resharded: .*{end}", told)
            failed += 1
            assert names(run) == before
            assert CheckpointManager(run).verified()[0].name == "step-000004"
        else:
            break
    else:
        pytest.fail("never enough room")
    assert failed >= 3
    assert CheckpointManager(run).verified()[0].name == "step-000004-universal"


@pytest.mark.parametrize("failure", [Killed, OSError])
def test_resharding_may_end_at_any_moment(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def reshard_until(moment: int, run: Path) -> int:
        """Moments left over; negative where something failed at that moment or, once failed, later."""
        shutil.copytree(sharded, run, copy_function=os.link)
        left = moment

        def counted(original: Any, writes: Any = lambda arguments: True) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                mine = writes(arguments)
                left -= mine
                if mine and left < 0:
                    raise failure(28, "No space left on device")
                return original(*arguments, **keywords)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(builtins, "open", counted(builtins.open, lambda given: "w" in str(given[1:2])))
            for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (torch, "save")):
                patched.setattr(owner, name, counted(getattr(owner, name)))
            patched.setattr(module, "_link", counted(module._link))
            with contextlib.suppress(Killed if failure is Killed else CheckpointError):
                reshard(run)
        return left

    many = 100_000
    total = many - reshard_until(many, tmp_path / "whole")
    assert total > 200
    for moment in {*range(4), *range(4, total, 99), *range(total - 8, total)}:  # the last ones seal and name it
        run = tmp_path / f"moment{moment}"
        assert reshard_until(moment, run) < 0
        warnings: list[str] = []
        found, state = CheckpointManager(run, warn=warnings.append).verified()
        assert (state.step, warnings) == (4, [])
        if failure is OSError and moment < total - 1:  # the last one only forces what has been done to the disk
            assert found.name == "step-000004"
            assert not list((run / "checkpoints").glob("*.partial"))
        if moment % 4 == 0:
            assert reshard(run).name == CheckpointManager(run).verified()[0].name == "step-000004-universal"
        shutil.rmtree(run)


def test_resharding_says_what_it_does_and_does_it_once(tmp_path: Path, sharded: Path) -> None:
    shutil.copytree(sharded, tmp_path / "run")
    told: list[str] = []
    universal = reshard(tmp_path / "run", told.append)
    assert re.fullmatch(r"step-000004 is verified; converting \d+ MB", told[0])
    assert find_damage(universal) is None
    before = universal.stat().st_mtime_ns
    assert reshard(tmp_path / "run", told.append) == universal
    assert told[-1] == "step-000004-universal loads into any number of ranks as it is"
    assert universal.stat().st_mtime_ns == before
    assert {"frozen.weight", "frozen.bias", "mean", "calls"} <= {
        name.removeprefix("model.") for name in load_file(universal / "student/unmoved.safetensors")
    }


def test_a_run_that_goes_on_meanwhile_keeps_its_newer_checkpoint(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sharded, run)
    convert = module.convert_student

    def slowly(*arguments: Any) -> None:
        convert(*arguments)
        shutil.copytree(run / "checkpoints/step-000004", run / "checkpoints/step-000006")
        (run / "checkpoints/latest").write_text("step-000006\n")

    monkeypatch.setattr(module, "convert_student", slowly)
    with pytest.raises(CheckpointError, match=r"the run went on meanwhile; stop it first, and try again; it is intact"):
        reshard(run)
    assert names(run) == ["latest", "step-000002", "step-000004", "step-000006"]
    assert (run / "checkpoints/latest").read_text() == "step-000006\n"


def test_a_universal_checkpoint_counts_as_its_step_when_old_ones_go(tmp_path: Path, sharded: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sharded, run)
    reshard(run)
    manager = CheckpointManager(run, keep=2)
    manager._prune(run / "checkpoints/step-000004-universal")
    assert names(run) == ["latest", "step-000002", "step-000004", "step-000004-universal"]
    CheckpointManager(run, keep=1)._prune(run / "checkpoints/step-000004-universal")
    assert names(run) == ["latest", "step-000004", "step-000004-universal"]
    (run / "checkpoints/step-000004-universal/student/unmoved.safetensors").unlink()
    warnings: list[str] = []
    found, _ = CheckpointManager(run, warn=warnings.append).verified()
    assert found.name == "step-000004"
    assert "step-000004-universal is damaged (student/unmoved.safetensors: missing)" in warnings[0]
