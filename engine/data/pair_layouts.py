"""The layouts in which users and benchmarks keep their image-caption pairs, each read as a stream of entries.

A file of lines (``.jsonl``, ``.csv``), Karpathy's and ALBEF's ``.json``, and a folder with a text beside each image.
Entries are only checked for what they say; whether an image exists is for :mod:`.pair_files`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, nearest

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_EXPECTED = '{"image": ..., "caption": ...}'
_MAY_BE_NUMBERS = ("group", "category", "subcategory", "image_id")
_FILES = ("image", "filename", "filepath")
_SPACE = re.compile(r"[ \t\r\n]*")


class Entry(NamedTuple):
    """One image with captions that describe it."""

    place: int  # line or entry in its file, from 1; of a folder's text file, the line of its first caption
    image: str  # relative to the image root
    captions: Sequence[str]
    group: str | None = None
    category: str | None = None
    subcategory: str | None = None
    split: str | None = None  # train, val or test, where the layout says so
    places: Sequence[int] | None = None  # of each caption, where they have lines of their own


def read_lines(path: Path) -> Iterator[Entry]:
    """A JSONL or CSV file with the columns image and caption, and optionally group, category and subcategory."""
    for line, row in _rows(path):
        where = f"{path} line {line}"
        image, caption, group, category, subcategory = (
            _text(where, column, row.get(column)) for column in ("image", "caption", "group", "category", "subcategory")
        )
        if image is None:
            raise DataError(f"{where}: the image is empty; give its path relative to the image root")
        if caption is None:
            raise DataError(f"{where}: the caption is empty; write one or remove the line")
        yield Entry(line, image, (caption,), group, category, subcategory)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            try:
                reader = csv.DictReader(file)
                _columns(path, 1, list(reader.fieldnames or []))
                for row in reader:
                    yield reader.line_num, {str(k): v for k, v in row.items()}
            except csv.Error as error:
                raise DataError(f"{path}: not readable as CSV ({error}); check its quotes") from None
            return
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", type(error).__name__)
                raise DataError(f"{path} line {line}: not JSON ({reason}); expected {_EXPECTED}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path} line {line}: not a JSON object; expected {_EXPECTED}")
            _columns(path, line, list(row))
            yield line, row


def _columns(path: Path, line: int, present: list[str]) -> None:
    for column in ("image", "caption"):
        if column not in present:
            near = nearest(column, [str(name) for name in present])
            remedy = f"rename '{near}' to '{column}'" if near else f"add it (found: {', '.join(present) or 'nothing'})"
            raise DataError(f"{path} line {line}: no column '{column}'; {remedy}")


def _text(where: str, name: str, content: object) -> str | None:
    """Without space around it; None where there is nothing. Groups and categories may be numbers."""
    if isinstance(content, int) and not isinstance(content, bool) and name in _MAY_BE_NUMBERS:
        content = str(content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: '{name}' is {json.dumps(content)[:40]}; it must be text")
    if content and (half := lone_surrogate(content)):
        remedy = "rename the file in UTF-8" if name in _FILES else "write the whole character, or remove it"
        raise DataError(f"{where}: '{name}' has {half}; {remedy}")
    return content.strip() or None if content else None


def lone_surrogate(text: str) -> str | None:
    """What in a text is no character: JSON may escape one half of a pair of UTF-16, which no file can be written with.

    None where all of it is text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character, \\u{ord(text[error.start]):04x}, as number {error.start + 1}"
    return None


def read_json(path: Path) -> tuple[str, Iterator[Entry]]:
    """The layout, ``karpathy`` or ``albef``, and the entries."""
    text = path.read_bytes().decode("utf-8-sig")
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        return "albef", (_albef(f"{path} entry {n}", n, value) for n, value in _elements(path, text, start, end=True))
    if text[start : start + 1] == "{":
        return "karpathy", (_karpathy(f"{path} image {n}", n, value) for n, value in _images(path, text, start))
    if start == len(text):
        raise DataError(f"{path}: it is empty; expected Karpathy's layout or a list of {_EXPECTED}")
    raise _unreadable(path, text, start, "Expecting a list or an object")


def _albef(where: str, number: int, entry: object) -> Entry:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: not an object; expected {_EXPECTED}")
    image = _text(where, "image", entry.get("image"))
    if image is None:
        near = nearest("image", [key for key in entry if key != "image_id"])
        raise DataError(f"{where}: it has no image; " + (f"rename '{near}' to 'image'" if near else "add its path"))
    captions = entry.get("caption")
    captions = _captions(where, captions if isinstance(captions, list) else [] if captions is None else [captions])
    group = _text(where, "image_id", entry.get("image_id"))
    category, subcategory = (_text(where, level, entry.get(level)) for level in ("category", "subcategory"))
    return Entry(number, image, captions, group, category, subcategory)


def _karpathy(where: str, number: int, entry: object) -> Entry:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: not an object; expected one with filename, split and sentences")
    name, folder = (_text(where, key, entry.get(key)) for key in ("filename", "filepath"))
    if name is None:
        raise DataError(f"{where}: it has no image; add its filename")
    split = entry.get("split")
    if not isinstance(split, str) or split not in KARPATHY_SPLITS:
        known = ", ".join(KARPATHY_SPLITS)
        raise DataError(f"{where} ({name}): split is {json.dumps(split)[:40]}; it must be one of {known}")
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(s, dict) and "raw" in s for s in sentences):
        raise DataError(f'{where} ({name}): its sentences are not a list of {{"raw": ...}}; add the captions like that')
    captions = _captions(f"{where} ({name})", [sentence["raw"] for sentence in sentences])
    return Entry(number, f"{folder}/{name}" if folder else name, captions, split=KARPATHY_SPLITS[split])


def _captions(where: str, captions: list[object]) -> list[str]:
    if not captions:
        raise DataError(f"{where}: it has no caption; add one or remove the entry")
    found = []
    for caption in captions:
        text = _text(where, "caption", caption)
        if text is None:
            raise DataError(f"{where}: a caption is empty; write it or remove it")
        found.append(text)
    return found


# A file of a million entries is parsed one entry at a time, which takes an eighth of the memory of the whole.


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _value(path: Path, text: str, at: int) -> tuple[object, int]:
    try:
        value, at = json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _unreadable(path, text, error.pos, error.msg) from None
    except (ValueError, RecursionError) as error:  # nested too deeply, or a number of thousands of digits
        raise _unreadable(path, text, at, type(error).__name__) from None
    return value, _skip(text, at)


def _elements(path: Path, text: str, at: int, end: bool = False) -> Iterator[tuple[int, object]]:
    """The values of the list that begins at ``at``, numbered from 1; with ``end`` nothing may follow it."""
    at, number = _skip(text, at + 1), 0
    if text[at : at + 1] != "]":
        while True:
            value, at = _value(path, text, at)
            number += 1
            yield number, value
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise _unreadable(path, text, at, "Expecting ',' or ']'")
            at = _skip(text, at + 1)
    at = _skip(text, at + 1)
    if end and at < len(text):
        raise _unreadable(path, text, at, "Extra data")


def _images(path: Path, text: str, at: int) -> Iterator[tuple[int, object]]:
    """The values of ``images`` in the object that begins at ``at``."""
    at, names = _skip(text, at + 1), []
    while text[at : at + 1] != "}":
        name, at = _value(path, text, at)
        if not isinstance(name, str) or text[at : at + 1] != ":":
            raise _unreadable(path, text, at, "Expecting a name and ':'")
        at = _skip(text, at + 1)
        if name == "images" and text[at : at + 1] == "[":
            yield from _elements(path, text, at)
            return
        names.append(name)
        _, at = _value(path, text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "}":
            raise _unreadable(path, text, at, "Expecting ',' or '}'")
    near = nearest("images", names)
    remedy = f"rename '{near}' to 'images'" if near else f"found: {', '.join(names)[:80] or 'nothing'}"
    raise DataError(f"{path}: an object without a list 'images', so not in Karpathy's layout; {remedy}")


def _unreadable(path: Path, text: str, at: int, reason: str) -> DataError:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return DataError(f"{path} line {line} column {column}: not JSON ({reason}); is the file complete?")


class FolderEntries:
    """``NAME.txt`` beside ``NAME.jpg``, in subfolders too: each line is a caption of that image.

    A caption without an image is an error: something was lost. Images without a caption are left out and counted, for
    folders often hold more than what is described.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.without_caption: list[str] = []  # images, known once all entries were read

    def __iter__(self) -> Iterator[Entry]:
        images_found = texts_found = 0
        for place, folders, files in os.walk(self.folder, onerror=_raise):
            folders.sort()
            images: dict[str, str] = {}
            for name in sorted(files):
                stem, ending = os.path.splitext(name)
                if ending.lower() not in IMAGE_ENDINGS or name.startswith("."):
                    continue
                if stem in images and f"{stem}.txt" in files:
                    raise DataError(
                        f"{place}: {stem}.txt stands beside {images[stem]} and {name}; rename one of the images"
                    )
                images[stem] = name
            texts = {name[:-4] for name in files if name.endswith(".txt") and not name.startswith(".")}
            if lost := sorted(texts - images.keys()):
                raise DataError(
                    f"{os.path.join(place, lost[0])}.txt: no image of that name beside it"
                    + (f", and {len(lost) - 1} more in this folder" if len(lost) > 1 else "")
                    + "; add it or remove the text"
                )
            images_found, texts_found = images_found + len(images), texts_found + len(texts)
            for stem, name in images.items():
                image = os.path.relpath(os.path.join(place, name), self.folder)
                if lone_surrogate(image):
                    raise DataError(f"{self.folder}: the name of {image!r} is not UTF-8; rename it")
                if stem in texts:
                    yield self._entry(Path(place, f"{stem}.txt"), image)
                else:
                    self.without_caption.append(image)
        if not images_found:
            raise DataError(
                f"{self.folder}: no images in it; give a folder of images with a NAME.txt beside each NAME.jpg"
            )
        if not texts_found:
            image = self.without_caption[0]
            raise DataError(
                f"{self.folder}: none of its {images_found} images has a caption; write that of {image} to"
                f" {os.path.splitext(image)[0]}.txt, and so on"
            )

    def _entry(self, text: Path, image: str) -> Entry:
        try:
            lines = text.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{text}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
        except OSError as error:
            raise DataError(f"{text}: cannot be read ({error.strerror}); make it readable") from None
        captions = {line: caption.strip() for line, caption in enumerate(lines, 1) if caption.strip()}
        if not captions:
            raise DataError(f"{text}: no caption in it; write one, or remove it with its image")
        return Entry(min(captions), image, list(captions.values()), places=list(captions))


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make it readable") from None
