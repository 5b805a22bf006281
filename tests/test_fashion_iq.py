"""FashionIQ's published layout, on a small folder of it: triplets, galleries, the mean, and one-line mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crossmask.engine.data import load_data
from crossmask.engine.data.base import PairData
from crossmask.engine.data.fashion_iq import FashionIQ
from crossmask.engine.errors import DataError, RecipeError
from crossmask.engine.evaluation.composed import composed_retrieval
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.recipe_files import load_recipe

SMALL = [
    "data.source=fashioniq",
    "data.augment=0.5",
    "model.image={size: 16, patch_size: 8, width: 16, depth: 1, heads: 2, stem: patch}",
    "model.text={width: 16, depth: 0, heads: 2, dropout: 0.0}",
    "model.fusion={depth: 1, heads: 2, dropout: 0.0}",
    "model.projection_width=8",
]
CATEGORIES = ("dress", "shirt", "toptee")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    luck = np.random.default_rng(0)
    for name in ("captions", "image_splits", "images"):
        (tmp_path / name).mkdir()
    for c, category in enumerate(CATEGORIES):
        for split, count in (("train", 6), ("val", 4)):
            ids = [f"B{c}{split[0].upper()}{i:03}" for i in range(count)]
            for i, name in enumerate(ids):
                picture = Image.fromarray(luck.integers(0, 255, (20, 16, 3), dtype=np.uint8))
                picture.save(tmp_path / "images" / f"{name}.{'jpg' if i % 2 else 'png'}")
            entries = [
                {"candidate": ids[i], "target": ids[(i + 1) % count], "captions": [f"is {word} ", f"has {i} stripes"]}
                for i, word in enumerate(("red", "blue", "longer", "sleeveless", "left", "darker")[:count])
            ]
            (tmp_path / "captions" / f"cap.{category}.{split}.json").write_text(json.dumps(entries))
            (tmp_path / "image_splits" / f"split.{category}.{split}.json").write_text(json.dumps(ids))
    return tmp_path


def opened(folder: Path, *overrides: str) -> FashionIQ:
    found: PairData = load_data(load_recipe("composed-emoji", [*SMALL, f"data.path={folder}", *overrides]))
    assert isinstance(found, FashionIQ)
    return found


def edited(folder: Path, file: str, change: Any) -> None:
    path = folder / file
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_triplets_and_galleries(folder: Path) -> None:
    data = opened(folder)
    assert data.train_size == 18
    assert not data.splits
    assert list(data.composed) == list(CATEGORIES)
    for name, split in data.composed.items():
        assert split.title == f"FashionIQ's val split of {name}"
        assert (len(split.target), len(split.gallery), split.averaged) == (4, 4, True)
        assert (split.reference == -1).all()  # the reference stays a candidate, as published
        asked = split.requests(np.arange(4))
        candidates = split.candidates(np.arange(4))
        for row in range(4):
            assert torch.equal(asked.images[row], candidates[row])
            assert split.gallery[(row + 1) % 4] == split.target[row]
    assert data.name_of(7) == "cap.shirt.train.json entry 2"
    assert data.describe()["training triplets"] == 18


def words_of(data: FashionIQ, ids: torch.Tensor) -> str:
    words = ("and", "is", "has", "red", "blue", "stripes")
    known = {i: word for word in words for i in data.tokenizer.pieces(word)}
    return " ".join(known[i] for i in ids.tolist() if i in known)


def test_the_two_texts_are_joined_in_either_order_in_training_and_as_they_stand_in_evaluation(folder: Path) -> None:
    data = opened(folder)
    orders = {words_of(data, data.train_batch(np.array([0]), epoch).token_ids[0]) for epoch in range(12)}
    assert orders == {"is red and has stripes", "has stripes and is red"}
    asked = data.composed["dress"].requests(np.arange(2))
    assert [words_of(data, ids) for ids in asked.token_ids] == ["is red and has stripes", "is blue and has stripes"]


def test_a_batch_depends_on_its_samples_alone(folder: Path) -> None:
    data = opened(folder)
    batch, part = data.train_batch(np.array([3, 11]), 2), data.train_batch(np.array([11]), 2)
    assert torch.equal(batch.images[1:], part.images)
    assert batch.reference is not None
    assert part.reference is not None
    assert torch.equal(batch.reference[1:], part.reference)
    assert batch.group_id.tolist() == data.train_group_id[[3, 11]].tolist() == data.target[[3, 11]].tolist()
    assert not torch.equal(batch.images, data.train_batch(np.array([3, 11]), 3).images)


def test_the_evaluation_has_each_category_and_their_mean(folder: Path) -> None:
    recipe = load_recipe("composed-emoji", [*SMALL, f"data.path={folder}"])
    data = opened(folder)
    torch.manual_seed(0)
    model = VisionLanguageModel(recipe.model, data.tokenizer.vocabulary_size, data.max_tokens).eval()
    found = composed_retrieval(model, data.composed, "cpu")
    assert list(found) == [*CATEGORIES, "average"]
    for kind in ("query", "image"):
        for cut in ("r1", "r10", "r50"):
            mean = sum(found[name][kind][cut] for name in CATEGORIES) / 3
            assert found["average"][kind][cut] == pytest.approx(mean)
    assert all(found[name]["image"]["r1"] == 0.0 for name in CATEGORIES)  # itself is nearest, and a candidate
    assert found["average"]["query"]["r10"] == 100.0  # of a gallery of four


def test_a_trained_model_needs_no_training_files(folder: Path) -> None:
    recipe = load_recipe("composed-emoji", [*SMALL, f"data.path={folder}"])
    tokenizer = opened(folder).tokenizer
    for path in (folder / "captions").glob("cap.*.train.json"):
        path.unlink()
    for path in (folder / "images").glob("B?T*"):
        path.unlink()
    data = load_data(recipe, tokenizer)
    assert data.train_size == 0
    assert len(data.composed) == 3
    with pytest.raises(DataError, match=r"no captions/cap\.\{dress,shirt,toptee\}\.train\.json in it"):
        opened(folder)
    for path in (folder / "captions").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no captions/cap\.\{dress,shirt,toptee\}\.val\.json in it"):
        load_data(recipe, tokenizer)


def test_missing_images_are_counted_in_one_line(folder: Path) -> None:
    (folder / "images" / "B0V001.jpg").unlink()
    with pytest.raises(
        DataError, match=r"images: no image B0V001\.png or \.jpg; add them, or take their entries out of"
    ):
        opened(folder)
    (folder / "images" / "B2T004.png").unlink()
    with pytest.raises(DataError, match=r"no image B2T004\.png or \.jpg, and 1 more of 30 are missing"):
        opened(folder)


DRESS = "captions/cap.dress.train.json"


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (DRESS, lambda x: x[1].pop("target"), r"cap\.dress\.train\.json entry 2: it has no target; add the ID"),
        (DRESS, lambda x: x[0].update(candidate="../x"), r"entry 1: candidate '../x' is not the ID of an image"),
        (DRESS, lambda x: x[0].update(candidate="\udce9"), r"entry 1: candidate '.udce9' is not the ID of an image"),
        (DRESS, lambda x: x[2].update(captions=["a", "is red \ud83d"]),
         r"entry 3: a caption has half a character, .ud83d, as number 8; write the whole character, or remove it"),
        (DRESS, lambda x: x[0].update(captions="red"), r"entry 1: its captions are not a list of texts"),
        (DRESS, lambda x: x[0].update(captions=[" ", ""]), r"entry 1: it has no caption; write one or remove"),
        (DRESS, lambda x: x.append("red"), r"entry 7: not an object; expected candidate, target and captions"),
        ("image_splits/split.shirt.val.json", lambda x: x.pop(1),
         r"cap\.shirt\.val\.json entry 1: its target B1V001 is not in image_splits/split\.shirt\.val\.json"),
    ],
)  # fmt: skip
def test_entries_that_are_no_triplets(folder: Path, file: str, change: Any, problem: str) -> None:
    edited(folder, file, change)
    with pytest.raises(DataError, match=problem) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_foreign_folders_and_files(folder: Path, tmp_path: Path) -> None:
    (folder / DRESS).write_text('{"images": []}')
    with pytest.raises(DataError, match="not a list, so not one of FashionIQ's files"):
        opened(folder)
    (folder / DRESS).write_text('[{"candidate"')
    with pytest.raises(DataError, match=r"not readable as JSON .* is the file complete"):
        opened(folder)
    (folder / DRESS).write_text("[]")
    (folder / "image_splits/split.toptee.val.json").unlink()
    with pytest.raises(DataError, match="no such file, so the gallery of toptee is not known"):
        opened(folder)
    with pytest.raises(DataError, match=r"no folder 'captions' in it; set data\.path to the folder of FashionIQ"):
        opened(folder / "images")
    with pytest.raises(RecipeError, match="no such file"):
        opened(folder / "nowhere")
