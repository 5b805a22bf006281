"""The momentum teacher under ZeRO 0 to 3 on two CPU ranks, bit by bit, and its momentum schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import ranks

from crossmask.engine.teacher import momentum_at

# name, stage, dtype, accumulation steps, warm-up of the momentum, further zero_optimization keys
CASES: list[tuple[str, int, str, int, bool, dict[str, Any]]] = [
    ("0 fp32", 0, "fp32", 1, True, {}),
    ("1 fp32", 1, "fp32", 1, False, {}),
    ("1 bf16", 1, "bf16", 2, False, {}),
    ("2 fp32", 2, "fp32", 1, False, {}),
    ("2 bf16", 2, "bf16", 2, True, {}),
    ("2 bf16 round robin", 2, "bf16", 1, False, {"round_robin_gradients": True}),
    ("3 fp32", 3, "fp32", 1, False, {}),
    ("3 bf16", 3, "bf16", 2, True, {}),
    ("3 bf16 sub-groups", 3, "bf16", 1, False, {"sub_group_size": 100}),
]
NAMES = ["calls", "decoder.bias", "embedding.weight", "frozen.bias", "frozen.weight", "hidden.bias", "hidden.weight"]
NAMES += ["mean", "norm.bias", "norm.weight", "position"]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks saw, by case; one launch for all stages."""
    output = tmp_path_factory.mktemp("teacher") / "seen"
    for code, log in ranks.start("teacher_stages.py", output, json.dumps(CASES)):
        assert code == 0, log
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", [case[0] for case in CASES])
def test_follows_the_masters_bit_by_bit(followed: list[dict[str, Any]], case: str) -> None:
    for seen in (rank[case] for rank in followed):
        assert seen["updates"] == 6
        assert seen["names"] == NAMES  # the tied decoder weight once
        assert seen["compared"] == 7
        false = {name for name, value in seen.items() if value is False}
        if "round robin" in case:  # DeepSpeed 0.19.8's own safe_get_full_fp32_param mixes parameters up here
            false -= {"ema_bitwise", "behind"}
        assert false == set()
    assert followed[0][case]["checksum"] == followed[1][case]["checksum"]


def test_stages_agree(followed: list[dict[str, Any]]) -> None:
    seen = followed[0]
    assert seen["1 fp32"]["checksum"] == pytest.approx(seen["2 fp32"]["checksum"], abs=1e-4)
    assert seen["2 fp32"]["checksum"] == pytest.approx(seen["3 fp32"]["checksum"], abs=1e-4)


def test_refusals(followed: list[dict[str, Any]]) -> None:
    refusals = followed[0]["refusals"]
    assert "ZeRO stage 0 with bfloat16" in refusals["stage 0 bf16"]
    assert "no counterpart model.more.weight" in refusals["unknown parameter"]
    assert "frozen.weight is (13, 13), the student's is (13, 37)" in refusals["other shape"]
    assert "ties" in refusals["tied differently"]
    assert "no parameter position" in refusals["load missing"]
    assert "hidden.bias is (3,), this one's is (37,)" in refusals["load other shape"]


def test_gather_with_grad_on_two_ranks(followed: list[dict[str, Any]]) -> None:
    for rank in followed:
        assert rank["gather"] == {"fp32": True, "bf16": True, "plain": True, "bool": True}


@pytest.mark.parametrize(("updates", "warm"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10_000, 0.995)])
def test_momentum_schedule(updates: int, warm: float) -> None:
    assert momentum_at(updates, 0.995) == 0.995
    assert momentum_at(updates, 0.995, warmup=True) == pytest.approx(warm)
