"""Batches made ahead of their step: which they are, what becomes of errors, and that threads end."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crossmask.engine.data import StepSampler, decoders, load_data
from crossmask.engine.data.batch import Batch
from crossmask.engine.data.decoders import Decoders, decoder_threads
from crossmask.engine.data.grouping_sampler import GroupedSampler
from crossmask.engine.data.normalisation import CLIP
from crossmask.engine.data.prefetch import BESIDE_A_GPU, THREADS, Prefetcher
from crossmask.engine.errors import DataError
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_sections_grouping import GroupingSection
from crossmask.engine.training.pretrainer import Pretrainer
from crossmask.engine.training.recipe_change import check_recipe

CPU = torch.device("cpu")


class Maker:
    """Makes batches, writes down which, and holds them back until it is told to go on."""

    def __init__(self, bad: int = -1) -> None:
        self.made: list[tuple[int, list[int]]] = []
        self.threads: set[str] = set()
        self.go, self.begun, self.bad = threading.Event(), threading.Semaphore(0), bad
        self.go.set()

    def __call__(self, indices: np.ndarray, epoch: int) -> Batch:
        self.begun.release()
        assert self.go.wait(20)
        self.made.append((epoch, indices.tolist()))
        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        if self.bad in indices:
            raise DataError(f"pairs.jsonl line {self.bad}: cannot read image x.jpg")
        index = torch.from_numpy(indices)
        words = torch.ones(len(indices), 3, dtype=torch.int64)
        return Batch(torch.full((len(indices), 3, 2, 2), float(epoch)), words, words > 0, words > 0, index, index)


def some(*indices: int) -> np.ndarray:
    return np.array(indices, np.int64)


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_what_was_made_ahead_is_handed_out_where_it_is_asked_for_and_nowhere_else() -> None:
    make = Maker()
    batches = Prefetcher(make, 2, 1, CPU)
    batches.prepare([(some(1, 2), 0), (some(3, 4), 0), (some(1, 2), 1)])
    assert batches.take(some(1, 2), 1).images.unique().tolist() == [1.0], "another epoch is another batch"
    assert batches.take(some(1, 2), 0).index.tolist() == [1, 2]
    assert batches.take(some(2, 1), 0).index.tolist() == [2, 1], "and so is another order"
    batches.close()
    assert make.made.count((0, [1, 2])) == 1
    assert make.threads == {"batches", ""}  # "": the caller's, which made what was not prepared


def test_with_nothing_ahead_the_caller_makes_every_batch_itself() -> None:
    make = Maker()
    batches = Prefetcher(make, None, None, CPU)
    batches.prepare([(some(1), 0), (some(2), 0)])
    assert make.made == []
    assert batches.take(some(1), 0).index.tolist() == [1]
    assert make.threads == {""}
    assert not batch_threads()


def test_the_default_follows_the_device() -> None:
    assert Prefetcher(Maker(), None, None, torch.device("cuda", 0)).steps == BESIDE_A_GPU
    assert Prefetcher(Maker(), None, None, CPU).steps == 0
    assert Prefetcher(Maker(), 3, None, CPU).steps == 3


def test_no_more_is_begun_than_there_are_threads_and_what_is_not_wanted_any_more_is_never_made() -> None:
    make = Maker()
    make.go.clear()
    batches = Prefetcher(make, 8, 1, CPU)
    batches.prepare([(some(i), 0) for i in range(8)])
    for _ in range(THREADS):
        assert make.begun.acquire(timeout=20)
    batches.prepare([(some(7), 0)])  # a step was left out, or another run's place was restored
    make.go.set()
    assert batches.take(some(7), 0).index.tolist() == [7]
    batches.close()
    assert sorted(index for _, (index,) in make.made) == [0, 1, 7]


def test_an_error_is_raised_where_its_batch_is_taken_and_not_before() -> None:
    batches = Prefetcher(Maker(bad=5), 2, 1, CPU)
    batches.prepare([(some(1), 0), (some(5), 0), (some(2), 0)])
    assert batches.take(some(1), 0).index.tolist() == [1]
    assert batches.take(some(2), 0).index.tolist() == [2]
    with pytest.raises(DataError, match=r"^pairs.jsonl line 5: cannot read image x.jpg$"):
        batches.take(some(5), 0)
    batches.close()


def test_an_error_in_a_batch_that_nobody_takes_is_told_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    batches = Prefetcher(Maker(bad=5), 2, 1, CPU)
    batches.prepare([(some(1), 0), (some(5), 0)])
    batches.take(some(1), 0)
    batches.prepare([])
    batches.close()
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_threads_end_with_close_and_with_the_prefetcher_and_start_no_more() -> None:
    make, before = Maker(), torch.get_num_threads()
    batches = Prefetcher(make, 1, 3, CPU)
    batches.prepare([(some(1), 0)])
    running = batch_threads()
    assert len(running) == THREADS
    seen: list[int] = []
    asking = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    asking.start()
    asking.join()
    assert [torch.get_num_threads(), *seen] == [before, before], "what other threads begin with is put back"
    batches.close()
    batches.close()
    assert not any(thread.is_alive() for thread in running)
    batches.prepare([(some(2), 0)])
    assert not batch_threads()
    assert batches.take(some(2), 0).index.tolist() == [2]

    left = Prefetcher(make, 1, 1, CPU)  # by a caller that never closes it
    left.prepare([(some(1), 0)])
    left.take(some(1), 0)
    running = batch_threads()
    del left
    gc.collect()
    for thread in running:
        thread.join(20)
        assert not thread.is_alive()


# -- which steps are known ahead ------------------------------------------------------------------------------------


def test_later_steps_are_told_without_changing_any() -> None:
    plain, asked = StepSampler(10, 4, 2, 7), StepSampler(10, 4, 2, 7)
    for step in range(9):
        for later in range(step + 1, step + 6):
            expected = StepSampler(10, 4, 2, 7).indices(later, 1)
            found = asked.ahead(later, 1)
            assert found is not None
            assert found.tolist() == expected.tolist()
        assert asked.indices(step, 1).tolist() == plain.indices(step, 1).tolist()
        assert all(epoch > asked.epoch(step) for epoch in asked._later)


def test_an_order_that_follows_the_model_is_not_asked_for_before_its_epoch(tmp_path: Path) -> None:
    def refuse(make: Any) -> np.ndarray:
        raise AssertionError("every rank would have to ask")

    section = GroupingSection(search_space=8, similar=2, lead=0.5)
    sampler = GroupedSampler(
        8, 4, 1, 0, section=section, groups=np.arange(8), width=4, folder=tmp_path, max_steps=8, share=refuse
    )
    assert sampler.ahead(1, 0) is None, "not even the first epoch's, before it begins"
    sampler.indices(0, 0)
    known = sampler.ahead(1, 0)
    assert known is not None
    assert sampler.ahead(2, 0) is None
    assert known.tolist() == sampler.indices(1, 0).tolist()


def test_a_run_makes_the_coming_steps_of_its_end_and_none_behind_it() -> None:
    recipe = Recipe.model_validate({"training": {"batch_size": 4, "accumulation_steps": 2, "max_steps": 5}})
    run: Any = object.__new__(Pretrainer)
    run.recipe, run.rank, run.sampler = recipe, 0, StepSampler(8, 4, 1, 0, 2)
    run.prefetcher = Prefetcher(Maker(), 3, 1, CPU)
    run.sampler.indices(0, 0)
    coming = [(indices.tolist(), epoch) for indices, epoch in run._coming(0)]
    expected = [(half.tolist(), step // 2) for step in (1, 2, 3) for half in run.sampler.ahead(step, 0).reshape(2, 2)]
    assert coming == expected
    assert len(list(run._coming(3))) == 2
    assert not list(run._coming(4))


# -- the decoders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(16, "1", 16), (64, "8", 8), (2, "4", 1), (96, "", 16)])
def test_the_ranks_of_a_machine_share_its_cores(
    cores: int, ranks: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", ranks)
    assert decoder_threads(None) == threads
    assert decoder_threads(5) == 5


@pytest.mark.parametrize("lights", [None, np.array([[0.83, 1.2, 1.0], [1.1, 0.91, 1.0]])])
def test_pixels_are_those_of_arithmetic_on_the_whole_batch(lights: np.ndarray | None) -> None:
    """Tables of the 256 levels are the same to the bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    found = Decoders(2).images(lambda at: Image.fromarray(pixels[at]), 3, 64, CLIP, lights)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    if lights is not None:
        contrast, brightness = (torch.from_numpy(x).float()[:, None, None, None] for x in lights)
        images = (((images - 0.5) * contrast + 0.5) * brightness).clamp_(0, 1)
    assert found.equal(CLIP.apply_(images))
    assert found.is_contiguous()


def test_a_broken_image_is_told_at_its_step_as_without_threads(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = "".join(f'{{"image": "{i}.png", "caption": "picture number {i}"}}\n' for i in range(4))
    (tmp_path / "pairs.jsonl").write_text(rows)
    given = {"source": "pairs", "path": tmp_path / "pairs.jsonl", "validation_fraction": 0.0, "workers": 3}
    data = load_data(Recipe.model_validate({"data": given, "model": {"image": {"size": 16}}}))
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "3.png").write_bytes(b"no picture either")
    batches = Prefetcher(data.train_batch, 1, 3, CPU)
    batches.prepare([(some(0, 1), 0), (some(1, 2, 3), 0)])
    assert len(batches.take(some(0, 1), 0)) == 2
    with pytest.raises(DataError) as told:
        batches.take(some(1, 2, 3), 0)
    batches.close()
    with pytest.raises(DataError) as plain:
        data.train_batch(some(1, 2, 3), 0)
    assert str(told.value) == str(plain.value)
    assert "pairs.jsonl line 3: cannot read image" in str(told.value)
    assert "\n" not in str(told.value)


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_threads_and_steps_ahead_may_change_when_a_run_goes_on() -> None:
    before = Recipe.model_validate({"data": {"workers": 2}})
    now = Recipe.model_validate({"data": {"prefetch": 4}})
    assert check_recipe(before.model_dump_json(), now, "step-000100") == []
