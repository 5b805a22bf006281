"""Batches of coming steps, made in threads while a step runs.

::

    step            |------ 7 ------|------ 8 ------|------ 9 ------|
    two threads     |- 8 -|- 9 -|   |- 10 -|        |- 11 -|          with ``data.prefetch: 2``

A batch is a function of the seed, the epoch and its samples' indices alone. So one that was made ahead is known by its
epoch and its indices, and is handed out where just these are asked for: what is made ahead decides when work is done
and never what a step sees, and a checkpoint needs to know nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .batch import Batch
from .decoders import decoder_threads

BESIDE_A_GPU = 2  # steps ahead, where the recipe leaves it open; on CPUs none, as the step leaves no core idle
THREADS = 2  # while one waits for the last image of its batch, the other's images are decoded

Make = Callable[[np.ndarray, int], Batch]


class Prefetcher:
    """What makes a rank's batches: beforehand for the steps that :meth:`prepare` names, else when one is taken.

    >>> batches = Prefetcher(make, steps=2, workers=None, device=device)
    >>> batches.prepare([(now, 0), (next_step, 0), (step_after, 0)])
    >>> batch = batches.take(now, 0)        # what make(now, 0) returns, or raises
    >>> batches.close()

    At most the batches named last are held. An error in making one is raised where it is taken, and nowhere if it never
    is. Called by one thread; ``make`` is called in others, several at once.
    """

    def __init__(self, make: Make, steps: int | None, workers: int | None, device: torch.device) -> None:
        """``make``: from (B,) int64 indices and an epoch to a batch on the CPU. ``steps``, ``workers``: the recipe's
        ``data.prefetch`` and ``data.workers``. For a CUDA ``device`` batches made ahead lie in pinned memory, from
        where they are copied while the host goes on."""
        self.steps = steps if steps is not None else BESIDE_A_GPU if device.type == "cuda" else 0
        self._make, self._device = make, device
        self._coming: dict[tuple[int, bytes], Future[Batch]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._workers = workers
        self._closed = False

    def prepare(self, wanted: Iterable[tuple[np.ndarray, int]]) -> None:
        """Begin to make these batches, the first one first, and forget all others. ``wanted``: indices and epochs.

        Without ``steps`` nothing is made before it is taken.
        """
        if not self.steps or self._closed:
            return
        if self._pool is None:
            self._pool = _started(decoder_threads(self._workers))
        before, self._coming = self._coming, {}
        for indices, epoch in wanted:
            key = epoch, indices.tobytes()
            found = before.pop(key, None)
            self._coming[key] = self._pool.submit(self._ahead, indices, epoch) if found is None else found
        for left in before.values():
            left.cancel()

    def take(self, indices: np.ndarray, epoch: int) -> Batch:
        """The batch of these samples, waiting for it where it is being made. Raises what making it raised."""
        coming = self._coming.pop((epoch, indices.tobytes()), None)
        return self._make(indices, epoch) if coming is None else coming.result()

    def close(self) -> None:
        """End the threads; a batch that is being made is finished and dropped, what has not begun is left."""
        self._closed = True
        self._coming = {}
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _ahead(self, indices: np.ndarray, epoch: int) -> Batch:
        batch = self._make(indices, epoch)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own: pinning would else open a context on GPU 0
            batch = batch.pinned()
        return batch


def _started(cores: int) -> ThreadPoolExecutor:
    """Threads whose tensor operations take ``cores`` cores.

    torch keeps that number for each thread, and the last one given for threads that are yet to ask for theirs: these
    ask first, so that their own stays, and the caller's is put back for all others.
    """
    pool, before = ThreadPoolExecutor(THREADS, "batches"), torch.get_num_threads()
    everyone = threading.Barrier(THREADS)  # so that each of them takes one of the calls

    def begin() -> None:
        everyone.wait()
        torch.get_num_threads()
        torch.set_num_threads(cores)

    for begun in [pool.submit(begin) for _ in range(THREADS)]:
        begun.result()
    torch.set_num_threads(before)
    return pool
