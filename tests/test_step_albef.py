"""ALBEF's step on two ranks under ZeRO 0 to 3: the same losses, the same queue everywhere, and its variants."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from distributed import ranks

STAGE = "deepspeed.zero_optimization.stage"
CASES: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {STAGE: stage} for stage in range(4)},
    "stage 2 bf16": {STAGE: 2, "training.precision": "bf16"},
    "stage 3 bf16": {STAGE: 3, "training.precision": "bf16"},
    "attention read, labels masked": {STAGE: 3, "masking.policy": "syncmask", "masking.options": {}},
    "empty queue": {STAGE: 1, "objectives.itc.queue_initial": "empty", "teacher.dropout": True},
    "accumulated": {STAGE: 2, "training.accumulation_steps": 2},
    "batches of one": {STAGE: 2, "training.batch_size": 2},
}
STEPS, LENGTH = 3, 13


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("albef") / "seen"
    for code, log in ranks.start("albef_steps.py", output, json.dumps(CASES), timeout=180):
        assert code == 0, log
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_same_queue_bit_by_bit(seen: list[dict[str, Any]], name: str) -> None:
    written = 2 if name == "batches of one" else 8
    for rank in seen:
        found = rank[name]
        assert found["equal"] == [True] * (1 + STEPS)
        assert found["own"], "what is contrasted with is the ring itself"
        whole = name != "empty queue"
        assert found["initial"] == [LENGTH if whole else 0, True]
        count = STEPS * written
        assert found["queue"] == [LENGTH, count % LENGTH, max(0, LENGTH - count) if whole else 0]


@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_a_number(seen: list[dict[str, Any]], name: str) -> None:
    wanted = {"itc", "mlm", "mlm_accuracy", "loss"} | ({"itm", "itm_accuracy"} if name != "batches of one" else set())
    for rank in seen:
        assert rank[name]["updates"] == STEPS
        for terms in rank[name]["terms"]:
            assert wanted <= terms.keys()
            assert ("itm" in terms) == ("itm" in wanted)
            assert all(math.isfinite(value) for value in terms.values()), terms
            assert terms["itc"] > 0


def test_sharding_changes_nothing_but_rounding(seen: list[dict[str, Any]]) -> None:
    """Masks and negatives are drawn by sample, so every term can be compared, after updates of all weights too."""
    for rank in seen:
        for stage in (1, 2, 3):
            for one, other in zip(rank["stage 0"]["terms"], rank[f"stage {stage}"]["terms"], strict=True):
                assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert seen[0]["stage 0"]["terms"] != seen[1]["stage 0"]["terms"]


def test_the_teacher_drops_only_while_it_looks_and_is_told_to(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for name, found in rank.items():
            assert found["modes"] == [name == "empty queue"] * len(found["modes"])
            assert len(found["modes"]) >= STEPS
            assert found["eval"]


def test_batches_of_one_say_what_is_left_out(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for name, found in rank.items():
            assert len(found["notices"]) == (name == "batches of one")
