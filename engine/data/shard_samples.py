"""The samples of one shard: a tar file whose members ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` belong together.

As the webdataset format has it, a key is the folder and the name up to its *first* dot, and the members of a sample lie
one behind the other. ``KEY.txt`` is one caption, however many lines it has; without one the captions are those of
``KEY.json``: ``caption``, ``captions`` or ``text``, each a text or a list of them, and beside them ``group``,
``category`` and ``subcategory``. All else in a shard is left where it is, and never opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..beats import beat
from ..errors import DataError
from .complaints import Complain, Unusable, refuse
from .pair_layouts import IMAGE_ENDINGS, MAX_TEXT, captions_of, text_of
from .tar_members import Damaged, Member, Window, members

IMAGES = tuple(ending[1:] for ending in IMAGE_ENDINGS)
# Members that a reader would have to run code of, or be tricked into it; named when they are passed over.
PICKLES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "joblib", "dill"})
MAX_IMAGE = 512 * 2**20  # bytes of an encoded image
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # webdataset's own rule
_CAPTIONS = ("caption", "captions", "text")
_BEAT_EVERY = 1024  # members


@dataclass
class Samples:
    """A shard's samples that have an image and a caption, in columns, and what was passed over."""

    keys: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # names of the image members
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    categories: list[str | None] = field(default_factory=list)
    subcategories: list[str | None] = field(default_factory=list)
    passed_over: dict[str, list[int | str]] = field(default_factory=dict)  # what -> how many, and the first

    def pass_over(self, what: str, name: str) -> None:
        entry = self.passed_over.setdefault(what, [0, name])
        entry[0] = int(entry[0]) + 1


WITHOUT_CAPTION = "samples without a caption are left out"
NEVER_OPENED = "members that may hold code are never opened"
SEVERAL_LINES = "texts of several lines are one caption each; several captions belong in a .json, as a list"


def read_samples(path: str, descriptor: int, complain: Complain) -> Samples:
    """The samples of an open shard, from its headers, texts and JSON; no image is looked at.

    Raises:
        DataError: by way of ``complain``, for every member or sample that cannot be used.
    """
    found = Samples()
    window = Window(descriptor, os.fstat(descriptor).st_size)

    def refused(name: str, byte: int, what: str) -> None:
        line = f"{path}: member {name} at byte {byte:,} is {what}; pack the shard anew, of plain files alone"
        complain("unsafe member", DataError(line))

    seen: dict[str, int] = {}  # key -> byte of its first member
    sample: dict[str, Member] = {}
    key: str | None = None
    try:
        for number, member in enumerate(members(window, refused)):
            if number % _BEAT_EVERY == 0:
                beat("indexing the shards")
            match = _KEY.fullmatch(member.name)
            if match is None:
                continue
            own, ending = match[1], match[2].lower()
            if own != key:
                if key is not None:
                    _add(found, path, key, sample, window, complain)
                if own in seen:
                    line = (
                        f"{path}: members of sample {own} lie apart, at bytes {seen[own]:,} and {member.start:,}; those"
                        " of a sample must lie together: pack the shard with tar --sort=name"
                    )
                    complain("scattered sample", DataError(line))
                key, sample = own, {}
                seen.setdefault(own, member.start)
            if ending.rpartition(".")[2] in PICKLES:
                found.pass_over(NEVER_OPENED, member.name)
            elif ending in sample:
                line = f"{path}: member {member.name} is there twice, at bytes {sample[ending].start:,} and"
                complain("listed twice", DataError(f"{line} {member.start:,}; remove one of them"))
            else:
                sample[ending] = member
    except Damaged as error:
        whole = key if key is not None and _is_whole(sample) else found.keys[-1] if found.keys else None
        last = f"the last whole sample is {whole}" if whole is not None else "no sample is whole"
        if not error.truncated:
            remedy = "unpack it with its own tool" if "compressed" in error.problem else "pack or fetch it again"
        else:
            remedy = "fetch or write it again"
        line = f"{path}: byte {error.byte:,}: {error.problem}; {last}; {remedy}"
        complain("truncated" if error.truncated else "unreadable file", DataError(line))
        if not _is_whole(sample):
            return found
    if key is not None:
        _add(found, path, key, sample, window, complain)
    return found


def _is_whole(sample: dict[str, Member]) -> bool:
    return any(ending in sample for ending in IMAGES) and ("txt" in sample or "json" in sample)


def _add(found: Samples, path: str, key: str, sample: dict[str, Member], window: Window, complain: Complain) -> None:
    where = f"{path} sample {key}"
    images = [sample[ending] for ending in sample if ending in IMAGES]
    texts = "txt" in sample or "json" in sample
    try:
        captions, levels = _texts(where, sample, window, found, complain)
        if not images and captions:
            others = ", ".join(ending for ending in sample if ending not in ("txt", "json"))[:60]
            remedy = f"its members: {others}; a key ends at the first dot of a name" if others else "is it complete?"
            raise Unusable("caption without image", f"{where}: no image (.{', .'.join(IMAGES)}); {remedy}")
        if not images:
            return
        if len(images) > 1:
            both = f"{images[0].name} and {images[1].name}"
            raise Unusable("ambiguous image", f"{where}: two images, {both}; give one of them another key")
        if images[0].size > MAX_IMAGE:
            line = f"{where}: its image has {images[0].size:,} bytes, more than {MAX_IMAGE >> 20} MiB; make it smaller"
            raise Unusable("oversized image", line)
    except Unusable as error:
        complain(error.kind, error)
        return
    if not captions:
        found.pass_over(WITHOUT_CAPTION, key)
        if complain is not refuse:  # a run says how many there are
            kind, what = (
                ("empty caption", "its caption is empty") if texts else ("missing caption", "it has no caption")
            )
            complain(kind, DataError(f"{where}: {what}; write one, or remove the sample"))
        return
    found.keys.append(key)
    found.images.append(images[0].name)
    found.offsets.append(images[0].offset)
    found.sizes.append(images[0].size)
    found.captions.append(captions)
    for column, value in zip((found.groups, found.categories, found.subcategories), levels, strict=True):
        column.append(value)


def _texts(
    where: str, sample: dict[str, Member], window: Window, found: Samples, complain: Complain
) -> tuple[list[str], list[str | None]]:
    """The captions, and group, category and subcategory."""
    captions: list[str] = []
    if "txt" in sample:
        caption = _read(where, sample["txt"], window).strip()
        if "\n" in caption:
            found.pass_over(SEVERAL_LINES, sample["txt"].name)
        captions = [caption] if caption else []
    if "json" not in sample:
        return captions, [None] * 3
    try:
        record = json.loads(_read(where, sample["json"], window))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise Unusable("not JSON", f"{where}: its .json is not JSON ({reason}); write it again") from None
    if not isinstance(record, dict):
        if "txt" in sample:  # somebody's annotations
            return captions, [None] * 3
        raise Unusable("wrong type", f'{where}: its .json is no object; expected {{"caption": ...}}')
    levels = [text_of(where, name, record.get(name)) for name in ("group", "category", "subcategory")]
    if not captions:
        captions = captions_of(where, next((record[name] for name in _CAPTIONS if record.get(name)), None), complain)
    return captions, levels


def _read(where: str, member: Member, window: Window) -> str:
    if member.size > MAX_TEXT:
        line = f"{where}: {member.name} has {member.size:,} bytes, more than {MAX_TEXT >> 20} MiB; is it a caption?"
        raise Unusable("oversized text", line)
    try:
        return window.read(member.offset, member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = f"{where}: {member.name} is not UTF-8 at byte {error.start}; write it in UTF-8"
        raise Unusable("not UTF-8", line) from None


def notices(path: str, shards: Iterator[tuple[str, Samples]]) -> list[str]:
    """One line for each thing that was passed over, of all shards together."""
    lines: dict[str, tuple[int, str]] = {}
    for name, samples in shards:
        for what, (count, first) in samples.passed_over.items():
            before, where = lines.get(what, (0, f"{first} in {name}"))
            lines[what] = before + int(count), where
    return [f"{path}: {what}: {count:,}, the first {first}" for what, (count, first) in lines.items()]
