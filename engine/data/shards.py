"""Pairs in tar shards of the webdataset format, read at random: what a step sees depends on no shard's order.

``data.path`` is one ``.tar``, a folder with ``.tar`` files, sorted by name, or a pattern such as
``shards-{000..011}.tar``. Where the images lie is known from :mod:`.shard_index`; each is read by its place when it is
needed. The members: :mod:`.shard_samples`.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

from ..errors import DataError
from .complaints import Complain, refuse
from .open_files import OpenFiles, Stamp
from .pair_files import PairTable, Source, tabulate
from .pair_layouts import IMAGE_ENDINGS, Entry
from .shard_index import index_shards
from .shard_samples import Samples, notices

LAYOUT = "shards"
MAX_SHARDS = 100_000
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")
_REMOTE = re.compile(r"(?:^|/)(pipe:|(?:https?|ftps?|s3|gs|gcs|hdfs|hf|ais|az|abfss?|rclone|ssh):/)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_ADDRESS = re.compile(r"(.+?)#(\d+)\+(\d+)#(.*)", re.DOTALL)
_files = OpenFiles()


def is_shards(path: Path) -> bool:
    """Whether it is a tar file, a pattern of them, or a folder with tar files and no images beside them.

    Compressed and remote ones, too: they are told what to do.
    """
    if path.is_dir():
        names = os.listdir(path)
        if not any(name.lower().endswith((".tar", *_COMPRESSED)) for name in names):
            return False
        return not any(name.lower().endswith(IMAGE_ENDINGS) for name in names)
    if path.exists():
        return path.name.lower().endswith((".tar", *_COMPRESSED))
    name = str(path)
    return bool(_REMOTE.search(name)) or name.lower().endswith((".tar", *_COMPRESSED))


def read_shards(path: Path, name: str = "data.path", complain: Complain = refuse) -> PairTable:
    """The pairs of all shards, in their order. ``name``: the recipe's field.

    Raises:
        DataError: what cannot be used, by shard and sample or byte, and what to do.
    """
    root, paths = _find(path, name, complain)
    found: list[Samples | None] = [None] * len(paths)
    stamps: dict[str, Stamp] = {}
    real = [os.path.realpath(shard) for shard in paths]
    for number, samples, stamp in index_shards(real, complain):
        found[number], stamps[real[number]] = samples, stamp
    shown = [os.path.relpath(shard, root) for shard in paths]
    source = Source(path, LAYOUT, root, stamps)
    finder = _Addresses()
    entries = (
        finder.entry(shown[number], real[number], samples, at)
        for number, samples in enumerate(found)
        if samples is not None
        for at in range(len(samples.keys))
    )
    table = tabulate(source, entries, finder, complain)
    lines = notices(str(path), ((shown[number], x) for number, x in enumerate(found) if x is not None))
    if not len(table):
        raise DataError(f"{path}: no samples in it; each needs a KEY.jpg and a KEY.txt, or a KEY.json with a caption")
    return replace(table, notices=(*table.notices, *lines))


class _Addresses:
    """A finder of images whose place is known."""

    def __init__(self) -> None:
        self.images, self.names = list[str](), list[str]()
        self._name = ""

    def entry(self, shard: str, path: str, samples: Samples, at: int) -> Entry:
        address = f"{path}#{samples.offsets[at]}+{samples.sizes[at]}#{samples.images[at]}"
        self._name = f"{shard}/{samples.images[at]}"
        levels = samples.groups[at], samples.categories[at], samples.subcategories[at]
        return Entry(at + 1, address, samples.captions[at], *levels)

    def __call__(self, place: int, name: str) -> int:
        self.images.append(name)
        self.names.append(self._name)
        return len(self.images) - 1

    def complain(self) -> None:
        """All were there when the shard was indexed."""


def _find(path: Path, field: str, complain: Complain) -> tuple[str, list[str]]:
    """The folder that shards are named below, and their paths, at least one."""
    if path.is_dir():
        root = os.path.abspath(path)
        names = sorted(os.listdir(path))
        paths = [os.path.join(root, name) for name in names if name.lower().endswith((".tar", *_COMPRESSED))]
    elif path.exists():
        root, paths = os.path.abspath(path.parent), [os.path.abspath(path)]
    elif remote := _REMOTE.search(str(path)):
        what = "a command, and commands in data are not run" if remote[1] == "pipe:" else "not on this machine"
        raise DataError(f"{path}: {what}; copy the shards to a disk and set {field} to their folder")
    else:
        text = os.path.abspath(path)
        root, paths = os.path.dirname(text.split("{", 1)[0]), expand(text, field)
    for shard in paths:
        if shard.lower().endswith(_COMPRESSED):
            how = "gunzip" if shard.lower().endswith(("gz",)) else "unpack"
            raise DataError(f"{shard}: compressed, so that nothing in it can be read by its place; {how} it to a .tar")
    missing = [shard for shard in paths if not os.path.isfile(shard)]
    if missing:
        more = f", and {len(missing) - 1} more of {len(paths)} shards" if len(missing) > 1 else ""
        line = f"{missing[0]}: no such file{more}; copy what is missing, or correct {field}"
        complain("missing shard", DataError(line))
        paths = [shard for shard in paths if shard not in set(missing)]
    twice = [shard for shard, again in itertools.pairwise(sorted(map(os.path.realpath, paths))) if shard == again]
    if twice:
        complain("listed twice", DataError(f"{twice[0]}: this shard is in {path} twice; name it once"))
        paths = list({os.path.realpath(shard): shard for shard in paths}.values())
    return root, paths


def expand(pattern: str, field: str = "data.path") -> list[str]:
    """``{000..011}`` and ``{a,b}`` in a path, worked out here and by no shell; the last changes fastest.

    Raises:
        DataError: braces that say neither, or too many shards.
    """
    parts = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices: list[list[str]] = []
    count = 1
    for number, part in enumerate(parts):
        if number % 2 == 0:
            if set(part) & set("{}"):
                raise DataError(f"{pattern}: braces within braces, or one alone; write {field} like s-{{000..011}}.tar")
            choices.append([part])
            continue
        found = _RANGE.fullmatch(part)
        if found is None and "," not in part:
            raise DataError(f"{pattern}: {{{part}}} is neither {{000..011}} nor {{a,b}}; correct {field}")
        first, last = (int(found[1]), int(found[2])) if found else (0, 0)
        count *= last - first + 1 if found else part.count(",") + 1
        if not 0 < count <= MAX_SHARDS:
            what = "runs backwards" if count <= 0 else f"names more than {MAX_SHARDS:,} shards"
            raise DataError(f"{pattern}: {{{part}}} {what}; correct {field}")
        if found is None:
            choices.append(part.split(","))
        else:
            padded = any(len(end) > 1 and end.startswith("0") for end in found.groups())
            width = max(map(len, found.groups())) if padded else 0
            choices.append([f"{at:0{width}d}" for at in range(first, last + 1)])
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def contents(source: Source, address: str, where: str) -> bytes:
    """The encoded image at ``SHARD.tar#OFFSET+SIZE#MEMBER``. Any thread may ask.

    Raises:
        DataError: it cannot be read; ``where`` says who named it.
    """
    found = _ADDRESS.fullmatch(address)
    stamp = source.stamps.get(found[1]) if found else None
    if found is None or stamp is None:
        raise DataError(f"{where}: {address} names no image of {source.path}; start again")
    try:
        return _files.read(found[1], int(found[2]), int(found[3]), stamp, where)
    except OSError as error:
        raise DataError(f"{where}: cannot read {found[1]}: {error.strerror}; make it readable") from None
