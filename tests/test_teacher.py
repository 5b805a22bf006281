"""The momentum teacher under ZeRO 0 to 3 on 1, 2 and 4 CPU ranks, bit by bit; its schedules; what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import ranks

from crossmask.engine.errors import RecipeError
from crossmask.engine.recipe import TeacherSection
from crossmask.engine.recipe_files import load_recipe
from crossmask.engine.teacher import Constant, Cosine, WarmUp, ema, named_schedule, zero
from crossmask.engine.teacher.schedule import decay_at

CPU = {"device": "cpu"}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
PLAIN_COMMUNICATION = {"overlap_comm": False, "contiguous_gradients": False, "reduce_scatter": False}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
Case = dict[str, Any]


def case(stage: int, dtype: str, accumulation: int = 1, **options: Any) -> Case:
    return {"stage": stage, "dtype": dtype, "accumulation": accumulation, **options}


TWO: dict[str, Case] = {
    "0 fp32": case(0, "fp32", plain=True),
    "0 bf16": case(0, "bf16", 2, schedule="warmup"),
    "0 autocast": case(0, "fp32", 2, config=AUTOCAST, buffers="average"),
    "1 fp32": case(1, "fp32", schedule="cosine", plain=True),
    "1 bf16": case(1, "bf16", 2),
    "1 bf16 summed in fp32": case(1, "bf16", 2, config=FP32_SUMS),
    "1 autocast": case(1, "fp32", config=AUTOCAST),
    "1 fp32 offload": case(1, "fp32", zero={"offload_optimizer": CPU}, plain=True),
    "1 bf16 offload": case(1, "bf16", 2, zero={"offload_optimizer": CPU}),
    "2 fp32": case(2, "fp32", 2, schedule="warmup", plain=True),
    "2 bf16": case(2, "bf16", schedule="warmup", buffers="average"),
    "2 bf16 summed in fp32": case(2, "bf16", 2, config=FP32_SUMS),
    "2 autocast": case(2, "fp32", config=AUTOCAST),
    "2 fp32 round robin": case(2, "fp32", zero={"round_robin_gradients": True}, plain=True),
    "2 bf16 plain communication": case(2, "bf16", 2, zero=PLAIN_COMMUNICATION),
    "2 fp32 offload": case(2, "fp32", 2, zero={"offload_optimizer": CPU}, plain=True),
    "2 bf16 offload": case(2, "bf16", zero={"offload_optimizer": CPU}),
    "3 fp32": case(3, "fp32", schedule="cosine", plain=True),
    "3 bf16": case(3, "bf16", 2, schedule="warmup", buffers="average"),
    "3 autocast": case(3, "fp32", config=AUTOCAST),
    "3 bf16 sub-groups, nothing persistent": case(
        3, "bf16", zero={"sub_group_size": 100, "stage3_param_persistence_threshold": 0}
    ),
    "3 bf16 all persistent": case(3, "bf16", 2, zero={"stage3_param_persistence_threshold": 100_000}),
    "3 bf16 plain communication": case(3, "bf16", 2, zero=PLAIN_COMMUNICATION),
    "3 bf16 inside zero.Init": case(3, "bf16", inside_init=True),
    "3 bf16 secondary partition": case(3, "bf16", zero={"zero_hpz_partition_size": 2}),
    "3 fp32 offload": case(3, "fp32", 2, zero={"offload_optimizer": CPU}, plain=True),
    "3 bf16 offload": case(3, "bf16", zero={"offload_optimizer": CPU, "offload_param": CPU}),
    "3 bf16 parameters offloaded": case(3, "bf16", zero={"offload_param": CPU}),
}
ONE = {
    f"{stage} {dtype}": case(stage, dtype, plain=dtype == "fp32") for stage in range(4) for dtype in ("fp32", "bf16")
}
ONE |= {"2 bf16 offload": TWO["2 bf16 offload"]}
FOUR: dict[str, Case] = {
    "0 bf16": case(0, "bf16"),
    "1 fp32": case(1, "fp32", plain=True),
    "2 bf16": case(2, "bf16", 2, schedule="warmup"),
    "2 fp32 offload": case(2, "fp32", zero={"offload_optimizer": CPU}, plain=True),
    "3 fp32": case(3, "fp32", plain=True),
    "3 bf16 secondary partition": case(3, "bf16", 2, zero={"zero_hpz_partition_size": 2}),
}
CASES = {1: ONE, 2: TWO, 4: FOUR}
NAMES = ["calls", "decoder.bias", "embedding.weight", "frozen.bias", "frozen.weight", "hidden.bias", "hidden.weight"]
NAMES += ["mean", "norm.bias", "norm.weight", "position"]  # the tied decoder weight once, the passing buffer not at all


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each rank of a world of the given size saw, by case; one launch for all cases of a size."""

    @cache  # a failure too: every test would launch again
    def launched(size: int) -> tuple[list[tuple[int, str]], Path]:
        output = tmp_path_factory.mktemp("teacher") / "seen"
        return ranks.start("teacher_stages.py", output, json.dumps(CASES[size]), ranks=size, timeout=240), output

    def launch(size: int) -> list[dict[str, Any]]:
        ended, output = launched(size)
        for code, log in ended:
            assert code == 0, log
        return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(size)]

    return launch


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, 1, 4) for name in CASES[size]])
def test_follows_the_masters_bit_by_bit(followed: Any, size: int, name: str) -> None:
    every_rank = [rank[name] for rank in followed(size)]
    for seen in every_rank:
        assert {what for what, value in seen.items() if value is False} == set()
        assert seen["names"] == NAMES
        assert seen["compared"] == 7
        assert seen.get("plain_error", 0.0) <= 1e-6  # of weights up to 3, after 20 steps
        assert seen["checksum"] == every_rank[0]["checksum"]


def test_an_update_sends_the_weights_once_and_waits_at_their_first_use(followed: Any) -> None:
    for rank in followed(2):
        once = [0, 1, 1]
        assert rank["waits"] == [True, True]
        assert rank["overlap"] == {"model": once, "weights": once, "state_dict": once, "update": [0, 1, 2]}


def test_the_engine_starts_with_untouched_masters(followed: Any) -> None:
    for rank in followed(2):
        assert {what for what, holds in rank["start"].items() if not holds} == set()


def test_a_step_that_deepspeed_skips_is_not_followed(followed: Any) -> None:
    for rank in followed(2):
        assert len(rank["overflows"]) == 9
        for name, seen in rank["overflows"].items():
            assert seen == [True, False, True, False, True, False, True, True], name


REFUSALS = {
    "not an engine": "the teacher follows a DeepSpeed engine, not a Linear: give it deepspeed.initialize's",
    "a model": "build_model is a Body: give a function that builds the model",
    "no model": "build_model returned a NoneType, not a torch.nn.Module",
    "own model": "is the student's own parameter: build_model must build a new model",
    "decay 1": "decay 1.0 is not a number in [0, 1)",
    "decay true": "decay True is not a number in [0, 1)",
    "decay text": "decay '0.9' is not a number in [0, 1)",
    "buffers": "buffers 'mean' is neither 'copy' nor 'average'",
    "prefix": "has no counterpart student.position in the student (prefix 'student.')",
    "unknown parameter": "no counterpart model.more.weight",
    "unknown buffer": "the teacher's buffer extra has no counterpart model.extra",
    "other shape": "frozen.weight is (13, 13), the student's is (13, 37)",
    "tied differently": "the teacher ties norm.bias to norm.weight, the student does not",
    "not tied": "the student ties decoder.weight to embedding.weight, the teacher does not",
    "other buffer shape": "the teacher's buffer mean is (5,), the student's is (13,)",
    "buffers tied differently": "the teacher ties buffer peak to mean, the student does not",
    "buffers not tied": "the student ties buffer peak to mean, the teacher does not",
    "buffer's new shape": "the student's buffer mean is now (1,), the teacher's is (13,)",
    "load missing": "the saved teacher has no position",
    "load missing buffer": "the saved teacher has no mean",
    "load other shape": "hidden.bias is (3,), this one's is (37,)",
    "load unknown": "the saved teacher has other, this one has not",
    "schedule": "the decay schedule gave 1.5 for update 0: a decay lies in [0, 1]",
    "student after refusals": "as before",
    "teacher after refusals": "as before",
    "as it is": "accepted",
    "no optimizer": "the student's engine has no optimizer",
    "pipeline": "leave the pipeline out",
    "tensor parallel": "use data parallelism alone",
    "experts": "use data parallelism alone",
    "nvme optimizer": "the teacher cannot follow masters on NVMe: set offload_optimizer.device to cpu",
    "nvme parameters": "the teacher cannot follow parameters on NVMe: set offload_param.device to cpu",
    "ratio": "set offload_optimizer.ratio to 1.0",
    "autocast fp16": "set torch_autocast.dtype to bfloat16",
    "zenflow": "leave zenflow out",
    "int8": "leave zero_quantized_nontrainable_weights out",
    "bf16 unchecked": "leave bf16.check_grad_overflow and zero_optimization.compute_grad_norm true",
    "fp32 unchecked": "leave bf16.check_grad_overflow and zero_optimization.compute_grad_norm true",
    "unknown optimizer": "does not know where DeepSpeed's FP16_Optimizer keeps its fp32 masters: use torch.optim.AdamW",
    "low-precision masters": "the teacher needs fp32 masters: leave DeepSpeed's *_master_weights_and_grads out",
    "several groups": "the teacher cannot follow parameters of several process groups",
}


def test_refusals_are_one_line_that_names_the_culprit(followed: Any) -> None:
    found = followed(2)[0]["refusals"]
    assert found.keys() == REFUSALS.keys()
    for what, words in REFUSALS.items():
        assert words in found[what], what
        assert "\n" not in found[what]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gather_with_grad(followed: Any, size: int) -> None:
    for rank in followed(size):
        assert rank["gather"] == {"fp32": True, "bf16": True, "plain": True, "bool": True}


def test_a_deepspeed_that_was_not_tested_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    major, minor = zero.TESTED.split(".")
    assert f'"deepspeed>={zero.TESTED},<{major}.{int(minor) + 1}"' in pins
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.25.1")
    zero._warn_of_untested_version.cache_clear()
    with pytest.warns(UserWarning, match=r"proved exact with 0\.19, not with 0\.25\.1: install deepspeed==0\.19"):
        zero._warn_of_untested_version()
    zero._warn_of_untested_version.cache_clear()


def test_the_engines_start_keeps_a_schedulers_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    hook = vars(optimizer)["step"]

    def hidden_step(**options: Any) -> tuple[Any]:
        options["optimizer"].step()
        return (SimpleNamespace(optimizer="DeepSpeed's own", seq_dp_world_size=2),)

    monkeypatch.setattr(deepspeed, "initialize", hidden_step)
    zero.initialize_untouched(model, optimizer, {})
    assert vars(optimizer)["step"] is hook


@pytest.mark.parametrize(("updates", "warm"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10_000, 0.995)])
def test_warm_up_and_constant_schedules(updates: int, warm: float) -> None:
    assert Constant(0.995)(updates) == 0.995
    assert WarmUp(0.995)(updates) == pytest.approx(warm)


def test_the_cosine_schedule_goes_from_decay_to_one() -> None:
    cosine = Cosine(0.996, 200)
    assert cosine(0) == pytest.approx(0.996)
    assert cosine(50) == pytest.approx(1 - 0.004 * 0.8535533905932737)  # (1 + cos 45°) / 2
    assert cosine(100) == pytest.approx(0.998)
    assert cosine(200) == cosine(1000) == 1.0
    assert all(cosine(t) < cosine(t + 1) for t in range(200))


def test_schedules_by_name_and_their_mistakes() -> None:
    assert named_schedule("constant", 0.9, 5) == Constant(0.9)
    assert named_schedule("warmup", 0.9, 5) == WarmUp(0.9)
    assert named_schedule("cosine", 0.9, 5) == Cosine(0.9, 5)
    with pytest.raises(ValueError, match="schedule 'linear' is not one of constant, warmup, cosine"):
        named_schedule("linear", 0.9, 5)  # type: ignore[arg-type]
    for kind in (Constant, WarmUp, lambda decay: Cosine(decay, 5)):
        for decay in (1.0, -0.1, float("nan"), True, "0.9"):
            with pytest.raises(ValueError, match="is not a number in"):
                kind(decay)
    with pytest.raises(ValueError, match="a cosine over 0 updates: give a whole number, at least 1"):
        Cosine(0.9, 0)
    with pytest.raises(ValueError, match="gave nan for update 3"):
        decay_at(lambda updates: float("nan"), 3)


def test_the_recipe_names_schedule_and_buffers(tmp_path: Path) -> None:
    section = load_recipe("syncmask-emoji").teacher
    assert (section.schedule, section.buffers) == ("warmup", "copy")
    assert load_recipe(
        "syncmask-emoji", ["teacher.schedule=cosine", "teacher.buffers=average"]
    ).teacher == TeacherSection(momentum=section.momentum, schedule="cosine", buffers="average")
    with pytest.raises(
        RecipeError, match=r"teacher\.schedule: 'linear' is not allowed; expected one of constant, warmup"
    ):
        load_recipe("syncmask-emoji", ["teacher.schedule=linear"])


@pytest.mark.parametrize(("older", "schedule"), [("true", "warmup"), ("false", "constant")])
def test_a_recipe_of_an_earlier_run_is_still_read(tmp_path: Path, older: str, schedule: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"teacher: {{momentum: 0.9, warmup: {older}}}\n")
    assert load_recipe(file).teacher.schedule == schedule
    file.write_text(f"teacher: {{schedule: cosine, warmup: {older}}}\n")
    with pytest.raises(RecipeError, match=r"unknown key teacher\.warmup"):
        load_recipe(file)


def test_a_teacher_that_drops_leaves_running_means_alone() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).eval()
    before, x = {name: value.clone() for name, value in model.state_dict().items()}, torch.randn(64, 3)
    ema._drop(model, True)
    assert (model(x) == 0).any()
    ema._drop(model, False)
    assert torch.equal(model(x), model(x))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
