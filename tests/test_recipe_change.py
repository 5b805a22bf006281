"""A recipe edited between two starts of a run: what is refused, what is remarked on, what is nobody's business."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_checkpoint import TEACHER, Engine

from crossmask.engine.errors import CheckpointError
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_files import dump_recipe
from crossmask.engine.teacher import FeatureQueue
from crossmask.engine.training.checkpoint import CheckpointManager
from crossmask.engine.training.loop import _share_of
from crossmask.engine.training.recipe_change import check_recipe

BEFORE = {"training": {"batch_size": 64}, "deepspeed": {"zero_optimization": {"stage": 2}}}


def remarks(**changes: Any) -> list[str]:
    now = Recipe.model_validate(BEFORE | changes)
    return check_recipe(dump_recipe(Recipe.model_validate(BEFORE)), now, "step-000100")


def test_the_same_recipe_is_no_change() -> None:
    assert remarks() == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed was 0 when step-000100 was saved and is 1 in the recipe now"),
        ({"model": {"text": {"depth": 5}}}, "model.text.depth was 6 when"),
        ({"objectives": {"itc": {"queue_length": 8}}}, "objectives.itc.queue_length was 65536 when"),
        ({"masking": {"policy": "random"}}, 'masking.policy was "syncmask" when'),
        ({"training": {"batch_size": 32}}, "training.batch_size was 64 when"),
        ({"training": {"batch_size": 64, "precision": "fp32"}}, 'training.precision was "bf16" when'),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed.zero_optimization.stage was 2 when"),
        ({"deepspeed": {}}, "deepspeed"),
        ({"data": {"word_drop": 0.5}}, "data.word_drop was 0.0 when"),
        ({"masking": {"options": {"side": "both"}}}, "masking.options.side was null when"),
    ],
)
def test_what_would_give_the_state_another_meaning_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as error:
        remarks(**changes)
    assert str(error.value).startswith(told)
    assert str(error.value).endswith("set it back, or start a new run")


def test_what_only_moves_the_losses_is_remarked_on() -> None:
    found = remarks(optimizer={"lr": 0.5}, training={"batch_size": 64, "max_steps": 2000})
    assert [line.split(" was ")[0] for line in found] == ["optimizer.lr", "training.max_steps"]
    assert all("no longer those of an uninterrupted run" in line for line in found)


def test_what_moves_nothing_is_not_mentioned(tmp_path: Path) -> None:
    assert remarks(name="other", note="x", output=tmp_path, evaluation={"rerank": 0}, data={"path": tmp_path}) == []
    assert remarks(training={"batch_size": 64, "checkpoint_every": 1, "log_every": 1, "cpu_ranks": 5}) == []
    free = {"rank_timeout": 90.0, "evaluate_every": 5, "max_nonfinite": 9, "keep_checkpoints": 7}
    assert remarks(training={"batch_size": 64, **free}) == []


def test_files_of_the_masks_may_be_elsewhere_as_data_may(tmp_path: Path) -> None:
    before = BEFORE | {"masking": {"prior": str(tmp_path / "before/prior.pt")}}

    def found(prior: str) -> list[str]:
        now = Recipe.model_validate(BEFORE | {"masking": {"prior": prior}})
        return check_recipe(dump_recipe(Recipe.model_validate(before)), now, "step-000100")

    (remark,) = found(str(tmp_path / "after/prior.pt"))
    assert remark.startswith("masking.prior was")
    assert remark.endswith("those of an uninterrupted run if the file is the same")
    for other in (str(tmp_path / "before/other.pt"), "centre"):
        with pytest.raises(CheckpointError, match=r"masking\.prior was"):
            found(other)


def test_recipes_that_are_none_are_refused_in_one_line() -> None:
    for text in ("model: {unheard_of: 1}", "[", "1"):
        with pytest.raises(CheckpointError, match=r"^step-000100: its recipe is of another version of crossmask"):
            check_recipe(text, Recipe(), "step-000100")


def test_every_checkpoint_holds_the_recipe_and_loading_compares_it(tmp_path: Path) -> None:
    recipe, warnings = Recipe.model_validate(BEFORE), list[str]()
    folder = CheckpointManager(tmp_path, recipe=recipe).save(100, Engine(), TEACHER, FeatureQueue(4, 2))
    assert (folder / "recipe.yaml").read_text() == dump_recipe(recipe)
    for changes, error in (
        ({"model": {"text": {"depth": 5}}}, "model.text.depth was 6"),
        # goes on, and finds no DeepSpeed engine to load into
        ({"optimizer": {"lr": 0.5}}, "cannot be loaded into this recipe's model"),
    ):
        engine: Any = Engine()
        engine.optimizer = SimpleNamespace(param_groups=[])
        engine.load_checkpoint = lambda folder, tag: (None, None)
        manager = CheckpointManager(tmp_path, warn=warnings.append, recipe=Recipe.model_validate(BEFORE | changes))
        with pytest.raises(CheckpointError, match=error):
            manager.load(engine, TEACHER, FeatureQueue(4, 2))
    assert [line.split(" was ")[0] for line in warnings] == ["optimizer.lr"]


def test_sums_that_wait_for_the_next_record_survive_another_number_of_ranks() -> None:
    saved = [{"itc": (1.0, 2), "mlm": (4.0, 1)}, {"itc": (2.0, 2), "mlm": (8.0, 1)}]
    assert [_share_of(saved, rank, 2) for rank in range(2)] == saved
    for ranks in (1, 3, 4):
        shares = [_share_of(saved, rank, ranks) for rank in range(ranks)]
        for name in ("itc", "mlm"):  # a record is the mean over ranks of sum / count
            before, after = ([one[name][0] / one[name][1] for one in world] for world in (saved, shares))
            assert sum(after) / ranks == sum(before) / 2
            assert {one[name][1] for one in shares} == {saved[0][name][1]}
    assert _share_of([{}, {}], 3, 4) == {}
