"""``crossmask evaluate``: exported models, converted ones and runs on a user's pairs; mistakes are one line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from crossmask.engine import cli, model_evaluation
from crossmask.engine.data import load_data
from crossmask.engine.errors import CheckpointError, DataError, RecipeError
from crossmask.engine.evaluation.retrieval import evaluate_split
from crossmask.engine.exported import describe_export, load_exported, save_exported
from crossmask.engine.model_evaluation import evaluate_model
from crossmask.engine.models import PretrainingModel, VisionLanguageModel
from crossmask.engine.recipe_files import load_recipe
from crossmask.engine.training.stored import RunModel

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
RECIPE = """
name: tiny
data: {source: pairs, path: train.jsonl, vocabulary_size: 200, max_words: 8, augment: 0}
model:
  image: {size: 16, patch_size: 8, width: 16, depth: 1, heads: 2}
  text: {width: 16, depth: 1, heads: 2, dropout: 0.0}
  fusion: {depth: 2, heads: 2, dropout: 0.0}
  projection_width: 8
evaluation: {rerank: 4, sampled: {draws: 2, queries: 5, negatives: 3}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, captions in three layouts, a recipe, and a model that was trained on none of them."""
    folder = tmp_path_factory.mktemp("home")
    luck = np.random.default_rng(0)
    karpathy, lines = [], []
    for i in range(12):
        name = f"{i:02}.png"
        Image.fromarray(luck.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / name)
        captions = [f"a {COLOURS[i % 8]} {word} number {i}" for word in ("square", "picture")]
        split = "test" if i < 8 else "train"
        karpathy.append({"filename": name, "split": split, "sentences": [{"raw": c} for c in captions]})
        lines += [{"image": name, "caption": c, "category": COLOURS[i % 2], "group": f"g{i}"} for c in captions]
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "tiny.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "tiny.yaml", ["data.normalisation=clip"])
    data = load_data(recipe)
    torch.manual_seed(0)
    student = PretrainingModel(recipe.model, recipe.objectives, data.tokenizer.vocabulary_size, data.max_tokens)
    with torch.no_grad():
        student.temperature.fill_(0.03125)
    for name, tensors in (("student", dict(student.named_parameters())), ("teacher", None)):
        tensors = tensors or dict(VisionLanguageModel(
            recipe.model, data.tokenizer.vocabulary_size, data.max_tokens).named_parameters())  # fmt: skip
        tensors = {key: value.detach() for key, value in tensors.items()}
        config = describe_export(recipe, name, tensors, 7)  # type: ignore[arg-type]
        save_exported(folder / name, tensors, config, data.tokenizer)
    return folder


@pytest.fixture(autouse=True)
def there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def evaluated(*overrides: str, model: str = "student", **more: Any) -> tuple[dict[str, Any], str]:
    stream = io.StringIO()
    found = evaluate_model(Path(model), "tiny.yaml", overrides, console=Console(file=stream, width=80), **more)
    return found, stream.getvalue()


def test_karpathys_test_split_with_the_models_own_words(home: Path, tmp_path: Path) -> None:
    asked = ["data.path=karpathy.json", "data.normalisation=half"]
    found, shown = evaluated(*asked, output=tmp_path / "new" / "found.json")
    split = found["splits"]["test"]
    assert (split["images"], split["captions"]) == (8, 16)
    assert split["sampled"]["draws"] == 2
    assert split["reranked"]["candidates"] == 4
    assert (found["temperature"], found["weights"], found["step"]) == (0.03125, "student", 7)
    assert json.loads((tmp_path / "new" / "found.json").read_text()) == found
    assert not list((tmp_path / "new").glob("*.part"))
    assert f"{split['sum']:.1f}" in shown
    assert "pixels normalised as the model was trained: clip, not half" in shown
    # the same by hand: the model's normalisation and tokenizer on the recipe's pairs
    model, tokenizer, config = load_exported(home / "student")
    recipe = load_recipe("tiny.yaml", [asked[0], "data.normalisation=clip", f"data.max_tokens={config.max_length}"])
    by_hand = evaluate_split(model, load_data(recipe, tokenizer).splits["test"], "cpu", 0.03125, recipe.evaluation)
    assert by_hand == split


def test_a_models_tokenizer_reads_data_that_it_was_not_trained_on(home: Path) -> None:
    """Captions with letters that the vocabulary has not are unknown words, not an error; nothing need be trained on."""
    Image.new("RGB", (9, 9), "red").save(home / "x.png")
    Image.new("RGB", (9, 9), "blue").save(home / "y.png")
    rows = [{"image": "x.png", "caption": ["ωμέγα", "red"]}, {"image": "y.png", "caption": ["blue"]}]
    (home / "other.json").write_text(json.dumps(rows))
    found, _ = evaluated("data.path=other.json", "data.validation_path=other.json")
    (split,) = found["splits"].values()
    assert (split["images"], split["captions"]) == (2, 3)


def test_all_of_a_file_without_splits_at_the_models_own_size(home: Path) -> None:
    shape = ["model.image.size=32", "data.max_tokens=90"]
    found, shown = evaluated("data.validation_fraction=0.1", *shape)
    (split,) = found["splits"].values()
    assert (split["title"], split["images"], split["captions"]) == (f"all 24 pairs of {home / 'train.jsonl'}", 12, 24)
    assert "images read at the size that the model was trained at: 16 pixels, not 32" in shown
    assert "captions cut at the model's longest: 18 tokens, not 90" in shown
    assert found["splits"] == evaluated()[0]["splits"]
    assert not evaluated()[0]["notices"]


def test_the_emoji_splits(home: Path) -> None:
    (home / "emoji.yaml").write_text(
        "evaluation: {rerank: 2, rerank_queries: 3}\ndata: {source: emoji, max_words: 8}\nmodel: {image: {size: 16}}"
    )
    stream = io.StringIO()
    found = evaluate_model(Path("teacher"), "emoji.yaml", console=Console(file=stream, width=80))
    assert list(found["splits"]) == ["a", "b", "c"]
    assert found["splits"]["a"]["reranked"]["i2t"]["queries"] == 3
    assert found["temperature"] == 0.07
    assert "the temperature that training began with, 0.07" in stream.getvalue()


def test_a_run_is_read_from_its_checkpoint(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its teacher, with the temperature that was last logged before the checkpoint."""
    run, given = home / "run", load_recipe("tiny.yaml", ["data.normalisation=clip"])
    run.mkdir()
    (run / "recipe.yaml").write_text("name: tiny")
    logged = [{"kind": "train", "step": 5, "temperature": 0.0625}, {"kind": "train", "step": 9, "temperature": 0.5}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, logged)))
    _, tokenizer, _ = load_exported(home / "teacher")
    asked: list[object] = []

    def read(folder: Path, wanted: object, tell: object) -> object:
        asked.append(wanted)
        assert tokenizer is not None
        return given, 7, RunModel(tokenizer, load_file(home / "teacher" / "model.safetensors"), None, None)

    monkeypatch.setattr(model_evaluation, "read_run", read)
    found, _ = evaluated("data.path=karpathy.json", model="run")
    assert asked == [()]
    assert (found["weights"], found["step"], found["temperature"]) == ("teacher", 7, 0.0625)
    assert not found["notices"]
    (notice,) = evaluated(model="run")[0]["notices"]
    assert notice.endswith("train.jsonl: these recalls do not speak of new images")
    exported, _ = evaluated("data.path=karpathy.json", model="teacher")
    assert found["splits"]["test"]["i2t"] == exported["splits"]["test"]["i2t"]


@pytest.mark.parametrize(
    ("model", "overrides", "error", "words"),
    [
        ("student", ["data.path=trained.json"], DataError, "neither val nor test images in it; give another data.path"),
        ("nowhere", [], CheckpointError, "nowhere: no such folder; give a folder of crossmask convert"),
        (".", [], CheckpointError, "neither config.json nor recipe.yaml is in it"),
        ("student", ["data.path=gone.json"], RecipeError, "gone.json"),
        ("bare", [], CheckpointError, "bare: no tokenizer.json in it"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    home: Path, model: str, overrides: list[str], error: type[Exception], words: str
) -> None:
    trained = {"filename": "00.png", "split": "train", "sentences": [{"raw": "a red square"}]}
    (home / "trained.json").write_text(json.dumps({"images": [trained]}))
    if model == "bare" and not (home / "bare").exists():
        (home / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (home / "bare" / name).write_bytes((home / "student" / name).read_bytes())
    with pytest.raises(error) as caught:
        evaluated(*overrides, model=model)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_said_before_anything_is_computed(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder; name a file"):
        evaluated(output=tmp_path, model="nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"x.json cannot be written, .*file is a file; name another"):
        evaluated(output=tmp_path / "file" / "x.json", model="nowhere")


def test_on_the_command_line(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    output = tmp_path / "found.json"
    arguments = ["evaluate", "student", "tiny.yaml", "data.path=karpathy.json", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["crossmask", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    out, err = capsys.readouterr()
    assert "Karpathy's test split" in out
    assert "TR R@1" in out
    assert "retrieval: Karpathy's test split" in err
    assert json.loads(output.read_text())["splits"]["test"]["images"] == 8
    monkeypatch.setattr(sys, "argv", ["crossmask", "evaluate", "teacher", "tiny.yaml", "--student"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "has no student, only the teacher; ask for that" in capsys.readouterr().err
