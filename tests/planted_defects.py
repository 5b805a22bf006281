"""Small sets of pairs with defects planted in them at random places, in every format that keeps pairs.

``plant`` draws the defects; a writer puts the set on the disk; each defect knows its kind and the place it must be
named by. What is not planted is clean: every image has its own pixels and every caption its own words.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

COUNT, DEFECTS = 60, 20
COLOURS = ("red", "green", "blue", "grey", "ochre", "white")
THINGS = ("shirt", "hat", "coat", "shoe", "bag", "scarf", "dress", "glove", "belt", "sock")
LETTERS = "abcdefghijklmnopqrst"


@dataclass
class Item:
    """A pair before it is written."""

    name: str  # without an ending
    image: bytes
    caption: str
    ending: str = "png"
    raw: str | None = None  # how it is written instead: a mistake of the format


@dataclass(frozen=True)
class Planted:
    kind: str
    item: Item  # whose place is named


@dataclass
class Set:
    random: np.random.Generator
    items: list[Item] = field(default_factory=list)
    planted: list[Planted] = field(default_factory=list)


def clean(seed: int) -> Set:
    """Pictures of a few soft patches, far from each other; captions that share no words' order."""
    found = Set(np.random.default_rng(seed))
    for number in range(COUNT):
        colour, thing = COLOURS[number % 6], THINGS[number // 6]
        found.items.append(Item(f"{number:03d}-{thing}", png(patches(found.random)), f"a {colour} {thing}"))
    return found


def patches(random: np.random.Generator) -> Image.Image:
    small = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
    return small.resize((int(random.integers(40, 60)), int(random.integers(40, 60))), Image.Resampling.BICUBIC)


def png(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# Defects of an image or a caption, which every format can have: each changes an item and returns its kind -------------


def changed(kind: str, change: Callable[[Item, Set], None]) -> Callable[[Item, Item, Set], str]:
    def plant(item: Item, _other: Item, whole: Set) -> str:
        change(item, whole)
        return kind

    return plant


def pixels(kind: str, make: Callable[[np.random.Generator], bytes], ending: str = "png") -> Callable[..., str]:
    def change(item: Item, whole: Set) -> None:
        item.image, item.ending = make(whole.random), ending

    return changed(kind, change)


def words(kind: str, make: Callable[[str], str]) -> Callable[..., str]:
    def change(item: Item, _whole: Set) -> None:
        item.caption = make(item.caption)

    return changed(kind, change)


def truncated(random: np.random.Generator) -> bytes:
    whole = png(Image.fromarray(random.integers(0, 256, (60, 60, 3), np.uint8)))
    return whole[: len(whole) // 2]


def enormous(random: np.random.Generator) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\x08IDAT"


def transparent(random: np.random.Generator) -> bytes:
    image = patches(random).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 15, 15))
    return png(image)


def animated(random: np.random.Generator) -> bytes:
    first, *others = (patches(random).resize((40, 40)) for _ in range(3))
    return png(first, "GIF", save_all=True, append_images=others)


def same_picture(item: Item, other: Item, _whole: Set) -> str:
    item.image, item.ending = other.image, other.ending
    return "duplicate image"


def same_pair(item: Item, other: Item, whole: Set) -> str:
    item.caption = other.caption
    same_picture(item, other, whole)
    return "repeated pair"


def nearly_the_same(item: Item, other: Item, _whole: Set) -> str:
    item.image = png(Image.open(io.BytesIO(other.image)), "JPEG", quality=92, subsampling=0)
    item.ending = "jpg"
    return "near-identical images"


ANYWHERE: list[Callable[[Item, Item, Set], str]] = [
    pixels("unreadable image", lambda random: random.bytes(300)),
    pixels("unreadable image", truncated),
    pixels("unreadable image", lambda random: b""),
    pixels("oversized image", enormous),
    pixels("tiny image", lambda random: png(patches(random).resize((40, 3)))),
    pixels("extreme aspect", lambda random: png(patches(random).resize((240, 30)))),
    pixels("invisible image", lambda random: png(Image.new("RGBA", (40, 40), (*random.integers(0, 255, 3), 0)))),
    pixels("clipped image", lambda random: png(Image.fromarray(random.random((40, 40), np.float32)), "TIFF"), "tif"),
    pixels("one colour", lambda random: png(Image.new("RGB", (40, 40), tuple(random.integers(0, 255, 3))))),
    pixels("CMYK image", lambda random: png(patches(random).convert("CMYK"), "JPEG"), "jpg"),
    pixels("16-bit image", lambda random: png(Image.fromarray(random.integers(0, 65536, (40, 40), np.uint16)))),
    pixels("palette image", lambda random: png(patches(random).quantize(16))),
    pixels("transparent image", transparent),
    pixels("animated image", animated, "gif"),
    same_picture,
    same_pair,
    nearly_the_same,
    words("empty caption", lambda caption: ""),
    words("empty caption", lambda caption: " \t "),
    words("control characters", lambda caption: f"{caption}\x07 bell"),
    words("broken encoding", lambda caption: f"{caption} in a café".encode().decode("cp1252")),
    words("broken encoding", lambda caption: f"{caption} in a caf\ufffd"),
    words("file name as caption", lambda caption: f"IMG_{caption.replace(' ', '')}.JPG"),
    words("link as caption", lambda caption: f"https://shop.example/{caption.replace(' ', '/')}"),
    words("markup in a caption", lambda caption: f"<b>{caption}</b> &amp; more"),
    words("long caption", lambda caption: f"{caption} " + "of many words " * 12),
    words("wordless caption", lambda caption: "of the " + "!" * len(caption)),
]  # fmt: skip


def plant(seed: int, of_format: list[Callable[[Item, Item, Set], str]]) -> Set:
    """A set with :data:`DEFECTS` defects, up to a third of them of its format, at places of their own.

    Seeds that follow each other take defects that follow each other: 0, 1 and 2 have each of them at least once.
    """
    found = clean(seed)
    own = min(DEFECTS // 3, len(of_format))
    chosen = [of_format[(seed * own + i) % len(of_format)] for i in range(own)]
    chosen += [ANYWHERE[(seed * (DEFECTS - own) + i) % len(ANYWHERE)] for i in range(DEFECTS - own)]
    order = [int(i) for i in found.random.permutation(COUNT)]
    for defect in chosen:
        one, other = sorted((order.pop(), order.pop()))  # a copy is told at the later of the two
        found.planted.append(Planted(defect(found.items[other], found.items[one], found), found.items[other]))
    return found


# A folder of images and a file of lines -------------------------------------------------------------------------------


def spelt(kind: str, line: Callable[[Item], str]) -> Callable[[Item, Item, Set], str]:
    """A mistake in how an item's line is written."""

    def change(item: Item, _whole: Set) -> None:
        item.raw = line(item)

    return changed(kind, change)


def _json(item: Item, **other: object) -> str:
    return json.dumps({"image": f"{item.name}.{item.ending}", "caption": item.caption, **other})


CSV_DEFECTS = [
    spelt("missing image", lambda item: f"lost/{item.name}.png,{item.caption}"),
    spelt("outside the root", lambda item: f"../{item.name}.png,{item.caption}"),
    spelt("unusable name", lambda item: f"{'a' * 5000}.png,{item.caption}"),
    spelt("no image named", lambda item: f",{item.caption}"),
    spelt("empty caption", lambda item: f"{item.name}.png"),
    spelt("wrong columns", lambda item: f"{item.name}.png,{item.caption}, with a comma"),
    spelt("not UTF-8", lambda item: f"{item.name}.png,{item.caption} caf\udce9"),
]
JSONL_DEFECTS = [
    spelt("missing image", lambda item: _json(item, image=f"lost/{item.name}.png")),
    spelt("outside the root", lambda item: _json(item, image=f"/etc/{item.name}.png")),
    spelt("unusable name", lambda item: _json(item, image="a\0.png")),
    spelt("no image named", lambda item: _json(item, image=None)),
    spelt("not JSON", lambda item: _json(item)[:-4]),
    spelt("not JSON", lambda item: "[1, 2]"),
    spelt("wrong columns", lambda item: _json(item).replace('"caption"', '"captoin"')),
    spelt("wrong type", lambda item: _json(item, caption=[item.caption])),
    spelt("half a character", lambda item: _json(item, caption=f"{item.caption} \ud83d")),
    spelt("not UTF-8", lambda item: f'{{"image": "{item.name}.png", "caption": "caf\udce9"}}'),
]


def write_lines(found: Set, folder: Path, kind: str) -> tuple[Path, Callable[[Item], str]]:
    """The file of pairs, and the place that an item is named by."""
    lines = ["image,caption"] if kind == "csv" else []
    place = {}
    for item in found.items:
        (folder / f"{item.name}.{item.ending}").write_bytes(item.image)
        if item.raw is not None:
            line = item.raw
        elif kind == "csv":
            stream = io.StringIO()
            csv.writer(stream, lineterminator="").writerow([f"{item.name}.{item.ending}", item.caption])
            line = stream.getvalue()
        else:
            line = _json(item)
        lines.append(line)
        place[item.name] = len(lines)
    path = folder / f"pairs.{kind}"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape") + b"\n")
    return path, lambda item: f"{path} line {place[item.name]}"


# Tar shards -----------------------------------------------------------------------------------------------------------


def packed(kind: str, way: str) -> Callable[[Item, Item, Set], str]:
    return spelt(kind, lambda item: way)


TAR_DEFECTS = [
    packed("caption without image", "no image"),
    packed("missing caption", "no text"),
    packed("ambiguous image", "two images"),
    packed("not UTF-8", "latin"),
    packed("not JSON", "json"),
    packed("wrong type", "list"),
    packed("unsafe member", "link"),
    packed("unsafe member", "outside"),
    packed("listed twice", "twice"),
]


def write_shards(found: Set, folder: Path, truncate: bool = False) -> tuple[Path, Callable[[Item], str]]:
    """Three shards; with ``truncate`` the first ends within its last sample, which is then lost."""
    shard = {}
    for number in range(3):
        path = folder / f"{number:05d}.tar"
        part = found.items[number::3]
        with tarfile.open(path, "w") as tar:
            for item in part:
                shard[item.name] = path
                for name, contents in _members(item):
                    info = tarfile.TarInfo(name)
                    if contents is None:
                        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                        tar.addfile(info)
                    else:
                        info.size = len(contents)
                        tar.addfile(info, io.BytesIO(contents))
                last = tar.offset
        if truncate and number == 0:
            with path.open("r+b") as file:
                file.truncate(last - 512)
    return folder, lambda item: f"{shard[item.name]} {item.name}"


def _members(item: Item) -> list[tuple[str, bytes | None]]:
    image, text = (f"{item.name}.{item.ending}", item.image), (f"{item.name}.txt", item.caption.encode())
    record = (f"{item.name}.json", b'{"caption": "cut')
    ways: dict[str | None, list[tuple[str, bytes | None]]] = {
        None: [image, text],
        "no image": [text],
        "no text": [image],
        "two images": [image, (f"{item.name}.jpg" if item.ending == "png" else f"{item.name}.png", item.image), text],
        "latin": [image, (f"{item.name}.txt", b"caf\xe9")],
        "json": [image, record],
        "list": [image, (f"{item.name}.json", b"[1, 2]")],
        "link": [image, text, (f"{item.name}.link", None)],
        "outside": [image, text, (f"../{item.name}.png", item.image)],
        "twice": [image, image, text],
    }
    return ways[item.raw]


# A Hugging Face data set ----------------------------------------------------------------------------------------------

ARROW_DEFECTS = [
    packed("no image named", "no image"),
    packed("empty caption", "no text"),
    packed("missing image", "lost/a.png"),
    packed("outside the root", "../a.png"),
    packed("unusable name", "a" * 5000),
]


def write_arrow(found: Set, folder: Path, truncate: bool = False) -> tuple[Path, Callable[[Item], str]]:
    """A saved data set of three files; with ``truncate`` the last is cut, and its rows are lost."""
    from datasets import Dataset, Features, Value

    images = []
    for item in found.items:
        empty, path = item.raw == "no image", item.raw if item.raw not in (None, "no image", "no text") else None
        images.append(None if empty else {"bytes": None if path else item.image, "path": path})
    captions = [None if item.raw == "no text" else item.caption for item in found.items]
    # datasets' own type of images would look at each path
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "caption": Value("string")})
    path = folder / "saved"
    Dataset.from_dict({"image": images, "caption": captions}, features).save_to_disk(str(path), num_shards=3)
    if truncate:
        last = max(path.glob("*.arrow"))
        last.write_bytes(last.read_bytes()[:1000])
    rows = {item.name: row for row, item in enumerate(found.items)}
    return path, lambda item: f"{path} row {rows[item.name]}"
