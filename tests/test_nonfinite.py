"""Non-finite losses: skipped on all ranks as if never seen, counted, and too many in a row end the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler
from distributed import ranks

from crossmask.engine.errors import NonFiniteLossError
from crossmask.engine.training.nonfinite import NonFiniteGuard

# stage, dtype, accumulation steps, variant
CASES = [(0, "fp32", 2, ""), (0, "bf16", 2, ""), (1, "bf16", 2, ""), (1, "bf16", 2, "fp32 sums"), (2, "bf16", 1, "")]
CASES += [(2, "bf16", 2, ""), (2, "fp32", 3, ""), (2, "bf16", 3, "fp32 sums"), (3, "bf16", 2, "")]
CASES += [(1, "bf16", 3, "offload"), (2, "bf16", 2, "offload"), (2, "fp32", 3, "offload"), (3, "bf16", 3, "offload")]
INDEX = torch.tensor([4, 9])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("skip") / "seen"
    for code, log in ranks.start("skip_steps.py", output, json.dumps(CASES)):
        assert code == 0, log
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", [" ".join(map(str, case)) for case in CASES])
def test_a_skipped_step_leaves_no_trace(seen: list[dict[str, Any]], case: str) -> None:
    for rank in seen:
        with_bad, without = rank[case]
        assert with_bad["weights"] == without["weights"]
        assert (with_bad["updates"], with_bad["global_steps"]) == (3, 3)
        assert (with_bad["skipped"], without["skipped"]) == (2, 0)


def test_ranks_decide_together_and_name_the_bad_ranks_samples(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["guard"] == seen[1]["guard"]
    assert seen[0]["guard"]["accepted"] == [False, True, False]
    assert seen[0]["guard"]["skipped"] == 3
    message = seen[0]["guard"]["message"]
    assert message.startswith("the loss was not finite (nan) 2 steps in a row; samples of the last batch: 41, 51; ")


def test_counts_and_stops_in_one_process() -> None:
    guard = NonFiniteGuard(3, name_of=lambda i: f"pairs.jsonl line {i + 1}")
    guard.skipped = 10  # as restored from a checkpoint
    bad, good = torch.tensor(float("nan")), torch.tensor(1.0, requires_grad=True)
    assert [guard.accept(loss, INDEX) for loss in (bad, bad, good)] == [False, False, True]
    guard.stepped(True, INDEX)
    assert [guard.accept(loss, INDEX) for loss in (bad, bad)] == [False, False]
    assert (guard.skipped, guard.in_a_row) == (14, 2)
    samples = r"samples of the last batch: 4 \(pairs.jsonl line 5\), 9 \(pairs.jsonl line 10\);"
    with pytest.raises(NonFiniteLossError, match=f"3 steps in a row; {samples}") as caught:
        guard.accept(torch.tensor(float("inf")), INDEX)
    assert "\n" not in str(caught.value)


def test_a_good_micro_batch_does_not_excuse_a_step_that_was_left_out() -> None:
    guard = NonFiniteGuard(2)
    bad, good = torch.tensor(float("nan")), torch.tensor(1.0)
    assert [guard.accept(loss, INDEX) for loss in (good, bad, good)] == [True, False, True]
    with pytest.raises(NonFiniteLossError, match="2 steps in a row"):
        guard.accept(bad, INDEX)


def test_a_step_left_out_for_its_gradient_counts() -> None:
    guard = NonFiniteGuard(2)
    guard.stepped(False, INDEX)
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    with pytest.raises(NonFiniteLossError, match="gradient was not finite 2 steps in a row; samples"):
        guard.stepped(False, INDEX)


def test_a_step_left_out_while_the_loss_scale_can_fall_does_not_count() -> None:
    guard = NonFiniteGuard(2)
    scaler = DynamicLossScaler(2.0**4, 1000, 1.0, 2, False)
    stage_0 = LossScaleConfig(torch.float16, True, 1.0, {"init_scale": 2.0, "scale_window": 1000, "min_scale": 1.0})
    engines = [SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))]
    engines.append(SimpleNamespace(optimizer=SimpleNamespace(loss_scale_config=stage_0)))
    for engine in engines:
        for _ in range(4):
            guard.stepped(False, INDEX, engine)
    assert (guard.skipped, guard.in_a_row) == (0, 0)
    scaler.cur_scale, stage_0.cur_scale = 1.0, 1.0
    guard.stepped(False, INDEX, engines[0])
    with pytest.raises(NonFiniteLossError, match="gradient was not finite 2 steps in a row"):
        guard.stepped(False, INDEX, engines[1])


def test_a_static_loss_scale_excuses_nothing() -> None:
    guard = NonFiniteGuard(9)
    for optimizer in (
        SimpleNamespace(loss_scaler=LossScaler(128.0)),
        SimpleNamespace(loss_scale_config=LossScaleConfig(torch.float16, False, 128.0, None)),
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
    ):
        guard.stepped(False, INDEX, SimpleNamespace(optimizer=optimizer))
    assert guard.in_a_row == 3


def test_one_is_enough_where_the_recipe_says_so() -> None:
    with pytest.raises(NonFiniteLossError, match=r"not finite \(nan\) once"):
        NonFiniteGuard(1).accept(torch.tensor(float("nan")), INDEX)
