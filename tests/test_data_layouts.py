"""Karpathy's and ALBEF's JSON, folders of images with texts, files to evaluate on: what is read, every mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crossmask.engine.data import load_data
from crossmask.engine.data.pair_files import read_pairs
from crossmask.engine.data.pairs import FilePairs
from crossmask.engine.errors import DataError, UserError
from crossmask.engine.recipe import Recipe


def recipe(path: Path, **data: Any) -> Recipe:
    settings = {"source": "pairs", "path": path, **data}
    return Recipe.model_validate({"data": settings, "model": {"image": {"size": 16, "patch_size": 8}}})


def load(path: Path, **data: Any) -> FilePairs:
    loaded = load_data(recipe(path, **data))
    assert isinstance(loaded, FilePairs)
    return loaded


def picture(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * shade, 0, 0)).save(folder / name)


def save(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), "utf-8")
    return path


def one_line(error: type[UserError], *parts: str) -> Any:
    return pytest.raises(error, match=r"(?s)\A" + "".join(f"(?=.*{part})" for part in parts) + r"[^\n]*\Z")


def entry(name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": c, "tokens": c.split()} for c in captions], **more}


def captions_of(data: FilePairs, split: str) -> list[str]:
    return [data.tokenizer.text(row) for part in data.splits[split].gallery(2) for row in part.token_ids]


# Karpathy's layout ----------------------------------------------------------------------------------------------------


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    picture(tmp_path / "images", "val2014/1.jpg", "val2014/2.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg")
    images = [
        entry("1.jpg", "train", "a red cat", "the cat sits", filepath="val2014", cocoid=1, imgid=0),
        entry("2.jpg", "restval", "a dog", filepath="val2014"),
        entry("3.jpg", "val", "a blue cow", "the cow"),
        entry("4.jpg", "test", "a dog runs", "one dog", "a dog runs"),
        entry("5.jpg", "test", "a dog runs", "two dogs"),
        entry("6.jpg", "train", "a dog"),
    ]
    return save(tmp_path / "dataset.json", {"dataset": "toy", "more": {"a": [1, {}]}, "images": images, "x": None})


def test_karpathys_splits_and_groups(karpathy: Path) -> None:
    data = load(karpathy, image_root=karpathy.parent / "images", validation_fraction=0.5)
    assert [data.name_of(i) for i in range(data.train_size)] == [f"dataset.json image {n}" for n in (1, 1, 2, 6)]
    assert data.train_group_id.tolist() == [0, 0, 1, 4 + 1]  # equal captions of two images are no match
    assert list(data.splits) == ["val", "test"]
    val, test = data.splits.values()
    assert (val.image_count, val.caption_count) == (1, 2)
    assert (test.image_count, test.caption_count) == (2, 5)  # every caption is ranked, equal ones too
    assert test.gallery_group_id.tolist() == [3, 3, 3, 4, 4]
    assert test.image_group_id.tolist() == [3, 4]
    assert test.image_category is None
    assert captions_of(data, "val") == ["a [UNK] [UNK]", "the [UNK]"]  # words that training never saw
    batches = list(test.images(1))
    assert [round(float(data.normalisation.undo(b.images)[0, 0, 0, 0]) * 255 / 20) for b in batches] == [3, 4]
    assert "captions that their image has twice: 1" in data.notices()[0]
    assert data.describe()["images"] == 6


def test_without_evaluation_splits_a_share_is_held_out(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(40)]
    picture(tmp_path, *names)
    path = save(tmp_path / "d.json", {"images": [entry(name, "train", f"thing {name}", "a thing") for name in names]})
    assert not load(path, validation_fraction=0.5).splits  # its author said that all are trained on
    rows = [{"image": name, "caption": [f"thing {name}", "a thing"]} for name in names]
    data = load(save(tmp_path / "l.json", rows), validation_fraction=0.5)
    held = data.splits["held-out"]
    assert 10 <= held.image_count <= 30
    assert data.train_size == 80 - held.caption_count
    assert not set(held.image_group_id.tolist()) & set(data.train_group_id.tolist())


GOOD = entry("a.jpg", "train", "a cat")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["it is empty"]),
        ('{"images": [', ["line 1 column 13", "not JSON", "complete"]),
        ('{"images": [{"filename": "a.jpg",\n "split"}]}', ["line 2 column 9", "not JSON"]),
        ('{"images": [1] ', ["image 1", "not an object"]),
        ("[1, 2", ["entry 1", "not an object"]),
        ("[" * 100_000, ["line 1 column 2", "RecursionError|Expecting"]),
        ('{"images" 5}', ["line 1 column 11", "name and ':'"]),
        ('{"a": 1 "b": 2}', ["line 1 column 9", "','"]),
        ("hello", ["line 1 column 1", "not JSON"]),
        ({"imgaes": []}, ["'imgaes'", "rename", "'images'"]),
        ({"annotations": []}, ["without a list 'images'", "annotations"]),
        ({"images": {}}, ["without a list 'images'"]),
        ({"images": []}, ["no pairs"]),
        ({"images": [GOOD, {"split": "train", "sentences": []}]}, ["image 2", "no image", "filename"]),
        ({"images": [GOOD, entry("b.jpg", "training", "x")]}, ["image 2", "b.jpg", '"training"', "restval"]),
        ({"images": [GOOD, {**GOOD, "split": None}]}, ["image 2", "split is null"]),
        ({"images": [entry("a.jpg", "train")]}, ["image 1", "no caption"]),
        ({"images": [entry("a.jpg", "train", "cat", " ")]}, ["image 1", "caption is empty"]),
        ({"images": [{**GOOD, "sentences": ["a cat"]}]}, ["image 1", '"raw"']),
        ({"images": [{**GOOD, "sentences": [{"raw": 5}]}]}, ["image 1", "'caption' is 5", "must be text"]),
        ({"images": [GOOD, entry("b.jpg", "train", "x"), entry("c.jpg", "val", "x"), entry("a.jpg", "val", "y")]},
         ["image 4", "a.jpg was listed before"]),
        ({"images": [GOOD, entry("q.jpg", "train", "x"), entry("r.jpg", "val", "x")]},
         ["image 2", "no image .*q.jpg", "1 more of 3", "image_root"]),
        ({"images": [{**GOOD, "filepath": ".."}]}, ["image 1", "lies outside", "image_root"]),
        ({"images": [entry("/etc/passwd", "train", "x")]}, ["image 1", "lies outside"]),
        ({"images": [entry("a.jpg", "test", "a cat")]}, ["nothing is left to train on, all", "split train or restval"]),
    ],
)  # fmt: skip
def test_bad_karpathy_files(content: Any, parts: list[str], tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    picture(root, "a.jpg", "b.jpg", "c.jpg")
    with one_line(DataError, str(root / "d.json"), *parts):
        load(save(root / "d.json", content))


# ALBEF's layout -------------------------------------------------------------------------------------------------------


def test_albefs_lists_train_and_evaluate(tmp_path: Path) -> None:
    picture(tmp_path / "i", *[f"{i}.jpg" for i in range(6)])
    train = [
        {"image": "0.jpg", "caption": "a red cat", "image_id": "coco_0"},
        {"image": "0.jpg", "caption": "the cat", "image_id": "coco_0"},
        {"image": "1.jpg", "caption": ["the cat", "a cat"], "image_id": 7},
        {"image": "2.jpg", "caption": "a cat", "image_id": 7},  # another photo of the same thing
        {"image": "0.jpg", "caption": "the cat", "image_id": "coco_0"},
        {"image": "3.jpg", "caption": "..."},
    ]
    test = [
        {"image": "4.jpg", "caption": ["a dog", "one dog", "a dog"]},
        {"image": "5.jpg", "caption": ["a dog", "a cat"]},
    ]
    data = load(save(tmp_path / "train.json", train), validation_path=save(tmp_path / "test.json", test),
                image_root=tmp_path / "i")  # fmt: skip
    assert data.train_group_id.tolist() == [0, 0, 1, 1, 1, 0]
    assert [data.name_of(i) for i in (0, 2, 3, 5)] == [f"train.json entry {n}" for n in (1, 3, 3, 5)]
    (split,) = data.splits.values()
    assert (split.image_count, split.caption_count) == (2, 5)
    assert split.gallery_group_id.tolist() == np.repeat(split.image_group_id, [3, 2]).tolist()
    assert len(set(split.image_group_id.tolist())) == 2
    lines = data.notices()
    assert any("without a word that can be masked: 1, the first" in line and "entry 6" in line for line in lines)
    assert any("twice: 1, the first in" in line and "train.json entry 5" in line for line in lines)
    batch = data.train_batch(np.arange(6), 0)
    assert batch.group_id.tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"caption": "x"}], ["entry 1", "no image"]),
        ([{"img": "a.jpg", "caption": "x"}], ["entry 1", "no image", "rename 'img'"]),
        ([{"image": "a.jpg", "caption": "x"}, {"image": "a.jpg"}], ["entry 2", "no caption"]),
        ([{"image": "a.jpg", "caption": []}], ["entry 1", "no caption"]),
        ([{"image": "a.jpg", "caption": ["x", ""]}], ["entry 1", "caption is empty"]),
        ([{"image": "a.jpg", "caption": {"en": "x"}}], ["entry 1", "must be text"]),
        ([{"image": "a.jpg", "caption": "x", "image_id": 1.5}], ["entry 1", "'image_id' is 1.5"]),
        ([{"image": "/abs/a.jpg", "caption": "x"}], ["entry 1", "lies outside", "image_root"]),
        ([{"image": "nowhere/a.jpg", "caption": "x"}], ["entry 1", "no image"]),
        ('[{"image": "a.jpg", "caption": "x"}] trailing', ["line 1 column 38", "Extra data"]),
        ('[{"image": "a.jpg", "caption": "x"}\n{', ["line 2 column 1", "','"]),
    ],
)
def test_bad_albef_files(rows: Any, parts: list[str], tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg")
    with one_line(DataError, *parts):
        load(save(tmp_path / "d.json", rows))


# A folder -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_and_texts(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", "b.PNG", "sub/c.jpeg", "d.jpg", ".hidden.jpg")
    save(tmp_path / "a.txt", "a cat\r\n\n  one cat \n")
    save(tmp_path / "b.txt", "\ufeffa cat")
    save(tmp_path / "sub" / "c.txt", "a dog")
    save(tmp_path / "labels.csv", "ignored")
    data = load(tmp_path, validation_fraction=0.0)
    assert [p.caption for p in data.pairs] == ["a cat", "one cat", "a cat", "a dog"]
    assert data.train_group_id.tolist() == [0, 0, 0, 1]  # the caption that two images share makes them one group
    assert [data.name_of(i) for i in range(4)] == ["a.txt line 1", "a.txt line 3", "b.txt line 1", "sub/c.txt line 1"]
    (notice,) = data.notices()
    assert notice.endswith("images without a .txt of their name are left out: 1, the first d.jpg")


@pytest.mark.parametrize(
    ("texts", "images", "parts"),
    [
        ({}, [], ["no images in it", "NAME.txt"]),
        ({"a.txt": "x"}, [], ["a.txt: no image of that name"]),
        ({"a.txt": "cat", "b.txt": "x", "c.txt": "x"}, ["a.jpg"], ["b.txt: no image", "1 more in this folder"]),
        ({}, ["a.jpg", "b.jpg"], ["none of its 2 images has a caption", "a.txt"]),
        ({"a.txt": "\n \n"}, ["a.jpg"], ["a.txt: no caption"]),
        ({"a.txt": "cat"}, ["a.jpg", "a.png"], ["a.txt stands beside a.jpg and a.png", "rename"]),
        ({"a.txt": "cat\ncat"}, ["a.jpg"], []),
        ({"a.txt": "the"}, ["a.jpg"], ["a.txt line 1", "no word that can be masked"]),
    ],
)
def test_bad_folders(texts: dict[str, str], images: list[str], parts: list[str], tmp_path: Path) -> None:
    picture(tmp_path, *images)
    for name, text in texts.items():
        save(tmp_path / name, text)
    if not parts:
        assert len(load(tmp_path, validation_fraction=0.0).pairs) == 2  # a caption that stands twice is no mistake here
        return
    with one_line(DataError, *parts):
        load(tmp_path, validation_fraction=0.0)


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with one_line(DataError, "a.txt", "UTF-8 at byte 3"):
        load(tmp_path)


HALF = "half a character, .ud83d, as number 7; write the whole character, or remove it"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("d.jsonl", [{"image": "a.jpg", "caption": "a cat"}, {"image": "b.jpg", "caption": "a cat \ud83d!"}],
         ["d.jsonl line 2: 'caption' has " + HALF]),
        ("d.jsonl", [{"image": "a.jpg", "caption": "a cat", "group": "group \ud83d"}], ["line 1: 'group' has " + HALF]),
        ("d.jsonl", [{"image": "a\udce9.jpg", "caption": "a cat"}],
         ["line 1: 'image' has half a character, .udce9, as number 2; rename the file in UTF-8"]),
        ("d.json", [{"image": "a.jpg", "caption": ["a cat", "a cat \ud83d"]}], ["entry 1: 'caption' has " + HALF]),
        ("d.json", {"images": [entry("a.jpg", "train", "a cat \ud83d")]}, ["image 1 .a.jpg.: 'caption' has " + HALF]),
    ],
)  # fmt: skip
def test_half_characters_are_named(name: str, content: Any, parts: list[str], tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", "b.jpg")
    lines = "\n".join(map(json.dumps, content)) if name.endswith("l") else content
    with one_line(DataError, *parts):
        load(save(tmp_path / name, lines), validation_fraction=0.0)
    whole = save(tmp_path / "w.jsonl", json.dumps({"image": "a.jpg", "caption": "a cat \U0001f600"}))
    assert load(whole, validation_fraction=0.0).pairs.captions == ["a cat \U0001f600"]  # as both halves are escaped


def test_a_picture_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", os.fsdecode(b"sub/caf\xe9.jpg"))
    save(tmp_path / "a.txt", "a cat")
    with one_line(DataError, r"the name of 'sub/caf.udce9\.jpg' is not UTF-8; rename it"):
        load(tmp_path)


# Files to evaluate on -------------------------------------------------------------------------------------------------


def test_validation_path_takes_the_place_of_other_splits(karpathy: Path) -> None:
    root = karpathy.parent / "images"
    lines = save(karpathy.parent / "v.jsonl", json.dumps({"image": "6.jpg", "caption": "a small dog"}))
    data = load(karpathy, image_root=root, validation_path=lines)
    assert list(data.splits) == ["validation"]
    assert data.train_size == 4
    assert data.splits["validation"].take(np.array([0])).images.shape == (1, 3, 16, 16)
    notices = " | ".join(data.notices())
    assert "3 val/test images of" in notices
    assert "1 of the 1 images of split validation are trained on" in notices
    other = load(lines, image_root=root, validation_path=karpathy)
    assert list(other.splits) == ["val", "test"]
    assert other.train_size == 1
    assert "3 train images of" in " | ".join(other.notices())


def test_a_file_without_anything_to_evaluate(karpathy: Path) -> None:
    root = karpathy.parent / "images"
    train = save(karpathy.parent / "t.json", {"images": [entry("6.jpg", "train", "a dog")]})
    with one_line(DataError, "t.json", "neither val nor test", "data.validation_path"):
        load(karpathy, image_root=root, validation_path=train)
    with one_line(DataError, "missing.json", "data.validation_path"):
        load(karpathy, image_root=root, validation_path=karpathy.parent / "missing.json")


def test_with_a_trained_models_words_only_what_is_evaluated_is_read(karpathy: Path) -> None:
    """Neither are training images needed, nor their captions tokenised; a file without splits is evaluated whole."""
    root = karpathy.parent / "images"
    words = load(karpathy, image_root=root).tokenizer
    (root / "6.jpg").unlink()
    with one_line(DataError, "image 6", "no image"):
        load(karpathy, image_root=root)
    data = FilePairs(recipe(karpathy, image_root=root), words)
    assert list(data.splits) == ["val", "test"]
    assert (len(data.pairs), data.train_size, len(data.table)) == (7, 0, 7)
    rows = [{"image": f"{n}.jpg", "caption": ["a cat", "a cow"]} for n in (3, 4, 5)]
    whole = save(karpathy.parent / "l.json", rows)
    (split,) = FilePairs(recipe(whole, image_root=root), words).splits.values()
    assert (split.title, split.image_count, split.caption_count) == (f"all 6 pairs of {whole}", 3, 6)
    gone = save(karpathy.parent / "gone.json", [{"image": "gone.jpg", "caption": "a cat"}])
    data = FilePairs(recipe(gone, image_root=root, validation_path=whole), words)
    assert [(name, s.image_count) for name, s in data.splits.items()] == [("validation", 3)]
    train = save(karpathy.parent / "t.json", {"images": [entry("6.jpg", "train", "a dog")]})
    with one_line(DataError, "t.json", "neither val nor test images in it; give another data.path"):
        FilePairs(recipe(train, image_root=root), words)


def test_a_vocabulary_that_does_not_fit_is_named(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", "b.jpg")
    foreign = save(tmp_path / "d.json", [{"image": "a.jpg", "caption": "Katze"}, {"image": "b.jpg", "caption": "Hund"}])
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "hund"]))
    settings = {"vocabulary": words, "validation_fraction": 0.0}
    (line, unknown) = load(foreign, **settings).notices()
    assert line.startswith("pairs left out of the training, without a word that can be masked: 1, the first ")
    assert (
        unknown
        == f"50 % of the words of the training captions are unknown to {words}: is data.vocabulary of their language?"
    )
    words.write_text(words.read_text().removesuffix("\nhund"))
    with one_line(
        DataError, "vocab.txt knows no word of its 2 training captions", "set data.vocabulary to a vocab.txt"
    ):
        load(foreign, **settings)
    lines = save(tmp_path / "d.jsonl", json.dumps({"image": "a.jpg", "caption": "Katze"}))
    with one_line(DataError, "vocab.txt", "set data.vocabulary to one that knows its words"):
        load(lines, **settings)


def test_links_to_one_image_are_one_image(tmp_path: Path) -> None:
    picture(tmp_path, "real/a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "real" / "a.jpg")
    names = ("real/a.jpg", "link/a.jpg", "b.jpg", "./real/../real/a.jpg")
    rows = [{"image": name, "caption": f"caption {i}"} for i, name in enumerate(names)]
    table = read_pairs(save(tmp_path / "d.json", rows), None)
    assert table.images == [str((tmp_path / "real" / "a.jpg").resolve())]
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "set").symlink_to(tmp_path / "real")  # as one who has two disks does
    rows = [{"image": "set/a.jpg", "caption": "x"}, {"image": str(tmp_path / "link" / "a.jpg"), "caption": "y"}]
    table = read_pairs(save(tmp_path / "outside" / "d.json", rows[:1]), None)
    assert (table.images, table.names) == ([str((tmp_path / "real" / "a.jpg").resolve())], ["set/a.jpg"])
    with one_line(DataError, "entry 2", "lies outside"):
        read_pairs(save(tmp_path / "outside" / "d.json", rows), None)
    with one_line(DataError, "entry 1", "lies outside"):  # ".." is worked out in the name, not behind the link
        read_pairs(save(tmp_path / "outside" / "d.json", [{"image": "set/../../b.jpg", "caption": "x"}]), None)
    (tmp_path / "root").symlink_to(tmp_path / "real")
    inside = [{"image": str(tmp_path / "real" / "a.jpg"), "caption": "x"}, {"image": "a.jpg", "caption": "y"}]
    assert read_pairs(save(tmp_path / "d.json", inside), tmp_path / "root").names == ["a.jpg"]


def test_captions_longer_than_the_limit_are_cut_and_counted(tmp_path: Path) -> None:
    picture(tmp_path, "a.jpg", "b.jpg")
    rows = [{"image": "a.jpg", "caption": "cat " * 9}, {"image": "b.jpg", "caption": "one cat"}]
    path = save(tmp_path / "d.json", rows)
    data = load(path, max_tokens=6, validation_fraction=0.0)
    assert data.describe()["captions cut"] == 1
    batch = data.train_batch(np.arange(2), 0)
    assert batch.token_ids.shape == (2, 6)
    assert batch.token_ids[0, -1] == data.tokenizer.sep_id
    assert data.max_tokens == 6
    assert load(path, max_words=3, validation_fraction=0.0).describe()["captions cut"] == 1
    assert load(path, validation_fraction=0.0).describe()["captions cut"] == 0


@pytest.mark.parametrize(
    ("settings", "positions", "parts"),
    [
        ({"max_tokens": 40}, 30, [r"data.max_tokens \(40\)", "model.text.positions is 30"]),
        ({"max_words": 30}, 61, [r"data.max_words \(30\)", "= 62", "model.text.positions is 61"]),
    ],
)
@pytest.mark.parametrize("source", ["pairs", "emoji"])
def test_captions_longer_than_the_text_tower(
    source: str, settings: dict[str, Any], positions: int, parts: list[str], tmp_path: Path
) -> None:
    described = recipe(tmp_path / "d.json", **settings).model_dump()
    described["data"]["source"] = source
    described["model"]["text"]["positions"] = positions
    with one_line(UserError, *parts):
        load_data(Recipe.model_validate(described))


def test_a_sample_does_not_depend_on_the_other_files(karpathy: Path) -> None:
    root = karpathy.parent / "images"
    lines = save(karpathy.parent / "v.jsonl", json.dumps({"image": "6.jpg", "caption": "a small dog"}))
    one = load(karpathy, image_root=root).train_batch(np.arange(4), 3)
    other = load(karpathy, image_root=root, validation_path=lines).train_batch(np.arange(4), 3)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.token_ids, other.token_ids)
