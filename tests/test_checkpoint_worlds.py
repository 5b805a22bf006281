"""Resuming on the same and on other numbers of ranks, at every ZeRO stage; ranks killed and files damaged at random."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed.checkpoint_worlds import CASES, FAILING, SAVED
from distributed.corruption import corrupt

from crossmask.engine.training.checkpoint import CheckpointManager

SCRIPTS = Path(__file__).parent / "distributed"


def script(name: str, *arguments: object, timeout: float = 250) -> str:
    """Runs a script of many ranks in a process group of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    script("checkpoint_worlds.py", folder)
    return folder


def seen(worlds: Path, name: str, case: str, rank: int = 0) -> Any:
    return json.loads((worlds / f"{name}.{rank}.json").read_text())[case]


@pytest.mark.parametrize("case", CASES)
def test_resuming_on_as_many_ranks_changes_no_bit(worlds: Path, case: str) -> None:
    """With dropout, accumulation, and a step left out before and one after the checkpoint."""
    for rank in range(2):
        found = seen(worlds, "two", case, rank)
        assert found["whole"][1] == found["whole"][5] == "skipped"
        assert len(found["resumed"]) == 4
        assert found["resumed"] == found["whole"][SAVED:]
        assert found["compared"] > 55
        assert found["different"] == []


@pytest.mark.parametrize("case", CASES)
def test_sharded_checkpoints_of_another_number_of_ranks_are_refused_with_the_remedy(worlds: Path, case: str) -> None:
    found = seen(worlds, "sharded", case)
    if case.startswith("0:"):  # every rank has everything
        assert found["different"] == []
        return
    run = worlds / case.replace(":", "-") / "plain"
    assert found["error"] == (
        f"CheckpointError: {run}/checkpoints/step-000004 was saved by 2 ranks, this run has 1 rank: use --ranks 2, or "
        f"make it load into any number with: crossmask reshard {run}"
    )


@pytest.mark.parametrize("where", ["plain-1", "plain-2", "plain-4", "one-2"])
@pytest.mark.parametrize("case", CASES)
def test_resharded_state_is_the_same_bit_by_bit_on_any_number_of_ranks(worlds: Path, case: str, where: str) -> None:
    """Masters, Adam's moments and steps, frozen weights, buffers, hyperparameters, teacher, queue and counters."""
    found = seen(worlds, where, case)
    assert found["missing"] == found["different"] == []
    assert found["compared"] > 55
    whole, resumed = seen(worlds, "two", case)["means"][SAVED:], found["means"]
    assert [math.isnan(loss) for loss in resumed] == [False, True, False, False]
    # what is left is the order in which gradients are summed over ranks; on as many ranks there is none of it
    tolerance = 0.0 if where.endswith("-2") else 1e-6 if case.endswith("fp32") else 2e-3
    assert resumed[0] == pytest.approx(whole[0], rel=tolerance)
    assert resumed[2:] == pytest.approx(whole[2:], rel=tolerance)


@pytest.mark.parametrize("kind", ["sharded", "plain"])
def test_a_rank_that_cannot_read_says_so_at_once(worlds: Path, kind: str) -> None:
    """At stage 3, where the load is full of collectives: nobody hangs, and the reason is not the recipe's."""
    ended = json.loads((worlds / f"failing-{kind}.json").read_text())
    assert ended["seconds"] < 50, ended
    folder = worlds / FAILING.replace(":", "-") / kind / "checkpoints"
    newest = folder / f"step-000004{'-universal' if kind == 'plain' else ''}"
    for place in ("checkpoint", *(["student_files"] if kind == "plain" else [])):  # agreed on
        for rank in range(2):
            told = json.loads((worlds / f"failing-{kind}-{place}.{rank}.json").read_text())
            assert told == f"rank 1: {newest} cannot be read: [Errno 5] Input/output error"
    for rank in range(2):
        told = json.loads((worlds / f"failing-{kind}-checkpoint_state.{rank}.json").read_text())
        assert "no usable checkpoint" in told
        assert "state.json: [Errno 5] Input/output error" in told
    told = json.loads((worlds / f"failing-{kind}-torch.1.json").read_text())
    assert told == f"rank 1: {newest} cannot be read: [Errno 5] Input/output error"


def test_new_ranks_draw_their_own_numbers(worlds: Path) -> None:
    draws = [seen(worlds, "plain-4", "2:fp32", rank)["draw"] for rank in range(4)]
    assert len(set(draws)) == 4
    assert draws[:2] == [seen(worlds, "plain-2", "2:fp32", rank)["draw"] for rank in range(2)]
    assert draws[2:] == [seen(worlds, "plain-4", "3:fp32", rank)["draw"] for rank in (2, 3)]  # the same seed and step


def test_what_reshard_leaves(worlds: Path) -> None:
    for case in CASES:
        run = worlds / case.replace(":", "-") / "plain"
        sharded, universal = (run / "checkpoints" / f"step-000004{kind}" for kind in ("", "-universal"))
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        if case.startswith("0:"):
            assert names == ["latest", "step-000002", "step-000004"]
            continue
        assert names == ["latest", "step-000002", "step-000004", "step-000004-universal"]
        assert (run / "checkpoints/latest").read_text() == "step-000004-universal\n"
        for name in ("state.json", "teacher.safetensors", "queue.safetensors", "rng-rank01.safetensors"):
            assert (sharded / name).samefile(universal / name)
        folder, state = CheckpointManager(run).verified()
        assert (folder, state.world_size, state.extra) == (universal, 2, {"skipped": 1})


@pytest.mark.parametrize("kind", ["sharded", "plain"])
@pytest.mark.parametrize("case", ["2-bf16", "3-fp32"])
def test_random_damage_is_found_and_named(worlds: Path, tmp_path: Path, case: str, kind: str) -> None:
    """A thousand a checkpoint: python tests/distributed/corruption.py"""
    shutil.copytree(worlds / case / kind, tmp_path / "run", copy_function=os.link)
    counts = corrupt(tmp_path / "run", 40, random.Random(0))
    assert sum(counts.values()) == 40
    assert len(counts) >= 8, counts


def test_killed_ranks_never_spoil_a_run() -> None:
    """Many more: python tests/distributed/kill_loop.py"""
    printed = script("kill_loop.py", "--kills", 6, "--seed", 1)
    assert "6 kills of 2 ranks" in printed
    assert "equal the undisturbed run's bit by bit" in printed
    assert " 0 while saving" not in printed
