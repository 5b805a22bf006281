"""The recipes that fine-tune for retrieval: the models they go on from, and ALBEF's published settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crossmask.engine.recipe import ModelSection
from crossmask.engine.recipe_files import load_recipe


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs.json").write_text(json.dumps({"images": []}))
    return f"data.path={tmp_path / 'pairs.json'}"


def resized(model: ModelSection, size: int) -> ModelSection:
    return model.model_copy(update={"image": model.image.model_copy(update={"size": size})})


def test_they_go_on_from_the_pre_trained_models_at_another_size(pairs: str) -> None:
    whole, tuned = load_recipe("albef", [pairs]), load_recipe("albef-retrieval", [pairs])
    assert tuned.model == resized(whole.model, 384)
    assert (tuned.data.normalisation, tuned.data.max_words) == (whole.data.normalisation, whole.data.max_words)
    small, tuned = load_recipe("albef-emoji"), load_recipe("albef-retrieval-emoji")
    assert tuned.model == resized(small.model, 64)
    assert tuned.model.image.size != small.model.image.size
    same = ("source", "vocabulary_size", "max_words", "vocabulary", "max_tokens", "normalisation")
    assert [getattr(tuned.data, name) for name in same] == [getattr(small.data, name) for name in same]


def test_published_settings(pairs: str) -> None:
    recipe = load_recipe("albef-retrieval", [pairs])
    itc, training, data = recipe.objectives.itc, recipe.training, recipe.data
    assert (itc.distillation, itc.queue_length, itc.temperature, recipe.teacher.momentum) == (0.4, 65536, 0.07, 0.995)
    assert (recipe.objectives.mlm.weight, recipe.objectives.mim.weight, recipe.objectives.itm.weight) == (0, 0, 1)
    assert (recipe.optimizer.lr, recipe.optimizer.final_lr, recipe.optimizer.weight_decay) == (1e-5, 1e-6, 0.02)
    epochs = training.max_steps * training.batch_size / (29_000 * 5)
    assert epochs == pytest.approx(10, abs=0.01)
    assert recipe.objectives.distillation_ramp * epochs == pytest.approx(1, abs=0.01)
    assert (data.crop_area, data.rand_augment.operations, data.rand_augment.magnitude) == (0.5, 2, 7)
    assert (data.max_words, data.max_tokens, data.normalisation) == (30, 30, "clip")


@pytest.mark.parametrize("name", ["albef-retrieval", "albef-retrieval-emoji"])
def test_evaluation_is_the_published_one(name: str, pairs: str) -> None:
    found = load_recipe(name, [pairs] if name == "albef-retrieval" else []).evaluation
    assert found.rerank_score == "match_logit"
    assert found.sampled.draws == 5
    if name == "albef-retrieval":
        assert (found.rerank, found.rerank_queries) == (128, 0)
        assert (found.sampled.queries, found.sampled.negatives) == (1000, 100)
