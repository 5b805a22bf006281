"""Two real ranks hold and send what the scaling model says, at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import ranks

TOLERANCE = 0.01  # of what a rank holds, of what it sends of each kind
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


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("planning") / "seen"
    for code, log in ranks.start("planning_steps.py", output, json.dumps(CASES), timeout=240):
        assert code == 0, log
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_what_the_plan_says(seen: list[dict[str, Any]], name: str) -> None:
    for rank in seen:
        measured, expected = rank[name]["measured"]["held"], rank[name]["expected"]["held"]
        assert sum(expected.values()) == pytest.approx(sum(measured.values()), rel=TOLERANCE)
        for part in ("student", "moments", "teacher", "queue"):
            assert expected[part] == pytest.approx(measured[part], rel=TOLERANCE, abs=600), part


@pytest.mark.parametrize("name", CASES)
def test_ranks_send_what_the_plan_says(seen: list[dict[str, Any]], name: str) -> None:
    for rank in seen:
        measured, expected = rank[name]["measured"]["sent"], rank[name]["expected"]["sent"]
        assert measured.keys() == expected.keys()
        for kind, count in expected.items():
            assert count == pytest.approx(measured[kind], rel=TOLERANCE), kind
