"""The documentation site: it builds strictly, every page is reached, and nothing in it comes from another host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python", "latex2mathml")


def missing() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]


pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"pip install 'crossmask[docs]': {', '.join(missing())} missing"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    """What makes a policy's page."""
    sys.path.insert(0, str(ROOT / "docs/site"))
    try:
        yield __import__("policy_pages")
    finally:
        sys.path.remove(str(ROOT / "docs/site"))


def navigation(part: object) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        for inner in part.values():
            yield from navigation(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from navigation(inner)


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = list(navigation(settings["nav"]))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert written <= set(named), f"mkdocs.yml: put {sorted(written - set(named))} into nav"
    assert len(named) == len(set(named)), "a page is in the navigation twice"


def test_the_site_is_whole_and_has_nothing_from_elsewhere(site: Path) -> None:
    html = sorted(site.rglob("*.html"))
    assert len(html) > 70
    for page in html:
        text = page.read_text()
        for tag in re.findall(r"<(?:script|link|img|iframe|source|video|object|form)\b[^>]*>", text):
            loaded = re.findall(r'\b(?:src|href|srcset|data|action)="?((?:https?:)?//[^"\s>]+)', tag)
            assert not loaded, f"{page.name}: {tag}"
        assert 'class="arithmatex"' not in text, f"{page.name}: a formula was not rendered"
        assert "<!-- site:" not in text, f"{page.name}: a part was not filled"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text()), style
    assert not list(site.rglob("*.py")), "scripts are no part of the site"
    assert (site / "search/search_index.json").is_file()


def test_what_the_code_gives_is_there(site: Path) -> None:
    recipe = (site / "reference/recipe.html").read_text()
    for path in ("training.max_steps", "model.fusion.qk_norm", "objectives.itm.hardness_ramp", "masking.policy"):
        assert f'id="{path}"' in recipe, path
    assert 'id="crossmask-data-masks"' in (site / "reference/cli.html").read_text()
    kernels = (site / "reference/kernels.html").read_text()
    for words in ("bisecting its bit pattern", "largest softmax weight of a row", "query_mask"):
        assert words in kernels, words
    cost = (site / "kernels/soft_contrastive.html").read_text()
    assert "its time in ours" in cost
    assert "65536" in cost
    assert "<math" in cost
    assert 'class="rooms"' in (site / "architecture.html").read_text()
    source = site / "source/kernels/cross_attention/triton/backward.py.html"
    assert "<code" in source.read_text()


def test_each_policy_has_a_page_with_a_recipe_that_is_one(site: Path, pages: ModuleType) -> None:
    from docs_blocks import Line
    from docs_commands import check_crossmask

    from crossmask.engine.masking import MaskPlanner, policies
    from crossmask.engine.recipe import Recipe

    listed = [uri for _, group in pages.navigation() for _, uri in group]
    assert sorted(listed) == sorted(f"policies/{name}.md" for name in policies())
    for name, policy in policies().items():
        recipe = Recipe.model_validate(yaml.safe_load(pages.recipe(name)))
        assert name in (recipe.masking.policy, recipe.masking.text_policy)
        MaskPlanner(recipe.masking, 16, 40)  # which reads the options
        text = pages.page(name)
        for option in policy.Options.model_fields:
            assert f"| `{option}` |" in text
        (command,) = re.findall(r"^crossmask .*$", text, re.MULTILINE)
        check_crossmask(Line(f"policies/{name}", command))
        assert (site / f"policies/{name}.html").is_file()
