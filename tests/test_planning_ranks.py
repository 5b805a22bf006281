"""One real rank and two hold and send what the scaling model says, at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import ranks

TOLERANCE = 0.01  # of what a rank holds, of what it sends of each kind
PEAK = 0.1  # of what a step holds beyond that
ACTIVATIONS = 3e6  # bytes, at most, that a backward of PEAKS holds besides
STAGE, BUCKET = "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.reduce_bucket_size"
THRESHOLD = "deepspeed.zero_optimization.stage3_param_persistence_threshold"
REUSE = "deepspeed.zero_optimization.stage3_max_reuse_distance"
LIVE = "deepspeed.zero_optimization.stage3_max_live_parameters"
OFF = {"weight": 0.0}
CAPTIONER = {
    "model.captioner": {"depth": 1, "heads": 2, "mlp_ratio": 2.0},
    "masking": {"policy": "sycoca", "options": {"side": "both"}},
    "objectives": {"itc": {"queue_length": 0, "distillation": 0.0}, "itm": OFF, "mlm": OFF, "mim": OFF}
    | {"caption": {"weight": 2.0}, "tg_mim": {"weight": 1.0}},
}
# DeepSpeed's bucket of a gigabyte would hide everything else at stage 3
CASES: dict[str, dict[str, Any]] = {
    "stage 0 bf16": {STAGE: 0, BUCKET: 20000, "training.precision": "bf16"},
    "stage 1 fp32": {STAGE: 1, BUCKET: 20000},
    "stage 2 bf16, accumulated": {
        STAGE: 2,
        BUCKET: 20000,
        "training.precision": "bf16",
        "training.accumulation_steps": 2,
    },
    "stage 3 bf16": {STAGE: 3, BUCKET: 20000, THRESHOLD: 500, "training.precision": "bf16"},
    "stage 3, nothing kept for reuse": {STAGE: 3, BUCKET: 20000, THRESHOLD: 500, REUSE: 1, LIVE: 1},
    "captioner": {STAGE: 2, BUCKET: 20000, **CAPTIONER},
}


# towers so wide that a step's own copies are most of what it holds, and activations little
WIDE = {"model.image.width": 256, "model.text.width": 256, "training.batch_size": 2, "objectives.itm.weight": 0.0}
WIDE |= {BUCKET: 20000, THRESHOLD: 500, "deepspeed.zero_optimization.stage3_prefetch_bucket_size": 20000}
KINDS = {1: [(2, "fp32"), (3, "bf16")], 2: [(3, "bf16")]}
PEAKS: dict[int, dict[str, dict[str, Any]]] = {
    count: {f"wide, stage {stage} {kind}": {**WIDE, STAGE: stage, "training.precision": kind} for stage, kind in some}
    for count, some in KINDS.items()
}
WIDE_ONES = [(count, name) for count in PEAKS for name in PEAKS[count]]
EVERY = [*((2, name) for name in CASES), *WIDE_ONES]
Seen = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By how many ranks there are, what each has seen."""
    found: Seen = {}
    for count in (1, 2):
        output = tmp_path_factory.mktemp("planning") / "seen"
        cases = json.dumps(PEAKS[count] | (CASES if count == 2 else {}))
        for code, log in ranks.start("planning_steps.py", output, cases, ranks=count, timeout=240):
            assert code == 0, log
        found[count] = [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(count)]
    return found


@pytest.mark.parametrize(("count", "name"), EVERY)
def test_ranks_hold_what_the_plan_says(seen: Seen, count: int, name: str) -> None:
    for rank in seen[count]:
        measured, expected = rank[name]["measured"]["held"], rank[name]["expected"]["held"]
        assert sum(expected.values()) == pytest.approx(sum(measured.values()), rel=TOLERANCE)
        for part in ("student", "moments", "teacher", "queue"):
            assert expected[part] == pytest.approx(measured[part], rel=TOLERANCE, abs=600), part


@pytest.mark.parametrize("name", CASES)
def test_ranks_send_what_the_plan_says(seen: Seen, name: str) -> None:
    for rank in seen[2]:
        measured, expected = rank[name]["measured"]["sent"], rank[name]["expected"]["sent"]
        assert measured.keys() == expected.keys()
        for kind, count in expected.items():
            assert count == pytest.approx(measured[kind], rel=TOLERANCE), kind


def test_a_single_rank_sends_nothing(seen: Seen) -> None:
    for found in seen[1][0].values():
        assert found["measured"]["sent"] == found["expected"]["sent"] == {}


@pytest.mark.parametrize(("count", "name"), WIDE_ONES)
def test_a_step_holds_at_most_what_the_plan_says(seen: Seen, count: int, name: str) -> None:
    """In the optimizer's step, which at stages 0 to 2 begins where the backward ends, and for the teacher's look. A
    backward at stage 3 holds what it has gathered, on a single rank nothing, and activations, here a CPU's."""
    for rank in seen[count]:
        measured, expected = rank[name]["measured"]["most"], rank[name]["expected"]["most"]
        step = measured["step"] if "stage 3" in name else max(measured["step"], measured["backward"])
        assert expected["step"] == pytest.approx(step, rel=PEAK)
        assert expected.get("look", 0) == pytest.approx(measured["look"], rel=PEAK)
        if "stage 3" in name:
            assert expected["backward"] < 1.1 * measured["backward"]
            assert measured["backward"] < expected["backward"] + ACTIVATIONS
