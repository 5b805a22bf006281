"""The layouts in which users and benchmarks keep their image-caption pairs, each read as a stream of entries.

A file of lines (``.jsonl``, ``.csv``), Karpathy's and ALBEF's ``.json``, and a folder with a text beside each image.
Entries are only checked for what they say; whether an image exists is for :mod:`.pair_files`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from ..errors import DataError, nearest
from .complaints import Complain, Unusable, refuse
from .open_files import read_regular

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_TEXT = 4 * 2**20  # bytes of one image's .txt or .json
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_EXPECTED = '{"image": ..., "caption": ...}'
_MAY_BE_NUMBERS = ("group", "category", "subcategory", "image_id")
_FILES = ("image", "filename", "filepath")
_SPACE = re.compile(r"[ \t\r\n]*")
_BYTES = "surrogateescape"  # what is not UTF-8 becomes lone surrogates, which no file that is UTF-8 has


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


def read_lines(path: Path, complain: Complain = refuse) -> Iterator[Entry]:
    """A JSONL or CSV file with the columns image and caption, and optionally group, category and subcategory."""
    rows = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    # a run stops at the first byte that is not UTF-8; a check goes on behind the line
    with path.open(encoding="utf-8-sig", newline="", errors="strict" if complain is refuse else _BYTES) as file:
        for line, row in rows(path, file, complain):
            where = f"{path} line {line}"
            try:
                entry = _line(where, line, row)
            except Unusable as error:
                complain(error.kind, error)
                continue
            if not entry.captions:
                complain("empty caption", DataError(f"{where}: the caption is empty; write one or remove the line"))
            yield entry


def _line(where: str, line: int, row: dict[str, object]) -> Entry:
    image, caption, group, category, subcategory = (
        text_of(where, column, row.get(column)) for column in ("image", "caption", "group", "category", "subcategory")
    )
    if image is None:
        raise Unusable("no image named", f"{where}: the image is empty; give its path relative to the image root")
    return Entry(line, image, () if caption is None else (caption,), group, category, subcategory)


def _json_rows(path: Path, file: TextIO, complain: Complain) -> Iterator[tuple[int, dict[str, object]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            _check_bytes(path, line, text)
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", type(error).__name__)
                what = f"{path} line {line}: not JSON ({reason}); expected {_EXPECTED}"
                raise Unusable("not JSON", what) from None
            if not isinstance(row, dict):
                raise Unusable("not JSON", f"{path} line {line}: not a JSON object; expected {_EXPECTED}")
            _columns(path, line, list(row))
        except Unusable as error:
            complain(error.kind, error)
            continue
        yield line, row


def _csv_rows(path: Path, file: TextIO, complain: Complain) -> Iterator[tuple[int, dict[str, object]]]:
    spoilt: list[int] = []  # lines that are not UTF-8

    def lines() -> Iterator[str]:
        for line, text in enumerate(file, 1):
            try:
                _check_bytes(path, line, text)
            except Unusable as error:
                complain(error.kind, error)
                spoilt.append(line)
            yield text

    reader = csv.DictReader(lines())
    before, checked = 0, False
    while True:
        try:
            if not checked:
                _columns(path, 1, list(reader.fieldnames or []))
                checked, before = True, reader.line_num
            row = next(reader)
        except StopIteration:
            return
        except Unusable as error:
            return complain(error.kind, error)
        except csv.Error as error:
            what = f"{path}: not readable as CSV ({error}); check its quotes"
            if complain is not refuse:
                what = f"{path} line {before + 1}: not readable as CSV ({error}); check its quotes"
            complain("not CSV", DataError(what))
            before = reader.line_num
            continue
        first, before = before + 1, reader.line_num
        if spoilt and spoilt[-1] >= first:
            continue
        if complain is not refuse and None in row:  # a run has always passed over further fields
            what = f"{path} line {before}: it has more fields than there are columns; put quotes around a caption with"
            complain("wrong columns", DataError(f"{what} commas"))
        yield before, {str(k): v for k, v in row.items()}


def _check_bytes(path: Path, line: int, text: str) -> None:
    """Unusable where a line was not UTF-8: its other bytes were kept as lone surrogates."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"{path} line {line}: not UTF-8 at byte {len(text[: error.start].encode())} of the line"
        raise Unusable("not UTF-8", f"{what}; save the file as UTF-8") from None


def _columns(path: Path, line: int, present: list[str]) -> None:
    for column in ("image", "caption"):
        if column not in present:
            near = nearest(column, [str(name) for name in present])
            remedy = f"rename '{near}' to '{column}'" if near else f"add it (found: {', '.join(present) or 'nothing'})"
            raise Unusable("wrong columns", f"{path} line {line}: no column '{column}'; {remedy}")


def text_of(where: str, name: str, content: object) -> str | None:
    """Without space around it; None where there is nothing. Groups and categories may be numbers."""
    if isinstance(content, int) and not isinstance(content, bool) and name in _MAY_BE_NUMBERS:
        content = str(content)
    if content is not None and not isinstance(content, str):
        raise Unusable("wrong type", f"{where}: '{name}' is {json.dumps(content, default=str)[:40]}; it must be text")
    if content and (half := lone_surrogate(content)):
        remedy = "rename the file in UTF-8" if name in _FILES else "write the whole character, or remove it"
        raise Unusable("half a character", f"{where}: '{name}' has {half}; {remedy}")
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


def read_json(path: Path, complain: Complain = refuse) -> tuple[str, Iterator[Entry]]:
    """The layout, ``karpathy`` or ``albef``, and the entries."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if complain is refuse:
            raise
        what = f"{path} line {data.count(10, 0, error.start) + 1}: not UTF-8 at byte {error.start}"
        complain("not UTF-8", DataError(f"{what} of the file; save the file as UTF-8"))
        text = data.decode("utf-8-sig", _BYTES)
    del data
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        return "albef", _told(_albef, f"{path} entry", _elements(path, text, start, end=True), complain)
    if text[start : start + 1] == "{":
        return "karpathy", _told(_karpathy, f"{path} image", _images(path, text, start), complain)
    if start == len(text):
        raise DataError(f"{path}: it is empty; expected Karpathy's layout or a list of {_EXPECTED}")
    raise _unreadable(path, text, start, "Expecting a list or an object")


def _told(
    read: Callable[[str, int, object, Complain], Entry],
    what: str,
    values: Iterator[tuple[int, object]],
    complain: Complain,
) -> Iterator[Entry]:
    """Each value as an entry; what cannot be used is told and passed over. Behind a mistake in the JSON is nothing."""

    def entry(number: int, value: object) -> Entry | None:
        try:
            return read(f"{what} {number}", number, value, complain)
        except Unusable as error:
            complain(error.kind, error)
            return None

    try:
        for number, value in values:
            if (found := entry(number, value)) is not None:
                yield found
    except Unusable as error:
        complain(error.kind, error)


def _albef(where: str, number: int, entry: object, complain: Complain) -> Entry:
    if not isinstance(entry, dict):
        raise Unusable("wrong type", f"{where}: not an object; expected {_EXPECTED}")
    image = text_of(where, "image", entry.get("image"))
    if image is None:
        near = nearest("image", [key for key in entry if key != "image_id"])
        remedy = f"rename '{near}' to 'image'" if near else "add its path"
        raise Unusable("no image named", f"{where}: it has no image; {remedy}")
    captions = entry.get("caption")
    captions = captions if isinstance(captions, list) else [] if captions is None else [captions]
    captions = _captions(where, captions, complain)
    group = text_of(where, "image_id", entry.get("image_id"))
    category, subcategory = (text_of(where, level, entry.get(level)) for level in ("category", "subcategory"))
    return Entry(number, image, captions, group, category, subcategory)


def _karpathy(where: str, number: int, entry: object, complain: Complain) -> Entry:
    if not isinstance(entry, dict):
        raise Unusable("wrong type", f"{where}: not an object; expected one with filename, split and sentences")
    name, folder = (text_of(where, key, entry.get(key)) for key in ("filename", "filepath"))
    if name is None:
        raise Unusable("no image named", f"{where}: it has no image; add its filename")
    split = entry.get("split")
    if not isinstance(split, str) or split not in KARPATHY_SPLITS:
        known = ", ".join(KARPATHY_SPLITS)
        what = f"{where} ({name}): split is {json.dumps(split)[:40]}; it must be one of {known}"
        raise Unusable("unknown split", what)
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(s, dict) and "raw" in s for s in sentences):
        what = f'{where} ({name}): its sentences are not a list of {{"raw": ...}}; add the captions like that'
        raise Unusable("wrong type", what)
    captions = _captions(f"{where} ({name})", [sentence["raw"] for sentence in sentences], complain)
    return Entry(number, f"{folder}/{name}" if folder else name, captions, split=KARPATHY_SPLITS[split])


def _captions(where: str, captions: list[object], complain: Complain) -> list[str]:
    if not captions:
        complain("empty caption", DataError(f"{where}: it has no caption; add one or remove the entry"))
    found = []
    for caption in captions:
        try:
            text = text_of(where, "caption", caption)
        except Unusable as error:
            complain(error.kind, error)
            continue
        if text is None:
            complain("empty caption", DataError(f"{where}: a caption is empty; write it or remove it"))
        else:
            found.append(text)
    return found


def captions_of(where: str, content: object, complain: Complain) -> list[str]:
    """A text or a list of texts as captions; what is None or empty is passed over."""
    found = []
    for caption in content if isinstance(content, list) else [content]:
        try:
            text = text_of(where, "caption", caption)
        except Unusable as error:
            complain(error.kind, error)
            continue
        if text is not None:
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


def _unreadable(path: Path, text: str, at: int, reason: str) -> Unusable:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    what = f"{path} line {line} column {column}: not JSON ({reason}); is the file complete?"
    return Unusable("truncated" if not text[at:].strip() else "not JSON", what)


class FolderEntries:
    """``NAME.txt`` beside ``NAME.jpg``, in subfolders too: each line is a caption of that image.

    A caption without an image is an error: something was lost. Images without a caption are left out and counted, for
    folders often hold more than what is described.
    """

    def __init__(self, folder: Path, complain: Complain = refuse) -> None:
        self.folder, self._complain = folder, complain
        self.without_caption: list[str] = []  # images, known once all entries were read

    def __iter__(self) -> Iterator[Entry]:
        complain = self._complain
        images_found = texts_found = 0
        for place, folders, files in os.walk(self.folder, onerror=self._unreadable):
            folders.sort()
            names = set(files)
            images: dict[str, str] = {}
            for name in sorted(files):
                stem, ending = os.path.splitext(name)
                if ending.lower() not in IMAGE_ENDINGS or name.startswith("."):
                    continue
                if stem in images and f"{stem}.txt" in names:
                    what = f"{place}: {stem}.txt stands beside {images[stem]} and {name}; rename one of the images"
                    complain("ambiguous image", DataError(what))
                images[stem] = name
            texts = {name[:-4] for name in files if name.endswith(".txt") and not name.startswith(".")}
            lost = sorted(texts - images.keys())
            for text in lost:
                others = len(lost) - 1 if complain is refuse else 0  # a run names the first, and says how many more
                what = f"{os.path.join(place, text)}.txt: no image of that name beside it"
                what += f", and {others} more in this folder" if others else ""
                complain("caption without image", DataError(f"{what}; add it or remove the text"))
            images_found, texts_found = images_found + len(images), texts_found + len(texts)
            for stem, name in images.items():
                image = os.path.relpath(os.path.join(place, name), self.folder)
                if lone_surrogate(image):
                    what = f"{self.folder}: the name of {image!r} is not UTF-8; rename it"
                    complain("unusable name", DataError(what))
                elif stem in texts:
                    yield from self._entry(Path(place, f"{stem}.txt"), image)
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

    def _entry(self, text: Path, image: str) -> Iterator[Entry]:
        kind = what = ""
        lines: list[str] = []
        try:
            lines = read_regular(text, MAX_TEXT).decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            kind, what = "not UTF-8", f"{text}: not UTF-8 at byte {error.start}; save the file as UTF-8"
        except OSError as error:
            kind, what = "unreadable file", f"{text}: cannot be read ({error.strerror}); make it readable"
        captions = {line: caption.strip() for line, caption in enumerate(lines, 1) if caption.strip()}
        if not captions and not kind:
            kind, what = "empty caption", f"{text}: no caption in it; write one, or remove it with its image"
        if kind:
            self._complain(kind, DataError(what))
        yield Entry(min(captions, default=1), image, list(captions.values()), places=list(captions))

    def _unreadable(self, error: OSError) -> None:
        what = f"{error.filename}: cannot be read ({error.strerror}); make it readable"
        self._complain("unreadable file", DataError(what))
