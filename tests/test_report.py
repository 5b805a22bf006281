"""The report from whole, partial and empty run folders, its pictures, and the table on the screen."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from test_mask_measures import ToyData, policy, small_model, small_recipe

from crossmask.engine.errors import CheckpointError
from crossmask.engine.evaluation import build_report, print_summary, save_pictures, write_gallery
from crossmask.engine.evaluation.plots import heat, heat_scale, smooth


def recalls(r1: float) -> dict[str, float]:
    return {"r1": r1, "r5": r1 + 20, "r10": r1 + 30}


def evaluation() -> dict[str, Any]:
    split = {
        "title": "held-out <designer>", "images": 1718, "captions": 1718, "chance_r1": 0.06,
        "i2t": recalls(38.6), "t2i": recalls(37.1),
        "chance": {"i2t": recalls(0.06), "t2i": recalls(0.06)},
        "reranked": {
            "candidates": 16, "i2t": {**recalls(41.2), "queries": 1000}, "t2i": {**recalls(40.2), "queries": 1000},
            "before": {"i2t": recalls(38.0), "t2i": recalls(37.1)},
        },
        "without_flags": None,
    }  # fmt: skip
    masks = {
        "attention_entropy": 0.71, "on_drawing": 0.81, "on_drawing_random": 0.53, "itm_loss": 0.51, "itm_prior": 0.6365,
        "singles_on_drawing": 0.9, "singles_on_drawing_random": 0.7,
    }  # fmt: skip
    itm = {"loss": 0.51, "prior": 0.6365, "accuracy": 0.8, "auc": 0.9}
    machine = {"summary": "2 CPU cores", "ranks": 2, "versions": {"torch": "2.14.1"}}
    return {
        "splits": {"a": split}, "itm": itm, "masks": masks, "machine": machine, "seed": 7, "steps": 40, "minutes": 7.9
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "demo-20250101-101010"
    run.mkdir()
    recipe = small_recipe()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 1000, "reason": ""}))
    (run / "evaluation.json").write_text(json.dumps(evaluation()))
    records: list[dict[str, Any]] = []
    for step in range(0, 1001, 50):
        loss = {"loss": 9 - step / 200, "itc": 6 - step / 250, "itm": None if step < 200 else 0.6, "lr": 1e-3}
        records.append({"kind": "train", "step": step, "time_s": step / 10, **loss})
        if step % 250 == 0:
            records.append({"kind": "probe", "step": step, "on_drawing": 0.5 + step / 4000, "on_drawing_random": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_gallery(run, small_model(recipe), ToyData(), policy(recipe), recipe, "cpu")  # type: ignore[arg-type]
    return run


class Links(HTMLParser):
    """Everything that a browser would load, and the tags left open."""

    void = frozenset(["meta", "link", "br", "img", "input", "hr"])

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        self.loaded += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(path: Path) -> tuple[str, Links]:
    html, links = path.read_text("utf-8"), Links()
    links.feed(html)
    assert links.open == []
    return html, links


def test_report_is_one_self_contained_file(whole: Path) -> None:
    html, links = parse(build_report(whole))
    assert links.loaded
    assert all(v.startswith(("data:image/png;base64,", "#")) for v in links.loaded)
    assert not re.search(r"<script|@import|<link|url\((?!#)", html)
    assert "Not in this run" not in html
    for words in ("41.2", "38.6", "0.510", "81.0", "finished after 1,000 steps", "2 CPU cores", "2.14.1", "CC-BY-4.0"):
        assert words in html, words
    assert "held-out &lt;designer&gt;" in html
    assert "<designer>" not in html
    assert "var(--c1)" in html
    assert "#2563eb" in html
    assert html.count("#2563eb") == 1
    assert not list(whole.glob("*.part"))


def test_gallery_marks_masked_words_and_patches(whole: Path) -> None:
    gallery = json.loads((whole / "gallery.json").read_text())
    assert gallery["grid"] == [4, 4]
    assert [p["kind"] for p in gallery["pairs"]] == ["scene"] * 2 + ["drawing"] * 2
    pair = gallery["pairs"][0]
    assert [w["text"] for w in pair["words"]] == ["apple", "and", "acat", "dog"]  # pieces joined, specials gone
    assert [w["shown"] for w in pair["words"]] == [True, None, True, None]
    assert any(w["masked"] for w in pair["words"])
    assert len(pair["masked_patches"]) == 8
    assert sum(pair["attention"]) == pytest.approx(1.0, abs=1e-3)
    html = build_report(whole).read_text("utf-8")
    assert html.count('class="word masked') - 1 == sum(w["masked"] for p in gallery["pairs"] for w in p["words"])


@pytest.mark.parametrize(
    "gone", [["evaluation.json"], ["gallery.json"], ["metrics.jsonl"], ["recipe.yaml", "status.json"],
             ["evaluation.json", "gallery.json", "recipe.yaml", "status.json"]]
)  # fmt: skip
def test_report_of_a_stopped_run_says_what_is_missing(whole: Path, tmp_path: Path, gone: list[str]) -> None:
    run = tmp_path / "part"
    shutil.copytree(whole, run)
    for name in gone:
        (run / name).unlink()
    html, _ = parse(build_report(run))
    assert "Not in this run" in html
    for name in set(gone) - {"status.json"}:
        assert f"{name} " in html


@pytest.mark.parametrize(("source", "named"), [("scenes", True), ("composed_emoji", True), ("pairs", False)])
def test_drawings_are_credited_wherever_they_are_shown(whole: Path, tmp_path: Path, source: str, named: bool) -> None:
    run = tmp_path / "part"
    shutil.copytree(whole, run)
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["data"]["source"] = source
    values["objectives"]["composed"]["weight"] = float(source == "composed_emoji")
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    html, _ = parse(build_report(run))
    assert ("CC-BY-4.0" in html) == named
    assert ("text-guided retrieval" in html) == (source == "composed_emoji")


def test_report_survives_broken_pieces(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "broken"
    shutil.copytree(whole, run)
    (run / "evaluation.json").write_text('{"splits": ')
    (run / "gallery" / "00.png").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    html, _ = parse(build_report(run))
    assert "evaluation.json cannot be read" in html


def test_no_run_folder_is_one_clear_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            build_report(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_pictures_for_a_readme(whole: Path, tmp_path: Path) -> None:
    written = save_pictures(whole, tmp_path / "pictures")
    assert [p.name for p in written] == ["curves.png", "retrieval.png", "masks.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_a_report_that_cannot_be_written_is_one_line_and_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "full"
    shutil.copytree(whole, run)
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").mkdir()
    before = sorted(run.iterdir())
    with pytest.raises(CheckpointError, match=r"full cannot be written: Is a directory; make room there") as caught:
        build_report(run)
    assert "\n" not in str(caught.value)
    assert sorted(run.iterdir()) == before
    with pytest.raises(CheckpointError, match=r"status.json cannot be written: "):
        save_pictures(run, run / "status.json")


def with_samples() -> dict[str, Any]:
    """As runs write it now: sums, sampled galleries."""
    found = evaluation()
    split = found["splits"]["a"]
    both = {"i2t": recalls(59.5), "t2i": recalls(66.6)}
    deviation = {"i2t": recalls(1.25), "t2i": recalls(0.75), "sum": 12.34}
    split["sum"] = 327.1
    split["reranked"] |= {"score": "match_logit", "candidates": 128, "itm": {"i2t": recalls(1.0), "t2i": recalls(2.0)}}
    split["sampled"] = {
        "draws": 5, "negatives": 100, "queries": {"i2t": 1000, "t2i": 1000}, "same_category": {"i2t": 1, "t2i": 1},
        **both, "sum": 478.3, "spread": deviation, "chance": {"i2t": recalls(1), "t2i": recalls(1), "sum": 106.0},
        "reranked": {"score": "match_logit", **both, "sum": 478.3, "spread": deviation},
    }  # fmt: skip
    return found


def printed(found: dict[str, Any]) -> list[str]:
    """What is printed, line by line, one space between words."""
    stream = io.StringIO()
    print_summary(found, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    return [" ".join(line.split()) for line in lines]


def test_summary_fits_eighty_columns_and_has_every_number() -> None:
    lines = printed(evaluation())  # of a run that has no sums in its file
    assert "(a) ITC 38.6 58.6 68.6 37.1 57.1 67.1 327.1" in lines
    assert "ITC, 1,000 queries 38.0 58.0 68.0 37.1 57.1 67.1 325.3" in lines
    assert "top 16: ITC + ITM 41.2 61.2 71.2 40.2 60.2 70.2 344.2" in lines
    assert any(line.startswith("chance 0.06 ") for line in lines)
    for words in ("ITM loss 0.510", "81.0 %"):
        assert any(words in line for line in lines), words
    print_summary({}, Console(file=io.StringIO(), width=80))


def test_summary_and_report_show_sampled_galleries(whole: Path, tmp_path: Path) -> None:
    lines = printed(with_samples())
    assert "top 128: match logit 41.2 61.2 71.2 40.2 60.2 70.2 344.2" in lines
    assert "1 of 101: ITC 59.5 79.5 89.5 66.6 86.6 96.6 478.3 12.3" in lines
    assert "1 of 101: match logit 59.5 79.5 89.5 66.6 86.6 96.6 478.3 12.3" in lines
    assert any(line.startswith("1 of 101: chance ") for line in lines)
    assert any("mean of 5 draws" in line for line in lines)
    run = tmp_path / "sampled"
    shutil.copytree(whole, run)
    before, _ = parse(build_report(run))
    (run / "evaluation.json").write_text(json.dumps(with_samples()))
    html, _ = parse(build_report(run))
    for words in ("R@1 in sampled galleries", "among 101", "59.5 ± 1.2", "478.3 ± 12.3"):
        assert words in html, words
        assert words not in before, words
    assert "sum of all six recalls 344.2" in html
    assert [p.name for p in save_pictures(run, tmp_path / "pictures")][1:3] == ["retrieval.png", "sampled.png"]


def test_heat_is_absolute_so_uniform_attention_stays_pale() -> None:
    assert heat_scale([[0.26, 0.25, 0.25, 0.24]]) == 3.0
    assert heat_scale([[1.0, 0, 0, 0]]) == 4.0
    assert max(heat([0.26, 0.25, 0.25, 0.24], 3.0)) < 0.03
    assert heat([1.0, 0, 0, 0], 4.0) == [1.0, 0.0, 0.0, 0.0]


def test_smoothing_keeps_a_constant_and_the_start() -> None:
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([5.0, 1.0], 0.03)[0] == 5.0
    assert smooth([]) == []
