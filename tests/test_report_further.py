"""Recognition and text-guided retrieval in the report and on the screen, and the pictures of what was found."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from test_composed import Plain, Points
from test_report import parse

from crossmask.engine.data.base import Request
from crossmask.engine.data.normalisation import HALF
from crossmask.engine.errors import CheckpointError
from crossmask.engine.evaluation import build_report, print_summary, write_composed_gallery
from crossmask.engine.evaluation.composed import composed_retrieval, evaluate_composed
from crossmask.engine.evaluation.composed_gallery import composed_card, read_composed
from crossmask.engine.evaluation.recognition_rows import by_what, recognised, recognition_table


class Squares(Points):
    """Points that are drawn: each is a square of its own grey."""

    title = "squares <of grey>"

    def requests(self, rows: np.ndarray) -> Request:
        return Request(self._drawn(100 + rows), super().requests(rows).token_ids, torch.ones(len(rows), 2).bool())

    def candidates(self, rows: np.ndarray) -> torch.Tensor:
        return self._drawn(rows)

    @staticmethod
    def _drawn(greys: np.ndarray) -> torch.Tensor:
        return HALF.apply_(torch.from_numpy(greys).float()[:, None, None, None].expand(-1, 3, 8, 8) / 255)


def examples_of(
    gallery: torch.Tensor, asked: torch.Tensor, target: list[int], own: list[int], same: np.ndarray | None = None
) -> Any:
    split = Points(gallery, asked, target, own)
    if same is not None:
        split.gallery = same
    return evaluate_composed(Plain(), split, "cpu")


def test_examples_stand_where_the_recalls_rank_them() -> None:
    luck = torch.Generator().manual_seed(3)
    gallery = torch.randn(60, 6, generator=luck)
    asked = gallery[:40] + 0.8 * torch.randn(40, 6, generator=luck)
    own = [i + 20 if i % 3 else -1 for i in range(40)]
    found = examples_of(gallery, asked, list(range(40)), own)["examples"]
    assert [example["row"] for example in found] == [3, 10, 16, 23, 30, 36]  # evenly spread, not chosen
    keys = torch.nn.functional.normalize(gallery, dim=-1)
    for example in found:
        row = example["row"]
        query = torch.nn.functional.normalize(asked[row] + 0.3 * asked[row].flip(-1), dim=-1)
        scores = (keys @ query).tolist()
        best = sorted((i for i in range(60) if i != own[row]), key=lambda i: -scores[i])
        assert example["right"] == row
        assert example["rank"] == 1 + best.index(row)
        assert example["first"] == best[:5]
    assert any(example["rank"] <= 5 for example in found)
    assert any(example["rank"] > 5 for example in found)
    r10 = examples_of(gallery, asked[:6], list(range(6)), own[:6])
    assert sum(e["rank"] <= 10 for e in r10["examples"]) / 6 * 100 == pytest.approx(r10["query"]["r10"])


def test_examples_with_ties_copies_and_requests_without_an_answer() -> None:
    same = examples_of(torch.ones(9, 4), torch.ones(2, 4), [0, 7], [-1, 3])["examples"]
    assert [(e["rank"], e["first"]) for e in same] == [(9, [1, 2, 3, 4, 5]), (8, [0, 1, 2, 4, 5])]
    corner = torch.eye(4)
    twins = examples_of(torch.cat([corner, corner[:1]]), corner[:2], [0, 1], [-1, 1], same=np.array([0, 1, 2, 3, 0]))
    (only,) = twins["examples"]  # the second request asks for itself
    assert (only["row"], only["rank"], only["first"]) == (0, 1, [0, 3, 1, 2])  # the copy of the right one is left out
    nothing = examples_of(torch.full((7, 4), torch.nan), torch.ones(1, 4), [0], [-1])["examples"]
    assert nothing[0]["rank"] == 7


def drawn(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A run folder with squares that were found: the first request's at place 1, the second's at the last place."""
    corner = torch.eye(8)
    asked = torch.stack([corner[0], corner[0]])
    split = Squares(corner, asked, [0, 5], [-1, -1])
    model = Plain()
    model.encode_image = lambda images: Plain.encode_image(model, _points(images))  # type: ignore[method-assign]
    tokenizer = SimpleNamespace(text=lambda ids: f"like {int(ids[0])} <b>")
    data: Any = SimpleNamespace(composed={"grey": split}, tokenizer=tokenizer, normalisation=HALF)
    evaluation = {"composed": composed_retrieval(model, data.composed, "cpu"), "splits": {}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "recipe.yaml").write_text("name: squares\n")
    assert write_composed_gallery(tmp_path, evaluation, data) == tmp_path / "composed.json"
    return tmp_path, evaluation


def _points(images: torch.Tensor) -> torch.Tensor:
    """What is seen of a square: a candidate is its own corner, a request the first."""
    grey = (HALF.undo(images)[:, 0, 0, 0] * 255).round().long()
    return torch.eye(8)[torch.where(grey >= 100, 0, grey)]


def grey_of(url: str) -> int:
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).getpixel((0, 0))[0]  # type: ignore[index]


def test_pictures_of_what_was_found(tmp_path: Path) -> None:
    run, evaluation = drawn(tmp_path)
    (kept,) = read_composed(run)
    assert (kept["split"], kept["candidates"]) == ("grey", 8)
    for shown, example in zip(kept["examples"], evaluation["composed"]["grey"]["examples"], strict=True):
        assert grey_of(shown["reference"]) == 100 + example["row"]
        assert grey_of(shown["right"]) == example["right"]
        assert [grey_of(url) for url in shown["first"]] == example["first"]
    assert [shown["rank"] for shown in kept["examples"]] == [1, 8]
    html, links = parse(build_report(run))
    assert sum(url.startswith("data:image/png") for url in links.loaded) == 2 * (1 + 5) + 1
    assert html.count('<figure class="right"') == 1
    assert html.count('<figure class="right far"><img') == 1
    assert 'alt="right one, place 8"' in html
    assert "like 1 &lt;b&gt;" in html
    assert "squares &lt;of grey&gt;" in html
    assert "2 requests, 8 candidates" in html


def test_older_runs_and_broken_files_have_the_table_alone(tmp_path: Path) -> None:
    run, evaluation = drawn(tmp_path)
    for text in (None, "{", "{}"):
        (run / "composed.json").unlink() if text is None else (run / "composed.json").write_text(text)
        html, _ = parse(build_report(run))
        assert "<figure" not in html
        assert "2 requests, 8 candidates" in html
    del evaluation["composed"]["grey"]["examples"]  # as runs wrote it before there were pictures
    assert write_composed_gallery(run, evaluation, SimpleNamespace(composed={})) is None  # type: ignore[arg-type]
    (run / "composed.json").unlink()
    (run / "composed.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_composed_gallery(*drawn(run), SimpleNamespace())  # type: ignore[arg-type]


def test_the_card_is_of_the_mean_and_names_the_best_without_training() -> None:
    kinds = {"query": 30.0, "image": 12.0, "text": 20.5, "sum": 19.0, "chance": 0.25}
    one = {kind: {"r1": v, "r10": v, "r50": v} for kind, v in kinds.items()}
    card = composed_card({"composed": {"x": {"title": "x"} | one, "average": {"title": "mean of the 3 sets"} | one}})
    assert (card["value"], card["label"], card["mood"]) == ("30.0", "R@10, mean of the 3 sets", "good")
    assert card["note"] == "words alone 20.5 %, chance 0.25 %"
    one["image"]["r10"] = 30.0
    assert composed_card({"composed": {"x": {"title": "x"} | one}})["mood"] == "bad"


def recognition() -> dict[str, Any]:
    def scores(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "macro_f1": accuracy / 2}

    def level(classes: int, majority: float, *names: str) -> dict[str, Any]:
        splits = {
            name: {"title": f"split <{name}>", "images": 1234, "unlabelled": 0, "unseen_classes": 1,
                   "unseen_images": 2 if name == "b" else 0, "majority": scores(majority)}
            for name in names
        }  # fmt: skip
        features = {
            feature: {"splits": {name: scores(value + i) for i, name in enumerate(names)}}
            for feature, value in (("image", 40.0), ("text", 50.0), ("fused", 60.0))
        }
        return {"classes": classes, "single": 0, "majority": "a class with a name that does not end", "splits": splits,
                "features": features}  # fmt: skip

    found = {"category": level(9, 20.0, "a", "b"), "subcategory": level(1097, 4.0, "a")}
    found["category"]["fine_tuned"] = {
        "classes": 9, "splits": {n: {"unseen_images": 5, **scores(77.5)} for n in ("a", "b")},
    }  # fmt: skip
    return found


def test_recognition_has_a_row_for_each_way_beside_the_majority_class(tmp_path: Path) -> None:
    found = recognition()
    rows = recognition_table(found)
    assert [row["kind"] for row in rows[:5]] == [
        *("image alone", "text alone", "image and text fused", "fine-tuned classifier", "majority class"),
    ]
    assert rows[0]["values"] == ["40.0", "20.0", "40.0", "20.0"]
    assert rows[3]["values"] == ["77.5", "38.8", "–", "–"]
    assert rows[4]["values"] == ["20.0", "10.0", "4.0", "2.0"]
    assert rows[6]["values"] == ["51.0", "25.5", "–", "–"]  # (b) has no sub-categories
    (tmp_path / "evaluation.json").write_text(json.dumps({"recognition": found, "splits": {}}))
    html, _ = parse(build_report(tmp_path))
    for words in (
        "split &lt;b&gt;",
        "subcategory, 1,097 classes",
        "category: b: 2 of 1,234 images are of 1 unseen class",
    ):
        assert words in html, words
    assert "linear probes on the frozen model and the fine-tuned classifier" in html
    assert html.count(">78<") == 2  # bars of the chart, with their values
    assert "was not taught the classes of 5 images" in html


def test_a_classifier_without_probes() -> None:
    found = recognition()
    del found["subcategory"]
    found["category"]["features"] = {}
    assert by_what(found) == "the fine-tuned classifier"
    assert list(recognised(found["category"])) == ["fine-tuned classifier"]
    assert [row["kind"] for row in recognition_table(found)] == ["fine-tuned classifier", "majority class"] * 2


def test_reports_without_either_have_no_word_of_them(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"splits": {}}))
    html, _ = parse(build_report(tmp_path))
    assert "Recognition" not in html
    assert "Text-guided" not in html


def test_the_screen_has_room_at_eighty_columns() -> None:
    sets = {
        name: {"title": "another person, held-out captions by the held-out designer", "triplets": 12345,
               "candidates": 123456, **{kind: {"r1": 100.0, "r10": 0.012, "r50": 33.3} for kind in
               ("query", "image", "text", "sum", "chance")}}
        for name in ("variant-a", "variant-b")
    }  # fmt: skip
    stream = io.StringIO()
    print_summary({"splits": {}, "recognition": recognition(), "composed": sets}, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    words = [" ".join(line.split()) for line in lines]
    assert "variant-b image and words 100.0 0.01 33.3" in words
    assert "12,345 requests image alone 100.0 0.01 33.3" in words
    assert "image and text fused 60.0 / 30.0 61.0 / 30.5" in words
    assert "always 'a class with a name…' 4.0 / 2.0 –" in words
    ends = {len(line.rstrip()) for line in lines if line.rstrip().endswith(" 33.3")}
    assert len(ends) == 1, "columns stand below each other"
