"""Fine-tuning for recognition: the objective and its evaluation by hand, what is stored, and bad input."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

import ranks

from crossmask.engine.data import PairData, load_data
from crossmask.engine.data.classes import Classes, training_classes
from crossmask.engine.errors import DataError, RecipeError
from crossmask.engine.evaluation.evaluate import further
from crossmask.engine.export import export_run
from crossmask.engine.exported import describe_export, load_exported, save_exported
from crossmask.engine.model_evaluation import evaluate_model
from crossmask.engine.models import PretrainingModel, VisionLanguageModel
from crossmask.engine.models.classifier import Classifier
from crossmask.engine.objectives import Keys, RunMasks, StudentView, look, recognise
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_files import load_recipe
from crossmask.engine.training.initial import Initial
from crossmask.engine.training.step import Schedule, compute_losses

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
RECIPE = """
name: tiny
data: {source: pairs, path: pairs.jsonl, vocabulary_size: 200, max_words: 8, augment: 0, validation_fraction: 0.3}
model:
  image: {size: 16, patch_size: 8, width: 16, depth: 1, heads: 2}
  text: {width: 16, depth: 1, heads: 2, dropout: 0.0}
  fusion: {depth: 2, heads: 2, dropout: 0.0}
  projection_width: 8
masking: {policy: random}
objectives:
  itc: {weight: 0.0, queue_length: 0}
  itm: {weight: 0.0}
  mlm: {weight: 0.0}
  mim: {weight: 0.0}
  recognition: {weight: 1.0, column: subcategory}
teacher: {momentum: 0.5}
optimizer: {lr: 1.0e-3, warmup_steps: 0}
training: {batch_size: 8, max_steps: 4, precision: fp32}
evaluation: {rerank: 0}
"""


def write(folder: Path, name: str, labels: list[dict[str, str]], captions: int = 1) -> None:
    """Squares whose colour is their sub-category, with captions that do not name it."""
    lines = [
        {"image": f"{i}.png", "caption": f"square number {i} {letter}", **level}
        for i, level in enumerate(labels)
        for letter in "abc"[:captions]
    ]
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines))


def labelled(count: int) -> list[dict[str, str]]:
    """Every fifth without a class."""
    kinds = list(COLOURS)
    return [{} if i % 5 == 4 else {"category": "ab"[i % 2], "subcategory": kinds[i % 4]} for i in range(count)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    luck = np.random.default_rng(0)
    for i in range(60):
        colour = np.array(list(COLOURS.values())[i % 4])
        pixels = np.clip(colour + luck.integers(-20, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    write(folder, "pairs.jsonl", labelled(60))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def loaded(*overrides: str) -> tuple[Recipe, PairData]:
    recipe = load_recipe("tiny.yaml", list(overrides))
    return recipe, load_data(recipe)


def model_of(recipe: Recipe, data: PairData, seed: int = 0) -> PretrainingModel:
    torch.manual_seed(seed)
    assert data.classes is not None
    made = PretrainingModel(
        recipe.model,
        recipe.objectives,
        data.tokenizer.vocabulary_size,
        data.max_tokens,
        classes=data.classes.classes,
        mask_id=data.tokenizer.mask_id,
    )
    return made.eval()


def by_definition(predicted: list[str], target: list[str]) -> dict[str, float]:
    """Accuracy, and macro-F1 from precision and recall, over the classes that are said or there."""
    found = []
    for kind in sorted({*predicted, *target}):
        hits = sum(p == t == kind for p, t in zip(predicted, target, strict=True))
        said, there = predicted.count(kind), target.count(kind)
        precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
        found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    right = sum(p == t for p, t in zip(predicted, target, strict=True))
    return {"accuracy": 100 * right / len(target), "macro_f1": 100 * sum(found) / len(found)}


def seen(model: VisionLanguageModel, batch: Any) -> StudentView:
    return StudentView(model.encode_image(batch.images), model.encode_text(batch.token_ids, batch.token_mask))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_objective_by_hand(pool: str) -> None:
    recipe, data = loaded(f"model.pool={pool}")
    model = model_of(recipe, data).double().model
    assert data.classes is not None
    assert data.classes.classes == Classes(column="subcategory", names=("blue", "green", "grey", "red"))
    batch = data.classes.add(data.train_batch(np.arange(12), 0))
    assert batch.label is not None
    known = batch.label >= 0
    assert 0 < int(known.sum()) < 12
    images = batch.images.double().requires_grad_()
    batch = type(batch)(**{**vars(batch), "images": images})
    terms = recognise(model, seen(model, batch), batch)
    assert list(terms) == ["recognition", "recognition_accuracy"]
    terms["recognition"].backward()

    view = seen(model, batch)
    fused = model.fuse(view.text.tokens, batch.token_mask, model.project_image(view.image.tokens)).tokens
    words = batch.token_mask.double()[..., None]
    pooled = fused[:, 0] if pool == "cls" else (fused * words).sum(1) / words.sum(1)
    head = model.classifier.head  # type: ignore[union-attr]
    z = pooled @ head.weight.T + head.bias
    chosen = [z[i].log_softmax(0)[int(label)] for i, label in enumerate(batch.label) if label >= 0]
    assert float(terms["recognition"].detach()) == pytest.approx(float(-torch.stack(chosen).detach().mean()), rel=1e-5)
    right = (z.argmax(1) == batch.label)[known].double().mean()
    assert float(terms["recognition_accuracy"]) == pytest.approx(float(right))

    assert images.grad is not None
    reached = images.grad.abs().sum((1, 2, 3)) > 0
    assert torch.equal(reached, known)  # a pair without a class has no part in it
    # a key's bias moves all scores of a row alike, and an image's [CLS] alone is read where pooling reads [CLS]
    for part in ("image.vit.blocks", "text.", "fusion.", "classifier."):
        grads = [p.grad for name, p in model.named_parameters() if name.startswith(part)]
        assert any(g is not None and g.abs().sum() > 0 for g in grads), part
    assert model.word_bias.grad is None


def test_a_batch_without_classes_gives_nothing_with_a_live_graph() -> None:
    recipe, data = loaded()
    model = model_of(recipe, data).model
    batch = data.train_batch(np.arange(6), 0)
    batch = type(batch)(**{**vars(batch), "label": torch.full((6,), -1)})
    terms = recognise(model, seen(model, batch), batch)
    assert float(terms["recognition"].detach()) == 0.0
    assert float(terms["recognition_accuracy"]) == 0.0
    terms["recognition"].backward()
    assert model.classifier is not None
    grad = model.classifier.head.weight.grad
    assert grad is not None
    assert float(grad.abs().sum()) == 0.0


@pytest.mark.parametrize("others", [False, True])
def test_the_loss_has_it_by_its_weight(others: bool) -> None:
    """Beside the other objectives, whose keys and values it reads, and alone."""
    on = [f"objectives.{name}.weight={int(others)}" for name in ("itc", "itm", "mlm")]
    recipe, data = loaded("objectives.recognition.weight=0.3", *on)
    model, masks, now = model_of(recipe, data), RunMasks(recipe, data), Schedule.at(0, recipe)
    assert data.classes is not None
    batch = data.classes.add(data.train_batch(np.arange(8), 0))
    view = look(model.model, batch, masks, 0, 8 if others else 0)
    keys = Keys(view.image_feature, view.text_feature, batch.group_id)
    loss, terms = compute_losses(model, batch, view, keys, recipe, now, masks.planner)
    weights = {"recognition": 0.3} | ({"itc": 1.0, "itm": 1.0, "mlm": 1.0} if others else {})
    assert float(loss.detach()) == pytest.approx(sum(w * float(terms[name]) for name, w in weights.items()), rel=1e-5)
    alone = recognise(model.model, seen(model.model, batch), batch)["recognition"]
    assert float(terms["recognition"]) == pytest.approx(float(alone.detach()), rel=1e-5)


def test_every_sample_has_its_own_class(home: Path) -> None:
    write(home, "several.jsonl", labelled(20), captions=3)  # more samples than images
    _, data = loaded("data.path=several.jsonl", "data.word_drop=0.3", "objectives.recognition.column=category")
    assert data.classes is not None
    assert data.train_size == len(data.classes.label) > 20
    batch = data.classes.add(data.train_batch(np.array([5, 3, data.train_size - 1]), 1))
    assert batch.label is not None
    for index, label in zip(batch.index.tolist(), batch.label.tolist(), strict=True):
        line = json.loads((home / "several.jsonl").read_text().splitlines()[int(data.name_of(index).split()[-1]) - 1])
        assert line.get("category", "") == ("a", "b", "")[label]
    assert batch.rows(slice(2)).label.tolist() == batch.label.tolist()[:2]  # type: ignore[union-attr]


def test_emoji_are_of_their_group() -> None:
    small = ["model.image.size=16", "model.image.patch_size=8"]
    data = load_data(load_recipe("recognition-emoji", small))
    assert data.classes is not None
    assert len(data.classes.classes.names) == 9
    batch = data.classes.add(data.train_batch(np.array([0, 999, 5000]), 0))
    assert batch.label is not None
    split = data.training_split()
    assert split is not None
    wanted = split.labels["category"][[0, 999, 5000]].tolist()
    assert [data.classes.classes.names[i] for i in batch.label.tolist()] == wanted
    assert len(set(wanted)) > 1


def test_other_classes_are_other_data(home: Path) -> None:
    whole = loaded()[1].fingerprint()
    assert loaded("objectives.recognition.weight=0", "objectives.itc.weight=1")[1].fingerprint() != whole
    changed = labelled(60)
    for row in range(0, 40, 20):  # the same classes, each as often
        changed[row], changed[row + 1] = (
            {**changed[row + i], "subcategory": changed[row + 1 - i]["subcategory"]} for i in (0, 1)
        )
    write(home, "changed.jsonl", changed)
    images = "data.path=changed.jsonl"
    assert loaded(images)[1].fingerprint() != whole
    write(home, "changed.jsonl", labelled(60))
    assert loaded(images)[1].fingerprint() == whole


def said_by_hand(model: VisionLanguageModel, data: PairData, name: str) -> list[str]:
    assert model.classifier is not None
    batch = data.splits[name].take(np.arange(data.splits[name].image_count))
    with torch.no_grad():
        view = seen(model, batch)
        fused = model.fuse(view.text.tokens, batch.token_mask, model.project_image(view.image.tokens)).tokens
        z = model.pool_fused(fused, batch.token_mask) @ model.classifier.head.weight.T + model.classifier.head.bias
    return [model.classifier.classes.names[i] for i in z.argmax(1).tolist()]


def test_the_evaluation_by_hand(home: Path) -> None:
    tested = labelled(30)
    tested[7] = {"subcategory": "violet"}  # which training has not
    tested[11] = {"subcategory": "violet"}
    write(home, "tested.jsonl", tested)
    recipe, data = loaded("data.validation_path=tested.jsonl")
    model = model_of(recipe, data, seed=3).model
    head = model.classifier.head  # type: ignore[union-attr]
    with torch.no_grad():  # so that it says several things
        head.weight.copy_(5 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
        found = further(model, data, recipe, "cpu")["recognition"]
    assert list(found) == ["subcategory"]
    of = found["subcategory"]
    said, true = said_by_hand(model, data, "validation"), [x.get("subcategory", "") for x in tested]
    pairs = [(s, t) for s, t in zip(said, true, strict=True) if t]
    assert len({s for s, _ in pairs}) > 1
    wanted = by_definition([s for s, _ in pairs], [t for _, t in pairs])
    tuned = of["fine_tuned"]["splits"]["validation"]
    assert {name: tuned[name] for name in wanted} == pytest.approx(wanted)
    assert 0 < tuned["accuracy"] < 100
    assert (tuned["unseen_images"], of["fine_tuned"]["classes"]) == (2, 4)
    split = of["splits"]["validation"]
    assert (split["images"], split["unlabelled"], split["unseen_images"]) == (24, 6, 2)
    assert of["features"] == {}
    probed = further(model, data, recipe.model_copy(update={"evaluation": probes(recipe)}), "cpu")["recognition"]
    assert list(probed) == ["category", "subcategory"]
    assert "fine_tuned" not in probed["category"]
    assert probed["subcategory"]["fine_tuned"] == of["fine_tuned"]
    assert probed["subcategory"]["splits"] == of["splits"]
    assert list(probed["subcategory"]["features"]) == ["image", "text", "fused"]


def probes(recipe: Recipe) -> Any:
    return recipe.evaluation.model_copy(update={"recognition": True})


def exported(folder: Path, recipe: Recipe, data: PairData, seed: int = 0) -> PretrainingModel:
    model = model_of(recipe, data, seed)
    tensors = {name: x.detach().clone() for name, x in model.state_dict().items()}
    save_exported(folder, tensors, describe_export(recipe, "student", tensors, 7), data.tokenizer, force=True)
    return model


def test_an_export_has_the_classifier_and_evaluate_reads_it(home: Path, tmp_path: Path) -> None:
    recipe, data = loaded()
    model = exported(tmp_path / "model", recipe, data)
    loaded_model, _, config = load_exported(tmp_path / "model")
    assert isinstance(loaded_model, VisionLanguageModel)
    assert isinstance(loaded_model.classifier, Classifier)
    assert data.classes is not None
    assert config.classes == loaded_model.classifier.classes == data.classes.classes
    assert torch.equal(loaded_model.classifier.head.weight, model.model.classifier.head.weight)  # type: ignore[union-attr]
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    found = evaluate_model(tmp_path / "model", "tiny.yaml", console=console)
    (name,) = found["splits"]
    said, labels = said_by_hand(loaded_model, data, name), data.splits[name].labels["subcategory"].tolist()
    pairs = [(s, t) for s, t in zip(said, labels, strict=True) if t]
    wanted = by_definition([s for s, _ in pairs], [t for _, t in pairs])
    tuned = found["recognition"]["subcategory"]["fine_tuned"]["splits"][name]
    assert {key: tuned[key] for key in wanted} == pytest.approx(wanted)
    assert "Recognition by the fine-tuned classifier" in stream.getvalue()
    assert f"{tuned['accuracy']:.1f} / " in stream.getvalue()
    assert found["notices"] == []

    found = evaluate_model(tmp_path / "model", "tiny.yaml", ["objectives.recognition.column=category"], console=console)
    assert "recognition" not in found
    assert found["notices"] == [
        "objectives.recognition: the model's classifier is of the column subcategory, not category: set"
        " objectives.recognition.column to subcategory"
    ]
    write(home, "plain.jsonl", [{} for _ in range(20)])
    found = evaluate_model(tmp_path / "model", "tiny.yaml", ["data.path=plain.jsonl"], console=console)
    assert "the data have no column subcategory" in found["notices"][0]


def test_a_model_without_a_classifier_is_evaluated_without(tmp_path: Path) -> None:
    plain, data = loaded("objectives.recognition.weight=0", "objectives.itc.weight=1")
    student = PretrainingModel(plain.model, plain.objectives, data.tokenizer.vocabulary_size, data.max_tokens)
    tensors = student.state_dict()
    save_exported(tmp_path / "model", tensors, describe_export(plain, "student", tensors, 7), data.tokenizer)
    assert not any("classifier" in name for name in tensors)
    found = evaluate_model(tmp_path / "model", "tiny.yaml", console=Console(file=io.StringIO()))
    assert "the model has no classifier" in found["notices"][0]
    assert "recognition" not in found


def test_what_a_fine_tuning_starts_from(home: Path, tmp_path: Path) -> None:
    """The classifier of a stored model is read where its classes are the run's, and new elsewhere."""
    recipe, data = loaded()
    stored = exported(tmp_path / "model", recipe, data, seed=1).state_dict()
    given = f"model.initial={tmp_path / 'model'}"
    head = "model.classifier.head.weight"

    def start(*overrides: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
        tuned, own = loaded(given, *overrides)
        assert own.classes is not None
        student = model_of(tuned, own, seed=2)
        fresh = {name: x.clone() for name, x in student.state_dict().items()}
        initial = Initial(student, tuned, own.tokenizer)
        return student.state_dict(), fresh, initial.notices

    now, _, notices = start()
    assert torch.equal(now[head], stored[head])
    assert notices == []
    swapped = [{**x, "subcategory": f"x{x['subcategory'][1:]}"} if x else x for x in labelled(60)]
    write(home, "swapped.jsonl", swapped)  # as many classes, and their names are as long
    now, fresh, notices = start("data.path=swapped.jsonl")
    assert torch.equal(now[head.replace("classifier.head", "match_head")], stored["model.match_head.weight"])
    assert torch.equal(now[head], fresh[head])
    assert not torch.equal(now["model.classifier.names"], stored["model.classifier.names"])
    assert notices == ["model.initial: new, as they were not to be had there: classifier"]
    now, fresh, notices = start("objectives.recognition.column=category")
    assert torch.equal(now[head], fresh[head])
    assert len(notices) == 1
    plain = load_recipe("tiny.yaml", [given, "objectives.recognition.weight=0", "objectives.itc.weight=1"])
    student = PretrainingModel(
        plain.model, plain.objectives, data.tokenizer.vocabulary_size, data.max_tokens, mask_id=data.tokenizer.mask_id
    )
    Initial(student, plain, data.tokenizer)  # going on without it is no mistake
    assert torch.equal(student.model.match_head.weight, stored["model.match_head.weight"])


CASES = {
    f"zero{stage}": [f"deepspeed={{zero_optimization: {{stage: {stage}, stage3_param_persistence_threshold: 40}}}}"]
    for stage in (0, 2, 3)
}


@pytest.fixture(scope="module")
def steps(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("steps")
    recipe = home / "absolute.yaml"
    recipe.write_text(RECIPE.replace("path: pairs.jsonl", f"path: {home / 'pairs.jsonl'}"))
    done = ranks.start("recognition_steps.py", folder / "seen", recipe, json.dumps(CASES), timeout=300)
    assert all(code == 0 for code, _ in done), "\n".join(text[-3000:] for _, text in done)
    return folder, [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", list(CASES))
def test_every_zero_stage_trains_alike_and_resumes(steps: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    for seen_by in steps[1]:
        found, wanted = seen_by[case], seen_by["zero0"]
        for one, other in zip(wanted["terms"], found["terms"], strict=True):
            assert other == pytest.approx(one, rel=1e-4)
        assert found["teacher"] == pytest.approx(wanted["teacher"], rel=1e-4, abs=1e-5)  # a key's bias moves nothing
        assert found["resumed"] == found["terms"][2:]
        assert found["same"]
        assert found["terms"][-1]["recognition"] != found["terms"][0]["recognition"]


@pytest.mark.parametrize("case", list(CASES))
def test_a_runs_student_and_teacher_are_exported_with_it(
    steps: tuple[Path, list[dict[str, Any]]], case: str, tmp_path: Path
) -> None:
    for weights in ("student", "teacher"):
        export_run(steps[0] / f"run-{case}", tmp_path / weights, weights=weights)  # type: ignore[arg-type]
        model, _, config = load_exported(tmp_path / weights)
        assert config.classes == Classes(column="subcategory", names=("blue", "green", "grey", "red"))
        assert model.classifier.classes == config.classes  # type: ignore[union-attr]
        assert model.classifier.head.weight.abs().sum() > 0  # type: ignore[union-attr]


def mistakes() -> Iterator[tuple[str, list[str], str]]:
    on = "objectives.recognition.weight=1"
    yield "syncmask-emoji", [on], "a scene shows several things and has no one class; set data.scenes.fraction to 0"
    yield "syncmask-scenes", [on], "data.source: scenes has none; set data.source to emoji or pairs"
    yield "sycoca-emoji", [on], "which a captioner has none of: set objectives.recognition.weight to 0"
    yield "composed-emoji", [on], "do not describe their image; set objectives.recognition.weight to 0"
    yield "recognition-emoji", ["objectives.recognition.weight=0"], "every weight is 0"
    yield "recognition-emoji", ["objectives.recognition.column=kind"], "objectives.recognition.column"


@pytest.mark.parametrize(("name", "overrides", "problem"), list(mistakes()))
def test_a_recipes_mistakes_are_one_line(name: str, overrides: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)


ALL_ONE, HALF = {"subcategory": "shoes"}, [{"subcategory": x} for x in ("shoes", "hats")]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([{}] * 20, "the training pairs have no subcategory; add the column subcategory$"),
        ([ALL_ONE] * 20, "all training pairs are of one subcategory, 'shoes'; add the column subcategory$"),
        ([{"category": "ab"[i % 2]} for i in range(20)], "or set objectives.recognition.column to category$"),
    ],
)
def test_data_without_classes_are_one_line(home: Path, labels: list[dict[str, str]], problem: str) -> None:
    write(home, "bad.jsonl", labels)
    with pytest.raises(DataError, match=f"^objectives.recognition: .*{problem}") as caught:
        loaded("data.path=bad.jsonl")
    assert "\n" not in str(caught.value)


def test_held_out_data_without_classes_are_one_line(home: Path) -> None:
    write(home, "bare.jsonl", [{} for _ in range(8)])
    write(home, "half.jsonl", HALF * 10)
    recipe = load_recipe("tiny.yaml", ["data.path=half.jsonl"])
    data = load_data(recipe)
    for split in data.splits.values():
        split.labels = {}
    with pytest.raises(DataError, match="the held-out pairs have no subcategory"):
        training_classes(data, "subcategory")


def test_a_probe_of_scenes_says_what_has_classes() -> None:
    small = ["model.image.size=16", "model.image.patch_size=8", "data.scenes.held_out=2"]
    problem = "a scene shows several things .* set data.source to emoji, or evaluation.recognition to false$"
    with pytest.raises(DataError, match=problem) as caught:
        load_data(load_recipe("syncmask-scenes", ["evaluation.recognition=true", *small]))
    assert "column" not in str(caught.value)
