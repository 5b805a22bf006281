"""Tar shards that are cut short, hostile or badly packed: each found when it is indexed, in one line."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pair_sets
import pytest

from crossmask.engine.data import shard_samples
from crossmask.engine.data.complaints import KINDS
from crossmask.engine.data.pair_files import PairTable, read_pairs
from crossmask.engine.data.pair_pictures import read_pair_picture
from crossmask.engine.errors import DataError

PICTURE = pair_sets.encoded("x")
WHOLE = {f"{key}{ending}": data for key in "abc" for ending, data in ((".png", PICTURE), (".txt", b"a red hat"))}


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_pairs(path, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def told(path: Path) -> tuple[list[tuple[str, str]], PairTable]:
    """What a check is told, and what is left."""
    found: list[tuple[str, str]] = []
    table = read_pairs(path, None, complain=lambda kind, error: found.append((kind, str(error))))
    assert {kind for kind, _ in found} <= KINDS.keys()
    return found, table


def packed(path: Path, *entries: tarfile.TarInfo | tuple[str, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as file:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                file.addfile(entry, io.BytesIO(bytes(entry.size)))
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                file.addfile(info, io.BytesIO(entry[1]))
    return path


# Cut short ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_anywhere(tmp_path: Path, kind: int) -> None:
    """In a header, a body, an extension header, the padding, between members and in what ends the archive."""
    long = {} if kind == tarfile.USTAR_FORMAT else {f"{'n' * 120}{ending}": data for ending, data in
                                                   ((".png", PICTURE), (".txt", b"long"))}  # fmt: skip
    whole = pair_sets.shard(tmp_path / "whole.tar", WHOLE | long, kind).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as file:
        ends = {m.name: m.offset_data + m.size for m in file}
    end = -(-max(ends.values()) // 512) * 512
    keys = [*"abc", *(["n" * 120] if long else [])]
    path = tmp_path / "cut.tar"
    for size in [*range(0, end + 513, 170), *ends.values(), *(byte - 1 for byte in ends.values())]:
        path.write_bytes(whole[:size])
        if size >= end + 512:
            assert len(read_pairs(path, None)) == len(keys)  # a block of zeros: all of it is there
            continue
        line = problem(path)
        there = [key for key in keys if ends[f"{key}.txt"] <= size]
        last = f"the last whole sample is {there[-1]}" if there else "no sample is whole"
        assert f"cut.tar: byte {line.split('byte ')[1].split(':')[0]}: it is cut short" in line
        assert f"; {last}; fetch or write it again" in line, size
        byte = int(line.split("byte ")[1].split(":")[0].replace(",", ""))
        assert byte <= size < byte + len(PICTURE) + 2048
    path.write_bytes(whole[: max(ends.values()) - 1])
    found, table = told(path)
    assert [kind for kind, _ in found] == ["truncated"]
    assert len(table) == len(keys) - 1


def test_other_damage(tmp_path: Path) -> None:
    whole = pair_sets.shard(tmp_path / "whole.tar", WHOLE).read_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(whole + whole)
    assert "a second archive behind the end of the first" in problem(path)
    path.write_bytes(whole[:3072] + bytes(1024) + whole[4096:])
    assert "zeros, and more behind them: a download that was not finished?" in problem(path)
    flipped = bytearray(whole)
    second = whole.index(b"b.png")
    flipped[second + 3] ^= 4
    path.write_bytes(flipped)
    assert f"byte {second:,}: what stands there is no tar header; the last whole sample is a;" in problem(path)
    for contents, kind in ((b"\x1f\x8b" + bytes(600), "gzip"), (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd")):
        path.write_bytes(contents)
        assert f"it is compressed by {kind}; no sample is whole; unpack it with its own tool" in problem(path)
    path.write_bytes(b"a text" * 200)
    assert "byte 0: it is no tar file" in problem(path)
    os.mkdir(tmp_path / "folder.tar")
    assert "no images in it" in problem(tmp_path / "folder.tar")
    assert "KEY.jpg and a KEY.txt" in problem(packed(tmp_path / "empty.tar"))


# Hostile --------------------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "what"),
    [
        (special("b.png", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
        (special("b.png", tarfile.LNKTYPE, "a.png"), "a hard link"),
        (special("b.png", tarfile.CHRTYPE), "a character device"),
        (special("b.png", tarfile.BLKTYPE), "a block device"),
        (special("b.png", tarfile.FIFOTYPE), "a named pipe"),
        (special("b.png", b"V"), "of type 'V'"),
        (special("../up", tarfile.DIRTYPE), "named with '..', outside the archive"),
        (("/etc/b.png", PICTURE), "named from the root of a file system"),
        (("x/../../b.png", PICTURE), "named with '..', outside the archive"),
        (("b\n.png", PICTURE), "named with control characters"),
    ],
)
def test_members_that_are_no_plain_files_below(tmp_path: Path, member: Any, what: str) -> None:
    path = packed(
        tmp_path / "a.tar", ("a.png", PICTURE), ("a.txt", b"a hat"), member, ("c.png", PICTURE), ("c.txt", b"c")
    )
    assert f" is {what}; pack the shard anew, of plain files alone" in problem(path)
    found, table = told(path)
    assert [kind for kind, _ in found] == ["unsafe member"]
    assert table.captions == ["a hat", "c"]  # and what comes behind it is found


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("blocks", "what"),
    [
        (header(b"a.png", b"\xff" * 12), "a header with a negative size"),
        (header(b"a.png", b"-0000000100\0"), "a header with a negative size"),
        (header(b"a.png", b"\x80" + b"\x7f" * 11), "it is cut short in a.png, of which 1,024 of"),
        (header(b"a.png", b"9z"), "a header without a size"),
        (header(b"a\xff.png", b"0"), "is not UTF-8"),
        (header(b"", b"0"), "a member without a usable name"),
        (header(b"L", b"77777777777", b"L"), "an extension header of 8,589,934,591 bytes"),
        (header(b"x", b"20", b"x") + b"99 path=a.png\n".ljust(512, b"\0"), "PAX records that cannot be read"),
        (header(b"x", b"20", b"x") + b"13 size=-400\n".ljust(512, b"\0"), "a size that is no number"),
        (header(b"g", b"20", b"g") + b"16 path=all.png\n".ljust(512, b"\0"), "global PAX records that name a member"),
        (header(b"a.png", b"1000", b"S"), "a.png is a sparse file"),
        (header(b"x", b"15", b"L") + b"a long name".ljust(512, b"\0"), "a header of extensions without a member"),
    ],
)
def test_hostile_headers(tmp_path: Path, blocks: bytes, what: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(blocks + bytes(1024))
    assert what in problem(path)


def test_sparse_files_of_pax(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.pax_headers, info.size = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, 600
    path = packed(tmp_path / "a.tar", info, ("b.png", PICTURE), ("b.txt", b"b"), kind=tarfile.PAX_FORMAT)
    assert "member a.png at byte 0 is a sparse file" in problem(path)


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [("a.pyd", b"cos\nsystem\n(S'touch x'\ntR."), ("a.seg.pth", b"\x80\x04"), ("a.npy", b"\x93NUMPY")]
    path = packed(tmp_path / "a.tar", ("a.png", PICTURE), *bad, ("a.txt", b"a hat"))
    read: list[tuple[int, int]] = []
    own = shard_samples.Window.read
    monkeypatch.setattr(shard_samples.Window, "read", lambda self, at, n: (read.append((at, n)), own(self, at, n))[1])
    (notice,) = read_pairs(path, None).notices
    assert notice == f"{path}: members that may hold code are never opened: 3, the first a.pyd in a.tar"
    assert [n for _, n in read if n != 512] == [len(b"a hat")]


def test_what_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_samples, "MAX_TEXT", 1000)
    path = packed(tmp_path / "a.tar", ("a.png", PICTURE), ("a.json", b" " * 1001))
    assert "a.tar sample a: a.json has 1,001 bytes, more than 0 MiB; is it a caption?" in problem(path)
    monkeypatch.setattr(shard_samples, "MAX_IMAGE", 100)
    path = packed(tmp_path / "a.tar", ("a.png", PICTURE), ("a.txt", b"a"))
    assert f"a.tar sample a: its image has {len(PICTURE):,} bytes, more than 0 MiB; make it smaller" in problem(path)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"  # would start Ghostscript
    entries = {"a": (bomb, "9000 x 9000 pixels, more than 64 million"), "b": (script, "it is not an image"),
               "c": (PICTURE[:-200], "truncated"), "d": (b"", "it is not an image")}  # fmt: skip
    path = packed(tmp_path / "a.tar", *((f"{k}{e}", d) for k, (image, _) in entries.items()
                                        for e, d in ((".png", image), (".txt", b"a hat")) ))  # fmt: skip
    table = read_pairs(path, None)
    for row, (key, (_, what)) in enumerate(entries.items()):
        with pytest.raises(DataError, match=rf"\A{path}/{key}\.png: [^\n]*{what}[^\n]*\Z"):
            read_pair_picture(table.sources[0], table.images[row], table.where(row))


# Badly packed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "kind", "what"),
    [
        ([("a.txt", b"lost")], "caption without image", "sample a: no image (.jpg, .jpeg, .png,"),
        ([("a.1.png", PICTURE), ("a.1.txt", b"x"), ("a.txt", b"lost")], "caption without image",
         "its members: 1.png, 1.txt; a key ends at the first dot of a name"),
        ([("a.png", PICTURE), ("a.jpg", PICTURE), ("a.txt", b"x")], "ambiguous image", "two images, a.png and a.jpg"),
        ([("a.png", PICTURE), ("a.txt", b"x"), ("a.txt", b"y")], "listed twice", "member a.txt is there twice"),
        ([("a.png", PICTURE), ("a.txt", b"caf\xe9")], "not UTF-8", "a.txt is not UTF-8 at byte 3"),
        ([("a.png", PICTURE), ("a.json", b"{")], "not JSON", "sample a: its .json is not JSON"),
        ([("a.png", PICTURE), ("a.json", b"[" * 10**5)], "not JSON", "not JSON (RecursionError)"),
        ([("a.png", PICTURE), ("a.json", b"[1]")], "wrong type", "its .json is no object"),
        ([("a.png", PICTURE), ("a.json", b'{"caption": 3}')], "wrong type", "'caption' is 3; it must be text"),
        ([("a.png", PICTURE), ("a.txt", b"x"), ("a.json", b'{"group": {}}')], "wrong type", "'group' is {}"),
        ([("a.png", PICTURE), ("a.json", json.dumps({"caption": "\ud83d"}).encode())], "half a character", "\\ud83d"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_used(tmp_path: Path, entries: Any, kind: str, what: str) -> None:
    path = packed(tmp_path / "a.tar", *entries, ("z.png", pair_sets.encoded("z")), ("z.txt", b"a whole one"))
    assert what in problem(path)
    found, table = told(path)
    assert kind in {kind for kind, _ in found}
    assert table.captions[-1] == "a whole one"


def test_members_that_lie_apart(tmp_path: Path) -> None:
    apart = [("a.png", PICTURE), ("b.png", PICTURE), ("a.txt", b"a"), ("b.txt", b"b")]
    path = packed(tmp_path / "a.tar", *apart, ("c.png", PICTURE), ("c.txt", b"c"))
    assert "members of sample a lie apart, at bytes 0 and " in problem(path)
    found, table = told(path)
    assert sum(kind == "scattered sample" for kind, _ in found) == 2
    assert table.captions == ["c"]
