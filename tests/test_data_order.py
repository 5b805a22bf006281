"""The order of the data and the samples themselves: the same for any number of threads, of steps ahead and of ranks."""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import ranks
from PIL import Image

from crossmask.engine.data import PairData, StepSampler, load_data
from crossmask.engine.recipe import Recipe

COUNT = 48
WORDS = ("red", "green", "blue", "round", "tall", "small")


def captions() -> list[str]:
    return [f"a {WORDS[i % 6]} {WORDS[i // 6 % 6]} thing number {i}" for i in range(COUNT)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with noisy JPEGs of several sizes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(COUNT):
        pixels = random.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((60 + i, 45 + i % 7), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    rows = [json.dumps({"image": f"{i}.jpg", "caption": caption}) for i, caption in enumerate(captions())]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs in three tar files."""
    folder, each = tmp_path_factory.mktemp("shards"), COUNT // 3
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for i in range(shard * each, (shard + 1) * each):
                parts = {"jpg": (photos / f"{i}.jpg").read_bytes(), "txt": captions()[i].encode()}
                for ending, contents in parts.items():
                    member = tarfile.TarInfo(f"{i:06d}.{ending}")
                    member.size = len(contents)
                    archive.addfile(member, io.BytesIO(contents))
    return folder


@cache
def opened(path: Path | None, workers: int) -> PairData:
    data: dict[str, Any] = {"source": "emoji", "workers": workers, "scenes": {"fraction": 0.4}, "vocabulary_size": 512}
    if path is not None:
        data = {"source": "pairs", "path": path, "validation_fraction": 0.0, "workers": workers}
    return load_data(Recipe.model_validate({"seed": 3, "data": data, "model": {"image": {"size": 32}}}))


@pytest.mark.parametrize("source", ["emoji", "pairs", "shards"])
def test_ranks_and_workers_change_neither_the_order_nor_the_pixels(source: str, request: Any) -> None:
    """Of a step in the midst of the second epoch: what 1, 2 and 4 ranks see is one batch, cut into shares."""
    path = {"emoji": None, "pairs": "pairs.jsonl", "shards": ""}[source]
    fixture = {"pairs": "photos", "shards": "shards"}.get(source)
    where = None if path is None else request.getfixturevalue(fixture) / path
    first = opened(where, 1)
    batch = 12
    step = first.train_size // batch + 2
    whole = StepSampler(first.train_size, batch, 1, 3)
    alone = first.train_batch(whole.indices(step, 0), whole.epoch(step))
    for world, workers in ((1, 4), (2, 2), (4, 1)):
        data = opened(where, workers if where else 1)  # threads that emoji, which are drawn, do not use
        assert data.fingerprint() == first.fingerprint()
        samplers = [StepSampler(data.train_size, batch, world, 3) for _ in range(world)]
        shares = [data.train_batch(s.indices(step, rank), s.epoch(step)) for rank, s in enumerate(samplers)]
        assert torch.cat([share.index for share in shares]).equal(alone.index)
        assert torch.cat([share.images for share in shares]).equal(alone.images), (world, workers)
        assert torch.cat([share.group_id for share in shares]).equal(alone.group_id)
        words = [
            ids[mask].tolist() for share in shares for ids, mask in zip(share.token_ids, share.token_mask, strict=True)
        ]
        assert words == [ids[mask].tolist() for ids, mask in zip(alone.token_ids, alone.token_mask, strict=True)]


def test_every_layout_of_the_same_pairs_gives_the_same_pixels(photos: Path, shards: Path) -> None:
    """Only the address of an image differs between a file and a tar file's member."""
    files, tars = opened(photos / "pairs.jsonl", 1), opened(shards, 2)
    some = np.array([5, 40, 17])
    one, other = files.train_batch(some, 1), tars.train_batch(some, 1)
    assert one.images.equal(other.images)
    assert one.token_ids.equal(other.token_ids)


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Prefetch, workers and whether epochs are grouped -> each step's loss and a digest of the weights."""
    output = tmp_path_factory.mktemp("runs") / "seen"
    for code, log in ranks.start("prefetch_steps.py", output, photos / "pairs.jsonl", ranks=1):
        assert code == 0, log
    found: dict[str, list[str]] = json.loads(Path(f"{output}.0.json").read_text())
    return found


def test_losses_and_weights_are_the_same_to_the_bit_whatever_is_made_ahead(runs: dict[str, list[str]]) -> None:
    plain = runs["0 1 False"]
    assert len(set(plain)) == len(plain) == 10
    assert runs["4 4 False"] == plain
    assert runs["stopped"] == plain, "stopped within an epoch and resumed with other threads"


def test_grouped_epochs_whose_order_follows_the_model_are_the_same_too(runs: dict[str, list[str]]) -> None:
    assert runs["3 2 True"] == runs["0 1 True"]
    assert runs["0 1 True"][:4] == runs["0 1 False"][:4], "the first epoch is plain"
    assert runs["0 1 True"][4:] != runs["0 1 False"][4:]


def test_no_thread_outlives_its_run(runs: dict[str, list[str]]) -> None:
    assert runs["threads"] == []
