"""A user's own pairs: reading, splitting, decoding, and every mistake in one line."""

from __future__ import annotations

import csv
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crossmask.engine.data import load_data
from crossmask.engine.data.pair_files import read_pairs
from crossmask.engine.data.pair_groups import held_out, linked, true_matches
from crossmask.engine.data.pairs import FilePairs
from crossmask.engine.errors import DataError, RecipeError, UserError
from crossmask.engine.recipe import Recipe

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}
THINGS = ["shirt", "hat", "coat", "shoe", "bag"]


def write(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path


def picture(
    folder: Path, name: str = "a.png", colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (20, 30)
) -> Path:
    Image.new("RGB", size, colour).save(folder / name)
    return folder / name


def recipe(path: Path | None, size: int = 16, **data: Any) -> Recipe:
    settings = {"source": "pairs", "path": path, "validation_fraction": 0.3, **data}
    return Recipe.model_validate({"seed": 1, "data": settings, "model": {"image": {"size": size, "patch_size": 8}}})


def shop(folder: Path) -> Path:
    """20 captions, two images each."""
    rows = []
    for colour, value in COLOURS.items():
        for thing in THINGS:
            for view in range(2):
                name = picture(folder, f"{colour}-{thing}-{view}.png", value, (20 + view, 30)).name
                rows.append({"image": name, "caption": f"a {colour} {thing}", "category": thing})
    return write(folder, rows)


def load(path: Path | None, **data: Any) -> FilePairs:
    loaded = load_data(recipe(path, **data))
    assert isinstance(loaded, FilePairs)
    return loaded


def one_line(error: type[UserError], *parts: str) -> Any:
    return pytest.raises(error, match=r"(?s)\A" + "".join(f"(?=.*{part})" for part in parts) + r"[^\n]*\Z")


# What works -----------------------------------------------------------------------------------------------------------


def test_splits_hold_out_whole_captions(tmp_path: Path) -> None:
    data = load(shop(tmp_path))
    split = data.splits["held-out"]
    train, held = set(data.train_group_id.tolist()), set(split.image_group_id.tolist())
    assert not train & held
    assert len(train | held) == 20
    assert 1 <= len(held) <= 12
    assert split.image_count == 2 * split.caption_count == 2 * len(held)
    assert data.train_size + split.image_count == 40
    fractions = {k: zlib.crc32(k.encode()) / 2**32 < 0.3 for k in ("a red shirt", "a blue hat", "a grey bag")}
    for caption, out in fractions.items():
        group = next(int(data._group[i]) for i, p in enumerate(data.pairs) if p.caption == caption)
        assert (group in held) == out
    batches = list(split.images(7))
    assert torch.cat([b.group_id for b in batches]).tolist() == split.image_group_id.tolist()
    assert sum(len(g) for g in split.gallery(3)) == split.caption_count
    assert data.scene_batch("held-out", 4, 0) is None
    assert not split.image_is_flag.any()


def test_a_sample_is_the_same_in_any_batch(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    path = shop(tmp_path)
    for name in tmp_path.glob("*.png"):
        Image.fromarray(np.roll(noise, zlib.crc32(name.name.encode()) % 30, 0)).save(name)
    data = load(path, word_drop=0.3)
    indices = np.array([3, 0, 9, 5])
    together = data.train_batch(indices, 2)
    for i, index in enumerate(indices):
        alone = data.train_batch(np.array([index]), 2)
        assert torch.equal(together.images[i], alone.images[0])
        length = int(alone.token_mask.sum())
        assert torch.equal(together.token_ids[i, :length], alone.token_ids[0])
    assert together.images.shape == (4, 3, 16, 16)
    assert together.index.tolist() == indices.tolist()
    assert together.group_id.tolist() == data.train_group_id[indices].tolist()
    assert not torch.equal(together.images, data.train_batch(indices, 3).images)
    still = load(path, augment=0.0)
    assert torch.equal(still.train_batch(indices, 2).images, still.train_batch(indices, 3).images)


def test_evaluation_sees_the_whole_image(tmp_path: Path) -> None:
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, :20] = 255  # left half white
    Image.fromarray(image).save(tmp_path / "a.png")
    data = load(write(tmp_path, [{"image": "a.png", "caption": "half"}]), validation_fraction=0.0, augment=0.0)
    pixels = data.train_batch(np.array([0]), 0).images[0]
    assert (pixels[:, :, :6] > 0.95).all()
    assert (pixels[:, :, 10:] < -0.95).all()
    assert data.splits == {}


def test_csv_and_group_column(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path, f"{name}.png")
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "group"])
        writer.writerows(
            [
                ["a.png", 'a "red"\nshirt', "7"],
                ["b.png", "crimson shirt", "7"],
                ["c.png", "Hat", ""],
                ["d.png", "hat!", ""],
            ]
        )
    data = load(path, validation_fraction=0.0)
    assert data._group.tolist() == [0, 0, 1, 1]
    assert [data.name_of(i) for i in range(4)] == [f"pairs.csv line {line}" for line in (3, 4, 5, 6)]


def test_side_words_forbid_mirroring(tmp_path: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": c} for c in ("pocket on the left", "pocket somewhere")]
    data = load(write(tmp_path, rows), validation_fraction=0.0)
    flips = [
        [
            bool(b[0, :4].mean() < b[0, 12:].mean())
            for b in (data.train_batch(np.array([i]), e).images[0].transpose(1, 2) for e in range(40))
        ]
        for i in range(2)
    ]
    assert not any(flips[0])
    assert 5 < sum(flips[1]) < 35


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    if mode == "I;16":
        Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / name)
    else:
        colour = {"LA": (0, 0), "RGBA": (0, 0, 0, 0), "CMYK": (0, 0, 0, 0), "P": 0}.get(mode, 255 if mode == "L" else 1)
        image = Image.new(mode, (9, 9), colour)
        if mode == "P":
            image.putpalette([255, 255, 255] * 256)
        image.save(tmp_path / name)
    data = load(write(tmp_path, [{"image": name, "caption": "white"}]), validation_fraction=0.0, augment=0.0)
    assert torch.allclose(data.train_batch(np.array([0]), 0).images, torch.ones(1, 3, 16, 16), atol=0.01)


def test_pairs_that_share_an_image_stay_together(tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        picture(tmp_path, f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": f"view {i} number {k}"} for k in range(3)]
    listed = read_pairs(write(tmp_path, rows), None)
    group, names = true_matches(listed, listed.captions)
    assert group.tolist() == np.repeat(np.arange(30), 3).tolist()
    out = held_out(group, names, 0.3).reshape(30, 3)
    assert (out.all(1) | ~out.any(1)).all()
    assert 2 <= out.all(1).sum() <= 20


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_empty_by_chance(fraction: float) -> None:
    out = held_out(np.arange(3), ["one", "two", "three"], fraction)
    assert out.sum() == (1 if fraction < 0.5 else 2)


def test_pairs_match_that_share_an_image_or_a_key_or_are_linked() -> None:
    image, key = np.array([0, 0, 1, 2, 3, 3, 4]), np.array([0, 1, 1, 2, 3, -1, 2])
    assert linked(image, key).tolist() == [0, 0, 0, 1, 2, 2, 1]
    assert linked(np.array([5, 3, 5]), np.array([-1, -1, -1])).tolist() == [0, 1, 0]


def test_a_split_has_every_image_and_every_caption_once(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path, f"{name}.png")
    rows = [
        {"image": "a.png", "caption": "red shirt", "category": "shirts"},
        {"image": "b.png", "caption": "Red shirt"},
        {"image": "a.png", "caption": "crimson top"},
        {"image": "c.png", "caption": "blue hat", "category": "hats"},
        {"image": "a.png", "caption": "RED SHIRT"},
    ]
    train = write(tmp_path, [{"image": "c.png", "caption": "a hat"}], "train.jsonl")
    data = load(train, validation_path=write(tmp_path, rows))
    split = data.splits["validation"]
    assert split.image_count == 3
    assert split.image_group_id[0] == split.image_group_id[1] != split.image_group_id[2]
    texts = [data.tokenizer.text(row) for part in split.gallery(2) for row in part.token_ids]
    assert len(texts) == split.caption_count == 3  # two spellings of "red shirt" are one candidate
    assert split.gallery_group_id.tolist() == [split.image_group_id[i] for i in (0, 0, 2)]
    assert split.image_category is not None
    assert split.gallery_category is not None
    assert split.image_category.tolist() == [0, -1, 1]
    assert split.gallery_category.tolist() == [0, -1, 1]
    assert data.train_size == 1
    assert data.notices() == [
        "1 of the 3 images of split validation are trained on, too: their recalls do not speak of new images"
    ]


# Mistakes -------------------------------------------------------------------------------------------------------------

GOOD = {"image": "a.png", "caption": "red shirt"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ["no pairs"]),
        ([GOOD, "{oops"], ["line 2", "not JSON"]),
        ([GOOD, "[" * 100_000], ["line 2", "not JSON"]),
        (["[1, 2]"], ["line 1", "JSON object"]),
        ([{"image": "a.png", "captoin": "x"}], ["line 1", "'captoin'", "rename"]),
        ([{"image": "a.png"}], ["line 1", "no column 'caption'", "add it"]),
        ([GOOD, "", {"image": "a.png", "caption": "  "}], ["line 3", "caption is empty"]),
        ([{"image": "", "caption": "x"}], ["line 1", "image is empty"]),
        ([{"image": None, "caption": "x"}], ["line 1", "image is empty"]),
        ([{"image": "a.png", "caption": 5}], ["line 1", "'caption' is 5", "must be text"]),
        ([{"image": "a.png", "caption": ["x"]}], ["line 1", "must be text"]),
        ([{"image": "b.png", "caption": "x"}], ["line 1", "no image .*b.png", "image_root"]),
        ([{"image": ".", "caption": "x"}], ["line 1", "no image"]),
        ([{"image": "a\0.png", "caption": "x"}], ["line 1", "not a usable file name"]),
        ([{"image": "a" * 5000, "caption": "x"}], ["line 1", "file name|no image"]),
        ([{"image": "../outside.png", "caption": "x"}], ["line 1", "lies outside", "image_root"]),
        ([{"image": "/etc/passwd", "caption": "x"}], ["line 1", "lies outside"]),
        ([{"image": "link/../../outside.png", "caption": "x"}], ["line 1", "lies outside"]),
        ([{"image": "link.png/..", "caption": "x"}], ["line 1", "no image"]),
        ([{"image": "zero.png", "caption": "x"}], ["line 1", "no image"]),
        ([GOOD, GOOD], ["line 2", "same image and caption as line 1"]),
        (
            [GOOD, {"image": "a.png", "caption": "of the!"}],
            ["line 2", "of the!", "no word that can be masked"],
        ),
        ([{"image": "a.png", "caption": "?!…"}], ["line 1", "no word that can be masked"]),
    ],
)
def test_bad_rows(rows: list[Any], parts: list[str], tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    picture(root)
    picture(tmp_path, "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "zero.png").symlink_to("/dev/zero")
    with one_line(DataError, *parts):
        load(write(root, rows))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no column 'image'", "found: nothing"]),
        ("image,text\na.png,x\n", ["line 1", "no column 'caption'", "found: image, text"]),
        ("image,caption\na.png\n", ["line 2", "caption is empty"]),
        ("image,caption\n", ["no pairs"]),
        ('image,caption\n"' + "x" * 200_000, ["CSV", "field larger"]),
    ],
)
def test_bad_csv(text: str, parts: list[str], tmp_path: Path) -> None:
    picture(tmp_path)
    (tmp_path / "pairs.csv").write_text(text)
    with one_line(DataError, *parts):
        load(tmp_path / "pairs.csv")


def test_bad_files(tmp_path: Path) -> None:
    with one_line(DataError, "data.path is not set"):
        read_pairs(None, None)
    with one_line(DataError, "no.jsonl", "no such file"):
        load(tmp_path / "no.jsonl")
    with one_line(DataError, "pairs.txt", "must end in .jsonl, .csv or .json"):
        load(write(tmp_path, [], "pairs.txt"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "a.png", "caption": "caf\xe9"}')
    with one_line(DataError, "latin.jsonl", "UTF-8"):
        load(tmp_path / "latin.jsonl")
    picture(tmp_path)
    good = write(tmp_path, [GOOD])
    with one_line(DataError, "nowhere", "image_root"):
        load(good, image_root=tmp_path / "nowhere")
    with one_line(RecipeError, "scenes.fraction", "set it to 0"):
        load(good, scenes={"fraction": 0.5})
    with one_line(DataError, "vocabulary_size"):
        rare = [{"image": "a.png", "caption": "x" * 9 + chr(0x4E00 + i)} for i in range(80)]
        load(write(tmp_path, [*rare, {"image": "a.png", "caption": "龍"}]), vocabulary_size=64, validation_fraction=0.0)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + struct.pack(">I", 8) + b"IDAT"  # and then nothing


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["not an image"]),
        (b"hello", ["not an image"]),
        (png_header(9000, 9000), ["9000 x 9000 pixels", "64 million"]),
        (png_header(60000, 60000), ["cannot read|pixels"]),
        (None, ["cannot read"]),  # cut off in the middle
    ],
)
def test_unreadable_images_are_named_when_they_are_needed(
    content: bytes | None, parts: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    picture(tmp_path)
    if content is None:
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "b.png")
        content = (tmp_path / "b.png").read_bytes()[:3000]
    (tmp_path / "b.png").write_bytes(content)
    data = load(write(tmp_path, [GOOD, {"image": "b.png", "caption": "bad"}]), validation_fraction=0.0)
    data.train_batch(np.array([0]), 0)
    with one_line(DataError, "line 2", "b.png", *parts):
        data.train_batch(np.array([0, 1]), 0)
    assert not recwarn.list


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_forbidden_image(tmp_path: Path) -> None:
    picture(tmp_path).chmod(0)
    with one_line(DataError, "line 1", "a.png"):
        load(write(tmp_path, [GOOD]), validation_fraction=0.0).train_batch(np.array([0]), 0)
