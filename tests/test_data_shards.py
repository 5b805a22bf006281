"""Tar shards: the same batches as the same pairs in files, which shards are meant, and their index on disk."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pair_sets
import pytest
import torch

from crossmask.engine.data import load_data, shard_index
from crossmask.engine.data.complaints import KINDS
from crossmask.engine.data.open_files import OpenFiles, stamp_of
from crossmask.engine.data.pair_files import PairTable, read_pairs
from crossmask.engine.data.pair_pictures import open_pair_picture, read_pair_picture
from crossmask.engine.data.shards import expand
from crossmask.engine.errors import DataError, UserError


def one_line(*parts: str, error: type[UserError] = DataError) -> Any:
    return pytest.raises(error, match=r"(?s)\A" + "".join(f"(?=.*{part})" for part in parts) + r"[^\n]*\Z")


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One set as lines and as shards."""
    return pair_sets.lines(tmp_path_factory.mktemp("lines")), pair_sets.shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(shard_index.SETTING, str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


# What works -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_the_same_batches_as_the_same_pairs_in_lines(same: tuple[Path, Path], augment: float) -> None:
    from_lines, from_shards = (load_data(pair_sets.recipe(path, augment=augment, word_drop=0.3)) for path in same)
    assert from_lines.train_size == from_shards.train_size > 10
    assert from_lines.train_group_id.tolist() == from_shards.train_group_id.tolist()
    indices = np.random.default_rng(0).permutation(from_lines.train_size)
    one, other = (vars(data.train_batch(indices, 3)) for data in (from_lines, from_shards))
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
    assert from_lines.splits.keys() == from_shards.splits.keys() == {"held-out"}
    one, other = (data.splits["held-out"] for data in (from_lines, from_shards))
    assert torch.equal(one.take(np.arange(3)).images, other.take(np.arange(3)).images)
    assert one.labels["category"].tolist() == other.labels["category"].tolist()


def test_a_run_of_two_steps_is_the_same(same: tuple[Path, Path]) -> None:
    from_lines, from_shards = (pair_sets.two_steps(pair_sets.recipe(path)) for path in same)
    assert from_shards == from_lines
    assert len(set(from_shards)) == 2


def test_what_webdataset_writes(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for row in pair_sets.rows()[:3]:
            name = f"sub/{row['key']}"
            writer.write({"__key__": name, "webp": pair_sets.encoded(name, kind="WEBP"), "txt": row["captions"][0],
                          "json": {"category": 7}, "npy": np.zeros(2)})  # fmt: skip
    table = read_pairs(tmp_path / "w.tar", None)
    assert table.captions == [row["captions"][0] for row in pair_sets.rows()[:3]]
    assert table.categories == ["7"] * 3
    assert table.where(1) == f"{tmp_path}/w.tar/sub/0001.webp"
    assert table.where(1, short=True) == table.names[1] == "w.tar/sub/0001.webp"
    (notice,) = table.notices
    assert notice.endswith("w.tar: members that may hold code are never opened: 3, the first sub/0000.npy in w.tar")
    with open_pair_picture(table.sources[0], table.images[1], "here") as picture:
        assert (picture.format, picture.size) == ("WEBP", (20, 24))


def test_the_fingerprint_moves_with_the_folder(same: tuple[Path, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(same[1], tmp_path / "elsewhere")
    one, other = (load_data(pair_sets.recipe(path)) for path in (same[1], moved))
    assert one.fingerprint() == other.fingerprint()
    assert one.name_of(0) == other.name_of(0) == "s-000.tar/0000.png"
    os.rename(moved / "s-001.tar", moved / "s-004.tar")
    assert load_data(pair_sets.recipe(moved)).fingerprint() != one.fingerprint()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_captions(tmp_path: Path, kind: int) -> None:
    deep = "/".join(["a-folder-with-a-long-name"] * 8) if kind != tarfile.USTAR_FORMAT else "f" * 90 + "/" + "n" * 80
    picture = pair_sets.encoded("x")
    found = {
        "./__meta__": b"",
        "._a.jpg": b"not a picture: a Macintosh's",
        "./a.JPG": picture,
        "./a.Txt": "\ufeff one\ntwo \n".encode(),
        "b.c/k.jpeg": picture,
        "b.c/k.json": json.dumps({"caption": "from JSON", "text": "not read", "group": 3}).encode(),
        "k.seg.png": b"a mask of segments",
        "k.png": picture,
        "k.json": json.dumps({"captions": ["one", " ", "two"], "subcategory": "s"}).encode(),
        "k.txt": b" ",
        "m.png": picture,
        "m.cls": b"7",
        "café 图.png": picture,
        "café 图.json": b'["somebody\'s annotations"]',
        "café 图.txt": "日本".encode(),
        f"{deep}/deep.png": picture,
        f"{deep}/deep.txt": b"deep down",
    }
    table = read_pairs(pair_sets.shard(tmp_path / "a.tar", found, kind), None)
    assert table.captions == ["one\ntwo", "from JSON", "one", "two", "日本", "deep down"]
    assert table.groups == [None, "3", *[None] * 4]
    assert table.names == [
        f"a.tar/{name}" for name in ("./a.JPG", "b.c/k.jpeg", "k.png", "café 图.png", f"{deep}/deep.png")
    ]
    assert read_pair_picture(table.sources[0], table.images[-1], "here").size == (20, 24)
    lines = [line.partition("a.tar: ")[2] for line in table.notices]
    assert lines == [
        "texts of several lines are one caption each; several captions belong in a .json, as a list: 1, the first"
        " ./a.Txt in a.tar",
        "samples without a caption are left out: 1, the first m in a.tar",
    ]
    found["k.txt"] = b"text goes before JSON"
    assert read_pairs(pair_sets.shard(tmp_path / "a.tar", found, kind), None).captions[2] == "text goes before JSON"


def test_validation_and_evaluation(same: tuple[Path, Path], tmp_path: Path) -> None:
    held = pair_sets.shard(tmp_path / "held.tar", {"z.png": pair_sets.encoded("z"), "z.txt": b"a blue hat"})
    data = load_data(pair_sets.recipe(same[1], validation_path=str(held)))
    assert data.splits["validation"].image_count == 1
    assert data.train_size == 24
    trained = load_data(pair_sets.recipe(same[1]), data.tokenizer)
    assert trained.splits["all"].image_count == 20
    again = load_data(pair_sets.recipe(same[1], validation_path=str(same[1] / "s-001.tar")))
    assert "8 of the 8 images of split validation are trained on, too" in again.notices()[0]


def test_a_caption_without_words_is_left_out(tmp_path: Path) -> None:
    """Nobody edits an archive by hand; in a file of lines it is an error."""
    picture = pair_sets.encoded("x")
    found = {"a.png": picture, "a.txt": b"...", "b.png": pair_sets.encoded("y"), "b.txt": b"a red hat"}
    data = load_data(pair_sets.recipe(pair_sets.shard(tmp_path / "a.tar", found), validation_fraction=0))
    assert data.train_size == 1
    assert data.notices() == [
        f"pairs left out of the training, without a word that can be masked: 1, the first {tmp_path}/a.tar/a.png"
    ]


# Which shards are meant -----------------------------------------------------------------------------------------------


def test_patterns() -> None:
    assert expand("/d/s-{008..011}.tar") == [f"/d/s-{n:03d}.tar" for n in range(8, 12)]
    assert expand("/d/{9..10}-{a,b}.tar") == ["/d/9-a.tar", "/d/9-b.tar", "/d/10-a.tar", "/d/10-b.tar"]
    for bad in ("s-{}.tar", "s-{3..1}.tar", "s-{a..c}.tar", "s-{1,{2,3}}.tar", "s-{1.tar", "s-{0..999999999}.tar"):
        with one_line("(correct|write) data.path"):
            expand(bad)


def test_a_pattern_and_what_it_misses(same: tuple[Path, Path]) -> None:
    folder = same[1]
    whole = read_pairs(folder, None)
    pattern = read_pairs(Path(f"{folder}/s-{{000..002}}.tar"), None)
    assert (pattern.images, pattern.names) == (whole.images, whole.names)
    table = read_pairs(folder / "s-{002,000}.tar", None)
    assert [table.names[row] for row in (0, -1)] == ["s-002.tar/0016.png", "s-000.tar/0007.png"]
    with one_line(r"s-003\.tar: no such file, and 1 more of 5 shards; copy what is missing, or correct data\.path"):
        read_pairs(folder / "s-{000..004}.tar", None)
    with one_line("is in .* twice; name it once"):
        read_pairs(folder / "s-{000,001,000}.tar", None)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("pipe:curl -s http://example.org/s.tar", "a command, and commands in data are not run; copy the shards"),
        ("https://example.org/s-{000..010}.tar", "not on this machine; copy the shards to a disk"),
        ("s3://bucket/s.tar", "not on this machine"),
        ("none.tar", "none.tar: no such file; copy what is missing, or correct data.path"),
        ("none.tar.gz", r"none\.tar\.gz: compressed, .*; gunzip it to a \.tar"),
    ],
)
def test_shards_that_are_not_on_a_disk(path: str, problem: str) -> None:
    with one_line(problem):
        read_pairs(pair_sets.recipe(path).data.path, None)


def test_folders(same: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(same[1] / "s-000.tar", tmp_path)
    (tmp_path / "s-000.parquet").write_bytes(b"img2dataset's")
    (tmp_path / "s-000_stats.json").write_text("{}")
    assert len(read_pairs(tmp_path, None)) == 10
    (tmp_path / "s-001.tar.zst").write_bytes(b"")
    with one_line(r"s-001\.tar\.zst: compressed, .*; unpack it to a \.tar"):
        read_pairs(tmp_path, None)
    os.remove(tmp_path / "s-001.tar.zst")
    (tmp_path / "a.png").write_bytes(pair_sets.encoded("a"))
    (tmp_path / "a.txt").write_text("a folder of images that somebody has packed, too")
    assert read_pairs(tmp_path, None).sources[0].layout == "folder"


# The index on disk ----------------------------------------------------------------------------------------------------


def columns(table: PairTable) -> list[Any]:
    return [table.images, table.names, table.captions, table.groups, table.categories, table.notices]


def test_an_index_is_used_and_made_again(
    same: tuple[Path, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(same[1], tmp_path / "s")
    first = read_pairs(folder, None)
    kept = sorted(cache.glob("*.json"))
    assert len(kept) == 3
    scanned: list[str] = []
    scan = shard_index.read_samples
    monkeypatch.setattr(shard_index, "read_samples", lambda path, *rest: (scanned.append(path), scan(path, *rest))[1])
    assert columns(read_pairs(folder, None)) == columns(first)
    assert not scanned

    changed = str(folder / "s-001.tar")
    stamp = os.stat(changed)
    os.utime(changed, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))  # the same size, and another content perhaps
    assert columns(read_pairs(folder, None)) == columns(first)
    assert scanned == [changed]

    for contents in (b"", kept[0].read_bytes()[:-1], b"[]", b'{"version": 1}', kept[1].read_bytes()):
        scanned.clear()
        kept[0].write_bytes(contents)  # half-written, or another's
        assert columns(read_pairs(folder, None)) == columns(first)
        assert len(scanned) == 1
    record = json.loads(kept[0].read_text())
    record["samples"]["offsets"][2] = 10**9
    kept[0].write_text(json.dumps(record))
    assert columns(read_pairs(folder, None)) == columns(first)
    assert not list(cache.glob("*.part"))


def test_without_an_index(
    same: tuple[Path, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shard_index.SETTING, "off")
    assert shard_index.index_folder() is None
    whole = columns(read_pairs(same[1], None))
    (tmp_path / "cache").write_text("a file where the folder ought to be")
    monkeypatch.setenv(shard_index.SETTING, str(tmp_path / "cache"))
    assert columns(read_pairs(same[1], None)) == whole
    monkeypatch.delenv(shard_index.SETTING)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shard_index.index_folder() == tmp_path / "crossmask" / "shards"


def test_ranks_share_the_scanning(same: tuple[Path, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that another process is scanning comes last, from that one's index, or by ourselves when it has died."""
    whole = columns(read_pairs(same[1], None))
    done = {path: path.read_bytes() for path in cache.glob("*.json")}
    path = str(same[1] / "s-000.tar")
    (mine,) = (found for found, contents in done.items() if json.loads(contents)["path"] == path)
    mine.unlink()
    held, waits = [True], []

    def lockf(descriptor: int, *_: object) -> None:
        if held[0]:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        held[0] = False
        mine.write_bytes(done[mine])

    scanned: list[str] = []
    scan = shard_index.read_samples
    monkeypatch.setattr(shard_index, "read_samples", lambda path, *rest: (scanned.append(path), scan(path, *rest))[1])
    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(shard_index.time, "sleep", sleep)
    assert columns(read_pairs(same[1], None)) == whole
    assert len(waits) == 1
    assert not scanned


def test_a_shard_that_changes_while_it_is_trained_on(same: tuple[Path, Path], tmp_path: Path) -> None:
    path = shutil.copy(same[1] / "s-000.tar", tmp_path / "a.tar")
    table = read_pairs(path, None)
    read = lambda: read_pair_picture(table.sources[0], table.images[1], table.where(2))  # noqa: E731
    read()
    with path.open("ab") as file:
        file.write(bytes(512))
    with one_line(r"a\.tar/0001\.png: .*a\.tar has changed since the run began; put the old file back, or start again"):
        read()


def test_many_threads_and_more_files_than_may_be_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 5000)
    files, before = OpenFiles(most=3), len(os.listdir("/proc/self/fd"))

    def read(at: int) -> bool:
        number = at * 7 % 12
        found = files.read(str(paths[number]), at % 4000, 900, stamp_of(str(paths[number])), "here")
        return found == bytes([number]) * 900

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(3000)))
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    with one_line("here: .* has changed"):
        files.read(str(paths[0]), 4999, 2, stamp_of(str(paths[0])), "here")


def test_every_complaint_has_a_remedy() -> None:
    assert {"missing shard", "unsafe member", "scattered sample", "oversized text"} <= KINDS.keys()
