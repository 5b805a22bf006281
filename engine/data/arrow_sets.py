"""A Hugging Face data set on disk, as ``save_to_disk`` writes it: one Dataset, or a DatasetDict with its splits.

Read by ``pyarrow``; the package ``datasets`` is not needed. Captions are read batch by batch when a run begins, and
images one by one when they are needed, so a set may be larger than the memory. Columns: ``image`` (encoded bytes, or a
path below the folder) and ``caption``, ``captions`` or ``text``, each a text or a list of them; and if they are there
``group``, ``category`` and ``subcategory``, class labels by their names.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest
from .arrow_files import STATE, Mapped, is_name, keep, mapped, open_mapped, pyarrow, read_object
from .complaints import Complain, Unusable, refuse
from .pair_files import ImageFinder, PairTable, Source, tabulate
from .pair_layouts import IMAGE_ENDINGS, Entry, captions_of, text_of

LAYOUT = "arrow"
INFO, SPLIT_LIST = "dataset_info.json", "dataset_dict.json"
SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "dev": "val", "test": "test"}
_CAPTIONS = ("caption", "captions", "text")
_LEVELS = ("group", "category", "subcategory")
_ROWS = 1024  # of texts read at once
_HELD = "row "  # in an address, before the stored row and its folder; no absolute path begins like that


def is_arrow_set(path: Path) -> bool:
    """Whether it is a saved data set, or Arrow or Parquet files that could be made one: they are told how."""
    if not path.is_dir():
        return path.suffix.lower() in (".arrow", ".parquet")
    return _is_saved(path) or _convertible(path) is not None


def _is_saved(path: Path) -> bool:
    return (path / SPLIT_LIST).is_file() or (path / STATE).is_file()


def _convertible(path: Path) -> tuple[str, Path] | None:
    """``parquet`` or ``arrow``, and the folder with such files: this one or ``data`` in it; None where images are."""
    for folder in (path, path / "data"):
        names = [name.lower() for name in os.listdir(folder)] if folder.is_dir() else []
        if any(name.endswith((*IMAGE_ENDINGS, ".txt")) for name in names):
            return None
        for kind in ("parquet", "arrow"):
            if any(name.endswith(f".{kind}") for name in names):
                return kind, folder
    return None


def read_arrow_set(
    path: Path,
    image_root: Path | None = None,
    name: str = "data.path",
    training: bool = True,
    complain: Complain = refuse,
) -> PairTable:
    """The pairs of all splits. ``image_root``: where paths of images lead from, the set's folder if None; ``name``: the
    recipe's field; without ``training`` the split train is passed over where there is another.

    Raises:
        DataError: pyarrow is not installed, or what cannot be used, by split and row, and what to do.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; set {name} to the folder that save_to_disk wrote")
    if not path.is_dir() or not _is_saved(path):
        kind, folder = (path.suffix.lower()[1:], path.parent) if path.is_file() else _convertible(path) or ("", path)
        raise DataError(
            f"{path}: {kind.capitalize()} files are not read as they are; save them once with the package datasets:"
            f" load_dataset({kind!r}, data_dir={str(folder)!r}).save_to_disk('NEW'), and set {name} to NEW"
        )
    pyarrow(path)
    splits: dict[Path, str | None] = {path: None}
    unused: list[str] = []
    if (path / SPLIT_LIST).is_file():
        splits, unused = _splits(path, name, training)
    table: PairTable | None = None
    for folder, split in splits.items():
        found = _read(folder, split, image_root or path, complain)
        table = found if table is None else table.joined(found)
    if table is None or not len(table):
        raise DataError(f"{path}: no pairs in it; each needs an image and a caption")
    if unused:
        line = f"{path}: not used, for their names are not train, validation or test: {', '.join(unused)}"
        return replace(table, notices=(*table.notices, line))
    return table


def _splits(path: Path, field: str, training: bool) -> tuple[dict[Path, str | None], list[str]]:
    """The folders of splits that are used and what they are, and the names of the others."""
    names = read_object(path / SPLIT_LIST).get("splits")
    if not isinstance(names, list) or not all(is_name(name) for name in names):
        raise DataError(f"{path / SPLIT_LIST}: no list of names of splits in it; save the data set again")
    known = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    if not known:
        found = f"set {field} to the folder of one of: {', '.join(names)[:80]}" if names else "save it again"
        raise DataError(f"{path}: no split train, validation or test in it; {found}")
    used: dict[Path, str | None] = {path / name: split for name, split in known.items()}
    others = {folder: split for folder, split in used.items() if split != "train"}
    if not others:
        used = dict.fromkeys(used)  # only train: a share of it may be held out
    elif not training:
        used = others
    return used, [name for name in names if name not in known]


def _read(folder: Path, split: str | None, root: Path, complain: Complain) -> PairTable:
    place = Path(os.path.abspath(folder))
    found = open_mapped(place, complain)
    source = Source(folder, LAYOUT, os.path.abspath(root), found.stamps)
    finder = _Finder(source, place, complain)
    without = array("q")
    table = tabulate(source, _entries(folder, found, split, without, complain), finder, complain)
    keep(found)
    if not without:
        return table
    line = f"{folder}: rows without a caption are left out: {len(without):,}, the first row {without[0]}"
    return replace(table, notices=(*table.notices, line))


class _Finder:
    """Rows that hold their image, and the files of those that do not."""

    def __init__(self, source: Source, folder: Path, complain: Complain) -> None:
        self._files, self._folder = ImageFinder(source, complain), folder
        self.images, self.names = self._files.images, self._files.names

    def __call__(self, place: int, name: str) -> int:
        if not name.startswith(_HELD):
            return self._files(place, name)
        self.images.append(f"{name} of {self._folder}")
        self.names.append(f"{self._folder.name} {name}")
        return len(self.images) - 1

    def complain(self) -> None:
        self._files.complain()


def _entries(
    folder: Path, found: Mapped, split: str | None, without: array[int], complain: Complain
) -> Iterator[Entry]:
    if found.schema is None:
        return
    captions, levels = _columns(folder, found.schema)
    found.check(["image", captions, *levels])
    labels = _class_names(folder, found.schema, levels)
    for start in range(0, len(found.order), _ROWS):
        rows = found.order[start : start + _ROWS]
        columns = found.texts(rows, [captions, *levels])
        for at, row in enumerate(rows.tolist()):
            place = start + at
            where = f"{folder} row {place}"
            path = columns["image"][at]
            try:
                if path is None:
                    raise Unusable("no image named", f"{where}: its image is empty; remove the row with filter()")
                texts = captions_of(where, columns[captions][at], complain)
                values: dict[str, str | None] = dict.fromkeys(_LEVELS)
                for level in levels:
                    value = _named(where, level, columns[level][at], labels.get(level))
                    values[level] = text_of(where, level, value)
            except Unusable as error:
                complain(error.kind, error)
                continue
            if texts:
                image = f"./{path}" if path.startswith(_HELD) else path or f"{_HELD}{row}"
                yield Entry(place, image, texts, values["group"], values["category"], values["subcategory"], split)
            else:
                without.append(place)
                if complain is not refuse:  # a run says how many there are
                    complain(
                        "empty caption", DataError(f"{where}: its caption is empty; write one or filter() the row")
                    )


def _columns(folder: Path, schema: Any) -> tuple[str, list[str]]:
    """The column of captions, and those of groups and categories that there are.

    Raises:
        DataError: a column is missing, or of another type.
    """
    names, types = list(schema.names), pyarrow(folder).types
    captions = next((name for name in _CAPTIONS if name in names), None)
    for wanted, there in (("image", "image" in names), ("caption", captions is not None)):
        if not there:
            near = nearest(wanted, names)
            remedy = f"rename_column({near!r}, {wanted!r})" if near else f"found: {', '.join(names)[:80] or 'nothing'}"
            raise DataError(f"{folder}: no column '{wanted}'; {remedy}")
    used = ["image", str(captions), *(level for level in _LEVELS if level in names)]
    for name in used:
        if names.count(name) > 1:
            raise DataError(f"{folder}: two columns '{name}'; rename_column() one of them")
        field = schema.field(name)
        if isinstance(field.type, pyarrow(folder).BaseExtensionType) or b"ARROW:extension:name" in (
            field.metadata or {}
        ):
            raise DataError(f"{folder}: column '{name}' is of a type that is not read ({str(field.type)[:60]})")
    kind = schema.field("image").type
    parts = {part.name: part.type for part in kind} if types.is_struct(kind) else {_part(types, kind): kind}
    if not parts.keys() & {"bytes", "path"} or any(
        _part(types, parts[x]) != x for x in parts.keys() & {"bytes", "path"}
    ):
        remedy = "cast_column('image', datasets.Image()) it first"
        raise DataError(f"{folder}: column 'image' is {str(kind)[:60]}, not encoded images or their paths; {remedy}")
    kind = schema.field(captions).type
    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    if _part(types, inner) != "path" and not types.is_null(inner):
        raise DataError(f"{folder}: column '{captions}' is {str(kind)[:60]}, neither text nor a list of texts")
    return used[1], used[2:]


def _part(types: Any, kind: Any) -> str | None:
    """What of an image a column of some type can hold."""
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    return "path" if types.is_string(kind) or types.is_large_string(kind) else None


def _class_names(folder: Path, schema: Any, levels: list[str]) -> dict[str, list[str]]:
    """The names of the classes of columns whose numbers stand for some."""
    features = read_object(folder / INFO).get("features") if (folder / INFO).is_file() else None
    found = {}
    for level in levels:
        feature = features.get(level) if isinstance(features, dict) else None
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = feature.get("names")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(f"{folder / INFO}: the classes of '{level}' have no names; save the data set again")
            found[level] = names
    return found


def _named(where: str, level: str, value: Any, names: list[str] | None) -> Any:
    if names is None or value is None or value == -1:  # which datasets writes for an unknown class
        return value if names is None else None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise Unusable("wrong type", f"{where}: '{level}' is {str(value)[:40]}, but it has {len(names)} classes")
    return names[value]


def contents(source: Source, address: str, where: str) -> bytes | None:
    """The encoded image at ``row N of FOLDER``; None where the address is a file of its own. Any thread may ask.

    Raises:
        DataError: the data set has changed; ``where`` says who asks.
    """
    if not address.startswith(_HELD):
        return None
    row, _, folder = address.removeprefix(_HELD).partition(" of ")
    return mapped(folder, source.stamps, where).image(int(row), where)
