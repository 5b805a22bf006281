"""Data that were made to do harm: formats that start programs, files that never end, bombs, lengths that lie."""

from __future__ import annotations

import datetime
import fcntl
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import pair_sets
import pyarrow as pa
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from crossmask.engine.data import pair_layouts, pictures, shard_index
from crossmask.engine.data.arrow_files import open_mapped
from crossmask.engine.data.pair_files import read_pairs
from crossmask.engine.data.pictures import read_picture
from crossmask.engine.data_check import check_data
from crossmask.engine.errors import DataError
from crossmask.engine.failures import print_error

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 moveto\nshowpage\n"
PICTURE = pair_sets.encoded("x")


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_pairs(path, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Images ---------------------------------------------------------------------------------------------------------------


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: started.append("asked"))
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: started.append(given))
    (tmp_path / "a.jpg").write_bytes(EPS)
    with pytest.raises(DataError, match=r"cannot read image \S*a.jpg: it is not an image"):
        read_picture(str(tmp_path / "a.jpg"), "pairs.csv line 2")
    assert not started


def test_files_of_other_formats_are_still_read(tmp_path: Path) -> None:
    for name in ("a.tga", "a.ico"):  # beside those that an archive may hold
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
        assert read_picture(str(tmp_path / name)).getpixel((5, 5)) == (255, 0, 0)


def test_damaged_metadata_do_not_hide_a_picture() -> None:
    notes = Image.Exif()
    notes[0x0112], notes[0x010E] = 6, "hello"
    file = io.BytesIO()
    Image.new("RGB", (8, 16)).save(file, "JPEG", exif=notes)
    damaged = bytearray(file.getvalue())
    damaged[damaged.index(b"\x01\x0e\x00\x02") + 1] = 3  # the text is said to be a number, which Pillow cannot write
    assert read_picture("a.jpg", "a.csv line 2", bytes(damaged)).size == (16, 8)


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_pillow_turns_them(orientation: int) -> None:
    notes = Image.Exif()
    notes[0x0112] = orientation
    file = io.BytesIO()
    Image.effect_noise((12, 20), 80).save(file, "PNG", exif=notes)
    with Image.open(file) as stored:
        wanted = ImageOps.exif_transpose(stored).convert("RGB")
    found = read_picture("a.png", contents=file.getvalue())
    assert found.size == wanted.size
    assert found.tobytes() == wanted.tobytes()


def test_whatever_pillow_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise struct.error("unpack requires\na buffer")

    monkeypatch.setattr(pictures, "open_picture", broken)
    with pytest.raises(
        DataError, match=r"\Aa.csv line 2: cannot read image a.jpg: unpack requires; replace it[^\n]*\Z"
    ):
        read_picture("a.jpg", "a.csv line 2")


# Texts ----------------------------------------------------------------------------------------------------------------


def test_texts_that_are_no_plain_files_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "a.txt").symlink_to("/dev/null")
    assert "a.txt: cannot be read (it is no plain file)" in problem(tmp_path)
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")  # to open it would wait for somebody who writes
    assert "a.txt: cannot be read (it is no plain file)" in problem(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").write_text("a red hat")
    monkeypatch.setattr(pair_layouts, "MAX_TEXT", 8)
    assert "a.txt: cannot be read (it has 9 bytes, more than 8)" in problem(tmp_path)


# Arrow ----------------------------------------------------------------------------------------------------------------


def arrow_set(folder: Path, columns: dict[str, Any] | None = None, **how: Any) -> Path:
    folder.mkdir(parents=True)
    own = {"image": [PICTURE] * 3, "caption": ["a red hat", "a blue hat", "a green hat"]}
    stored(folder / "a.arrow", pa.table(own | (columns or {})), **how)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    return folder


def stored(file: Path, table: Any, **how: Any) -> bytes:
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_stream(stream, table.schema, **how) as writer:
        writer.write_table(table)
    return file.read_bytes()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("words", [["a"] * 3, pa.array(["a"] * 3).dictionary_encode()], ids=["plain", "dictionary"])
def test_compressed_columns_are_not_unpacked(tmp_path: Path, codec: str, words: Any) -> None:
    assert len(read_pairs(arrow_set(tmp_path / "plain", {"other": words}), None)) == 3
    zeros = pa.array([bytes(2**22)] * 3)  # in a column that nobody would read
    folder = arrow_set(
        tmp_path / "bomb", {"other": words, "x": zeros}, options=pa.ipc.IpcWriteOptions(compression=codec)
    )
    before = pa.total_allocated_bytes()
    assert "a.arrow: its columns are compressed, so that no row can be read by its place; load" in problem(folder)
    del zeros
    assert pa.default_memory_pool().bytes_allocated() <= before


def test_indices_that_claim_more_than_is_there(tmp_path: Path) -> None:
    """To read them would read what lies behind the file's mapping, and end the process."""
    folder = arrow_set(tmp_path / "set")
    contents = stored(folder / "i.arrow", pa.table({"indices": pa.array([0, 1, 2], pa.uint64())}))
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    assert open_mapped(folder).order.tolist() == [0, 1, 2]
    count, claimed = (struct.pack("<q", rows) for rows in (3, 5000))
    assert contents.count(count) == 2  # rows of the batch, and of its column
    (folder / "i.arrow").write_bytes(contents.replace(count, claimed))
    assert problem(folder) == f"{folder}: its indices are damaged; save the data set again"


@pytest.mark.parametrize(
    "value", [datetime.datetime(2020, 1, 1), b"x\xff", {"of": b"x"}], ids=["time", "bytes", "struct"]
)
def test_groups_that_no_json_could_hold(tmp_path: Path, value: Any) -> None:
    assert "row 0: 'group' is " in problem(arrow_set(tmp_path / "set", {"group": [value] * 3}))


def test_arrow_sets_of_what_is_no_plain_file(tmp_path: Path) -> None:
    for name, what in (("a.arrow", "a.arrow: no plain file"), ("state.json", "state.json: cannot be read (it is no")):
        folder = arrow_set(tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/null")
        # as a split: its state.json is not looked at before it is read
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
        (folder / "train").symlink_to(folder)
        assert what in problem(folder)


# The index of shards --------------------------------------------------------------------------------------------------


def test_an_index_that_no_scan_would_have_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shard_index.SETTING, str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    path = pair_sets.shards(tmp_path / "shards") / "s-000.tar"
    whole = read_pairs(path, None)
    (kept,) = (tmp_path / "cache").glob("shards/*.json")
    record = json.loads(kept.read_text())
    texts = {"captions": [5, [], [5]], "images": [5], "groups": [5], "keys": [None]}
    for name, value in [
        *((name, value) for name, values in texts.items() for value in values),
        *(("offsets", value) for value in (0.5, True, -1)),
        ("sizes", 10**9),
    ]:
        samples = record["samples"] | {name: [value, *record["samples"][name][1:]]}
        kept.write_text(json.dumps(record | {"samples": samples}))
        assert read_pairs(path, None).captions == whole.captions, (name, value)
        assert json.loads(kept.read_text()) == record, (name, value)
    for passed_over in ([], {"what": 3}, {"what": ["many", "first"]}, {"what": [1, 2]}):
        kept.write_text(json.dumps(record | {"samples": record["samples"] | {"passed_over": passed_over}}))
        assert read_pairs(path, None).notices == whole.notices, passed_over


def test_nobody_waits_for_ever_for_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped, or hangs on a dead disk, keeps its claim."""

    def lockf(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        assert len(waits) < 10**6

    (tmp_path / "shards").mkdir()
    monkeypatch.setenv(shard_index.SETTING, str(tmp_path / "cache"))
    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(shard_index.time, "sleep", sleep)
    monkeypatch.setattr(shard_index, "_PATIENCE", 0.01)
    assert len(read_pairs(pair_sets.shards(tmp_path / "shards"), None))
    assert waits


# What a person sees ---------------------------------------------------------------------------------------------------


def test_names_give_a_terminal_no_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;title\x07\x9b2J"
    (tmp_path / "b.png").write_bytes(PICTURE)
    (tmp_path / "b.txt").write_text("a red hat")
    (tmp_path / f"{name}.txt").write_text("a red hat")
    check_data(str(tmp_path), [], None, None, 0)
    print_error(problem(tmp_path))
    said = "".join(capsys.readouterr())
    assert said.count("a\\x1b]0;title") == 2
    assert not set(said) & {"\x1b", "\x07", "\x9b"}
