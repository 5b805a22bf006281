"""Every policy is in docs/policies.md, with a picture; what the page says can be written in a recipe can be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from crossmask.engine.masking import MaskPlanner, policies
from crossmask.engine.recipe import MaskingSection, Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/policies.md").read_text()


@pytest.mark.parametrize("name", sorted(policies()))
def test_every_policy_has_its_row_and_its_picture(name: str) -> None:
    row = re.search(rf"^\| \[`{name}`\]\(../engine/masking/policies/{name}.py\) \|.*$", PAGE, re.MULTILINE)
    assert row, f"docs/policies.md has no row for {name}"
    path = f"images/policies/{name}.png"
    assert path in row[0]
    with Image.open(ROOT / "docs" / path) as picture:
        assert picture.width > 500, "three pairs side by side: python docs/draw_policies.py RUN"


def test_no_row_is_of_a_policy_that_is_gone() -> None:
    named = re.findall(r"^\| \[`(\w+)`\]\S+ \|.*images/policies", PAGE, re.MULTILINE)
    assert set(named) == set(policies())
    pictures = {path.stem for path in (ROOT / "docs/images/policies").glob("*.png")}
    assert pictures == set(policies())


def test_the_recipe_at_the_top_is_one() -> None:
    text = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert text
    recipe = Recipe.model_validate(yaml.safe_load(text[1]))
    MaskPlanner(recipe.masking, 4, 40)


@pytest.mark.parametrize("cell", re.findall(r"^\| `((?:heads|links|hidden_\w+)[^|]*?)` \|", PAGE, re.MULTILINE))
def test_settings_in_the_tables_are_settings(cell: str) -> None:
    for setting in cell.split("`, `"):
        MaskingSection.model_validate(yaml.safe_load(setting))
