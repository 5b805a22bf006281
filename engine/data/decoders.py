"""The threads in which a rank decodes and augments images, and how many they are.

Threads and not processes: Pillow's decoding, resizing and filters let go of the interpreter's lock, and so do NumPy's
loops, so threads share the cores, while a process would need a copy of the captions and one more of every batch
(``benchmarks/bench_data.py`` measures threads against processes, and what the lock costs).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .normalisation import Normalisation

MOST = 16  # threads, unless a recipe asks for more; a guess: nobody has measured more than two
LEVELS = 256  # of a pixel


class Decoders:
    """Threads that a data source reads its images in; they end with it. Several batches may be asked for at once."""

    def __init__(self, workers: int | None) -> None:
        """``workers``: ``data.workers`` of the recipe."""
        self._pool = ThreadPoolExecutor(decoder_threads(workers), "decode")  # which starts them when there is work

    def images(
        self,
        read: Callable[[int], Image.Image],
        count: int,
        size: int,
        normalisation: Normalisation,
        lights: np.ndarray | None = None,
    ) -> Tensor:
        """The images at the places in ``range(count)``: (count, 3, size, size) float32, normalised.

        ``read`` makes one, RGB and ``size`` pixels a side, in one of the threads; what it raises is raised here, of
        several the first in order. ``lights`` (2, count) in place of 1: factors on contrast and brightness.
        """
        images, tables = torch.empty(count, 3, size, size), tables_of(normalisation, lights).numpy()
        planes = images.numpy()

        def fill(at: int) -> None:
            pixels, table = np.asarray(read(at)), tables[at % len(tables)]
            for channel in range(3):  # far faster than arithmetic on a whole batch, and the same to the bit
                np.take(table[channel], pixels[..., channel], out=planes[at, channel], mode="clip")

        for _ in self._pool.map(fill, range(count)):
            pass
        return images


def tables_of(normalisation: Normalisation, lights: np.ndarray | None) -> Tensor:
    """(1 or count, 3, 256) float32: what each level of a channel becomes in a batch."""
    levels = torch.arange(LEVELS).float().div_(LEVELS - 1).expand(1, 3, 1, LEVELS).clone()
    if lights is not None:
        contrast, brightness = torch.from_numpy(lights).float()[..., None, None, None]
        levels = (((levels - 0.5) * contrast + 0.5) * brightness).clamp_(0, 1)
    return normalisation.apply_(levels)[:, :, 0]


def decoder_threads(asked: int | None) -> int:
    """``asked``, else this rank's share of the cores that its process may run on: at least 1, at most :data:`MOST`.

    How many ranks share a machine is in the environment: torchrun says LOCAL_WORLD_SIZE, DeepSpeed LOCAL_SIZE.
    """
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return min(MOST, max(1, cores // max(1, int(ranks) if ranks.isdigit() else 1)))
