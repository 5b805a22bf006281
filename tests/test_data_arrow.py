"""Hugging Face data sets on disk: the same batches as the same pairs in files, splits, columns, and every mistake."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pair_sets
import pytest
import torch

from crossmask.engine.data import arrow_files, arrow_sets, load_data
from crossmask.engine.data.pair_files import PairTable, read_pairs
from crossmask.engine.data.pair_pictures import open_pair_picture, read_pair_picture
from crossmask.engine.errors import DataError

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")

TEXT = datasets.Value("string")
CLASSES = datasets.ClassLabel(names=list(pair_sets.THINGS))


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows() -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": pair_sets.encoded(row["key"]), "path": f"{row['key']}.png"},
            "captions": row["captions"],
            "category": pair_sets.THINGS.index(row["category"]),
            "group": row["group"],
        }
        for row in pair_sets.rows()
    ]


def saved(folder: Path, found: list[dict[str, Any]], features: dict[str, Any] | None = None, **how: Any) -> Path:
    known = {"image": datasets.Image(), "captions": datasets.List(TEXT), "category": CLASSES, "group": TEXT}
    known = features or {name: known.get(name, TEXT) for name in found[0]}
    columns = {name: [row[name] for row in found] for name in known}
    datasets.Dataset.from_dict(columns, datasets.Features(known)).save_to_disk(folder, **how)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it in three files."""
    return saved(tmp_path_factory.mktemp("arrow") / "set", rows(), num_shards=3)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a DatasetDict; its train is shuffled."""
    folder = tmp_path_factory.mktemp("arrow") / "dict"
    known = datasets.Features({"image": datasets.Image(), "caption": TEXT})
    made = datasets.Dataset.from_list([{"image": row["image"], "caption": row["captions"][0]} for row in rows()], known)
    parts = {"train": made.select(range(12)).shuffle(seed=0), "validation": made.select(range(12, 16)),
             "test": made.select(range(16, 20)), "extra": made.select(range(2))}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def problem(path: Path, **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_pairs(path, None, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(table: PairTable, row: int) -> bytes:
    image = table.images[table.image[row]]
    return read_pair_picture(table.sources[table.source[row]], image, table.where(row)).tobytes()


# What works -----------------------------------------------------------------------------------------------------------


def test_the_same_batches_as_the_same_pairs_in_lines(whole: Path, tmp_path: Path) -> None:
    paths = pair_sets.lines(tmp_path), whole
    from_lines, from_set = (load_data(pair_sets.recipe(path, word_drop=0.3)) for path in paths)
    assert from_lines.train_group_id.tolist() == from_set.train_group_id.tolist()
    indices = np.random.default_rng(0).permutation(from_lines.train_size)
    one, other = (vars(data.train_batch(indices, 3)) for data in (from_lines, from_set))
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
    labels = [data.splits["held-out"].labels["category"].tolist() for data in (from_lines, from_set)]
    assert labels[0] == labels[1]
    moved = shutil.copytree(whole, tmp_path / "elsewhere" / whole.name)
    assert load_data(pair_sets.recipe(moved, word_drop=0.3)).fingerprint() == from_set.fingerprint()


def test_a_run_of_two_steps(whole: Path) -> None:
    assert np.isfinite(pair_sets.two_steps(pair_sets.recipe(whole))).all()


def test_splits(split: Path) -> None:
    data = load_data(pair_sets.recipe(split))
    assert data.train_size == 12
    assert {name: part.title for name, part in data.splits.items()} == {"val": "val split", "test": "test split"}
    assert [part.image_count for part in data.splits.values()] == [4, 4]
    assert data.notices() == [f"{split}: not used, for their names are not train, validation or test: extra"]
    table = read_pairs(split, None)
    assert table.where(13) == f"{split}/validation row 1"
    assert table.where(13, short=True) == "validation row 1"
    assert pixels(table, 13) == open_pair_picture(table.sources[1], table.images[13], "").tobytes()
    train = datasets.load_from_disk(split)["train"]
    assert table.captions[:12] == train["caption"][:]
    assert pixels(table, 5) == train[5]["image"].tobytes()

    assert len(read_pairs(split, None, training=False)) == 8
    assert (read_pairs(split / "train", None).split == -1).all()
    one = load_data(pair_sets.recipe(split / "train", validation_path=str(split / "test")))
    assert one.splits["validation"].image_count == 4
    evaluated = load_data(pair_sets.recipe(split / "test"), data.tokenizer)
    assert evaluated.splits["all"].image_count == 4


def test_only_a_train_split(split: Path, tmp_path: Path) -> None:
    shutil.copytree(split / "train", tmp_path / "train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert (read_pairs(tmp_path, None).split == -1).all()
    assert len(read_pairs(tmp_path, None, training=False)) == 12


def test_what_captions_and_classes_may_be(tmp_path: Path) -> None:
    image = rows()[0]["image"]
    found = [
        {"image": image, "text": " a hat ", "category": 1, "subcategory": 7},
        {"image": image, "text": None, "category": 0, "subcategory": 8},
        {"image": image, "text": "", "category": -1, "subcategory": 9},
        {"image": image, "text": "two\nlines", "category": None, "subcategory": None},
    ]
    features = {"image": datasets.Image(), "text": datasets.Value("large_string"), "category": CLASSES,
                "subcategory": datasets.Value("int32")}  # fmt: skip
    table = read_pairs(saved(tmp_path / "a", found, features), None)
    assert table.captions == ["a hat", "two\nlines"]
    assert (table.categories, table.subcategories) == (["hat", None], ["7", None])
    assert table.place.tolist() == [0, 3]
    assert table.notices == (f"{tmp_path}/a: rows without a caption are left out: 2, the first row 1",)
    found = [{"image": image["bytes"], "captions": ["one", None, "two"]}]
    features = {"image": datasets.Value("large_binary"), "captions": datasets.List(TEXT)}
    table = read_pairs(saved(tmp_path / "b", found, features), None)
    assert table.captions == ["one", "two"]
    assert table.image.tolist() == [0, 0]
    assert len(pixels(table, 1)) == 20 * 24 * 3


def test_images_by_their_paths(tmp_path: Path) -> None:
    found = [{"image": {"bytes": None, "path": "images/a.png"}, "captions": ["a hat"]},
             {"image": {"bytes": pair_sets.encoded("b"), "path": "/etc/x"}, "captions": ["bytes win"]}]  # fmt: skip
    folder = tmp_path / "set"
    features = {"image": {"bytes": datasets.Value("binary"), "path": TEXT}, "captions": datasets.List(TEXT)}
    saved(folder, found, features)
    assert "set row 0: no image" in problem(folder)
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(pair_sets.encoded("a"))
    table = read_pairs(folder, None)
    assert table.names == ["images/a.png", "set row 1"]
    assert pixels(table, 0) != pixels(table, 1)
    for path in ("/etc/passwd", "../x.png", f"row 0 of {folder}"):
        found[0]["image"]["path"] = path
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        line = problem(saved(tmp_path / "bad", found, features))
        assert "lies outside" in line or "no image" in line
    found[0]["image"] = None
    assert "row 0: its image is empty; remove the row with filter()" in problem(
        saved(tmp_path / "none", found, features)
    )


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_indices_of_older_versions(whole: Path, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "set")
    order = np.array([7, 0, 19, 7], np.uint64)

    def choose(order: np.ndarray) -> None:
        table = pa.table({"indices": order})
        with pa.ipc.new_stream(folder / "indices.arrow", table.schema) as stream:
            stream.write_table(table)
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {key: [{"filename": "indices.arrow"}]}))

    choose(order)
    table, stored = read_pairs(folder, None), rows()
    assert table.captions == [caption for row in order for caption in stored[row]["captions"]]
    assert table.place.tolist() == [0, 1, 1, 2, 3]
    assert pixels(table, 3) == pixels(read_pairs(whole, None), 23)
    choose(order + np.uint64(1))
    assert "its indices lead outside of its 20 rows" in problem(folder)


def test_little_of_a_set_is_read(tmp_path: Path) -> None:
    """Of 200 images of 100 kB their captions, and one of them at a time."""
    image = {"bytes": bytes(100_000), "path": None}
    folder = saved(tmp_path / "set", [{"image": image, "captions": [f"hat {n}"]} for n in range(200)])
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        table = read_pairs(folder, None)
        with pytest.raises(DataError, match="it is not an image"):
            pixels(table, 9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)
    assert len(table) == 200
    assert peak + pool.max_memory() < 2e6


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    image = rows()[0]["image"]
    for number, (row, features, what) in enumerate((
        ({"images": image, "text": "a"}, {"images": datasets.Image(), "text": TEXT},
         "no column 'image'; rename_column('images', 'image')"),
        ({"image": image, "caption_en": "a"}, {"image": datasets.Image(), "caption_en": TEXT},
         "no column 'caption'; rename_column('caption_en', 'caption')"),
        ({"image": image, "y": 3}, {"image": datasets.Image(), "y": datasets.Value("int64")},
         "no column 'caption'; found: image, y"),
        ({"image": 3, "text": "a"}, {"image": datasets.Value("int64"), "text": TEXT},
         "column 'image' is int64, not encoded images or their paths; cast_column('image', datasets.Image()) it first"),
        ({"image": image, "text": 3}, {"image": datasets.Image(), "text": datasets.Value("int64")},
         "column 'text' is int64, neither text nor a list of texts"),
        ({"image": [[1]], "text": "a"}, {"image": datasets.Array2D((1, 1), "int8"), "text": TEXT},
         "column 'image' is of a type that is not read"),
        ({"image": image, "text": "a", "group": 0.5}, {"image": datasets.Image(), "text": TEXT,
         "group": datasets.Value("float64")}, "row 0: 'group' is 0.5; it must be text"),
    )):  # fmt: skip
        assert what in problem(saved(tmp_path / str(number), [row], features))


def test_files_that_are_cut_short_or_gone(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "set")
    file = folder / "data-00001-of-00003.arrow"
    contents = file.read_bytes()
    for size in (len(contents) - 8, len(contents) - 1, len(contents) // 2, 40, 0):
        file.write_bytes(contents[:size])
        line = problem(folder)
        assert f"{file}: cut short or damaged behind its first " in line
        found: list[str] = []
        table = read_pairs(folder, None, complain=lambda kind, error: found.append(kind))  # noqa: B023
        assert set(found) == {"truncated"}
        assert len(table) >= 12
    os.remove(file)
    assert f"{file}: no such file; copy it, or save the data set again" in problem(folder)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')
    assert "state.json: '../other.arrow' is no file in this folder" in problem(folder)
    (folder / "state.json").write_text("{")
    assert "state.json: not JSON; save the data set again" in problem(folder)


def test_hostile_offsets_are_found(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "set")
    file = folder / "data-00000-of-00003.arrow"
    stored = file.read_bytes()
    with pa.ipc.open_stream(stored) as stream:
        buffer = stream.read_next_batch().column("group").buffers()[1]
    at = stored.index(buffer.to_pybytes()[:28])  # offsets of the first texts
    file.write_bytes(stored[: at + 8] + np.int32(2**30).tobytes() + stored[at + 12 :])
    assert "data-00000-of-00003.arrow: column group is damaged" in problem(folder)


def test_a_set_that_changes_while_it_is_trained_on(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "set")
    table = read_pairs(folder, None)
    pixels(table, 3)
    file = folder / "data-00000-of-00003.arrow"
    os.truncate(file, 100)  # to read on would end the process
    with pytest.raises(DataError, match=r"set row \d: \S*00000-of-00003.arrow has changed since the run began"):
        pixels(table, 3)


def test_what_is_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    line = problem(tmp_path / "hub")
    assert f"load_dataset('parquet', data_dir='{tmp_path}/hub/data').save_to_disk('NEW'), and set data.path to" in line
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "set-train.arrow").write_bytes(b"")
    assert "Arrow files are not read as they are; save them once" in problem(tmp_path / "cache")
    assert "load_dataset('arrow'" in problem(tmp_path / "cache" / "set-train.arrow")


def test_unknown_splits(split: Path, tmp_path: Path) -> None:
    shutil.copytree(split / "extra", tmp_path / "extra")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["extra"]}')
    assert "no split train, validation or test in it; set data.path to the folder of one of: extra" in problem(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../extra"]}')
    assert "no list of names of splits" in problem(tmp_path)


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch trapped",)


def test_types_that_unpickle_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "set", rows()[:2])
    field = pa.field("group", pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type",
                                                      "ARROW:extension:metadata": pickle.dumps(Trap())})  # fmt: skip
    with pa.ipc.open_stream((folder / "data-00000-of-00001.arrow").read_bytes()) as stream:
        table = stream.read_all()
    schema = pa.schema([field if own.name == "group" else own for own in table.schema])
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", schema) as stream:
        stream.write_table(pa.Table.from_arrays(table.columns, schema=schema))
    assert "column 'group' is of a type that is not read" in problem(folder)
    assert not (tmp_path / "trapped").exists()


def test_without_pyarrow_and_with_an_old_one(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pa, "__version__", "14.0.0")
    assert "pyarrow 14.0.0 runs code that a file may hold; install 14.0.1 or later" in problem(whole)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = "Arrow files are read by pyarrow, which is not installed; install it with: pip install pyarrow"
    assert line in problem(whole)


def test_datasets_is_not_needed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets not in (*vars(arrow_sets).values(), *vars(arrow_files).values())
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read_pairs(whole, None)) == 24
