"""Masks over training: what is kept, that it is kept whole, and how the report shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_mask_measures import ToyData, policy, small_model, small_recipe
from test_report import parse

from crossmask.engine.evaluation import build_report, snapshot_steps, write_snapshot
from crossmask.engine.evaluation.mask_history import FOLDER, history, read_snapshots
from crossmask.engine.recipe_files import dump_recipe


def keep(run: Path, step: int, scenes: bool = True) -> Path:
    recipe = small_recipe()
    data = ToyData(scenes)
    return write_snapshot(run, step, small_model(recipe), data, policy(recipe), recipe, "cpu")  # type: ignore[arg-type]


def test_masks_are_kept_at_the_start_halfway_and_at_the_end() -> None:
    assert snapshot_steps(1800) == (0, 900, 1800)
    assert snapshot_steps(1) == (0, 1)


def test_a_snapshot_is_one_file_that_is_replaced_whole(tmp_path: Path) -> None:
    path = keep(tmp_path, 10)
    first = path.read_bytes()
    assert keep(tmp_path, 10).read_bytes() == first  # a resumed run writes the same again
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == ["step-000000010.json"]
    kept = json.loads(first)
    assert kept["grid"] == [4, 4]
    assert len(kept["pairs"]) == 4
    assert len(first) < 20_000
    for pair in kept["pairs"]:
        assert pair["image"].startswith("data:image/png;base64,")
        assert len(pair["masked_patches"]) == 8


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    keep(tmp_path, 0)
    (tmp_path / FOLDER / "step-000000005.json").write_text('{"step": 5, "gr')
    (tmp_path / FOLDER / "step-000000006.json").write_text("{}")
    (tmp_path / FOLDER / "step-000000007.json.123.part").write_text("{}")
    assert [s["step"] for s in read_snapshots(tmp_path)] == [0]
    assert history(read_snapshots(tmp_path)) == []  # one alone shows no change
    assert read_snapshots(tmp_path / "nowhere") == []


def test_scores_by_hand() -> None:
    pair = {"image": "x", "words": [], "attention": [0.25] * 4, "named_patches": [0, 1]}
    first = {"step": 0, "grid": [2, 2], "pairs": [{**pair, "masked_patches": [1, 2, 3]}]}
    last = {"step": 8, "grid": [2, 2], "pairs": [{**pair, "masked_patches": [0, 1]}]}
    (row,) = history([first, last])
    assert [look["score"] for look in row["looks"]] == pytest.approx([100 / 3, 100.0])
    assert row["luck"] == 50.0
    assert history([first, {**last, "pairs": [{**last["pairs"][0], "image": "y"}]}]) == []  # another picture
    bare = {**pair, "named_patches": None, "masked_patches": [1]}
    (row,) = history([{**first, "pairs": [bare]}, {**last, "pairs": [bare]}])
    assert row["luck"] is None
    assert row["looks"][0]["score"] is None


@pytest.mark.parametrize("scenes", [True, False])
def test_the_report_shows_them_in_a_row(tmp_path: Path, scenes: bool) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(small_recipe()))
    assert "Masks over training" not in build_report(tmp_path).read_text("utf-8")
    for step in (0, 900, 1800):
        keep(tmp_path, step, scenes)
    html, links = parse(build_report(tmp_path))
    assert "Masks over training" in html
    assert html.count('aria-label="masked at step 900"') == 4
    assert "step 1,800: " in html
    assert all(v.startswith(("data:image/png;base64,", "#")) for v in links.loaded)
