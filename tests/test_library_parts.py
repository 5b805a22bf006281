"""Parts from outside by name: what a recipe says of them, how modules come to be imported, and when they never do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crossmask.engine import PairList, Recipe, Section, load_recipe, register_objective, registry
from crossmask.engine.data import load_data
from crossmask.engine.errors import DataError, RecipeError
from crossmask.engine.masking.registry import find_policy
from crossmask.engine.objectives import ObjectiveView
from crossmask.engine.objectives.own import own_terms
from crossmask.engine.plugins import import_announced

PARTS = """
from crossmask.engine import PairList, Section, System, register_objective, register_source, register_system

class Options(Section):
    count: int = 4
    table: Path | None = None

@register_source("parts_dots", Options)
def dots(recipe, options, tokenizer):
    raise NotImplementedError

@register_system("parts_model")
class Model(System):
    class Options(Section):
        depth: int = 1

@register_objective("parts_loss", Options)
def loss(view, options):
    raise NotImplementedError
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with my_parts.py, where one stands; whatever it registers is forgotten afterwards."""
    (tmp_path / "my_parts.py").write_text("from pathlib import Path\n" + PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for kept in (registry.systems, registry.objectives, registry.sources):
        monkeypatch.setattr(kept, "_parts", dict(kept._parts))
    yield tmp_path
    for name in ("my_parts", "my_broken"):
        sys.modules.pop(name, None)


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("syncmask-emoji", overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OWN = ("plugins=[my_parts]", "data.source=parts_dots", "model.system=parts_model")


def test_a_recipe_names_the_modules_that_know_its_parts(parts: Path) -> None:
    recipe = load_recipe("albef-emoji", ["plugins=[my_parts]", "objectives.own={parts_loss: {weight: 0.5}}"])
    assert recipe.objectives.own["parts_loss"].weight == 0.5
    (parts / "own.yaml").write_text(
        "plugins: [my_parts]\ndata: {source: parts_dots, options: {table: t.npy}}\nmodel: {system: parts_model}\n"
    )
    own = load_recipe(parts / "own.yaml")
    assert own.data.options == {"table": str(parts / "t.npy")}
    assert own.objectives.itm.weight == own.objectives.mim.weight == 0  # an own model has none of them
    assert Recipe.model_validate(own.model_dump(mode="json")) == own


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.source=emojis"],
            "data.source: unknown source 'emojis'; did you mean 'emoji'? plugins names the modules",
        ),
        (["plugins=[my_parts]", "data.source=parts_dot"], "did you mean 'parts_dots'?"),
        (["model.system=my_clip", "objectives.mlm.weight=0"], "objectives.mim needs crossmask's own model"),
        ([*OWN, "model.options={depht: 2}"], "has no option"),
        (["plugins=[my_parts]", "objectives.own={parts_los: {}}"], "did you mean 'parts_loss'?"),
        (["plugins=[my_parts]", "objectives.own={parts_loss: {options: {count: x}}}"], "expected a whole number"),
        (["data.options={count: 3}"], "source 'emoji' has none"),
        (["model.options={depth: 3}"], "no model.system to read them"),
        (["plugins=[my_part]"], "plugins: there is no module my_part; install it, or start where it lies"),
        (["plugins=my_parts"], "plugins: 'my_parts' is not allowed; expected"),
    ],
)
def test_a_part_that_cannot_be_used_is_one_line(parts: Path, overrides: list[str], words: str) -> None:
    off = [f"objectives.{name}.weight=0" for name in ("itm", "mlm", "mim")]
    line = refusal(*(off if "model.system=parts_model" in overrides else []), *overrides)
    assert words in line


def test_a_module_that_cannot_be_imported_is_one_line(parts: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (parts / "my_broken.py").write_text("import my_missing\n")
    line = refusal("plugins=[my_broken]")
    assert "module my_broken cannot be imported: ModuleNotFoundError: No module named 'my_missing'" in line
    assert capfd.readouterr().err == ""
    (parts / "my_broken.py").write_text("raise SystemExit('no')\n")
    monkeypatch.setenv("CROSSMASK_VERBOSE", "1")
    assert "SystemExit: no" in refusal("plugins=[my_broken]")
    assert "Traceback" in capfd.readouterr().err


def test_what_is_not_trusted_imports_nothing(parts: Path) -> None:
    (parts / "own.yaml").write_text("plugins: [my_parts]\nmasking: {policy: random}\n")
    assert load_recipe(parts / "own.yaml", trusted=False).plugins == ["my_parts"]
    assert "my_parts" not in sys.modules
    load_recipe(parts / "own.yaml", ["plugins=[my_parts]"], trusted=False)
    assert "my_parts" in sys.modules


def test_installed_packages_announce_theirs(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "my_parts", "crossmask.parts")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == entry.group else [])
    monkeypatch.syspath_prepend(str(parts))
    import_announced.cache_clear()
    try:
        assert registry.systems.knows("parts_model")
        sys.modules.pop("my_parts")
        import_announced.cache_clear()
        registry.systems._parts.clear()
        assert find_policy("parts_policy") is None  # asked all the same: a package may announce policies alone
        assert "parts_model" in registry.systems._parts
    finally:
        import_announced.cache_clear()


def test_a_name_is_taken_once(parts: Path) -> None:
    register_objective("parts_twice")(print)
    register_objective("parts_twice")(print)  # the same, of a module that is imported again
    with pytest.raises(ValueError, match="objective 'parts_twice' is already registered"):
        register_objective("parts_twice")(repr)
    with pytest.raises(ValueError, match="objective 'itc' is already registered"):
        register_objective("itc")(print)


def test_an_objective_returns_its_loss_and_measures(parts: Path) -> None:
    class Twice(Section):
        factor: float = 2.0

    @register_objective("parts_twice", Twice)
    def twice(view: Any, options: Twice) -> Any:
        return view.found

    def terms(found: Any, **own: Any) -> Any:
        section = Recipe.model_validate({"objectives": {"own": {"parts_twice": own}}}).objectives
        view: ObjectiveView = SimpleNamespace(found=found)  # type: ignore[assignment]
        return own_terms(section, view)

    one = torch.ones(1)
    assert terms(one, weight=0.5) == ({"parts_twice": one[0]}, {"parts_twice": 0.5})
    assert terms({"parts_twice": one, "more": one})[1] == {"parts_twice": 1.0}
    assert terms(one, weight=0.0) == ({}, {})
    for wrong in (torch.ones(2), {"more": one}, None, {"parts_twice": 1.0}):
        with pytest.raises(ValueError, match="has to return one scalar tensor, or named ones with 'parts_twice'"):
            terms(wrong)
    for name in ("itc", "mlm", "loss", "temperature"):  # it would be weighted as crossmask's own, in its place
        with pytest.raises(ValueError, match=f"returned '{name}', which is the name of another term"):
            terms({"parts_twice": one, name: one})


# ------------------------------------------------------------------------------------------------------------- data


def listed(**section: Any) -> Recipe:
    image = {"size": 16, "patch_size": 8}
    return Recipe.model_validate({"data": {"vocabulary_size": 64, **section}, "model": {"image": image}})


class Dots:
    """As a map-style dataset has them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[np.ndarray, str]:
        return np.full((20, 30, 3), 6 * i, np.uint8), f"grey number {i // 2}"


def test_a_list_of_pairs_is_data() -> None:
    data = PairList(listed(), Dots())
    assert data.train_size + data.splits["held-out"].image_count == 40
    assert not {*data.train_group_id} & {*data.splits["held-out"].image_group_id}
    batch = data.train_batch(np.arange(6), 0)
    assert batch.images.shape == (6, 3, 16, 16)
    assert torch.equal(data.train_batch(np.array([3]), 0).images[0], batch.images[3])  # whatever else is in the batch
    assert not torch.equal(data.train_batch(np.arange(6), 1).images, batch.images)
    held = data.splits["held-out"]
    assert held.caption_count == len({*held.image_group_id})
    assert len(held.texts(data.tokenizer)) == held.caption_count
    assert "pair " in data.name_of(0)
    assert data.fingerprint() == PairList(listed(), Dots()).fingerprint()
    evaluated = PairList(listed(), Dots(), tokenizer=data.tokenizer)
    assert evaluated.train_size == 0
    assert evaluated.splits["all"].image_count == 40


def test_pictures_come_as_paths_and_images_too(tmp_path: Path) -> None:
    picture = Image.fromarray(Dots()[20][0])
    picture.save(tmp_path / "a.png")
    pairs = [(picture, "one"), (tmp_path / "a.png", "two"), (str(tmp_path / "a.png"), "three")]
    plain = listed(augment=0.0, validation_fraction=0.0)
    images = PairList(plain, pairs).train_batch(np.arange(3), 0).images
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    more = PairList(plain, pairs, validation=[(picture, "four")], captions=["one", "two", "three"])
    assert (more.train_size, more.splits["held-out"].image_count) == (3, 1)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "there are no pairs"),
        ([("a.png", "!?")], "pair 0: the caption '!\\?' has no word"),
        ([("a.png", 3)], "pair 0: its caption is int; give \\(picture, text\\)"),
        ([{"image": "a.png", "text": "one"}], "pair 0: it is a dict; give \\(picture, text\\)"),
    ],
)
def test_pairs_that_cannot_be_used_are_one_line(pairs: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        PairList(listed(validation_fraction=0.0), pairs)


def test_a_pair_that_cannot_be_had_is_named() -> None:
    class Broken(Dots):
        def __getitem__(self, i: int) -> tuple[np.ndarray, str]:
            if i == 13:
                raise OSError("disk\ngone")
            return super().__getitem__(i)

    with pytest.raises(DataError, match=r"^pairs, pair 13: cannot be had: OSError: disk gone; mend or remove it$"):
        PairList(listed(), Broken())
    data = PairList(
        listed(validation_fraction=0.0), Broken(), captions=[caption for _, caption in (Dots()[i] for i in range(40))]
    )
    with pytest.raises(DataError, match="pair 13: cannot be had"):
        data.train_batch(np.arange(12, 15), 0)


def test_a_picture_that_is_none_is_named() -> None:
    data = PairList(listed(validation_fraction=0.0), [(3.0, "one"), (4.0, "two")])
    with pytest.raises(DataError, match="pair 1: float is no picture"):
        data.train_batch(np.array([1]), 0)


def test_a_registered_source_is_opened(parts: Path) -> None:
    recipe = Recipe.model_validate({"data": {"source": "parts_none"}})
    with pytest.raises(RecipeError, match=r"data\.source: unknown source 'parts_none'"):
        load_data(recipe)
    registry.register_source("parts_none")(lambda recipe, options, tokenizer: None)
    with pytest.raises(TypeError, match="'parts_none' returned a NoneType"):
        load_data(recipe)
