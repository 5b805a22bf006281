"""Mask measures against hand-made masks, things and words."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from crossmask.engine.data.batch import Batch
from crossmask.engine.data.normalisation import HALF
from crossmask.engine.evaluation.evaluate import evaluate, sample
from crossmask.engine.evaluation.masks import (
    Shares,
    add_attention_shares,
    add_mask_shares,
    add_pointing,
    attention_maps,
    mask_measures,
    patch_coverage,
    visible_words,
)
from crossmask.engine.masking import MaskPlan
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.objectives import RunMasks, Seen
from crossmask.engine.recipe import Recipe
from crossmask.kernels import AttentionStatistics

GRID = (2, 2)  # patches 0 1 / 2 3 of 10 x 10 pixels


def one_scene(words: list[int] | None = None) -> Batch:
    """Thing 1 fills patch 0; thing 2 covers 12 % of patch 1 and 9 % of patch 3, too little to count; thing 3 is in 2.

    [CLS] apple and cat ferry dog [SEP]: apple is thing 1, cat thing 2, ferry is not drawn, dog names nothing; thing 3
    is drawn and not named.
    """
    things = torch.zeros(1, 20, 20, dtype=torch.uint8)
    things[0, :10, :10] = 1
    things[0, :3, 10:14] = 2
    things[0, 10:13, 10:13] = 2
    things[0, 10:20, :5] = 3
    words = words or [0, 1, 0, 2, 255, 0, 0]
    maskable = torch.tensor([[0, 1, 0, 1, 1, 1, 0]]).bool()
    return Batch(
        images=torch.zeros(1, 3, 20, 20),
        token_ids=torch.arange(7)[None],
        token_mask=torch.ones(1, 7).bool(),
        maskable=maskable,
        group_id=torch.zeros(1).long(),
        index=torch.zeros(1).long(),
        things=things,
        words=torch.tensor([words], dtype=torch.uint8),
    )


def plan(patches: list[int], words: list[int]) -> MaskPlan:
    image, text = torch.zeros(1, 4).bool(), torch.zeros(1, 7).bool()
    image[0, patches], text[0, words] = True, True
    return MaskPlan(image, text)


def test_patch_coverage() -> None:
    things = one_scene().things
    assert things is not None
    expected = [[1, 0, 0, 0], [0, 0.12, 0, 0.09], [0, 0, 0.5, 0]]
    torch.testing.assert_close(patch_coverage(things, GRID), torch.tensor([expected]))
    assert patch_coverage(torch.zeros(2, 20, 20, dtype=torch.uint8), GRID).sum() == 0


@pytest.mark.parametrize(
    ("patches", "on_drawing", "on_named"), [([0, 1], 1.0, 1.0), ([0, 2], 1.0, 0.5), ([2, 3], 0.5, 0.0), ([3], 0.0, 0.0)]
)
def test_masks_on_drawings_and_on_named_things(patches: list[int], on_drawing: float, on_named: float) -> None:
    shares = Shares()
    add_mask_shares(shares, plan(patches, [1, 4]), one_scene(), GRID)
    found = shares.result()
    assert (found["on_drawing"], found["on_named"]) == (on_drawing, on_named)
    assert (found["on_drawing_random"], found["on_named_random"]) == (0.75, 0.5)  # 3 and 2 of 4 patches
    assert (found["word_visible"], found["word_visible_random"]) == (0.5, 0.5)  # apple seen, ferry not; 2 of 4 maskable


def test_random_expectation_is_what_random_masks_get() -> None:
    shares, drawn = Shares(), Shares()
    add_mask_shares(shares, plan([0, 1], [1]), one_scene(), GRID)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        patches = torch.randperm(4, generator=generator)[:2].tolist()
        word = [1, 3, 4, 5][int(torch.randint(4, (1,), generator=generator))]
        add_mask_shares(drawn, plan(patches, [word]), one_scene(), GRID)
    for name in ("on_drawing", "on_named", "word_visible"):
        assert drawn.result()[name] == pytest.approx(shares.result()[f"{name}_random"], abs=0.05)


def test_batches_are_weighted_by_what_they_hide_and_nothing_hidden_is_no_answer() -> None:
    shares = Shares()
    add_mask_shares(shares, plan([], []), one_scene(), GRID)
    assert shares.result() == {}
    add_mask_shares(shares, plan([0, 1, 2], [1]), one_scene(), GRID)
    add_mask_shares(shares, plan([3], [4]), one_scene(), GRID)
    assert shares.result()["on_drawing"] == 0.75
    assert shares.result()["word_visible"] == 0.5


def test_entropies_are_shares_of_their_maximum() -> None:
    words = torch.tensor([[True, False, True]])
    uniform, sharp = torch.full((1, 4), 0.25), torch.tensor([[1.0, 0, 0, 0]])
    rows = torch.tensor([[[math.log(4), 99.0, 0.0]]])  # the second word does not count
    for weights, expected in ((uniform, 1.0), (sharp, 0.0)):
        shares = Shares()
        add_attention_shares(shares, AttentionStatistics(entropy=rows, key_attention=weights), words)
        assert shares.result() == pytest.approx({"attention_entropy": 0.5, "key_attention_entropy": expected})


def test_pointing() -> None:
    batch = one_scene()
    words = visible_words(batch, 10)
    assert words.tolist() == [[0, 1], [0, 3]]
    maps = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])  # apple on thing 1; cat where thing 2 hardly is
    shares = Shares()
    add_pointing(shares, batch, GRID, words, maps)
    assert shares.result() == {"pointing": 0.5, "pointing_random": 0.25}
    assert len(visible_words(one_scene([0] * 7), 10)) == 0


def small_recipe() -> Recipe:
    tower = {"width": 16, "heads": 2, "depth": 1}
    return Recipe.model_validate(
        {
            "model": {
                "image": {**tower, "size": 20, "patch_size": 5},
                "text": {**tower, "dropout": 0.0},
                "fusion": {"depth": 2, "heads": 2, "dropout": 0.0},
                "projection_width": 8,
            },
            "evaluation": {"rerank": 4, "mask_samples": 8, "gallery_pairs": 4},
        }
    )


def small_model(recipe: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(recipe.model, 64, 16)


def policy(recipe: Recipe) -> Any:
    data = SimpleNamespace(tokenizer=SimpleNamespace(mask_id=4, vocabulary_size=64, word_ids=None), train_size=16)
    masks = RunMasks(recipe, data)  # type: ignore[arg-type]

    def look(model: VisionLanguageModel, batch: Batch) -> tuple[Seen, MaskPlan]:
        seen = masks.see(model, batch)
        return seen, masks.plan(model, batch, seen, 0)

    return look


def test_attention_maps_average_to_the_statistics() -> None:
    recipe = small_recipe()
    model, batch = small_model(recipe).eval(), one_scene()
    words = batch.maskable.nonzero()
    with torch.no_grad():
        image = model.project_image(model.encode_image(torch.randn_like(batch.images)).tokens)
        text = model.encode_text(batch.token_ids, batch.token_mask).tokens
        maps = attention_maps(model, image, text, batch.token_mask, -1, words)
        together = model.fuse(text, batch.token_mask, image, -1, query_mask=batch.maskable).statistics
    assert together is not None
    assert together.key_attention is not None
    torch.testing.assert_close(maps.sum(1), torch.ones(len(words)))
    torch.testing.assert_close(maps.mean(0), together.key_attention[0])


def test_measures_of_a_source_without_truth_are_the_entropies() -> None:
    recipe, batch = small_recipe(), one_scene()
    bare = Batch(*(getattr(batch, n) for n in ("images", "token_ids", "token_mask", "maskable", "group_id", "index")))
    found = mask_measures(small_model(recipe), bare, policy(recipe), -1, "cpu")
    assert set(found) == {"attention_entropy", "key_attention_entropy"}
    assert all(0 < v <= 1.0001 for v in found.values())


class ToyData:
    """Sixteen scenes as a split of their own; enough for everything to run."""

    normalisation = HALF
    composed: ClassVar[dict[str, Any]] = {}  # no triplets

    def __init__(self, scenes: bool = True) -> None:
        from test_retrieval import Split

        class Scenes(Split):
            def take(self, rows: Any) -> Batch:
                return toy(len(self.image_group_id)).rows(rows)

        self.splits, self.with_scenes = {"a": Scenes(list(range(16)), list(range(16)))}, scenes

    def scene_batch(self, split: str, count: int, seed: int) -> Batch | None:
        return toy(count) if self.with_scenes else None

    class tokenizer:
        @staticmethod
        def words(token_ids: list[int]) -> list[str]:
            return ["[CLS]", "apple", "and", "a", "##cat", "dog", "[SEP]"]


def toy(count: int) -> Batch:
    one = one_scene()
    given = {n: x for n, x in vars(one).items() if x is not None}
    fields: dict[str, Tensor] = {n: x.repeat_interleave(count, 0) for n, x in given.items()}
    fields["images"] = torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    fields["group_id"] = fields["index"] = torch.arange(count)
    return Batch(**fields)


def test_evaluate_gives_the_documented_fields_and_touches_nothing() -> None:
    recipe = small_recipe()
    model = small_model(recipe).train()
    before = torch.random.get_rng_state()
    probe = evaluate(model, ToyData(), policy(recipe), recipe, "cpu", full=False)  # type: ignore[arg-type]
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(probe) >= {
        "attention_entropy", "itm_loss", "itm_prior", "on_drawing", "on_drawing_random", "on_named", "on_named_random",
        "word_visible", "word_visible_random", "pointing", "singles_on_drawing", "scenes_itm_loss",
    }  # fmt: skip
    again = evaluate(model, ToyData(), policy(recipe), recipe, "cpu", full=False)  # type: ignore[arg-type]
    assert again == probe
    plain = evaluate(model, ToyData(scenes=False), policy(recipe), recipe, "cpu", full=False)  # type: ignore[arg-type]
    assert plain["on_drawing"] == probe["singles_on_drawing"]
    assert "singles_on_drawing" not in plain


def test_full_evaluation_has_every_part() -> None:
    recipe = small_recipe()
    found = evaluate(small_model(recipe), ToyData(), policy(recipe), recipe, "cpu", full=True)  # type: ignore[arg-type]
    assert set(found) == {"splits", "itm", "masks", "machine", "seed"}
    assert set(found["splits"]["a"]) >= {
        "title",
        "images",
        "captions",
        "chance_r1",
        "i2t",
        "t2i",
        "reranked",
        "without_flags",
    }
    assert found["itm"]["prior"] == pytest.approx(0.6365, abs=1e-4)


def test_sample_is_fixed_and_shuffled() -> None:
    split = ToyData().splits["a"]
    drawn = sample(split, 10, seed=3)
    assert len(drawn) == 10
    assert torch.equal(drawn.index, sample(split, 10, seed=3).index)
    assert drawn.index.tolist() != list(range(10))
    assert len(set(drawn.index.tolist())) == 10
