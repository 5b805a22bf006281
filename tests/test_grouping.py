"""Grouped epochs: what a batch holds, that every start of a run finds the same orders, and the mistakes it names."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from crossmask.engine.data import StepSampler
from crossmask.engine.data.grouping import Features, OrderFiles, Rules, grouped_order
from crossmask.engine.data.grouping_sampler import GroupedSampler
from crossmask.engine.data.grouping_store import FeatureStore
from crossmask.engine.errors import CheckpointError, DataError, RecipeError, UserError
from crossmask.engine.recipe import Recipe
from crossmask.engine.recipe_sections_grouping import GroupingSection

WIDTH, SIZE, BATCH = 16, 62, 6  # ten steps an epoch, and two samples that fill no batch
GROUPS = np.arange(SIZE) // 3


def features_of(rows: np.ndarray, epoch: int, groups: np.ndarray = GROUPS) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample's own and its group's direction, and something that is of the epoch alone."""
    found = []
    for side in (1, 2):
        table = np.random.default_rng(side).normal(size=(len(groups), WIDTH))
        drift = np.random.default_rng(100 * side + epoch).normal(size=(len(groups), WIDTH))
        group = np.random.default_rng(7).normal(size=(int(groups.max()) + 1, WIDTH))[groups]
        vectors = torch.from_numpy((group + 0.5 * table + 0.3 * drift)[rows])
        found.append(torch.nn.functional.normalize(vectors, dim=1).float())
    return found[0], found[1]


class Trainer:
    """Takes the steps of a run, on all its ranks, without a model."""

    def __init__(self, folder: Path, step: int = 0, world: int = 1, micro: int = 1, steps: int = 50) -> None:
        section = GroupingSection(search_space=20, similar=3, lead=0.25)
        made: dict[int, np.ndarray] = {}
        self.world, self.micro, self.step, self.steps = world, micro, step, steps
        self.ranks: list[GroupedSampler] = []
        for rank in range(world):

            def share(make: Any, rank: int = rank) -> np.ndarray:
                if rank == 0:
                    made[0] = make()
                return made[0]

            self.ranks.append(
                GroupedSampler(
                    SIZE, BATCH, world, 3, micro, section=section, groups=GROUPS, width=WIDTH,
                    folder=folder, max_steps=steps, rank=rank, share=share,
                )
            )  # fmt: skip
        self.said = [line for sampler in self.ranks for line in sampler.begin(step)]

    def take(self, until: int) -> list[list[int]]:
        """The samples of each step, rank by rank."""
        seen = []
        while self.step < until:
            shares = [sampler.indices(self.step, rank) for rank, sampler in enumerate(self.ranks)]
            dealt = np.stack(shares).reshape(self.world, self.micro, -1)
            for micro in range(self.micro):
                image, text = features_of(dealt[:, micro].reshape(-1), self.step // 10)
                for sampler in self.ranks:
                    sampler.collect(self.step, micro, image, text)
            seen.append(np.concatenate(shares).tolist())
            self.step += 1
        return seen

    def end(self) -> None:
        for sampler in self.ranks:
            sampler.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    trainer = Trainer(tmp_path_factory.mktemp("whole"))
    seen = trainer.take(50)
    trainer.end()
    return seen


def test_epoch_0_is_plain_and_the_others_are_permutations_of_their_own(whole: list[list[int]]) -> None:
    plain = StepSampler(SIZE, BATCH, 1, 3)
    assert [plain.indices(step, 0).tolist() for step in range(10)] == whole[:10]
    epochs = [list(chain(*whole[10 * e : 10 * e + 10])) for e in range(5)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 60
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert any(set(epoch) != set(epochs[0]) for epoch in epochs[1:]), "the rest that fills no batch changes"


def test_ranks_and_micro_batches_share_one_order(whole: list[list[int]], tmp_path: Path) -> None:
    for world, micro in ((2, 1), (3, 1), (1, 3), (3, 2)):
        trainer = Trainer(tmp_path / f"{world} {micro}", world=world, micro=micro)
        assert trainer.take(50) == whole, (world, micro)
        trainer.end()


def test_another_seed_is_another_order(whole: list[list[int]], tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SIZE, WIDTH)
    rows = np.arange(SIZE)
    store.write(0, rows, torch.stack(features_of(rows, 0), 1).half().numpy())
    rules = Rules(3, SIZE, BATCH, BATCH, 20, 3, 1)
    features = Features(store, 0, None)
    one, again, other = (
        grouped_order(Rules(seed, *[getattr(rules, n) for n in list(rules.__dataclass_fields__)[1:]]), 1, features,
                      GROUPS, torch.device("cpu"))[0].tolist()
        for seed in (3, 3, 4)
    )  # fmt: skip
    assert one == again != other


@pytest.mark.parametrize("behind", [1, 4, 9, 17, 26])
def test_a_run_killed_at_any_step_goes_on_as_it_would_have(behind: int, whole: list[list[int]], tmp_path: Path) -> None:
    """The last checkpoint is ``behind`` steps back, up to two epochs and more; on another number of ranks, too."""
    for killed in range(1 + behind % 4, 50, 4):
        saved = max(0, killed - behind)
        folder = tmp_path / str(killed)
        first = Trainer(folder, world=1 + killed % 2)
        assert first.take(killed) == whole[:killed]
        first.ranks[0].flush()  # a process that is killed has written what its threads wrote
        first.end()
        second = Trainer(folder, saved, world=1 + killed // 2 % 3)
        assert second.said == []
        assert second.take(50) == whole[saved:], (killed, saved)
        second.end()


def test_killed_between_the_freeze_and_the_stored_order(whole: list[list[int]], tmp_path: Path) -> None:
    """The checkpoint is one behind the freeze (step 18 of 10 + 10 - 3), and nothing of the order is there."""
    for saved in (16, 17, 18, 19, 20):
        folder = tmp_path / str(saved)
        first = Trainer(folder)
        first.take(20)
        first.ranks[0].flush()
        first.end()
        first.ranks[0].files.path(2).unlink(missing_ok=True)  # the maker may have been ended before it stored it
        second = Trainer(folder, saved)
        assert second.take(50) == whole[saved:], saved
        second.end()


def test_a_half_written_order_is_made_again(whole: list[list[int]], tmp_path: Path) -> None:
    for name, damage in (("cut", None), ("empty", b""), ("other", b"nonsense")):
        first = Trainer(tmp_path / name)
        first.take(20)
        first.ranks[0].flush()
        path = first.ranks[0].files.path(2)
        for _ in range(1000):
            if path.exists():
                break
            time.sleep(0.02)
        first.end()
        path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
        second = Trainer(tmp_path / name, 19)
        assert second.take(25) == whole[19:25]
        second.end()


def test_the_running_epochs_order_is_missed_in_words(whole: list[list[int]], tmp_path: Path) -> None:
    first = Trainer(tmp_path)
    first.take(24)
    first.end()
    first.ranks[0].files.path(2).unlink()
    second = Trainer(tmp_path, 24, world=2)
    (line,) = second.said
    assert "epoch-000002.npz is missing or damaged: epoch 2 goes on in a plain order" in line
    plain = StepSampler(SIZE, BATCH, 1, 3)
    assert second.take(30) == [plain.indices(step, 0).tolist() for step in range(24, 30)]
    second.end()
    third = Trainer(tmp_path, 26)
    assert third.said == []
    assert third.take(27) == [plain.indices(26, 0).tolist()]
    third.end()


def test_features_that_are_gone_are_missed_in_words(tmp_path: Path) -> None:
    first = Trainer(tmp_path)
    first.take(24)
    first.end()
    (tmp_path / "grouping" / "features-1.f16").unlink()
    second = Trainer(tmp_path, 24)
    (line,) = second.said
    assert "holds no features of this run" in line
    epochs = [list(chain(*second.take(until))) for until in (30, 40, 50)]
    assert [len(set(epoch)) for epoch in epochs] == [36, 60, 60]
    assert second.ranks[0].files.load(3)[1]["walked"] < 0.7  # type: ignore[index]
    assert second.ranks[0].files.load(4)[1]["walked"] > 0.9  # type: ignore[index]
    second.end()


def test_a_step_that_was_left_out_for_its_loss_delays_nothing(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, micro=3)
    sampler = trainer.ranks[0]
    trainer.take(6)
    sampler.collect(6, 0, *features_of(sampler.indices(6, 0)[:2], 0))  # the other micro-batches were never run
    trainer.step = 7
    assert len(trainer.take(12)) == 5
    assert sampler.files.load(1)[1]["walked"] == pytest.approx((6 * 6 + 2) / 60, abs=0.04)  # type: ignore[index]
    trainer.end()


def test_samples_without_features_follow_behind_all_walks(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SIZE, WIDTH)
    rows = np.arange(0, SIZE, 2)
    store.write(0, rows, torch.stack(features_of(rows, 0), 1).half().numpy())
    rules = Rules(3, SIZE, BATCH, BATCH, 20, 3, 1)
    order, measures = grouped_order(rules, 1, Features(store, 0, None), GROUPS, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(SIZE))
    even = (order[:60] % 2 == 0).reshape(10, 6)
    assert sum(batch.any() and not batch.all() for batch in even) <= 1, "one batch at most holds both kinds"
    assert measures["walked"] == pytest.approx(even.mean())


def test_of_samples_not_yet_seen_the_epoch_before_is_used(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SIZE, WIDTH)
    rows = np.arange(SIZE)
    old, new, later = (np.full((SIZE, 2, WIDTH), value, np.float16) for value in (1, 2, 3))
    store.write(0, rows[:50], old[:50])
    store.write(1, rows[20:40], new[20:40])
    features = Features(store, 1, np.arange(10, 35))
    store.write(1, rows[:5], later[:5])  # behind the freeze
    assert features.known.tolist() == [True] * 50 + [False] * 12
    assert features.of(np.array([0, 15, 25, 34, 38, 49]))[:, 0, 0].tolist() == [1, 1, 2, 2, 1, 1]
    assert Features(store, 0, None).now.tolist() == [True] * 50 + [False] * 12
    assert np.flatnonzero(Features(store, 2, None).known).tolist() == [*range(5), *range(20, 40)], "not epoch 0's rows"
    assert not store.known(-1).any()


def measures_of(tmp_path: Path, similar: int, apart: int, ruled: bool) -> dict[str, float]:
    groups = np.arange(600) // 4
    store = FeatureStore(tmp_path, 600, WIDTH)
    rows = np.arange(600)
    store.write(0, rows, torch.stack(features_of(rows, 0, groups), 1).half().numpy())
    rules = Rules(1, 600, 24, 12, 300, similar, apart)
    order, measures = grouped_order(rules, 1, Features(store, 0, None), groups if ruled else rows, torch.device("cpu"))
    together = [(groups[b][:, None] == groups[b]).sum() - len(b) for b in order.reshape(-1, 12)]
    return measures | {"met": float(np.mean(together)) / (12 * 11)}


def test_batches_are_alike_and_hold_few_true_matches(tmp_path: Path) -> None:
    third, first, far = (measures_of(tmp_path, s, a, True) for s, a in ((3, 1), (1, 1), (3, 11)))
    unruled = measures_of(tmp_path, 1, 1, False)
    for one in (third, first, far, unruled):
        assert one["similarity"] > one["similarity_plain"] + 0.05, one
    assert third["same_group"] == pytest.approx(third["met"], abs=1e-3)
    assert far["met"] < third["met"] < first["met"] < unruled["met"]
    assert third["met"] < 0.5 * unruled["met"]


def test_an_order_is_made_beside_training_and_awaited_in_view_of_the_watchdog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[list[int]]
) -> None:
    go_on, beats = threading.Event(), []
    from crossmask.engine.data import grouping_sampler

    make = grouping_sampler.grouped_order

    def slow(*arguments: Any) -> Any:
        go_on.wait(20)
        return make(*arguments)

    monkeypatch.setattr(grouping_sampler, "grouped_order", slow)
    monkeypatch.setattr(grouping_sampler, "beat", lambda phase: (beats.append(phase), go_on.set()))
    trainer = Trainer(tmp_path)
    assert trainer.take(10) == whole[:10], "the epoch ends while its successor's order is being made"
    assert trainer.take(11) == whole[10:11]
    assert beats[:1] == ["making the order of epoch 1"]
    trainer.end()


def test_a_maker_that_hangs_does_not_look_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossmask.engine.data import grouping_sampler

    making: Future[np.ndarray] = Future()
    trainer, beats, waits = Trainer(tmp_path), [], []
    trainer.take(5)
    sampler = trainer.ranks[0]
    sampler._orders[1] = making

    def wait(futures: Any, timeout: float) -> None:
        waits.append(len(beats))
        if len(waits) == 3:
            sampler._walked += 1  # it moves again
        elif len(waits) == 5:
            making.set_result(np.arange(SIZE))

    monkeypatch.setattr(grouping_sampler, "beat", beats.append)
    monkeypatch.setattr(grouping_sampler, "wait", wait)
    sampler._wait(1)
    assert waits == [1, 1, 1, 2, 2], "a beat at first, then only where a slice was begun"
    trainer.end()


def test_whatever_the_maker_meets_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossmask.engine.data import grouping_sampler

    met: Future[np.ndarray] = Future()
    met.set_exception(TimeoutError("the disk is far away"))  # in Python 3.11 the same as a future's own
    monkeypatch.setattr(grouping_sampler, "beat", lambda phase: pytest.fail("waited for what is done"))
    trainer = Trainer(tmp_path)
    trainer.take(5)
    trainer.ranks[0]._orders[1] = met
    with pytest.raises(TimeoutError, match="far away"):
        trainer.take(11)
    trainer.end()


def test_the_product_takes_one_core_and_leaves_training_its_own(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        trainer = Trainer(tmp_path)
        assert torch.get_num_threads() == 3
        maker = trainer.ranks[0]._maker
        assert maker is not None
        assert maker.submit(torch.get_num_threads).result() == 1
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [3], "a thread that is started later"
        trainer.end()
    finally:
        torch.set_num_threads(before)


def test_records_are_told_once_at_an_epochs_first_step(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    told = {}
    for step in range(24):
        trainer.take(step + 1)
        told[step] = trainer.ranks[0].records()
    trainer.end()
    assert [step for step, records in told.items() if records] == [10, 20]
    (record,) = told[20]
    assert record["order_of_epoch"] == 2
    measured = {"similarity", "similarity_plain", "same_group", "same_group_plain"}
    assert set(record) == {"order_of_epoch", *measured, "walked", "made_s", "waited_s"}
    json.dumps(record, allow_nan=False)
    again = Trainer(tmp_path, 22)
    again.take(23)
    assert again.ranks[0].records() == []
    again.end()


def test_examples_are_of_the_epoch_that_runs(whole: list[list[int]], tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, world=2)
    trainer.take(3)
    assert trainer.ranks[0].examples(2) is None
    trainer.take(25)
    examples = trainer.ranks[0].examples(2)
    assert examples is not None
    assert examples.epoch == 2
    assert [share.tolist() for share in examples.grouped] == [whole[20][:3], whole[20][3:]]
    assert [len(share) for share in examples.plain] == [3, 3]
    assert examples.measures["order_of_epoch"] == 2
    trainer.end()


def test_orders_that_the_run_does_not_reach_are_not_made(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, steps=20)
    trainer.take(20)
    trainer.end()
    assert sorted(path.name for path in (tmp_path / "grouping" / "orders").iterdir()) == ["epoch-000001.npz"]
    short = Trainer(tmp_path / "short", steps=10)
    short.take(10)
    short.end()
    assert not (tmp_path / "short").exists()
    assert "has no effect: the run ends in its first epoch" in short.ranks[0].notices()[0]


def test_an_order_on_disk_is_checked(tmp_path: Path) -> None:
    files = OrderFiles(tmp_path, 4)
    files.save(1, np.array([3, 1, 0, 2]), {"similarity": 0.5})
    assert files.load(1)[0].tolist() == [3, 1, 0, 2]  # type: ignore[index]
    for wrong in ([3, 1, 0, 0], [3, 1, 0], [3, 1, 0, 4], [3, 1, 0, -1], [3.0, 1.0, 0.0, 2.0]):
        files.save(1, np.array(wrong), {})
        assert files.load(1) is None, wrong
    assert files.load(2) is None


def test_no_room_for_features_is_one_line_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"no room for 2\.57 GB of features \(No space left on device\): make"):
        FeatureStore(tmp_path / "grouping", 1_250_000, 256)

    def unable(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    store = FeatureStore(tmp_path / "grouping", 30, 8)
    assert store.fresh
    assert not FeatureStore(tmp_path / "grouping", 30, 8).fresh
    assert FeatureStore(tmp_path / "grouping", 31, 8).fresh


def sampler(size: int, batch: int, world: int = 1, groups: np.ndarray | None = None, **section: Any) -> GroupedSampler:
    groups = np.arange(size) if groups is None else groups
    values = GroupingSection(**{"search_space": 1920, **section})
    return GroupedSampler(
        size, batch, world, 0, section=values, groups=groups, width=8, folder=Path("x"), max_steps=999
    )


def test_what_is_done_otherwise_is_said() -> None:
    assert sampler(5000, 64).notices() == []
    (cut,) = sampler(500, 64).notices()
    assert cut == "data.grouping.search_space is cut from 1920 to the 448 samples of an epoch"
    (large,) = sampler(5000, 64, 2, groups=np.arange(5000) // 40).notices()
    assert "the largest group has 40 pairs, more than a rank's batch of 32" in large


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ((40, 32, 1), DataError, "data.grouping.similar (50) is not below the 32 samples of an epoch"),
        ((20, 32, 1), DataError, "training.batch_size (32) is larger than the 20 training samples"),
        ((100, 32, 3), RecipeError, "not divisible"),
    ],
)
def test_too_little_data_is_one_line(arguments: tuple[int, int, int], error: type[UserError], told: str) -> None:
    with pytest.raises(error) as caught:
        sampler(*arguments, similar=50)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"search_space": 3}, "similar (3) is not below search_space (3)"),
        ({"search_space": 40}, "search_space (40) is smaller than training.batch_size (64)"),
        ({"search_space": -1}, "greater than or equal to 0"),
        ({"search_space": 10**6}, "less than or equal to 16384"),
        ({"search_space": 1920, "similar": 0}, "greater than or equal to 1"),
        ({"search_space": 1920, "lead": 0.95}, "less than or equal to 0.9"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"data": {"grouping": values}, "training": {"batch_size": 64}})
    assert told in str(caught.value)
    assert Recipe().data.grouping.search_space == 0, "off, unless asked for"
