"""Grouped epochs beside training: features are written and the next order is made in threads of rank 0.

::

    epoch e      |--- collected, written ---|freeze|-- the order of e+1 is made --|
    epoch e+1                                                                     | every rank is given it

Two threads, and neither calls a collective. One writes what the steps have collected. One makes an order: it reads rows
of epoch e from before the freeze and rows of epoch e-1, and those the first thread does not write again before epoch
e+1, which begins when the order is there. An order is stored before it is used, so a run that was killed goes on by the
orders it had, and makes only such an order again whose features are still as they were: the features of an epoch are
overwritten two epochs on, and by then its order has long been stored.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import writing_to
from ..beats import beat
from ..errors import DataError
from ..recipe_sections_grouping import GroupingSection
from .grouping import Features, Measures, OrderFiles, Rules, grouped_order
from .grouping_store import FeatureStore
from .randomness import permutation
from .sampler import Examples, StepSampler

FOLDER = "grouping"
MOST_WAITING = 256  # steps whose features wait to be written before training waits for the disk
Share = Callable[[Callable[[], np.ndarray]], np.ndarray]


class _Closed(Exception):
    """The run ends while an order is being made."""


class GroupedSampler(StepSampler):
    """From the second epoch on, batches are runs of :func:`crossmask.kernels.semi_hard_order`'s walks.

    Files of ``folder``/grouping: see ``grouping_store.py``, and ``orders/epoch-NNNNNN.npz``, written by rank 0 alone.
    """

    collects = True

    def __init__(
        self,
        size: int,
        batch_size: int,
        world_size: int,
        seed: int,
        accumulation_steps: int = 1,
        *,
        section: GroupingSection,
        groups: np.ndarray,
        width: int,
        folder: Path,
        max_steps: int,
        rank: int = 0,
        device: torch.device | str = "cpu",
        share: Share = lambda make: make(),
    ) -> None:
        """What the base class does not take:

        Args:
            groups: (size,) int64, equal for true matches.
            width: of the features.
            folder: the run's; all ranks' orders come from there, through rank 0.
            max_steps: of the run: no order is made that it does not reach.
            device: where rank 0 computes similarities.
            share: calls its argument on rank 0 and returns the result on every rank, raising there what it raises;
                collective, called once an epoch at its first step.

        Raises:
            DataError: too few samples for ``section.similar`` to mean anything; and what the base class raises.
        """
        super().__init__(size, batch_size, world_size, seed, accumulation_steps)
        samples = self.steps_per_epoch * batch_size
        self.section, self.groups, self.width, self.max_steps = section, groups, width, max_steps
        self.rules = Rules(
            seed=seed,
            size=size,
            batch_size=batch_size,
            share=batch_size // world_size // accumulation_steps,
            search_space=min(section.search_space, samples),
            similar=section.similar,
            apart=section.apart,
        )
        if section.similar >= self.rules.search_space:
            raise DataError(
                f"data.grouping.similar ({section.similar}) is not below the {samples} samples of an epoch; set it to"
                f" at most {samples - 1}, or add data"
            )
        # Steps of an epoch after which the next one's order is made: the rest is what making it may take unnoticed.
        self.freeze = max(1, self.steps_per_epoch - math.ceil(section.lead * self.steps_per_epoch - 1e-9))
        self.accumulation_steps, self.rank, self.device, self._share = accumulation_steps, rank, device, share
        self.folder = folder / FOLDER
        self.files = OrderFiles(self.folder / "orders", size)
        self._told: list[Measures] = []
        self._measures: Measures = {}  # of the order of the epoch that is running
        self._writes: deque[Future[None]] = deque()
        self._orders: dict[int, Future[np.ndarray]] = {}
        self._closed = False
        self._walked = 0  # slices begun, by which rank 0 sees that its maker still moves
        self._store: FeatureStore | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._maker: ThreadPoolExecutor | None = None

    # -- for every rank ----------------------------------------------------------------------------------------------

    def begin(self, step: int) -> list[str]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.rank != 0 or self.max_steps <= self.steps_per_epoch:
            return []
        self._store = FeatureStore(self.folder, self.size, self.width)
        self._writer, self._maker = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("features", "order"))
        _on_one_thread(self._maker)
        said = []
        if step and self._store.fresh:
            said.append(
                f"{self.folder} holds no features of this run: samples are grouped again when they were seen again, and"
                " the losses are no longer those of an uninterrupted run"
            )
        if epoch and place and self.files.load(epoch) is None:
            said.append(
                f"{self.files.path(epoch)} is missing or damaged: epoch {epoch} goes on in a plain order, and the"
                " losses are no longer those of an uninterrupted run"
            )
            with writing_to(self.folder):
                self.files.save(epoch, permutation(self.seed, epoch, self.size).astype(np.int64), {})
        return said

    def indices(self, step: int, rank: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place == 0 and epoch != self._epoch
        found = super().indices(step, rank)
        if first and self._measures:  # a resumed run has told of an epoch that it goes on in
            self._told.append(self._measures)
        # Not told by collect(): a step that is left out for its loss collects less.
        if self._store is not None and place >= self.freeze and (epoch + 1) * self.steps_per_epoch < self.max_steps:
            self._start(epoch + 1)
        return found

    def _order_of(self, epoch: int) -> np.ndarray:
        """Collective from the second epoch on."""
        return super()._order_of(epoch) if epoch == 0 else self._share(lambda: self._wait(epoch))

    def _order_ahead(self, epoch: int) -> np.ndarray | None:
        """None: it follows the model, and ranks are given it together when the epoch begins."""
        return None

    def notices(self) -> list[str]:
        section, rules = self.section, self.rules
        said = []
        if self.max_steps <= self.steps_per_epoch:
            said.append(
                f"data.grouping has no effect: the run ends in its first epoch ({self.steps_per_epoch} steps), which is"
                " always plain"
            )
        if rules.search_space < section.search_space:
            said.append(
                f"data.grouping.search_space is cut from {section.search_space} to the {rules.search_space} samples of"
                " an epoch"
            )
        largest = int(np.unique(self.groups, return_counts=True)[1].max())
        if largest > rules.share:
            said.append(
                f"data.grouping: the largest group has {largest} pairs, more than a rank's batch of {rules.share}:"
                " pairs of one group cannot all be kept out of each other's batch"
            )
        return said

    # -- rank 0 ------------------------------------------------------------------------------------------------------

    def collect(self, step: int, micro: int, image: Tensor, text: Tensor) -> None:
        if self.rank != 0 or self._store is None or self._writer is None:
            return
        epoch, place = divmod(step, self.steps_per_epoch)
        batch = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        rows = batch.reshape(self.world_size, self.accumulation_steps, -1)[:, micro].reshape(-1)
        host, copied = _to_host(image, text)
        self._writes.append(self._writer.submit(self._write, self._store, epoch, rows, host, copied))
        while self._writes and (self._writes[0].done() or len(self._writes) > MOST_WAITING):
            self._writes.popleft().result()

    def records(self) -> list[dict[str, float]]:
        told, self._told = self._told, []
        return told

    def flush(self) -> None:
        if self._store is None:
            return
        with writing_to(self.folder):
            while self._writes:
                beat("writing features")
                self._writes.popleft().result()
            self._store.flush()

    def close(self) -> None:
        self._closed = True
        for pool in (self._writer, self._maker):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def examples(self, count: int) -> Examples | None:
        if self._epoch < 1:
            return None
        plain = permutation(self.seed, self._epoch, self.size).astype(np.int64)
        every = [order[: self.steps_per_epoch * self.batch_size] for order in (self._order, plain)]
        grouped, random = (list(order.reshape(-1, self.rules.share)[:count]) for order in every)
        return Examples(self._epoch, grouped, random, self._measures)

    # -- making an order ---------------------------------------------------------------------------------------------

    def _start(self, epoch: int) -> None:
        """Begin to make the order of ``epoch``, once, if it is not stored."""
        if epoch in self._orders:
            return
        assert self._maker is not None, "begin() comes first"
        stored = self.files.load(epoch)
        if stored is not None:
            done: Future[np.ndarray] = Future()
            done.set_result(stored[0])
            self._orders[epoch] = done
            return
        before = self._order if self._epoch == epoch - 1 else self._earlier(epoch - 1)
        seen = None if before is None else before[: self.freeze * self.batch_size]
        written = self._writes[-1] if self._writes else None
        self._orders[epoch] = self._maker.submit(self._make, epoch, seen, written)

    def _earlier(self, epoch: int) -> np.ndarray | None:
        if epoch == 0:
            return permutation(self.seed, 0, self.size).astype(np.int64)
        stored = self.files.load(epoch)
        return None if stored is None else stored[0]

    def _make(self, epoch: int, seen: np.ndarray | None, written: Future[None] | None) -> np.ndarray:
        if written is not None:
            written.result()
        begun = time.perf_counter()
        assert self._store is not None
        device = torch.device(self.device)
        # On a stream of its own: on training's, each slice would wait for the steps that are queued there.
        beside = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
        with beside, writing_to(self.folder):
            features = Features(self._store, epoch - 1, seen)
            order, measures = grouped_order(self.rules, epoch, features, self.groups, device, self._go_on)
            measures["made_s"] = time.perf_counter() - begun
            self.files.save(epoch, order, measures)
        return order

    def _go_on(self) -> None:
        if self._closed:
            raise _Closed
        self._walked += 1

    def _wait(self, epoch: int) -> np.ndarray:
        """The order of ``epoch``, which begins or goes on. Rank 0."""
        self._start(epoch)
        making = self._orders.pop(epoch)
        begun = time.perf_counter()
        walked = -1
        while not making.done():  # not by result(timeout), which looks alike where the maker itself met a TimeoutError
            if walked != self._walked:  # a maker that hangs, on a dead disk say, must not look alive
                walked = self._walked
                beat(f"making the order of epoch {epoch}")
            wait([making], timeout=1.0)
        order = making.result()
        stored = self.files.load(epoch)
        measures: Measures = stored[1] if stored else {}
        waited = time.perf_counter() - begun
        self._measures = {"order_of_epoch": epoch, **measures, "waited_s": waited} if measures else {}
        return order

    @staticmethod
    def _write(store: FeatureStore, epoch: int, rows: np.ndarray, host: Tensor, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        store.write(epoch, rows, host.numpy())


def _to_host(image: Tensor, text: Tensor) -> tuple[Tensor, Any]:
    """(B, 2, E) float16 on the host, and the event after which it is; None where it is already."""
    both = torch.stack((image.detach(), text.detach()), 1).to(torch.float16)
    if both.device.type != "cuda":
        return both.cpu(), None
    host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
    host.copy_(both, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def _on_one_thread(pool: ThreadPoolExecutor) -> None:
    """Products in the pool's thread take one core, as the others are training.

    torch keeps the number for each thread, and the last one given for threads that are yet to ask for theirs: the
    pool's asks first, so that its own stays, and that one is put back.
    """
    threads = torch.get_num_threads()
    pool.submit(torch.get_num_threads).result()
    pool.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)
