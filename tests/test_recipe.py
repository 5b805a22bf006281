"""Reading recipes: values, overrides, paths, and one line for everything that can be wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crossmask.engine import Recipe, dump_recipe, load_recipe
from crossmask.engine.errors import CheckpointError, RecipeError
from crossmask.engine.recipe_fields import describe, dotted_paths
from crossmask.engine.recipe_files import SHIPPED, check_world, choose_run_dir, load_run_recipe, shipped_recipes

RECIPE = """
name: small
training: {batch_size: 32, max_steps: 100}
optimizer:
  lr: 1e-3        # a number in YAML 1.2, text to a plain YAML 1.1 reader
  warmup_steps: 40
data:             # nothing in it: the defaults
"""

BRING_YOUR_OWN = ("albef", "albef-retrieval", "syncmask", "sycoca")  # recipes without data of their own


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*overrides: str, path: str = "small.yaml") -> str:
    before = sorted(os.listdir())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert sorted(os.listdir()) == before, "nothing is created on disk"
    return message


def test_values_and_defaults(folder: Path) -> None:
    recipe = load_recipe("small.yaml")
    assert (recipe.name, recipe.optimizer.lr, recipe.training.batch_size) == ("small", 1e-3, 32)
    assert recipe.data == Recipe().data


def test_a_pattern_of_shards_that_a_shell_took_apart(folder: Path) -> None:
    refused = refusal("data.path=/d/s-0.tar", "data.path=/d/s-1.tar", "data.path=/d/s-2.tar")
    assert refused.startswith(
        "override data.path=/d/s-1.tar: data.path is given 3 times; quote a pattern, for the shell"
    )


def test_overrides_are_yaml_and_the_last_one_wins(folder: Path) -> None:
    recipe = load_recipe(
        "small.yaml",
        [
            *("training.max_steps=7", "training.max_steps=20", "model.fusion.depth=4", "optimizer.lr=3e-4"),
            *("data.scenes.fraction=0.5", "data.scenes.max_things=3", "objectives.fusion_rows=null"),
            *("optimizer.betas=[0.9, 0.98]", "note=two words: one line", "masking={image_ratio: 0.25}"),
        ],
    )
    assert (recipe.training.max_steps, recipe.training.batch_size) == (20, 32)
    assert (recipe.model.fusion.depth, recipe.optimizer.lr, recipe.optimizer.betas) == (4, 3e-4, (0.9, 0.98))
    assert (recipe.data.scenes.fraction, recipe.data.scenes.max_things) == (0.5, 3)
    assert recipe.note == "two words: one line", "text stays text, whatever YAML would see in it"
    assert (recipe.masking.image_ratio, recipe.masking.text_ratio) == (0.25, 0.15)


def test_a_dumped_recipe_reads_back_equal(folder: Path) -> None:
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    recipe = load_recipe("small.yaml", ["deepspeed=zero.json", "optimizer.final_lr=1e-6", "note=±1 °C"])
    text = dump_recipe(recipe)
    (folder / "zero.json").unlink()
    (folder / "again.yaml").write_text(text)
    assert load_recipe("again.yaml") == recipe
    assert recipe.deepspeed == {"zero_optimization": {"stage": 1}}, "the run folder needs no other file"
    # numbers by default, and what is not there by default
    other = ("masking.image_ratio.", "masking.text_ratio.", "masking.corruption.rate.", "model.captioner.")
    names = [name for name in dotted_paths(Recipe) if not name.startswith(other)]
    assert all(f"{name.rpartition('.')[2]}:" in text for name in names)


def test_a_short_run_cuts_its_warm_up_and_says_so(folder: Path) -> None:
    assert load_recipe("small.yaml").warmup_steps == 40
    assert load_recipe("small.yaml").notices() == []
    short = load_recipe("small.yaml", ["training.max_steps=20"])
    assert short.warmup_steps == 10
    assert short.notices() == ["warm-up is cut to 10 of the 20 steps (optimizer.warmup_steps is 40)"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_stps=3", "unknown key training.max_stps; did you mean training.max_steps?"),
        ("trainng.max_steps=3", "unknown key trainng; did you mean training?"),
        ("max_steps=3", "unknown key max_steps; did you mean training.max_steps?"),
        ("data.scenes.fracton=1", "unknown key data.scenes.fracton; did you mean data.scenes.fraction?"),
        ("training.max_steps=abc", "training.max_steps: 'abc' is not allowed; expected a whole number ≥ 1"),
        ("training.max_steps=2.5", "training.max_steps: 2.5 is not allowed; expected a whole number ≥ 1"),
        ("training.max_steps=true", "training.max_steps: true is not allowed; expected a whole number ≥ 1"),
        ("training.max_steps=", "training.max_steps: None is not allowed; expected a whole number ≥ 1"),
        ("training.max_steps=0", "training.max_steps: 0 is not allowed; expected a whole number ≥ 1"),
        ("data.scenes.fraction=2", "data.scenes.fraction: 2 is not allowed; expected a number ≥ 0 and ≤ 1"),
        ("optimizer.lr=.nan", "optimizer.lr: nan is not allowed; expected a number > 0"),
        ("optimizer.betas=[1, 0.9]", "expected a list of 2, each a number ≥ 0 and < 1"),
        ("training.precision=bf61", "'bf61' is not allowed; expected one of bf16, fp16, fp32"),
        ("data.mirror=perhaps", "data.mirror: 'perhaps' is not allowed; expected true or false"),
        ("training=3", "training: 3 is not allowed; expected a section with keys of its own"),
        ("name=a/b", "name: 'a/b' is not allowed; expected text"),
        ("model.image.width=10", "model.image: width (10) is not a multiple of heads (12)"),
        ("model.fusion.heads=5", "model: text.width (768) is not a multiple of fusion.heads (5)"),
        ("masking.layer=6", "masking.layer (6) is not one of the 6 layers of model.fusion.depth"),
        ("masking.layer=-7", "masking.layer (-7) is not one of the 6 layers"),
        ("data.source=pairs", "data: path is missing"),
        ("data.source=emojis", "data.source: unknown source 'emojis'; did you mean 'emoji'?"),
        ("deepspeed=3", "deepspeed: 3 is not allowed; expected a JSON file's path or a mapping"),
        ("masking.policy=synkmask", "unknown policy 'synkmask'; did you mean 'syncmask'?"),
        ("training.max_steps", "write it as section.field=value"),
        ("name=[a", "'[a' is not a YAML value"),
    ],
)
def test_a_bad_override_is_named_with_what_is_allowed(folder: Path, override: str, words: str) -> None:
    message = refusal("training.batch_size=64", override)
    assert message.startswith(f"override {override}: ")
    assert words in message


def test_no_objective_left(folder: Path) -> None:
    weights = [f"objectives.{name}.weight=0" for name in ("itc", "itm", "mlm", "mim")]
    assert "every weight is 0" in refusal(*weights)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  max_stpes: 3\n", "bad.yaml: unknown key training.max_stpes; did you mean training.max_steps?"),
        ("training: {max_steps: x}\nseed: -1\nfoo: 1\n", "(and 2 more)"),
        ("name: a\nseed: 1\nname: b\n", "bad.yaml, line 3: key 'name' is given twice"),
        ("name: a\ntraining: {max_steps: 1\nseed: 1\n", "bad.yaml, line 3: "),
        ("name: a\n\tseed: 1\n", "bad.yaml, line 2: "),
        ("1: a\n", "bad.yaml, line 1: key 1 is not text"),
        ("- a\n", "not a list; see crossmask recipes"),
        ("name: !!python/name:os.system\n", "bad.yaml, line 1: could not determine a constructor"),
    ],
)
def test_a_bad_file_is_named_with_its_line(folder: Path, text: str, words: str) -> None:
    (folder / "bad.yaml").write_text(text)
    message = refusal(path="bad.yaml")
    assert message.startswith("bad.yaml")
    assert words in message


def test_text_that_is_not_text(folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(b"name: \xff\xfe\n")
    assert refusal(path="bad.yaml").startswith("bad.yaml: not a YAML text file")


def test_a_missing_file_names_the_nearest(folder: Path) -> None:
    assert refusal(path="smal.yaml") == "smal.yaml: no such recipe; did you mean small.yaml?"
    assert refusal(path="nowhere/small.yaml").startswith("nowhere/small.yaml: no such recipe; ")
    assert refusal(path=".") == ".: a folder, not a recipe; there is small.yaml"
    (folder / "captions.csv").write_text("image,caption\n")
    message = refusal("data.source=pairs", "data.path=caption.csv")
    assert message.startswith("override data.path=caption.csv: data.path: no such file")
    assert message.endswith(f"did you mean {folder / 'captions.csv'}?")
    message = refusal("deepspeed=zero7.json")
    assert message.startswith("override deepspeed=zero7.json: deepspeed: no DeepSpeed configuration")
    assert message.endswith("did you mean zero3.json?") or "did you mean zero" in message


def test_paths_in_a_file_are_relative_to_it_and_in_an_override_to_where_you_stand(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "pairs.csv").write_text("image,caption\n")
    (folder / "deep" / "r.yaml").write_text("data: {source: pairs, path: pairs.csv}\n")
    assert load_recipe("deep/r.yaml").data.path == folder / "deep" / "pairs.csv"
    assert load_recipe("small.yaml", ["data.source=pairs", "data.path=deep/pairs.csv"]).data.path == (
        folder / "deep" / "pairs.csv"
    )


def test_shipped_recipes_are_found_by_name_anywhere(folder: Path) -> None:
    assert {f"zero{stage}.json" for stage in range(4)} <= {file.name for file in SHIPPED.iterdir()}
    (folder / "pairs.json").write_text("[]")
    for name in shipped_recipes():
        given = ["data.path=pairs.json"] if name in BRING_YOUR_OWN else []
        recipe = load_recipe(name, given)
        assert recipe == load_recipe(f"recipes/{name}.yaml", given)
        assert recipe.note, f"{name} says how long it takes"


@pytest.mark.parametrize("name", BRING_YOUR_OWN)
def test_a_recipe_for_your_own_pairs_says_that_it_needs_them(folder: Path, name: str) -> None:
    assert refusal(path=name).startswith(f"{name}: data: path is missing")


def test_the_batch_divides_among_ranks() -> None:
    recipe = Recipe.model_validate({"training": {"batch_size": 36, "accumulation_steps": 2}})
    assert check_world(recipe, 2) == 9
    with pytest.raises(RecipeError, match=r"training.batch_size: 36 is not divisible by 8 ranks × 2 .* 32 or 48"):
        check_world(recipe, 8)
    with pytest.raises(RecipeError, match="nearest sizes: 64"):
        check_world(recipe, 32)


def test_the_run_folder(folder: Path) -> None:
    recipe = load_recipe("small.yaml")
    first = choose_run_dir(recipe)
    assert first.parent == folder / "runs"
    assert first.name.startswith("small-20")
    assert not first.exists()
    first.mkdir(parents=True)
    assert choose_run_dir(recipe) != first
    used = folder / "used"
    (used / "checkpoints").mkdir(parents=True)
    with pytest.raises(RecipeError, match="already holds files; choose another"):
        choose_run_dir(load_recipe("small.yaml", ["output=used"]))
    (used / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match="continue it with --resume used"):
        choose_run_dir(load_recipe("small.yaml", ["output=used"]))
    with pytest.raises(RecipeError, match=r"small.yaml is a file; choose another"):
        choose_run_dir(load_recipe("small.yaml", ["output=small.yaml/run"]))
    (folder / "empty").mkdir()
    assert choose_run_dir(load_recipe("small.yaml", ["output=empty"])) == folder / "empty"


def test_a_resumed_run_keeps_its_recipe(folder: Path) -> None:
    run = folder / "runs" / "small-1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("small.yaml")))
    assert load_run_recipe(run) == load_recipe("small.yaml")
    assert load_run_recipe(run, ["training.log_every=1"]).training.log_every == 1
    with pytest.raises(RecipeError, match=r"override optimizer.lr=1: a resumed run keeps its recipe.*checkpoint_every"):
        load_run_recipe(run, ["optimizer.lr=1"])
    with pytest.raises(CheckpointError, match=r"small-2: not a run folder.*did you mean .*small-1\?"):
        load_run_recipe(run.with_name("small-2"))


def test_fields_in_words() -> None:
    assert describe(Recipe, "objectives.fusion_rows") == "a whole number ≥ 2 or null"
    assert describe(Recipe, "masking.image_threshold") == "a number ≥ 0 and ≤ 1 or null"
    assert describe(Recipe, "data.path") == "a path or null"
    assert "training.max_steps" in dotted_paths(Recipe)
    assert not any("object at" in describe(Recipe, name) for name in dotted_paths(Recipe))
