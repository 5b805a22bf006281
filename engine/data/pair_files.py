"""A user's pairs in columns: read in whichever layout they are in, and every image looked for once."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..beats import beat
from ..errors import DataError
from .complaints import Complain, Unusable, refuse
from .open_files import Stamp
from .pair_layouts import Entry, FolderEntries, read_json, read_lines

KINDS = (
    "a .jsonl, .csv or .json file, .tar shards, a folder of images with a NAME.txt beside each NAME.jpg, or a saved"
    " Hugging Face data set"
)
SPLITS = {"train": 0, "val": 1, "test": 2}  # as ``PairTable.split`` numbers them
UNDECIDED = -1
# what ``place`` counts
NOUNS = {"lines": "line", "albef": "entry", "karpathy": "image", "fashiongen": "row", "arrow": "row"}
_BEAT_EVERY = 1024  # entries


@dataclass(frozen=True)
class Pair:
    """One row of a table."""

    image: Path
    caption: str
    group: str | None
    category: str | None


@dataclass(frozen=True)
class Source:
    """A file or folder that rows of a table come from."""

    path: Path
    layout: str  # lines, albef, karpathy, folder, fashiongen, shards or arrow
    root: str  # the images' folder, absolute; links in it are not followed
    # Of each file that images are read from by their place in it, what it had when they were found there.
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False, repr=False)

    @property
    def by_image(self) -> bool:
        """Whether a benchmark's protocol holds: captions match the image they were written for and no other, and all
        of them are ranked, equal ones too."""
        return self.layout in ("albef", "karpathy")

    @property
    def editable(self) -> bool:
        """Whether its owner can be asked to mend a line of it: a benchmark or an archive stays as it is."""
        return self.layout in ("lines", "folder", "fashiongen")


@dataclass(frozen=True)
class PairTable:
    """N pairs of I images; rows are in the order of their file."""

    sources: tuple[Source, ...]
    source: np.ndarray  # (N,) int8, row in ``sources``
    images: list[str]  # I absolute paths without links, or addresses in such files, each once
    names: list[str]  # I, each path below its source's root as it was first given: the same on every machine
    image: np.ndarray  # (N,) int32, row in ``images``
    captions: list[str]  # N
    place: np.ndarray  # (N,) int64, line or entry in its file, from 1; of an arrow set the row, from 0 as there
    split: np.ndarray  # (N,) int8, see :data:`SPLITS`
    groups: list[str | None]  # N
    categories: list[str | None]  # N
    subcategories: list[str | None]  # N
    notices: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> Pair:
        return Pair(Path(self.images[self.image[row]]), self.captions[row], self.groups[row], self.categories[row])

    def __iter__(self) -> Iterator[Pair]:
        return (self[row] for row in range(len(self)))

    def where(self, row: int, short: bool = False) -> str:
        """A row in words that its owner can look up; ``short`` without the folder."""
        source = self.sources[self.source[row]]
        path, noun = source.path, NOUNS.get(source.layout, "line")
        if source.layout == "folder":
            image = self.names[self.image[row]]
            path = Path(os.path.splitext(image if short else os.path.join(source.root, image))[0] + ".txt")
        elif source.layout == "shards":  # and the sample in it by the name of its image
            image = self.names[self.image[row]]
            return image if short else os.path.join(source.root, image)
        elif short:
            path = Path(path.name)
        return f"{path} {noun} {self.place[row]}"

    def joined(self, other: PairTable) -> PairTable:
        """The rows of both, those of ``other`` behind; an image that is in both is one."""
        number = {image: i for i, image in enumerate(self.images)}
        new = set(other.images) - number.keys()
        rows = np.array([number.setdefault(image, len(number)) for image in other.images], np.int32)
        return replace(
            self,
            sources=self.sources + other.sources,
            source=np.concatenate([self.source, other.source + np.int8(len(self.sources))]),
            images=list(number),
            names=self.names + [name for image, name in zip(other.images, other.names, strict=True) if image in new],
            image=np.concatenate([self.image, rows[other.image]]),
            captions=self.captions + other.captions,
            place=np.concatenate([self.place, other.place]),
            split=np.concatenate([self.split, other.split]),
            groups=self.groups + other.groups,
            categories=self.categories + other.categories,
            subcategories=self.subcategories + other.subcategories,
            notices=self.notices + other.notices,
        )


def read_pairs(
    path: Path | None,
    image_root: Path | None,
    name: str = "data.path",
    training: bool = True,
    complain: Complain = refuse,
) -> PairTable:
    """Read and check a file or folder of pairs; ``name`` is the recipe's field. Image contents are not looked at.

    Without ``training``, entries that the file itself has in the split train are passed over, and their images may be
    missing. ``complain`` is told of each item that cannot be used; by default the first is an error.

    Raises:
        DataError: what cannot be used, by its line or entry, and what to do.
    """
    if path is None:
        raise DataError(f"{name} is not set; set it to {KINDS}")
    from .arrow_sets import is_arrow_set, read_arrow_set
    from .fashion_gen import is_fashion_gen, read_fashion_gen
    from .shards import is_shards, read_shards

    if is_fashion_gen(path):
        return read_fashion_gen(path, name, training)
    if is_shards(path):
        return read_shards(path, name, complain)
    if is_arrow_set(path):
        return read_arrow_set(path, image_root, name, training, complain)
    folder = path.is_dir()
    if not folder and path.suffix.lower() not in (".jsonl", ".csv", ".json"):
        raise DataError(f"{path}: {name} must end in .jsonl, .csv or .json, or be a folder")
    if not folder and not path.is_file():
        raise DataError(f"{path}: no such file; set {name} to {KINDS}")
    root = path if folder else image_root or path.parent
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.image_root to the folder the image paths are relative to")
    entries: Iterable[Entry]
    try:
        if folder:
            layout, entries = "folder", FolderEntries(path, complain)
        elif path.suffix.lower() == ".json":
            layout, entries = read_json(path, complain)
        else:
            layout, entries = "lines", read_lines(path, complain)
        read = entries if training else (entry for entry in entries if entry.split != "train")
        source = Source(path, layout, os.path.abspath(root))
        table = tabulate(source, read, ImageFinder(source, complain), complain)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    if not len(table):
        if layout == "karpathy" and not training:
            raise DataError(f"{path}: neither val nor test images in it; give another {name}")
        raise DataError(f"{path}: no pairs in it; each needs an image and a caption")
    if isinstance(entries, FolderEntries) and (without := entries.without_caption):
        line = f"{path}: images without a .txt of their name are left out: {len(without)}, the first {without[0]}"
        return replace(table, notices=(line,))
    return table


class Finder(Protocol):
    """Names of images as entries have them -> rows of ``images``."""

    images: list[str]  # addresses, each once: what ``PairTable.images`` will be
    names: list[str]  # the same on every machine

    def __call__(self, place: int, name: str) -> int:
        """-1 for an image that was complained of."""

    def complain(self) -> None:
        """Called behind the last entry."""


def tabulate(source: Source, entries: Iterable[Entry], finder: Finder, complain: Complain = refuse) -> PairTable:
    """The entries of a source as a table."""
    image, place, split = array("i"), array("q"), array("b")
    captions: list[str] = []
    groups: list[str | None] = []
    categories: list[str | None] = []
    subcategories: list[str | None] = []
    seen: set[int] = set()
    shared: dict[str, str] = {}  # one string for each category, however many rows have it
    for number, entry in enumerate(entries):
        if number % _BEAT_EVERY == 0:
            beat("reading the captions")
        row = finder(entry.place, entry.image)
        if row < 0:
            continue
        if source.layout == "karpathy":
            if row in seen:
                what = f"{source.path} image {entry.place}: {entry.image} was listed before; remove one of them"
                complain("listed twice", DataError(what))
            seen.add(row)
        count = len(entry.captions)
        image.extend([row] * count)
        captions.extend(entry.captions)
        place.extend(entry.places or [entry.place] * count)
        split.extend([UNDECIDED if entry.split is None else SPLITS[entry.split]] * count)
        groups.extend([entry.group] * count)
        category = None if entry.category is None else shared.setdefault(entry.category, entry.category)
        categories.extend([category] * count)
        level = None if entry.subcategory is None else shared.setdefault(entry.subcategory, entry.subcategory)
        subcategories.extend([level] * count)
    finder.complain()
    table = PairTable(
        (source,),
        np.zeros(len(captions), np.int8),
        finder.images,
        finder.names,
        np.array(image, np.int32),
        captions,
        np.array(place, np.int64),
        np.array(split, np.int8),
        groups,
        categories,
        subcategories,
    )
    again = repeated(table)
    if again and (source.layout == "lines" or complain is not refuse):
        kind = "repeated caption" if source.by_image else "repeated pair"
        for row, first in again:
            what = f"the same image and caption as {NOUNS.get(source.layout, 'line')} {table.place[first]}"
            complain(kind, DataError(f"{table.where(row)}: {what}; remove one of them"))
    elif again:
        line = f"captions that their image has twice: {len(again)}, the first in {table.where(again[0][0])}"
        return replace(table, notices=(line,))
    return table


def repeated(table: PairTable) -> list[tuple[int, int]]:
    """Rows whose image has the same caption in an earlier row, with that row; ascending."""
    order = np.argsort(table.image, kind="stable")
    ends = np.flatnonzero(np.diff(table.image[order], append=-1)) + 1
    found = []
    for start, end in zip(np.append(0, ends[:-1])[np.diff(ends, prepend=0) > 1], ends[np.diff(ends, prepend=0) > 1],
                          strict=True):  # fmt: skip
        first: dict[str, int] = {}
        for row in order[start:end].tolist():
            earlier = first.setdefault(table.captions[row], row)
            if earlier != row:
                found.append((row, earlier))
    return sorted(found)


class ImageFinder:
    """Names of images -> rows of ``images``: each file is looked at once, each folder resolved once.

    An image's path must lie below the root as it is written, ``..`` worked out in the name and not on the disk: a list
    of captions, which may be anyone's, cannot name other files. Links below the root are followed wherever they lead,
    for only who may write there can place them, and a set often lies on several disks. So a link is trusted as the
    folder that holds it is; what it leads to is read as an image or not at all, and no device or pipe is opened.
    Missing images are counted, and told at the end.
    """

    def __init__(self, source: Source, complain: Complain = refuse) -> None:
        self.source, self._complain = source, complain
        self.images, self.names = list[str](), list[str]()
        self._row: dict[str, int] = {}  # by the name that was given
        self._real: dict[str, int] = {}  # by the resolved path
        self._folders: dict[str, tuple[str, str]] = {}  # by the given path: resolved, and below the root
        self._missing: list[tuple[int, str]] = []

    def __call__(self, place: int, name: str) -> int:
        row = self._row.get(name)
        if row is None:
            row = self._row[name] = self._find(place, name)
        return row

    def _find(self, place: int, name: str) -> int:
        missing = len(self._missing)
        try:
            path, below = self._resolve(place, name)
        except Unusable as error:
            self._complain(error.kind, error)
            return -1
        if len(self._missing) > missing and self._complain is not refuse:
            return -1
        row = self._real.setdefault(path, len(self.images))
        if row == len(self.images):
            self.images.append(path)
            self.names.append(below)
        return row

    def _resolve(self, place: int, name: str) -> tuple[str, str]:
        """The path of an image without links, and the one below the root."""
        real = os.path.join(self.source.root, name)
        folder, file = os.path.split(real)
        if file in ("", ".", ".."):
            folder, file = real, ""
        below = file
        try:
            if folder not in self._folders:
                self._folders[folder] = self._folder(place, name, folder)
            resolved, inside = self._folders[folder]
            real, below = os.path.join(resolved, file), os.path.join(inside, file)
            mode = os.lstat(real).st_mode
            if stat.S_ISLNK(mode):
                real = os.path.realpath(real)
                mode = os.stat(real).st_mode
            if not stat.S_ISREG(mode):
                self._missing.append((place, real))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            self._missing.append((place, real))
        except (OSError, ValueError):  # a name with NUL, too long, or a loop of links
            where = self._where(place)
            what = f"{where}: {name[:80]!r} is not a usable file name; correct it or remove it"
            raise Unusable("unusable name", what) from None
        return real, below

    def _folder(self, place: int, name: str, folder: str) -> tuple[str, str]:
        """A folder without links, and as it is below the root, ``""`` for the root; DataError outside of it."""
        root = self.source.root
        for path, top in ((os.path.normpath(folder), root), (os.path.realpath(folder), os.path.realpath(root))):
            below = os.path.relpath(path, top)
            if below.split(os.sep, 1)[0] != os.pardir:
                return os.path.realpath(path), "" if below == os.curdir else below
        what = f"{self._where(place)}: image {name} lies outside {root}; move it there, place a link to its folder"
        raise Unusable("outside the root", f"{what} there, or set data.image_root")

    def _where(self, place: int) -> str:
        noun = NOUNS.get(self.source.layout)
        return f"{self.source.path} {noun} {place}" if noun else f"{self.source.path}"

    def complain(self) -> None:
        """Missing images: a run's error names the first and says how many there are, a check hears of each."""
        told = self._missing[:1] if self._complain is refuse else self._missing
        for place, path in told:
            others = len(self._missing) - len(told)
            more = f", and {others} more of {len(self._row)} are missing" if others else ""
            what = f"{self._where(place)}: no image {path}{more}; correct the path or set data.image_root"
            self._complain("missing image", DataError(f"{what} (now {self.source.root})"))
