"""Scenes as a data source: what they are a function of, what is held out, and what is measured on every split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossmask.engine.data import Batch, load_data
from crossmask.engine.data.scene_pairs import ScenePairs
from crossmask.engine.errors import RecipeError
from crossmask.engine.evaluation.evaluate import evaluate, gains
from crossmask.engine.evaluation.gallery import write_gallery
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.objectives import RunMasks
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_files import load_recipe, shipped_recipes

TOWER = {"width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}


def recipe(**scenes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "seed": 7,
            "data": {
                "source": "scenes", "word_drop": 0.2, "max_words": 24,
                "scenes": {"held_out": 24, "unnamed": 0.4, "undrawn": 0.5, **scenes},
            },
            "model": {
                "image": {**TOWER, "size": 32, "patch_size": 8, "stem": "conv"},
                "text": {**TOWER, "dropout": 0.0},
                "fusion": {"depth": 1, "heads": 2},
                "projection_width": 8,
            },
            "evaluation": {"rerank": 4, "mask_samples": 16, "gallery_pairs": 4},
        }
    )  # fmt: skip


def opened(described: Recipe) -> ScenePairs:
    data = load_data(described)
    assert isinstance(data, ScenePairs)
    return data


@pytest.fixture(scope="module")
def data() -> ScenePairs:
    return opened(recipe())


def changed(data: ScenePairs, **scenes: Any) -> ScenePairs:
    """The same data under another section, without loading it again."""
    other = object.__new__(ScenePairs)
    section = recipe(**scenes).data
    other.__dict__.update(data.__dict__, section=section)
    return other


def names(data: ScenePairs, batch: Batch) -> list[str]:
    return [data.tokenizer.text(row) for row in batch.token_ids]


def test_every_sample_is_a_scene_and_new_in_every_epoch(data: ScenePairs) -> None:
    some = np.arange(200)
    first, second = data.train_batch(some, 0, truth=True), data.train_batch(some, 1, truth=True)
    assert first.things is not None
    drawn = [len(set(t.unique().tolist()) - {0}) for t in first.things]
    assert min(drawn) >= 2 - 1  # one may cover another
    assert 2.5 < np.mean(drawn) < 3.3
    assert len({*first.group_id.tolist(), *second.group_id.tolist()}) == 400
    assert (first.group_id >= len(data.art.captions)).all()
    assert sum(a == b for a, b in zip(names(data, first), names(data, second), strict=True)) < 3
    assert data.train_size == 7804
    assert data.train_group_id.shape == (7804,)


def test_a_sample_is_a_function_of_seed_epoch_and_index(data: ScenePairs) -> None:
    whole = data.train_batch(np.array([5, 9, 700]), 3)
    alone = data.train_batch(np.array([9]), 3)
    length = int(alone.token_mask[0].sum())
    assert torch.equal(whole.images[1], alone.images[0])
    assert torch.equal(whole.token_ids[1, :length], alone.token_ids[0, :length])
    assert whole.group_id[1] == alone.group_id[0]


def test_a_number_of_compositions_comes_again_under_other_augmentation(data: ScenePairs) -> None:
    fixed = opened(recipe(count=20000))
    some = np.array([0, 3, 19999])
    assert fixed.train_size == len(fixed.train_group_id) == 20000
    first, later = (fixed.train_batch(some, epoch, truth=True) for epoch in (0, 4))
    assert first.group_id.tolist() == later.group_id.tolist() == fixed.train_group_id[some].tolist()
    assert not torch.equal(first.images, later.images)
    for one, other in zip(names(fixed, first), names(fixed, later), strict=True):  # words are dropped, not exchanged
        assert len(set(one.split()) & set(other.split())) >= 0.4 * len(set(one.split()))


def test_splits_are_scenes_of_their_own_drawings_with_captions_of_their_own(data: ScenePairs) -> None:
    assert list(data.splits) == ["a", "b", "c"]
    for name, split in data.splits.items():
        assert split.kind == "scene"
        assert split.image_count == split.caption_count == 24
        assert len(set(split.image_group_id.tolist())) == 24
        batches = list(split.images(10))
        assert [len(b) for b in batches] == [10, 10, 4]
        assert torch.cat([b.group_id for b in batches]).tolist() == split.image_group_id.tolist()
        gallery = list(split.gallery(7))
        texts = [data.tokenizer.text(row) for part in gallery for row in part.token_ids]
        assert texts == [text for b in batches for text in names(data, b)]
        assert torch.cat([g.group_id for g in gallery]).tolist() == split.gallery_group_id.tolist()
        again = data.scene_batch(name, 5, data.seed)
        assert torch.equal(again.images, split.take(np.arange(5)).images)
    held = {i for i, c in enumerate(data.art.captions) if c.held_out}
    foreign = data.art.styles.index("twemoji")
    known = set(data.train.tolist())
    for name, unseen, other_hand in (("a", False, True), ("b", True, False), ("c", True, True)):
        pool = data.pools[name]
        assert not known & set(pool.tolist())
        assert all((int(data.art.caption[row]) in held) == unseen for row in pool)
        assert all((data.art.style[row] == foreign) == other_hand for row in pool)


def test_several_things_may_be_named_that_are_not_drawn(data: ScenePairs) -> None:
    batch = changed(data, undrawn=1.0, undrawn_things=3, unnamed=0.0, max_things=2).scene_batch("a", 60, 0)
    one = changed(data, undrawn=1.0, undrawn_things=1, unnamed=0.0, max_things=2).scene_batch("a", 60, 0)
    assert batch.words is not None
    assert one.words is not None
    assert ((batch.words == 255).sum(1) > 0).all()
    assert 1.7 < (batch.words == 255).sum() / (one.words == 255).sum() < 4
    assert torch.equal(batch.images, one.images)  # what is drawn is the same
    for row in batch.words:
        assert set(row.tolist()) - {0, 255} <= {1, 2}


def test_single_drawings_may_be_mixed_into_the_training_alone(data: ScenePairs) -> None:
    mixed = changed(data, fraction=0.4)
    batch = mixed.train_batch(np.arange(500), 0, truth=True)
    scene = batch.group_id >= len(data.art.captions)
    assert 0.33 < scene.float().mean() < 0.47
    assert torch.equal(batch.kind, scene)  # for matching: a look tells a scene from a single drawing
    assert batch.things is not None
    assert max(int(t.max()) for t in batch.things[~scene]) == 1
    assert batch.group_id[~scene].tolist() == data.art.caption[data.train[:500]][~scene.numpy()].tolist()
    assert torch.equal(mixed.splits["c"].take(np.arange(3)).images, data.splits["c"].take(np.arange(3)).images)


def test_description_and_names(data: ScenePairs) -> None:
    facts = data.describe()
    assert "others in every epoch" in str(facts["training scenes"])
    assert facts["training drawings"] == 7804
    assert data.name_of(3).startswith("scene 3, with ")
    assert data.training_captions() == sorted(data.training_captions(), key=data.training_captions().index)
    assert len(data.training_captions()) > 1000
    assert data.training_split().image_count == 7804


def test_masks_are_measured_on_the_scenes_of_every_split(data: ScenePairs, tmp_path: Path) -> None:
    described = recipe()
    torch.manual_seed(0)
    model = VisionLanguageModel(described.model, data.tokenizer.vocabulary_size, data.max_tokens)
    masks = RunMasks(described, data)

    def look(m: Any, batch: Batch) -> Any:
        seen = masks.see(m, batch)
        return seen, masks.plan(m, batch, seen, 0)

    probe = evaluate(model, data, look, described, "cpu", full=False)
    assert {"on_named", "b_on_named", "c_on_named", "c_pointing", "c_named_of_drawn_random", "itm_loss"} <= set(probe)
    assert not [name for name in probe if name.startswith("singles_")]
    found = evaluate(model, data, look, described, "cpu", full=True)
    for name in "abc":
        of_split = found["splits"][name]["masks"]
        assert of_split["on_named_gain"] == pytest.approx(of_split["on_named"] / of_split["on_named_random"])
        assert 0 < of_split["named_of_drawn_random"] <= 1
        assert found["splits"][name]["images"] == 24
    assert found["splits"]["a"]["masks"]["on_named"] == found["masks"]["on_named"]
    assert found["itm"]["loss"] == found["itm"]["scenes"]["loss"]
    gallery = json.loads(write_gallery(tmp_path, model, data, look, described, "cpu").read_text())
    assert [pair["kind"] for pair in gallery["pairs"]] == ["scene"] * 4


def test_gains() -> None:
    assert gains({"on_named": 0.6, "on_named_random": 0.4, "other": 1.0, "x": 1.0, "x_random": 0.0}) == pytest.approx(
        {"on_named_gain": 1.5}
    )


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("syncmask")])
def test_shipped_recipes_mask_as_published(name: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text("[]")
    described = load_recipe(name, [f"data.path={tmp_path / 'pairs.json'}"] if name == "syncmask" else [])
    assert described.masking.policy == "syncmask"
    assert described.masking.layer == -1
    assert described.objectives.mlm.teacher_reads == "intact"
    assert described.objectives.mim.target == "teacher_feature"
    assert described.masking.corruption.mask == 0.8
    assert described.masking.image_threshold is None
    if name == "syncmask":
        assert (described.masking.text_ratio, described.masking.image_ratio) == (0.15, 0.5)
        assert described.teacher.momentum == 0.995
        assert described.objectives.mlm.distillation == described.objectives.itc.distillation == 0.4
        assert (described.data.grouping.search_space, described.data.grouping.similar) == (1920, 3)


@pytest.mark.parametrize("field", ["count", "held_out"])
def test_what_is_of_scenes_alone_is_not_quietly_ignored(field: str) -> None:
    with pytest.raises(RecipeError, match=r"scenes.count and scenes.held_out are of source 'scenes'"):
        load_recipe("syncmask-emoji", [f"data.scenes.{field}=100"])
    load_recipe("syncmask-scenes", [f"data.scenes.{field}=100"])
