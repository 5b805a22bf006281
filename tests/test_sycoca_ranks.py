"""SyCoCa on two ranks: ITC as in one process, the same steps under every ZeRO stage, and a resumed run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

import ranks

ZERO = "deepspeed"
CASES: dict[str, dict[str, Any]] = {
    "zero0": {ZERO: {"zero_optimization": {"stage": 0}}},
    "zero1": {ZERO: {"zero_optimization": {"stage": 1}}, "resume": True},
    "zero2": {ZERO: {"zero_optimization": {"stage": 2}}, "resume": True},
    "zero3": {ZERO: {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}},
    "accumulated": {ZERO: {"zero_optimization": {"stage": 2}}, "training.accumulation_steps": 2, "resume": True},
    "bf16": {ZERO: {"zero_optimization": {"stage": 2}}, "training.precision": "bf16"},
    "dropped": {ZERO: {"zero_optimization": {"stage": 2}}, "masking.hidden_patches": "drop"},
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("sycoca") / "seen"
    done = ranks.start("sycoca_steps.py", output, json.dumps(CASES), timeout=400)
    assert all(code == 0 for code, _ in done), "\n".join(text[-3000:] for _, text in done)
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(2)]


def test_contrast_over_ranks_is_that_of_one_process(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert found["contrast"]["value"] > 1
        assert found["contrast"]["loss"] < 1e-6
        assert found["contrast"]["gradient"] < 1e-6


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3"])
def test_every_zero_stage_takes_the_same_steps(seen: list[dict[str, Any]], case: str) -> None:
    wanted, found = seen[0]["zero0"], seen[0][case]
    for one, other in zip(wanted["terms"], found["terms"], strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert found["teacher"] == pytest.approx(wanted["teacher"], rel=1e-4)
    assert found["terms"][-1]["loss"] < found["terms"][0]["loss"]


@pytest.mark.parametrize("case", ["zero1", "zero2", "accumulated"])
def test_a_resumed_run_goes_on_as_if_never_stopped(seen: list[dict[str, Any]], case: str) -> None:
    found = seen[0][case]
    assert found["resumed"] == found["terms"][-len(found["resumed"]) :]
    assert found["resumed_teacher"] == found["teacher"]


def test_the_teacher_follows_once_a_step_whatever_the_micro_batches(seen: list[dict[str, Any]]) -> None:
    assert {name: found["updates"] for name, found in seen[0].items() if name != "contrast"} == dict.fromkeys(CASES, 4)
    assert any(name.startswith("image_decoder.") for name in seen[0]["zero2"]["teacher"])


def test_other_precision_and_dropping_train_as_well(seen: list[dict[str, Any]]) -> None:
    for case in ("bf16", "dropped"):
        for term in ("itc", "caption", "tg_mim"):
            assert 0 < seen[0][case]["terms"][-1][term] < 10
    first, other = (seen[0][case]["terms"][0] for case in ("zero2", "bf16"))
    assert other["caption"] == pytest.approx(first["caption"], rel=0.02)
    assert seen[0]["dropped"]["terms"][0]["tg_mim"] != first["tg_mim"]
