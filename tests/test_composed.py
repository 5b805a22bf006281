"""Text-guided retrieval: triplets, what stays held out, the measure and the objective against plain re-derivations."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from crossmask.engine.data import load_data
from crossmask.engine.data.base import ComposedSplit, Request
from crossmask.engine.data.composed_emoji import ComposedEmoji, variants
from crossmask.engine.data.emoji import Caption
from crossmask.engine.errors import RecipeError
from crossmask.engine.evaluation import print_summary
from crossmask.engine.evaluation.composed import composed_retrieval, evaluate_composed
from crossmask.engine.evaluation.evaluate import further
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.objectives import StudentView, text_guided_retrieval
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_files import load_recipe

SMALL = [
    "model.image={size: 16, patch_size: 8, width: 16, depth: 1, heads: 2, stem: patch}",
    "model.text={width: 16, depth: 0, heads: 2, dropout: 0.0}",
    "model.fusion={depth: 1, heads: 2, dropout: 0.0}",
    "model.projection_width=8",
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("composed-emoji", SMALL)


@pytest.fixture(scope="module")
def data(recipe: Recipe) -> ComposedEmoji:
    found = load_data(recipe)
    assert isinstance(found, ComposedEmoji)
    return found


def test_nothing_held_out_is_trained_on(data: ComposedEmoji) -> None:
    art, foreign = data.art, data.art.styles.index("twemoji")
    held = np.array([c.held_out for c in art.captions])
    for drawing in (data.triplets.reference, data.triplets.target):
        assert not held[art.caption[drawing]].any()
        assert not (art.style[drawing] == foreign).any()
    asked = {data.texts[text] for text in np.unique(data.triplets.text).tolist()}
    assert "in the style of noto" in asked
    assert "in the style of twemoji" not in asked
    assert data.train_size == len(data.train_group_id) > 10_000


def test_a_triplet_is_what_its_words_say(data: ComposedEmoji) -> None:
    art = data.art
    for split in (SimpleNamespace(triplets=data.triplets), *data.composed.values()):
        found = split.triplets
        caption, style = art.caption[found.reference], art.style[found.reference]
        same_caption, same_style = caption == art.caption[found.target], style == art.style[found.target]
        assert (same_caption == found.style).all()
        assert (same_style == ~found.style).all()
    for row in range(0, len(data.triplets), 997):
        words, target = data.texts[data.triplets.text[row]], data.triplets.target[row]
        name = art.captions[art.caption[target]].name
        if data.triplets.style[row]:
            assert words.removeprefix("in the style of ").split()[0] in (art.styles[art.style[target]], "flat")
        else:
            assert words.split()[-1] in name.replace(":", "").split()
    row = int(np.flatnonzero(~data.triplets.style)[0])
    assert data.name_of(row).endswith(data.texts[data.triplets.text[row]])


def test_held_out_sets(data: ComposedEmoji) -> None:
    art, foreign = data.art, data.art.styles.index("twemoji")
    held = np.array([c.held_out for c in art.captions])[art.caption]
    by_foreign = art.style == foreign
    expected = {  # of the target: held out, by the held-out designer; of the reference: by that one
        "style-b": (True, False, False),
        "style-c": (True, False, True),
        "variant-a": (False, True, True),
        "variant-b": (True, False, False),
        "variant-c": (True, True, True),
    }
    assert list(data.composed) == list(expected)
    for name, (new, to, by) in expected.items():
        split = data.composed[name]
        assert len(split.target) > 0
        assert (held[split.triplets.target] == new).all()
        assert (by_foreign[split.triplets.target] == to).all()
        assert (by_foreign[split.triplets.reference] == by).all()
        assert np.isin(split.target, split.gallery).all()  # every request can be answered
        placed = split.reference >= 0
        assert (split.drawings[split.reference[placed]] == split.triplets.reference[placed]).all()
        assert not np.isin(split.triplets.reference[~placed], split.drawings).any()
        assert split.drawings.tolist() == data.splits[name[-1] if name != "style-c" else "b"].drawings.tolist()


def test_variants_differ_in_one_word() -> None:
    def caption(name: str) -> Caption:
        return Caption(name, name, (), "people & body", "person")

    named = ["man cook", "woman cook", "person: bald", "men dancing", "women dancing", "woman and man", "red apple"]
    found = {(named[one], named[other], text) for one, other, text in variants([caption(name) for name in named])}
    assert found == {
        ("man cook", "woman cook", "as a woman"),
        ("woman cook", "man cook", "as a man"),
        ("men dancing", "women dancing", "as women"),
        ("women dancing", "men dancing", "as men"),
    }


def test_batches_of_triplets(data: ComposedEmoji) -> None:
    rows = np.array([5, 900, 12_000])
    batch = data.train_batch(rows, epoch=3)
    again = data.train_batch(rows[1:], epoch=3)
    assert batch.reference is not None
    assert again.reference is not None
    assert torch.equal(batch.reference[1:], again.reference)
    assert torch.equal(batch.images[1:], again.images)
    assert batch.reference.shape == batch.images.shape == (3, 3, 16, 16)
    assert not torch.equal(batch.images, batch.reference)
    assert batch.group_id.tolist() == data.train_group_id[rows].tolist()
    assert batch.index.tolist() == rows.tolist()
    words = [data.texts[text] for text in data.triplets.text[rows]]
    pieces = [[i for word in text.split() for i in data.tokenizer.pieces(word)] for text in words]
    for row, own in enumerate(pieces):
        assert batch.token_ids[row, 1 : 1 + len(own)].tolist() == own
        assert int(batch.token_mask[row].sum()) == len(own) + 2
    assert batch.to("cpu").reference is not None
    assert len(batch.rows(slice(2)).reference) == 2  # type: ignore[arg-type]


def test_equal_pictures_are_one(data: ComposedEmoji) -> None:
    flat = data.art.rgba.flatten(1)
    same = {}
    for row, number in enumerate(data.picture.tolist()):
        if number in same:
            assert torch.equal(flat[row], flat[same[number]])
        same.setdefault(number, row)
    assert len(same) == len(torch.unique(flat, dim=0))


class Points(ComposedSplit):
    """Images are feature vectors, words another one."""

    title = "points"

    def __init__(self, gallery: torch.Tensor, asked: torch.Tensor, target: list[int], own: list[int]) -> None:
        self.features, self.asked = gallery, asked
        self.gallery, self.target = np.arange(len(gallery)), np.array(target)
        self.reference = np.array(own)

    def requests(self, rows: np.ndarray) -> Request:
        return Request(self.asked[rows], self.asked[rows], torch.ones(len(rows), 2, dtype=torch.bool))

    def candidates(self, rows: np.ndarray) -> torch.Tensor:
        return self.features[rows]


class Plain:
    """Features are what it is shown; image and words fused are twice the image, turned."""

    def encode_image(self, images: torch.Tensor) -> Any:
        return SimpleNamespace(tokens=images, feature=F.normalize(images, dim=-1))

    encode_text = lambda self, ids, mask: Plain.encode_image(self, ids.flip(-1))  # noqa: E731

    def composed_feature(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(image + 0.3 * text, dim=-1)


def by_hand(queries: torch.Tensor, gallery: torch.Tensor, split: Points) -> dict[str, float]:
    ranks = []
    for query, target, own in zip(queries, split.target, split.reference, strict=True):
        value = [float(query.double() @ key.double()) for key in gallery]
        ranks.append(1 + sum(v >= value[target] for i, v in enumerate(value) if i not in (target, own)))
    return {f"r{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 10, 50)}


def test_recalls_by_hand() -> None:
    luck = torch.Generator().manual_seed(1)
    gallery = torch.randn(80, 6, generator=luck)
    target = list(range(40))
    own = [(i + 40) if i % 2 else -1 for i in target]
    asked = torch.stack([gallery[i + 40] for i in target]) + gallery[target]
    split = Points(gallery, asked, target, own)
    found = evaluate_composed(Plain(), split, "cpu")
    unit = F.normalize(gallery, dim=-1)
    image, text = F.normalize(asked, dim=-1), F.normalize(asked.flip(-1), dim=-1)
    queries = {
        "query": F.normalize(asked + 0.3 * asked.flip(-1), dim=-1),
        "image": image, "text": text, "sum": F.normalize(image + text, dim=-1),
    }  # fmt: skip
    for kind, query in queries.items():
        assert found[kind] == pytest.approx(by_hand(query, unit, split)), kind
    assert 0 < found["query"]["r1"] < 100
    assert found["chance"] == pytest.approx({f"r{k}": 50 * (k / 80 + k / 79) for k in (1, 10, 50)})
    assert (found["triplets"], found["candidates"]) == (40, 80)


def test_a_collapsed_model_answers_nothing_and_a_twin_picture_counts() -> None:
    same = Points(torch.ones(30, 4), torch.ones(5, 4), [0, 1, 2, 3, 4], [-1] * 5)
    assert evaluate_composed(Plain(), same, "cpu")["query"]["r10"] == 0.0
    corner = torch.eye(4)
    twins = Points(torch.cat([corner, corner[:1]]), corner[:1], [0], [-1])
    assert evaluate_composed(Plain(), twins, "cpu")["image"]["r1"] == 0.0  # a tie
    twins.gallery = np.array([0, 1, 2, 3, 0])
    assert evaluate_composed(Plain(), twins, "cpu")["image"]["r1"] == 100.0
    twins.reference = np.array([4])  # of which one is left out
    assert evaluate_composed(Plain(), twins, "cpu")["image"]["r1"] == 100.0
    alone = Points(corner, corner[:2], [0, 1], [-1, 1])  # the second asks for itself: nothing is left to find
    found = evaluate_composed(Plain(), alone, "cpu")
    assert found["image"]["r1"] == 100.0
    assert found["chance"]["r1"] == 25.0


def test_the_mean_of_sets_where_the_source_has_one() -> None:
    gallery = torch.eye(4)
    one, other = (Points(gallery, gallery[:1] + 0.1 * gallery[i], [t], [-1]) for i, t in ((1, 0), (1, 3)))
    assert "average" not in composed_retrieval(Plain(), {"x": one, "y": other}, "cpu")
    one.averaged = other.averaged = True
    found = composed_retrieval(Plain(), {"x": one, "y": other}, "cpu")
    assert found["average"]["image"] == {"r1": 50.0, "r10": 100.0, "r50": 100.0}
    stream = io.StringIO()
    print_summary({"splits": {}, "composed": found}, Console(file=stream, width=100))
    assert "mean of the 2 sets" in stream.getvalue()
    assert "image and words" in stream.getvalue()


def test_the_objective_by_hand(data: ComposedEmoji, recipe: Recipe) -> None:
    """Cross-entropy over the batch's targets, uniform over those of one picture, with gradients on both sides."""
    torch.manual_seed(0)
    model = VisionLanguageModel(recipe.model, data.tokenizer.vocabulary_size, data.max_tokens).double()
    triplets = np.flatnonzero(data.train_group_id == data.train_group_id[7])[:3]  # of one target
    batch = data.train_batch(np.concatenate([triplets, np.arange(100, 5100, 1000)]), epoch=0)
    assert batch.group_id[:3].unique().numel() == 1
    image, text = model.encode_image(batch.images), model.encode_text(batch.token_ids, batch.token_mask)
    tau = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    terms = text_guided_retrieval(model, StudentView(image, text), batch, tau)
    assert list(terms) == ["composed"]
    terms["composed"].backward()
    gradients = [model.image_projection.weight.grad, model.text_projection.weight.grad, tau.grad]

    reference = model.encode_image(batch.reference)  # type: ignore[arg-type]
    fused = model.fuse(text.tokens, batch.token_mask, model.project_image(reference.tokens)).tokens
    words = batch.token_mask.double()[..., None]
    query = F.normalize(model.text_projection((fused * words).sum(1) / words.sum(1)), dim=-1)
    z = query.float() @ image.feature.float().T / 0.07
    right = (batch.group_id[:, None] == batch.group_id).float()
    expected = -(right / right.sum(1, keepdim=True) * z.log_softmax(1)).sum(1).mean()
    assert float(terms["composed"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_a_model_without_a_fusion_encoder_is_refused(data: ComposedEmoji, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="composed_emoji asks with image and words fused"):
        further(SimpleNamespace(), data, recipe, "cpu")


def mistakes() -> Iterator[tuple[str, list[str], str]]:
    yield "albef-emoji", ["objectives.composed.weight=1"], "objectives.composed needs triplets: set data.source to"
    yield "composed-emoji", ["objectives.itc.weight=1"], "do not describe their image; set objectives.itc.weight to 0"
    yield "composed-emoji", ["data.source=fashioniq"], "source 'fashioniq' reads a folder; give data.path=FOLDER"
    yield "composed-emoji", ["objectives.composed.weight=0"], "every weight is 0"


@pytest.mark.parametrize(("name", "overrides", "problem"), list(mistakes()))
def test_a_recipes_mistakes_are_one_line(name: str, overrides: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)


def test_scenes_are_not_triplets(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"data\.scenes\.fraction is only for data\.source: emoji"):
        load_data(load_recipe("composed-emoji", [*SMALL, "data.scenes.fraction=0.5"]))


def test_an_untrained_model_is_near_chance(data: ComposedEmoji, recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = VisionLanguageModel(recipe.model, data.tokenizer.vocabulary_size, data.max_tokens).eval()
    found = composed_retrieval(model, {"variant-c": data.composed["variant-c"]}, "cpu")["variant-c"]
    assert all(math.isfinite(v) for kind in ("query", "image", "text", "sum", "chance") for v in found[kind].values())
    assert 0 < found["chance"]["r1"] < found["chance"]["r10"] < found["chance"]["r50"] < 100
