"""DeepSpeed's configuration: filled from the recipe, strict about the user's keys, and accepted by DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crossmask.engine import Recipe
from crossmask.engine.deepspeed_config import _asked_for, _sections, build_deepspeed_config
from crossmask.engine.errors import RecipeError
from crossmask.engine.recipe_files import SHIPPED, load_recipe


def recipe(deepspeed: dict[str, Any] | Path | None = None, **sections: Any) -> Recipe:
    training = {"batch_size": 32, **sections.pop("training", {})}
    return Recipe.model_validate({"training": training, "deepspeed": deepspeed or {}, **sections})


def refusal(deepspeed: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        build_deepspeed_config(recipe(deepspeed, **sections), 2, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_deepspeed_needs_comes_from_the_recipe() -> None:
    given = recipe(training={"accumulation_steps": 2}, optimizer={"gradient_clip": 0.5})
    config = build_deepspeed_config(given, 2, "cpu")
    assert config == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "log_level": "error",
    }


def test_no_clipping_means_none() -> None:
    assert build_deepspeed_config(recipe(), 2, "cpu")["gradient_clipping"] == 0.0, "DeepSpeed's own default is 1.0"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_deepspeed_accepts_it_in_every_precision(precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = build_deepspeed_config(recipe(training={"precision": precision}), 1, "cuda")
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == 2
    assert (parsed.bfloat16_config.enabled, parsed.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    assert parsed.train_micro_batch_size_per_gpu == 32


@pytest.mark.parametrize("stage", range(4))
def test_the_shipped_configurations(stage: int) -> None:
    given = recipe(SHIPPED / f"zero{stage}.json", training={"precision": "fp32"})
    assert build_deepspeed_config(given, 2, "cpu")["zero_optimization"]["stage"] == stage


def test_the_users_keys_go_on_top() -> None:
    zero = {"stage": 1, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 10}
    config = build_deepspeed_config(
        recipe({"zero_optimization": zero, "bfloat16": {"enabled": "auto"}, "wall_clock_breakdown": True}), 2, "cpu"
    )
    assert config["zero_optimization"] == zero
    assert config["bf16"] == {"enabled": True}
    assert config["wall_clock_breakdown"] is True
    assert "zero_force_ds_cpu_optimizer" not in config


def test_auto_is_filled_where_the_recipe_knows_and_refused_elsewhere() -> None:
    auto = {"train_batch_size": "auto", "gradient_clipping": "auto", "fp16": {"enabled": "auto"}}
    assert "auto" not in str(build_deepspeed_config(recipe(auto), 2, "cpu"))
    message = refusal({"zero_optimization": {"reduce_bucket_size": "auto"}})
    assert 'deepspeed.zero_optimization.reduce_bucket_size: "auto" has no meaning here' in message
    build_deepspeed_config(recipe({"data_types": {"keep_in_fp32_modules": "auto"}}), 2, "cpu")  # DeepSpeed's own word


def test_offload_works_with_torchs_optimizer() -> None:
    given = recipe({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    config = build_deepspeed_config(given, 2, "cuda")
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation; did you mean deepspeed.zero_optimization?"),
        ({"zero_optimization": {"stge": 1}}, "zero_optimization.stge; did you mean deepspeed.zero_optimization.stage?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devce": "cpu"}}},
            "devce; did you mean deepspeed.zero_optimization.offload_optimizer.device?",
        ),
        ({"flops_profiler": {"enabld": True}}, "enabld; did you mean deepspeed.flops_profiler.enabled?"),
        (
            {"activation_checkpointing": {"partitioned_activations": True}},
            "did you mean deepspeed.activation_checkpointing.partition_activations?",
        ),
        (
            {"checkpoint": {"parallel_write": {"pipeline_stge": True}}},
            "did you mean deepspeed.checkpoint.parallel_write.pipeline_stage?",
        ),
        ({"timers": {"throughput": {"enabld": True}}}, "did you mean deepspeed.timers.throughput.enabled?"),
        ({"tensorboard": {"output": "x"}}, "did you mean deepspeed.tensorboard.output_path?"),
        ({"zero_optimization": {"stage": 7}}, "stage: 7 is not allowed; expected one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "two"}}, 'stage: "two" is not allowed; expected one of'),
        ({"zero_optimization": {"allgather_bucket_size": -1}}, "-1 is not allowed; expected a whole number ≥ 0"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 3}}}, "topk_ratio: 3 is not allowed; expected a number > 0"),
        ({"zero_optimization": True}, "zero_optimization: true is not allowed; expected a section of keys"),
        ({"wall_clock_breakdown": 3}, "wall_clock_breakdown: 3 is not allowed; expected true or false"),
        ({"communication_data_type": "fp33"}, "Supported data types"),
        ({"nebula": {"enabled": True}}, "Nebula checkpointing has been removed; leave it out"),
        ({"optimizer": {"type": "AdamW"}}, "deepspeed.optimizer: the recipe's own section"),
        ({"data_efficiency": {"enabled": True}}, "this engine does not use it"),
        (
            {"train_batch_size": 8},
            "train_batch_size (8) contradicts the recipe's training.batch_size, which makes it 32",
        ),
        ({"train_micro_batch_size_per_gpu": 32}, "contradicts the recipe's training.batch_size / (ranks"),
        ({"gradient_clipping": 1.0}, "contradicts the recipe's optimizer.gradient_clip"),
        ({"gradient_accumulation_steps": 4}, "contradicts the recipe's training.accumulation_steps"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled (true) contradicts the recipe's training.precision"),
        ({"bfloat16": {"enabled": False}}, "deepspeed.bfloat16.enabled (false) contradicts"),
        ({"torch_autocast": {"enabled": True}}, "contradicts the recipe's training.precision"),
    ],
)
def test_bad_keys_are_refused_in_one_line(keys: dict[str, Any], words: str) -> None:
    assert words in refusal(keys)


def test_several_problems_are_counted() -> None:
    assert refusal({"foo": 1, "zero_optimization": {"stge": 1}, "bar": 2}).endswith("(and 2 more)")


def test_saying_the_same_twice_is_no_contradiction() -> None:
    same = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 16, "bf16": {"enabled": True}}
    assert build_deepspeed_config(recipe(same), 2, "cpu")["train_batch_size"] == 32


def test_fp16_needs_a_gpu_and_stage_0_any_other_precision() -> None:
    assert "fp16 does not run on a CPU; use bf16 or fp32" in refusal({}, training={"precision": "fp16"})
    for precision in ("fp32", "bf16"):
        stage_0 = recipe({"zero_optimization": {"stage": 0}}, training={"precision": precision})
        assert build_deepspeed_config(stage_0, 2, "cpu")["bf16"] == {"enabled": precision == "bf16"}


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(RecipeError, match="32 is not divisible by 3 ranks"):
        build_deepspeed_config(recipe(), 3, "cpu")


def test_the_message_names_the_file_the_key_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text('{"zero_optimization": {"stge": 1}}')
    Path("twice.json").write_text('{"bf16": {}, "bf16": {}}')
    Path("r.yaml").write_text("deepspeed: mine.json\n")
    with pytest.raises(RecipeError, match=r"^mine.json: unknown DeepSpeed key deepspeed.zero_optimization.stge"):
        load_recipe("r.yaml")
    with pytest.raises(RecipeError, match=r"twice.json: key 'bf16' is given twice"):
        load_recipe("r.yaml", ["deepspeed=twice.json"])
    with pytest.raises(RecipeError, match=r"^override deepspeed.zero_optimization.stag=1: unknown DeepSpeed key"):
        load_recipe("r.yaml", ["deepspeed={}", "deepspeed.zero_optimization.stag=1"])


def test_deepspeed_itself_is_asked_for_its_keys() -> None:
    top = _asked_for(())
    assert {"zero_optimization", "bf16", "fp16", "gradient_clipping", "flops_profiler", "aio"} <= set(top)
    assert _asked_for(("aio",))["queue_depth"] == 8
    unknown_sections = {path for path in _sections() if path[0] not in top}
    assert not unknown_sections
