"""Recognition: scores and probes against plain re-derivations, what is counted, and bad input."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from crossmask.engine.data import load_data
from crossmask.engine.data.base import EvaluationSplit, PairData
from crossmask.engine.errors import DataError, RecipeError
from crossmask.engine.evaluation import print_summary
from crossmask.engine.evaluation.evaluate import further
from crossmask.engine.evaluation.linear_probe import choose_probe, fit_probe, held_out_rows, scores
from crossmask.engine.evaluation.recognition import recognition, represent
from crossmask.engine.exported import describe_export, save_exported
from crossmask.engine.model_evaluation import evaluate_model
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.recipe_files import load_recipe

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
WARM = {"red": "warm", "green": "cold", "blue": "cold", "grey": "cold"}
RECIPE = """
name: tiny
data: {source: pairs, path: pairs.jsonl, vocabulary_size: 200, max_words: 8, augment: 0, validation_fraction: 0.3}
model:
  image: {size: 16, patch_size: 8, width: 16, depth: 1, heads: 2}
  text: {width: 16, depth: 1, heads: 2, dropout: 0.0}
  fusion: {depth: 2, heads: 2, dropout: 0.0}
  projection_width: 8
evaluation: {rerank: 0, recognition: true}
"""


def by_definition(predicted: list[int], target: list[int]) -> tuple[float, float]:
    """Accuracy, and scikit-learn's f1_score(average="macro", zero_division=0) from precision and recall."""
    found = []
    for kind in sorted({*predicted, *target}):
        hits = sum(p == t == kind for p, t in zip(predicted, target, strict=True))
        said, there = predicted.count(kind), target.count(kind)
        precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
        found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    right = sum(p == t for p, t in zip(predicted, target, strict=True))
    return 100 * right / len(target), 100 * sum(found) / len(found)


@pytest.mark.parametrize("classes", [1, 2, 7, 40])
def test_scores_are_scikit_learns(classes: int) -> None:
    luck = torch.Generator().manual_seed(classes)
    target = torch.randint(0, classes, (60,), generator=luck)
    predicted = torch.where(torch.rand(60, generator=luck) < 0.5, target, torch.randint(0, classes, (60,)))
    target[:3] = 1000  # a class that is never predicted
    found = scores(predicted, target)
    assert (found["accuracy"], found["macro_f1"]) == pytest.approx(by_definition(predicted.tolist(), target.tolist()))


def test_scores_by_hand() -> None:
    found = scores(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]))
    # class 0: P 1/2, R 1 -> 2/3; class 1: P 1, R 1/3 -> 1/2; class 2 is said and never there -> 0
    assert found == pytest.approx({"accuracy": 50.0, "macro_f1": 100 * (2 / 3 + 1 / 2) / 3})
    assert scores(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))["accuracy"] == 0.0


def clusters(rows: int, classes: int, width: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    luck = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=luck, dtype=torch.float64)
    target = torch.randint(0, classes, (rows,), generator=luck)
    return centres[target] + noise * torch.randn(rows, width, generator=luck, dtype=torch.float64), target


@pytest.mark.parametrize("strength", [0.5, 0.01])
def test_a_probe_is_the_minimum_of_what_it_says(strength: float) -> None:
    """At the minimum of a convex function the gradient is 0: derived here by hand, in numpy."""
    features, target = clusters(80, 4, 6, 1.0)
    features = 3 * features + 5
    probe = fit_probe(features, target, 4, strength, iterations=500)
    x = features.numpy()
    x = (x - x.mean(0)) / x.std(0)
    z = x @ probe.weight.numpy() + probe.bias.numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(4)[target.numpy()]) / len(x)
    assert np.abs(x.T @ error + strength * probe.weight.numpy()).max() < 1e-5
    assert np.abs(error.sum(0)).max() < 1e-5  # the bias is not penalised
    assert probe.predict(features).tolist() == z.argmax(1).tolist()


def test_probes_are_deterministic_and_do_not_care_for_units() -> None:
    features, target = clusters(120, 5, 8, 1.5)
    group = torch.arange(120) // 2
    one, two, scaled = (choose_probe(x.float(), target, group, 5, 0) for x in (features, features, 100 * features - 7))
    assert torch.equal(one[0].weight, two[0].weight)
    assert one[1:] == two[1:] == scaled[1:]
    assert (one[0].predict(features.float()) == scaled[0].predict((100 * features - 7).float())).float().mean() > 0.98


def test_a_feature_that_never_changes_counts_nothing() -> None:
    features, target = clusters(60, 3, 5, 0.5)
    padded = torch.cat([features, torch.full((60, 1), 7.0, dtype=torch.float64)], 1)
    probe = fit_probe(padded, target, 3, 0.01)
    padded[:, -1] = -1e9
    assert torch.equal(probe.predict(padded), fit_probe(features, target, 3, 0.01).predict(features))


def test_no_group_is_on_both_sides_and_no_class_is_lost() -> None:
    target = torch.tensor([0] * 40 + [1] * 20 + [2])
    group = torch.tensor([i // 2 for i in range(40)] + [100 + i // 4 for i in range(20)] + [900])
    out = held_out_rows(target, group, seed=3)
    assert not set(group[out].tolist()) & set(group[~out].tolist())
    assert [int(out[target == kind].sum()) for kind in range(3)] == [8, 4, 0]  # a fifth of 20, 5 and 1 groups
    assert not torch.equal(out, held_out_rows(target, group, seed=4))
    assert not held_out_rows(torch.tensor([0, 1]), torch.tensor([0, 1]), 0).any()
    shared, two = torch.arange(10).repeat(2), torch.tensor([0] * 10 + [1] * 10)  # each group is of both classes
    out = held_out_rows(two, shared, 0)
    assert [int(out[two == kind].sum()) for kind in range(2)] == [2, 2]  # so they are counted as the first's
    mixed = held_out_rows(torch.tensor([0] * 10 + [1]), torch.tensor([*range(10), 0]), 0)
    assert int(mixed[:10].sum()) == 2
    assert bool(mixed[10]) == bool(mixed[0])


def test_the_penalty_is_chosen_where_it_was_not_fitted() -> None:
    """The best on the held-out part, of equals the strongest; the middle one where nothing can be held out."""
    features, target = clusters(60, 2, 2, 1.0)
    noisy = torch.cat([features, 3 * torch.randn(60, 200, dtype=torch.float64)], 1).float()
    group = torch.arange(60)
    _, strength, count = choose_probe(noisy, target, group, 2, 0)
    out = held_out_rows(target, group, 0)
    rights = {
        s: float((fit_probe(noisy[~out], target[~out], 2, s).predict(noisy[out]) == target[out]).float().mean())
        for s in (1.0, 0.1, 0.01, 0.001, 0.0001)
    }
    assert rights[strength] == max(rights.values())
    assert count == int(out.sum())
    assert strength == max(s for s, right in rights.items() if right == rights[strength])
    assert choose_probe(noisy[:2], torch.tensor([0, 1]), group[:2], 2, 0)[1:] == (0.01, 0)
    easy, kinds = clusters(60, 2, 4, 0.01)
    assert choose_probe(easy, kinds, group, 2, 0)[1] == 1.0  # all are right


class Squares(EvaluationSplit):
    """Features are given, no image is drawn."""

    def __init__(self, features: torch.Tensor, **labels: list[str]) -> None:
        self.title, self.features = "squares", features
        self.image_group_id = np.arange(len(features))
        self.gallery_group_id = self.image_group_id
        self.labels = {level: np.array(names, object) for level, names in labels.items()}

    def take(self, rows: np.ndarray) -> Any:
        part = self.features[rows]
        batch = SimpleNamespace(images=part, token_ids=part, token_mask=torch.ones(len(part), 2, dtype=torch.bool))
        batch.to = lambda device: batch
        return batch

    def gallery(self, batch_size: int) -> Iterator[Any]:
        return iter(())


class Mirror:
    """A model without a fusion encoder that says what it is shown."""

    def encode_image(self, images: torch.Tensor) -> Any:
        return SimpleNamespace(feature=images)

    def encode_text(self, token_ids: torch.Tensor, token_mask: torch.Tensor) -> Any:
        return SimpleNamespace(feature=torch.zeros_like(token_ids))


def test_what_is_recognised_and_what_is_counted() -> None:
    names = [*[""] * 4, *["x"] * 6, *["y"] * 5, "rare"]
    corners = {"x": (9.0, 0.0), "y": (0.0, 9.0), "rare": (-9.0, -9.0), "": (3.0, 3.0), "new": (9.0, 9.0)}
    place = lambda found: torch.tensor([corners[n] for n in found]) + 0.1 * torch.randn(len(found), 2)  # noqa: E731
    tested = ["x", "y", "rare", "new", "new", "other", ""]
    corners["other"] = (9.0, 8.0)
    training = Squares(place(names), category=names, subcategory=["same"] * 16)
    data = SimpleNamespace(
        training_split=lambda: training, splits={"t": Squares(place(tested), category=tested, subcategory=tested)}
    )
    found = recognition(Mirror(), data, "cpu", 0)  # type: ignore[arg-type]
    assert list(found) == ["category"]  # the sub-category is one for all
    of = found["category"]
    assert (of["classes"], of["images"], of["single"], of["unlabelled"], of["majority"]) == (3, 12, 1, 4, "x")
    split = of["splits"]["t"]
    assert (split["images"], split["unlabelled"], split["unseen_classes"], split["unseen_images"]) == (6, 1, 2, 3)
    assert split["majority"] == pytest.approx({"accuracy": 100 / 6, "macro_f1": 100 * (2 / 7) / 5})
    assert list(of["features"]) == ["image", "text"]
    right = of["features"]["image"]["splits"]["t"]["accuracy"] / 100 * 6
    assert round(right) in (2, 3)  # the three unseen are wrong, the rare one may be
    assert of["features"]["text"]["splits"]["t"]["accuracy"] == split["majority"]["accuracy"]  # says nothing
    stream = io.StringIO()
    print_summary({"splits": {}, "recognition": found}, Console(file=stream, width=100))
    shown = stream.getvalue()
    assert "category: t: 3 of 6 images are of 2 unseen classes: always wrong" in shown
    assert "category: t: 1 images without a class are left out" in shown
    assert "category: 1 of the classes have one training image" in shown
    assert f"{100 * right / 6:.1f} / " in shown


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    luck = np.random.default_rng(0)
    lines = []
    for i in range(60):
        name = list(COLOURS)[i % 4]
        pixels = np.clip(np.array(COLOURS[name]) + luck.integers(-20, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "caption": f"square number {i}", "category": WARM[name], "subcategory": name}
        )
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def model_of(data: PairData, recipe: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(recipe.model, data.tokenizer.vocabulary_size, data.max_tokens).eval()


def test_colours_are_recognised_in_images_and_not_in_texts_that_do_not_name_them() -> None:
    recipe = load_recipe("tiny.yaml")
    data = load_data(recipe)
    with torch.no_grad():
        found = further(model_of(data, recipe), data, recipe, "cpu")["recognition"]
    assert list(found) == ["category", "subcategory"]
    (name,) = data.splits
    of = found["subcategory"]
    assert (of["classes"], of["images"]) == (4, data.train_size)
    assert of["features"]["image"]["splits"][name]["accuracy"] > 85
    assert of["features"]["text"]["splits"][name]["accuracy"] < 70
    assert of["splits"][name]["images"] == data.splits[name].image_count
    assert all(math.isfinite(of["features"][f]["splits"][name]["macro_f1"]) for f in ("image", "text", "fused"))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_are_what_the_heads_project(pool: str) -> None:
    recipe = load_recipe("tiny.yaml", [f"model.pool={pool}"])
    data = load_data(recipe)
    model = model_of(data, recipe)
    split = data.training_split()
    assert split is not None
    found = represent(model, split, "cpu")
    batch = next(split.images(1000))
    with torch.no_grad():
        image, text = model.encode_image(batch.images), model.encode_text(batch.token_ids, batch.token_mask)
        fused = model.fuse(text.tokens, batch.token_mask, model.project_image(image.tokens)).tokens
        unit = torch.nn.functional.normalize
        torch.testing.assert_close(unit(model.image_projection(found["image"]), dim=-1), image.feature)
        torch.testing.assert_close(unit(model.text_projection(found["text"]), dim=-1), text.feature)
        torch.testing.assert_close(model.match_head(found["fused"]), model.match_logits(fused, batch.token_mask))
    assert len(found["fused"]) == split.image_count == data.train_size


def test_crossmask_evaluate_fits_probes_on_the_training_pairs_alone(home: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny.yaml")
    data = load_data(recipe)
    tensors = {name: x.detach() for name, x in model_of(data, recipe).named_parameters()}
    save_exported(tmp_path / "model", tensors, describe_export(recipe, "teacher", tensors, 7), data.tokenizer)
    stream = io.StringIO()
    found = evaluate_model(
        tmp_path / "model", "tiny.yaml", output=tmp_path / "found.json", console=Console(file=stream, width=100)
    )
    (name,) = found["splits"]
    assert name == "held-out"  # and not all of the file
    assert found["recognition"]["category"]["images"] == data.train_size
    assert json.loads((tmp_path / "found.json").read_text())["recognition"] == found["recognition"]
    assert "Recognition by linear probes" in stream.getvalue()
    with pytest.raises(RecipeError, match=r"nothing is held out .* set data.validation_fraction above 0"):
        evaluate_model(tmp_path / "model", "tiny.yaml", ["data.validation_fraction=0"], console=Console(file=stream))


@pytest.mark.parametrize(
    ("levels", "problem"),
    [
        ({}, "the training images have no categories"),
        ({"category": "shoes"}, "all training images are of one category, 'shoes'"),
    ],
)
def test_no_classes_is_one_line_before_the_training(home: Path, levels: dict[str, str], problem: str) -> None:
    rows = [{"image": f"{i}.png", "caption": f"square number {i}", **levels} for i in range(20)]
    (home / "plain.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=problem) as caught:
        load_data(load_recipe("tiny.yaml", ["data.path=plain.jsonl"]))
    assert "\n" not in str(caught.value)
    assert "add the column category or subcategory, or set evaluation.recognition to false" in str(caught.value)
    load_data(load_recipe("tiny.yaml", ["data.path=plain.jsonl", "evaluation.recognition=false"]))


def test_emoji_are_of_groups_and_subgroups() -> None:
    data = load_data(load_recipe("syncmask-emoji", ["evaluation.recognition=true"]))
    training = data.training_split()
    assert training is not None
    assert training.image_count == data.train_size == len(training.labels["category"])
    assert len(set(training.labels["category"].tolist())) == 9
    assert 90 < len(set(training.labels["subcategory"].tolist())) <= 98
    assert {name: set(split.labels) for name, split in data.splits.items()} == {
        name: {"category", "subcategory"} for name in "abc"
    }
