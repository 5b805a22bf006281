"""A captioner at the end of a run, in ``crossmask evaluate`` and ``crossmask caption``: numbers, tables, pictures."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from crossmask.engine.cli import app
from crossmask.engine.data import load_data
from crossmask.engine.errors import CheckpointError, DataError, RecipeError
from crossmask.engine.evaluation import build_report, evaluate, print_summary, write_caption_gallery, write_gallery
from crossmask.engine.evaluation.caption_gallery import read_captions
from crossmask.engine.evaluation.captioning import write_captions
from crossmask.engine.evaluation.generation import generate
from crossmask.engine.exported import describe_export, load_exported, save_exported
from crossmask.engine.model_evaluation import evaluate_model
from crossmask.engine.models.captioner import CaptioningModel
from crossmask.engine.objectives import RunMasks
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_files import load_recipe

MODEL = {
    "image": {"size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2},
    "text": {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0},
    "projection_width": 8,
    "captioner": {"depth": 1, "heads": 2},
}
OBJECTIVES: dict[str, Any] = {
    "itc": {"queue_length": 0, "distillation": 0.0},
    "caption": {"weight": 2.0},
    **{name: {"weight": 0.0} for name in ("itm", "mlm", "mim")},
}
MASKING = {"policy": "sycoca", "options": {"side": "both"}, "text_ratio": 0.0}
CAPTIONING = {"samples": 6, "beams": 2, "max_tokens": 6, "shown": 2}


def tiny(data: dict[str, Any], **evaluation: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"max_words": 8, **data},
            "model": MODEL,
            "objectives": OBJECTIVES,
            "masking": MASKING,
            "evaluation": {"mask_samples": 8, "gallery_pairs": 2, "captioning": CAPTIONING, **evaluation},
        }
    )


def captioner(recipe: Recipe, data: Any) -> CaptioningModel:
    torch.manual_seed(0)
    return CaptioningModel(recipe.model, data.tokenizer.vocabulary_size, data.max_tokens)


def test_the_end_of_a_run_on_the_emoji_set(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    recipe = tiny({"source": "emoji"})
    data = load_data(recipe)
    model, masks = captioner(recipe, data), RunMasks(recipe, data)

    def look(model: Any, batch: Any) -> Any:
        seen = masks.see(model, batch)
        return seen, masks.plan(model, batch, seen, 0)

    found = evaluate(model, data, look, recipe, "cpu", full=True)
    assert model.training, "evaluation leaves the mode alone"
    json.dumps(found)
    for name in ("a", "b", "c"):
        captions, classes = found["captioning"][name], found["zero_shot"][name]
        assert captions["images"] == 6
        assert captions["references"] == 1.0
        assert 0 <= captions["bleu4"] <= 100
        assert len(captions["examples"]) == 2
        assert {level: own["classes"] for level, own in classes.items()}.keys() == {"category", "subcategory", "name"}
        assert found["splits"][name]["reranked"] is None
    assert found["zero_shot"]["a"]["name"]["classes"] > 1500
    assert found["captioning"]["a"]["title"] == "known captions, held-out designer"
    assert 0 < found["masks"]["on_drawing"] <= 1
    assert 0 <= found["masks"]["pointing"] <= 1
    assert "itm_loss" not in found["masks"]
    assert "itm_loss" not in evaluate(model, data, look, recipe, "cpu", full=False)

    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    write_caption_gallery(tmp_path, found, data)
    write_gallery(tmp_path, model, data, look, recipe, "cpu")
    shown = read_captions(tmp_path)
    assert [split["split"] for split in shown] == ["a", "b", "c"]
    example = shown[0]["examples"][0]
    assert example["image"].startswith("data:image/png;base64,")
    html = build_report(tmp_path).read_text()
    assert "<h2>Captions</h2>" in html
    assert example["image"] in html
    assert example["references"][0] in html
    assert "Zero-shot classification" in html
    screen = io.StringIO()
    print_summary(found, Console(file=screen, width=120))
    assert "Captions of held-out images" in screen.getvalue()
    assert "CIDEr" in screen.getvalue()
    assert "macro-F1" in screen.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with two captions each and a category, and an exported captioner of their words."""
    folder, luck, lines = tmp_path_factory.mktemp("home"), np.random.default_rng(0), []
    for i in range(10):
        colour = ("red", "green", "blue")[i % 3]
        Image.fromarray(luck.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        for word in ("square", "picture"):
            line = {"image": f"{i}.png", "caption": f"A {colour} {word}, number {i}!", "group": f"g{i}"}
            lines.append(line | ({"category": colour.upper()} if i != 9 else {}))
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    recipe = tiny({"source": "pairs", "path": folder / "pairs.jsonl", "vocabulary_size": 200, "augment": 0})
    data = load_data(recipe)
    tensors = {name: value.detach() for name, value in captioner(recipe, data).named_parameters()}
    save_exported(folder / "model", tensors, describe_export(recipe, "teacher", tensors, 7), data.tokenizer)
    classes = {"RED": ["red", "scarlet"], "GREEN": "green", "BLUE": "blue"}
    (folder / "prompts.json").write_text(json.dumps({"templates": ["a {} square"], "classes": classes}))
    settings = "{samples: 6, beams: 2, max_tokens: 6, shown: 2}"
    (folder / "mine.yaml").write_text(
        f"data: {{source: pairs, path: pairs.jsonl, max_words: 8}}\nevaluation: {{rerank: 4, captioning: {settings}}}"
    )
    return folder


@pytest.fixture(autouse=True)
def there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def evaluated(*overrides: str) -> dict[str, Any]:
    return evaluate_model(Path("model"), "mine.yaml", overrides, console=Console(file=io.StringIO(), width=100))


def test_a_users_pairs_with_all_their_captions_and_prompts(home: Path) -> None:
    found = evaluated("evaluation.prompts=prompts.json")
    (captions,), (classes,) = found["captioning"].values(), found["zero_shot"].values()
    assert captions["references"] == 2.0
    references = captions["examples"][0]["references"]
    assert len(references) == 2
    assert references[0].split()[::2] == ["a", "square", references[0].split()[-1]]
    assert classes["category"].keys() >= {"top1", "top5", "macro_f1", "chance"}
    assert (classes["category"]["classes"], classes["category"]["images"]) == (3, 9)
    assert classes["category"]["unlabelled"] == 1
    assert not found["notices"]
    assert "captioning" not in evaluated("evaluation.captioning.samples=0")


def test_captions_do_not_depend_on_the_batch(home: Path) -> None:
    model, tokenizer, _ = load_exported("model")
    assert isinstance(model, CaptioningModel)
    assert tokenizer is not None
    written = []
    for more in (
        {"batch_size": 1},
        {"batch_size": 4},
        {"batch_size": 4, "top_p": 0.9},
        {"batch_size": 1, "top_p": 0.9},
    ):
        fields = {**CAPTIONING, "samples": 100, **more}
        recipe = tiny({"source": "pairs", "path": home / "pairs.jsonl"}, captioning=fields)
        (split,) = load_data(recipe, tokenizer).splits.values()
        captions = write_captions(model, split, tokenizer, recipe, "cpu")
        assert captions.rows.tolist() == list(range(10))
        written.append(captions.texts)
    assert written[0] == written[1]
    assert written[2] == written[3]
    assert written[0] != written[2]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"classes": ["x", "y"]}, "no image is of any of its classes (x, y, …): the column category has BLUE, GREEN"),
        ({"classes": {"x": ["x", "x\ud83d"], "y": "y"}}, "has half a character, \\ud83d, as number 2; write the whole"),
        ({"classes": ["x", "y"], "level": "shop"}, "the images have no shop; add the column shop"),
    ],
)
def test_prompts_that_do_not_go_with_the_data(home: Path, prompts: dict[str, Any], words: str) -> None:
    (home / "other.json").write_text(json.dumps(prompts))
    with pytest.raises(RecipeError) as caught:
        evaluated("evaluation.prompts=other.json")
    assert words in str(caught.value)
    with pytest.raises(RecipeError, match=r"evaluation\.prompts: no such file .*gone\.json"):
        load_recipe("mine.yaml", ["evaluation.prompts=gone.json"])


def test_captions_of_ones_own_pictures() -> None:
    run = CliRunner().invoke
    found = run(app, ["caption", "model", "0.png", "3.png", "--beams", "1", "--max-tokens", "4"])
    assert found.exit_code == 0, found.output
    rows = [line.split("\t") for line in found.stdout.splitlines()]
    assert [row[0] for row in rows] == ["0.png", "3.png"]
    assert all(float(row[2]) < 0 for row in rows)
    assert all(row[1] for row in rows)
    drawn = [run(app, ["caption", "model", "0.png", "--top-p", "0.9", "--seed", seed]).stdout for seed in "001"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_captions_are_as_long_as_the_model_can_write_and_as_wide_as_memory_bears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once: list[int] = []

    def counted(model: Any, context: Any, section: Any, *others: Any) -> Any:
        at_once.append(len(context.tokens) * section.beams)
        return generate(model, context, section, *others)

    monkeypatch.setattr("crossmask.engine.caption_images.generate", counted)
    names, run = [f"{i}.png" for i in range(5)], CliRunner().invoke
    whole, cut, few = (
        run(app, ["caption", "model", *names, "--beams", "64", *more])
        for more in ([], ["--max-tokens", "1000"], ["--max-tokens", "4"])
    )
    assert whole.stdout == cut.stdout != few.stdout
    assert at_once == [192, 128] * 3
    # 8 words make 18 tokens at most, and [CLS] is none of a caption's own
    assert cut.stderr.strip() == "--max-tokens 1000: this model's longest caption has 17 tokens, which are taken"
    assert not whole.stderr + few.stderr


def test_a_picture_whose_name_is_not_utf8(home: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (home / name).write_bytes((home / "0.png").read_bytes())
    found = CliRunner().invoke(app, ["caption", "model", name])
    assert found.exit_code == 0, found.exception
    assert found.stdout_bytes.startswith(b"caf\xe9.png\t")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["model", "gone.png"], DataError, "gone.png: no such file"),
        (["model", "."], DataError, ".: it is a folder; name the pictures in it"),
        (["model", "mine.yaml"], DataError, "mine.yaml cannot be read: it is not an image; give another picture, or"),
        (["model", "half.png"], DataError, "half.png cannot be read: "),
        (["model", "0.png", "--beams", "65"], RecipeError, "--beams 65: a search keeps at most 64; give 64 or fewer"),
        (["model", "0.png", "--top-p", "2"], RecipeError, "--top-p: input should be less than or equal to 1"),
        (["model", "0.png", "--temperature", "2"], RecipeError, "--temperature (2) is of --top-p, which is not set"),
        (["nowhere", "0.png"], CheckpointError, "nowhere: no such folder"),
    ],
)
def test_mistakes_of_the_command_line(home: Path, arguments: list[str], error: type[Exception], words: str) -> None:
    (home / "half.png").write_bytes((home / "0.png").read_bytes()[:100])
    found = CliRunner().invoke(app, ["caption", *arguments])
    assert isinstance(found.exception, error)
    assert words in str(found.exception)
    assert arguments[1] == "." or str(found.exception).count(arguments[1]) <= 1
    assert "start again" not in str(found.exception)
    assert "\n" not in str(found.exception)
    assert "value error" not in str(found.exception)
