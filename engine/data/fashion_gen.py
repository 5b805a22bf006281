"""FashionGen in its published files: ``fashiongen_256_256_train.h5`` and ``fashiongen_256_256_validation.h5``.

Each row of a file is a photograph with what belongs to it (Rostamzadeh et al., "Fashion-Gen", 2018): ``input_image``
(N, H, W, 3) uint8, the texts ``input_description``, ``input_name``, ``input_category`` and ``input_subcategory``
(N, 1), Latin-1 bytes, and ``input_productID`` (N, 1). A product is photographed from up to six sides, all with one
description: its images are one group. The description is the caption, or the name where there is none.

Rows are read in blocks and images one by one when they are needed, so the file may be larger than the memory.
"""

from __future__ import annotations

import os
import re
import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..beats import beat
from ..errors import DataError, nearest
from .pair_files import SPLITS, UNDECIDED, PairTable, Source

LAYOUT = "fashiongen"
FILES = {"fashiongen_256_256_train.h5": "train", "fashiongen_256_256_validation.h5": "val"}
ENDINGS = (".h5", ".hdf5")
_TEXTS = ("input_description", "input_name", "input_category", "input_subcategory")
_NEEDED = ("input_image", "input_description", "input_category", "input_subcategory", "input_productID")
_BLOCK = 1024  # rows of text read at once
_TAG = re.compile(r"<[^<>]*>")  # descriptions hold a little HTML
_files: dict[tuple[str, int], Any] = {}  # open files, by path and process: a handle must not cross a fork
_lock = threading.Lock()


def is_fashion_gen(path: Path) -> bool:
    """Whether it is an HDF5 file, or a folder with one of FashionGen's."""
    return path.suffix.lower() in ENDINGS or any((path / name).is_file() for name in FILES)


def read_fashion_gen(path: Path, name: str = "data.path", training: bool = True) -> PairTable:
    """Pairs of a folder with the published files, whose splits are then train and val, or of one such file, which is
    not split. Texts are read, images are not. ``name``: the recipe's field; without ``training`` the training file is
    passed over where the validation file lies beside it.

    Raises:
        DataError: h5py is not installed, or a file that is not FashionGen's; one line.
    """
    h5py = _h5py(path)
    files = {path: UNDECIDED}
    if path.is_dir():
        files = {path / file: SPLITS[split] for file, split in FILES.items() if (path / file).is_file()}
        if not training and len(files) > 1:
            files = {file: split for file, split in files.items() if split != SPLITS["train"]}
        if len(files) == 1 and SPLITS["train"] in files.values():
            files = dict.fromkeys(files, UNDECIDED)
    elif not path.is_file():
        raise DataError(f"{path}: no such file; set {name} to one of {', '.join(FILES)} or to their folder")
    tables = [_read(h5py, file, split) for file, split in files.items()]
    table = tables[0] if len(tables) == 1 else tables[0].joined(tables[1])
    if not len(table):
        raise DataError(f"{path}: none of its rows has a description or a name; is the file complete?")
    return table


def _h5py(path: Path | str) -> Any:
    try:
        import h5py
    except ImportError:
        raise DataError(
            f"{path}: HDF5 files are read by h5py, which is not installed; install it with: pip install h5py"
        ) from None
    return h5py


def _read(h5py: Any, path: Path, split: int) -> PairTable:
    try:
        with h5py.File(path, "r") as file:
            return _rows(path, file, split)
    except OSError as error:
        reason = str(error).split("\n")[0][:120]
        raise DataError(f"{path}: not readable as HDF5 ({reason}); is it one of FashionGen's, and complete?") from None


def _rows(path: Path, file: Any, split: int) -> PairTable:
    columns = _columns(path, file)
    count = len(columns["input_image"])
    kept, captions, groups = array("q"), list[str](), list[str | None]()
    levels: tuple[list[str | None], list[str | None]] = ([], [])
    shared: dict[str, str] = {}
    wordless = array("q")
    for start in range(0, count, _BLOCK):
        beat("reading the descriptions")
        block = slice(start, min(start + _BLOCK, count))
        texts = {name: [_text(x) for x in _flat(columns[name][block])] for name in _TEXTS if name in columns}
        products = _flat(columns["input_productID"][block])
        for at, product in enumerate(products):
            caption = texts["input_description"][at] or (texts["input_name"][at] if "input_name" in texts else "")
            if not caption:
                wordless.append(start + at)
                continue
            kept.append(start + at)
            captions.append(shared.setdefault(caption, caption))  # one string for all sides of a product
            groups.append(_text(product))
            for level, column in zip(levels, ("input_category", "input_subcategory"), strict=True):
                found = texts[column][at]
                level.append(shared.setdefault(found, found) if found else None)
    number = len(kept)
    left_out = f"{path}: rows without a description or a name are left out: {len(wordless)}"
    return PairTable(
        sources=(Source(path, LAYOUT, str(path.absolute().parent)),),
        source=np.zeros(number, np.int8),
        images=[f"{path.absolute()}#{row}" for row in kept],
        names=[f"{path.name}#{row}" for row in kept],
        image=np.arange(number, dtype=np.int32),
        captions=captions,
        place=np.array(kept, np.int64) + 1,
        split=np.full(number, split, np.int8),
        groups=groups,
        categories=levels[0],
        subcategories=levels[1],
        notices=(f"{left_out}, the first row {wordless[0] + 1}",) if wordless else (),
    )


def _columns(path: Path, file: Any) -> dict[str, Any]:
    """The data sets by name; DataError where one is missing or of another shape."""
    present = list(file)
    for name in _NEEDED:
        if name not in file:
            near = nearest(name, present)
            found = f"it has '{near}'" if near else f"found: {', '.join(present)[:80] or 'nothing'}"
            raise DataError(f"{path}: no data set '{name}' ({found}); give one of {', '.join(FILES)}")
    columns = {name: file[name] for name in (*_NEEDED, "input_name") if name in file}
    for name, column in columns.items():
        shape = getattr(column, "shape", None)  # a group has none
        if not shape or (len(shape) > 1 and shape[1] == 0):
            raise DataError(f"{path}: {name} has no rows; give one of {', '.join(FILES)}")
    images = file["input_image"]
    if len(images.shape) != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise DataError(
            f"{path}: input_image is {images.dtype} of shape {images.shape}, not uint8 of (N, H, W, 3); give one of"
            f" {', '.join(FILES)}"
        )
    for name, column in columns.items():
        if len(column) != len(images):
            raise DataError(f"{path}: {len(column)} rows of {name} for {len(images)} images; is the file complete?")
    return columns


def _flat(block: np.ndarray) -> list[Any]:
    return list(block.reshape(len(block), -1)[:, 0]) if len(block) else []


def _text(value: Any) -> str:
    """One value as text without markup or space around it; numbers as they are written."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return " ".join(_TAG.sub(" ", text).split())


def picture(address: str, where: str) -> Image.Image:
    """The image at ``FILE.h5#ROW``. Any thread may ask.

    Raises:
        DataError: it cannot be read; ``where`` says who named it.
    """
    path, _, row = address.rpartition("#")
    key = (path, os.getpid())
    try:
        with _lock:
            if key not in _files:
                _files[key] = _h5py(path).File(path, "r")
            pixels = _files[key]["input_image"][int(row)]
    except (OSError, LookupError, ValueError) as error:
        reason = str(error).split("\n")[0][:120]
        raise DataError(f"{where}: cannot read image {address}: {reason}; is the file complete?") from None
    return Image.fromarray(pixels)
