"""FashionGen's published HDF5 layout, on small files of it: what is read, how it is split, and one-line mistakes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossmask.engine.data import fashion_gen, load_data
from crossmask.engine.data.pair_files import read_pairs
from crossmask.engine.errors import DataError
from crossmask.engine.recipe_files import load_recipe

TRAIN, VALIDATION = fashion_gen.FILES
SHAPE = [
    "data.source=pairs",
    "data.augment=0",
    "data.scenes.fraction=0",
    "model.image={size: 16, patch_size: 8, width: 16, depth: 1, heads: 2}",
    "model.text={width: 16, depth: 1, heads: 2}",
]


def rows(first: int, products: int) -> list[dict[str, Any]]:
    """Each product from two sides, with one description."""
    return [
        {
            "input_productID": product,
            "input_description": f"Long-sleeve caf\xe9 shirt {product} in pink.<br>Tonal stitching.",
            "input_name": f"Shirt {product}",
            "input_category": ("SHIRTS", "JEANS")[product % 2],
            "input_subcategory": ("T-SHIRTS", "JEANS", "SHIRTS")[product % 3],
        }
        for product in range(first, first + products)
        for _ in range(2)
    ]


def write(path: Path, found: list[dict[str, Any]], **replaced: Any) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    count = len(found)
    images = np.zeros((count, 32, 24, 3), np.uint8)
    images[:] = (np.arange(count) * 7 % 256)[:, None, None, None]
    with h5py.File(path, "w") as file:
        columns: dict[str, Any] = {"index": np.arange(count)[:, None], "input_image": images}
        columns["input_productID"] = np.array([[row["input_productID"]] for row in found], np.int32)
        for name in ("input_description", "input_name", "input_category", "input_subcategory"):
            columns[name] = np.array([[row[name].encode("latin-1")] for row in found], "S80")
        for name, values in (columns | replaced).items():
            if values is not None:
                file.create_dataset(name, data=values)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / TRAIN, rows(100, 6))
    write(tmp_path / VALIDATION, rows(200, 4))
    return tmp_path


def test_a_folder_has_the_splits_of_its_files(folder: Path) -> None:
    data = load_data(load_recipe("syncmask-emoji", [*SHAPE, f"data.path={folder}"]))
    assert data.train_size == 12
    assert len(np.unique(data.train_group_id)) == 6  # all sides of a product match
    (name, split), *more = data.splits.items()
    assert not more
    assert (name, split.title, split.image_count, split.caption_count) == ("val", "FashionGen's val split", 8, 4)
    assert split.labels["category"].tolist()[:4] == ["SHIRTS", "SHIRTS", "JEANS", "JEANS"]
    assert split.labels["subcategory"].tolist()[::2] == ["SHIRTS", "T-SHIRTS", "JEANS", "SHIRTS"]
    assert split.image_category is not None
    assert len(set(split.image_category.tolist())) == 2
    training = data.training_split()
    assert training is not None
    assert training.image_count == 12
    batch = split.take(np.array([0, 5]))
    expected = (np.array([0, 5]) * 7 % 256) / 255 * 2 - 1
    np.testing.assert_allclose(batch.images.mean((1, 2, 3)).numpy(), expected, atol=1e-5)
    assert data.name_of(3) == f"{TRAIN} row 4"
    torch.testing.assert_close(split.take(np.array([0, 5])).images, batch.images)


def test_texts(folder: Path) -> None:
    table = read_pairs(folder, None)
    assert table.captions[0] == "Long-sleeve caf\xe9 shirt 100 in pink. Tonal stitching."  # Latin-1, no markup
    assert table.groups[:3] == ["100", "100", "101"]
    assert table.captions[0] is table.captions[1]
    assert read_pairs(folder, None, training=False).captions == table.captions[12:]


def test_a_single_file_is_split_by_share_or_by_the_other(folder: Path) -> None:
    alone = load_data(
        load_recipe("syncmask-emoji", [*SHAPE, f"data.path={folder / TRAIN}", "data.validation_fraction=0.4"])
    )
    assert 0 < alone.train_size < 12
    assert not set(alone.train_group_id.tolist()) & set(alone.splits["held-out"].image_group_id.tolist())
    both = [f"data.path={folder / TRAIN}", f"data.validation_path={folder / VALIDATION}"]
    data = load_data(load_recipe("syncmask-emoji", [*SHAPE, *both]))
    assert (data.train_size, data.splits["validation"].image_count) == (12, 8)
    os.remove(folder / VALIDATION)
    assert (read_pairs(folder, None).split == -1).all()


def test_the_name_where_there_is_no_description_and_neither(tmp_path: Path) -> None:
    found = rows(0, 3)
    found[0]["input_description"] = "<p> </p>"
    found[3]["input_description"] = found[3]["input_name"] = ""
    table = read_pairs(write(tmp_path / TRAIN, found), None)
    assert table.captions[0] == "Shirt 0"
    assert len(table) == 5
    assert table.place.tolist() == [1, 2, 3, 5, 6]
    assert table.notices == (
        f"{tmp_path / TRAIN}: rows without a description or a name are left out: 1, the first row 4",
    )
    assert fashion_gen.picture(table.images[3], "here").getpixel((0, 0)) == (28, 28, 28)  # the fifth row's


def test_recognition_and_sampled_galleries_can_be_asked_for(folder: Path) -> None:
    data = load_data(load_recipe("syncmask-emoji", [*SHAPE, f"data.path={folder}", "evaluation.recognition=true"]))
    assert set(data.splits["val"].labels) == {"category", "subcategory"}


@pytest.mark.parametrize(
    ("replaced", "problem"),
    [
        (
            {"input_category": None},
            r"no data set 'input_category' \(it has 'input_subcategory'\); give one of fashiongen",
        ),
        ({"input_image": np.zeros((12, 8, 8), np.uint8)}, r"input_image is uint8 of shape \(12, 8, 8\), not uint8 of"),
        ({"input_image": np.zeros((12, 8, 8, 3), np.float32)}, r"input_image is float32"),
        (
            {"input_productID": np.zeros((11, 1), np.int32)},
            "11 rows of input_productID for 12 images; is the file complete",
        ),
        ({"input_description": np.float64(3)}, "input_description has no rows; give one of fashiongen"),
        ({"input_name": np.zeros((12, 0))}, "input_name has no rows; give one of fashiongen"),
    ],
)
def test_foreign_files(tmp_path: Path, replaced: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / TRAIN, rows(0, 6), **replaced)
    with pytest.raises(DataError, match=problem) as caught:
        read_pairs(path, None)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_column(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    path = write(tmp_path / TRAIN, rows(0, 6), input_image=None)
    with h5py.File(path, "a") as file:
        file.create_group("input_image")
    with pytest.raises(DataError, match="input_image has no rows; give one of fashiongen"):
        read_pairs(path, None)


def test_files_that_are_not_hdf5(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    (tmp_path / TRAIN).write_bytes(b"<html>please log in</html>")
    with pytest.raises(DataError, match=r"not readable as HDF5 .* is it one of FashionGen's, and complete") as caught:
        read_pairs(tmp_path / TRAIN, None)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"other\.h5: no such file; set data\.validation_path to one of fashiongen_256"):
        read_pairs(tmp_path / "other.h5", None, "data.validation_path")
    empty = rows(0, 1)
    for row in empty:
        row["input_description"] = row["input_name"] = ""
    with pytest.raises(DataError, match="none of its rows has a description or a name"):
        read_pairs(write(tmp_path / VALIDATION, empty), None)


def test_an_image_that_is_gone(folder: Path) -> None:
    table = read_pairs(folder / TRAIN, None)
    with pytest.raises(DataError, match=r"somewhere: cannot read image .*#999"):
        fashion_gen.picture(table.images[0].replace("#0", "#999"), "somewhere")


def test_h5py_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    (tmp_path / TRAIN).write_bytes(b"")
    with pytest.raises(DataError, match=r"HDF5 files are read by h5py, which is not installed; install it with: pip"):
        read_pairs(tmp_path, None)
