"""The order of a grouped epoch: batches of pairs that are hard to tell apart, as a function of features alone.

Grouped mini-batch sampling is GRIT-VLP's (Byun et al., ECCV 2022), the s-th most similar in place of the first is
SyncMask's (Song et al., CVPR 2024): shuffle, cut into slices of M, order each slice by the walk of
:func:`crossmask.kernels.semi_hard_order`, cut into batches, shuffle the batches. Reconstructions, where neither says:

* the shuffle is of the whole epoch and not of a rank's samples, and so is the cut into global batches, of which each
  rank takes a contiguous share: the order does not know how many ranks there are;
* what fills no batch is the end of the shuffle, as in a plain epoch, not the end of the last walk, which would leave
  out the samples that resemble nothing;
* a sample without features (see :class:`Features`) is in no walk: those follow in shuffled order, behind all walks.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crossmask.kernels import semi_hard_order

from ..atomic import replace_file
from .grouping_store import FeatureStore
from .randomness import permutation, uniform

MEASURED = 64  # batches of a rank, evenly spread, that an order's measures are taken of
Measures = dict[str, float]


@dataclass(frozen=True)
class Rules:
    """What stays the same through a run. ``search_space`` is M, at most the samples of an epoch; ``similar`` is s."""

    seed: int
    size: int
    batch_size: int  # of all ranks together
    share: int  # of one rank: within it are measures taken
    search_space: int
    similar: int
    apart: int

    @property
    def steps(self) -> int:
        return self.size // self.batch_size


class Features:
    """The features that an epoch is ordered by: those that the epoch before it has collected until its freeze, and of
    the samples that it had not seen by then those of the epoch before that.

    Which is which follows from the order of the epoch and not from when something was written: a run that was killed
    behind the freeze and replays it finds rows that were written later, and must not read them.
    """

    def __init__(self, store: FeatureStore, epoch: int, seen: np.ndarray | None) -> None:
        """``epoch`` that features are collected in; ``seen`` (n,) int64, its samples until the freeze, None = all."""
        self.store, self.epoch = store, epoch
        self.now = store.known(epoch)
        if seen is not None:
            until = np.zeros(store.size, np.bool_)
            until[seen] = True
            self.now &= until
        self.known = self.now | store.known(epoch - 1)  # (size,) bool

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """(n, 2, E) float16 on the CPU, of the image and of the text; ``rows`` (n,) are known."""
        now = self.now[rows]
        found = np.empty((len(rows), 2, self.store.width), np.float16)
        found[now] = self.store.read(self.epoch, rows[now])
        found[~now] = self.store.read(self.epoch - 1, rows[~now])
        return torch.from_numpy(found)


def grouped_order(
    rules: Rules,
    epoch: int,
    features: Features,
    groups: np.ndarray,
    device: torch.device,
    go_on: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, Measures]:
    """The order of ``epoch``: a permutation of ``range(size)``, int64, whose end fills no batch; and its measures.

    Args:
        groups: (size,) int64, equal for true matches.
        device: where similarities are computed; an M x E slice and 512 x M similarities at a time.
        go_on: called before each slice; may raise to give up.
    """
    plain = permutation(rules.seed, epoch, rules.size).astype(np.int64)
    body, rest = np.split(plain, [rules.steps * rules.batch_size])
    known = features.known[body]
    walked = body[known]
    for begin in range(0, len(walked), rules.search_space):
        go_on()
        rows = walked[begin : begin + rules.search_space]
        slice_ = features.of(rows).to(device)
        # The slice is shuffled: its first sample is a random one to start from.
        followed = semi_hard_order(
            slice_[:, 0], slice_[:, 1], torch.from_numpy(groups[rows]), similar=rules.similar, apart=rules.apart
        )
        walked[begin : begin + rules.search_space] = rows[followed.numpy()]
    batches = np.concatenate([walked, body[~known]]).reshape(rules.steps, rules.batch_size)
    turn = uniform(rules.seed, epoch, np.arange(rules.steps), "order of batches", 1)[:, 0].argsort(kind="stable")
    order = np.concatenate([batches[turn].reshape(-1), rest])
    similarity, same_group = measure(rules, order, features, groups)
    plain_similarity, plain_same_group = measure(rules, plain, features, groups)
    return order, {
        "similarity": similarity,
        "similarity_plain": plain_similarity,
        "same_group": same_group,
        "same_group_plain": plain_same_group,
        "walked": len(walked) / len(body),
    }


def measure(rules: Rules, order: np.ndarray, features: Features, groups: np.ndarray) -> tuple[float, float]:
    """Over pairs of two samples in one rank's share of a batch: the mean similarity of the one's image with the other's
    text, and the share that is of one group. NaN of similarities is left out; NaN where there is no pair."""
    shares = order[: rules.steps * rules.batch_size].reshape(-1, rules.share)
    chosen = np.unique(np.linspace(0, len(shares) - 1, min(MEASURED, len(shares))).astype(np.int64))
    similarities, alike = [], []
    for rows in shares[chosen]:
        others = ~np.eye(len(rows), dtype=np.bool_)
        alike.append((groups[rows][:, None] == groups[rows])[others])
        rows = rows[features.known[rows]]
        image, text = features.of(rows).float().unbind(1)
        others = ~np.eye(len(rows), dtype=np.bool_)
        similarities.append((image @ text.T).numpy()[others])
    every = np.concatenate(similarities)
    every = every[~np.isnan(every)]
    pairs = np.concatenate(alike)
    return (
        float(every.mean(dtype=np.float64)) if len(every) else float("nan"),
        float(pairs.mean()) if len(pairs) else float("nan"),
    )


class OrderFiles:
    """The orders of grouped epochs, one file each, whole or not there: what a resumed run goes on by."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:06d}.npz"

    def save(self, epoch: int, order: np.ndarray, measures: Measures) -> None:
        contents = io.BytesIO()
        np.savez(contents, order=order, measures=np.array(json.dumps(measures)))
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.path(epoch), contents.getvalue(), durable=True)

    def load(self, epoch: int) -> tuple[np.ndarray, Measures] | None:
        """None where there is no such file, or one that holds no order of this size."""
        try:
            with np.load(self.path(epoch), allow_pickle=False) as stored:
                order, measures = stored["order"], json.loads(str(stored["measures"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if order.dtype != np.int64 or order.shape != (self.size,) or not isinstance(measures, dict):
            return None
        if order.min() < 0 or order.max() >= self.size:
            return None
        found = np.zeros(self.size, np.bool_)
        found[order] = True
        return (order, measures) if found.all() else None
