"""Grouped batches: the walk's time by M, its share of an epoch, and what the batches then hold.

    python benchmarks/bench_grouping.py [--rounds 9] [--run RUN]

1. One slice of M samples: C++, the reference, and the loop as commonly written, two torch.topk for every two samples on
   similarities that are overwritten as samples are used up. Each is first held against the reference.
2. An epoch of the recipe syncmask-emoji with ``data.grouping`` on: seconds on the step's own thread, seconds of making
   an order beside it, both against the epoch's own.
3. With ``--run``, a finished run: batches by s and ``apart``, from its teacher's features of the training samples; and
   what those hold when they are trained on, an epoch later and augmented and composed anew.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crossmask.engine.data import PairData, load_data
from crossmask.engine.data.grouping import Features, Rules, grouped_order, measure
from crossmask.engine.data.grouping_sampler import FOLDER
from crossmask.engine.data.grouping_store import FeatureStore
from crossmask.engine.data.randomness import permutation
from crossmask.engine.evaluation import describe_machine
from crossmask.engine.exported import load_exported
from crossmask.engine.recipe_files import load_recipe, load_run_recipe
from crossmask.kernels.semi_hard import op, reference
from crossmask.kernels.semi_hard.similarity import similarities

WIDTH, S = 256, 3


def commonly(similarity: Tensor, s: int) -> Tensor:
    """The loop as commonly written: both directions' tables, rows and columns overwritten as samples are used up."""
    by_image, by_text = similarity.clone(), similarity.T.clone()
    order, lowest = [0], -torch.inf
    for place in range(1, len(similarity)):
        last = order[-1]
        by_image[:, last] = lowest
        by_text[:, last] = lowest
        row = (by_image if place % 2 else by_text)[last]
        order.append(int(torch.topk(row, min(s, len(similarity) - place)).indices[-1]))
        by_image[last] = lowest
        by_text[last] = lowest
    return torch.tensor(order)


def median_ms(job: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.thread_time()  # of this thread: others may be at work on the machine
        job()
        seconds.append(time.thread_time() - start)
    return 1e3 * statistics.median(seconds)


def walks(rounds: int) -> None:
    print(f"one slice, s = {S}, width {WIDTH}, one thread; ms of its own time, median of {rounds}")
    print(f"{'M':>6} {'product':>9} {'C++':>9} {'C++, groups':>12} {'reference':>10} {'common loop':>12}  loop / C++")
    for samples in (256, 512, 1024, 1920, 3840):
        image, text = (torch.nn.functional.normalize(x, dim=1) for x in torch.randn(2, samples, WIDTH))
        similarity, groups = similarities(image, text), torch.arange(samples) // 4
        wanted = op.WALK(similarity, None, S, 0, 1)
        assert torch.equal(wanted, commonly(similarity, S)), samples
        assert torch.equal(wanted, reference.walk(similarity, None, S, 0, 1)), samples
        jobs: list[tuple[Callable[[], object], int]] = [
            (partial(similarities, image, text), rounds),
            (partial(op.WALK, similarity, None, S, 0, 1), rounds),
            (partial(op.WALK, similarity, groups, S, 0, 1), rounds),
            (partial(reference.walk, similarity, groups, S, 0, 1), 1),
            (partial(commonly, similarity, S), max(1, rounds // 3)),
        ]
        product, ours, ruled, slow, common = (median_ms(job, times) for job, times in jobs)
        ratio = common / ours
        print(f"{samples:>6} {product:9.2f} {ours:9.2f} {ruled:12.2f} {slow:10.0f} {common:12.0f}  {ratio:10.0f}")


def epoch(steps: int) -> None:
    """Steps of syncmask-emoji on one rank, and an order of all its samples from features that those have collected."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from crossmask.engine.training.distributed import init_distributed
    from crossmask.engine.training.pretrainer import Pretrainer

    recipe = load_recipe("syncmask-emoji", ["data.grouping.search_space=1920", "training.batch_size=256"])
    world = init_distributed()
    data = load_data(recipe)
    with tempfile.TemporaryDirectory() as folder:
        trained = Pretrainer(recipe, data, 0, 1, world.device, run_dir=Path(folder))
        sampler = trained.sampler
        sampler.begin(0)
        trained.next_step = recipe.training.max_steps // 2  # where every objective is on
        sampler._epoch, trained.next_step = -1, trained.next_step // sampler.steps_per_epoch * sampler.steps_per_epoch
        begun = trained.next_step
        trained.step()
        trained.seconds.clear()
        start = time.perf_counter()
        for _ in range(steps):
            trained.step()
        step = (time.perf_counter() - start) / steps
        beside = trained.seconds["sampler"] / steps
        sampler.flush()
        store = FeatureStore(Path(folder) / FOLDER, data.train_size, recipe.model.projection_width)
        rows, at = np.arange(data.train_size), begun // sampler.steps_per_epoch
        known = np.flatnonzero(store.known(at))
        store.write(at, rows, store.read(at, known[rows % len(known)]))  # an order's time does not depend on the values
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.perf_counter()
        grouped_order(sampler.rules, at + 1, Features(store, at, None), data.train_group_id, world.device)
        made = time.perf_counter() - start
        torch.set_num_threads(threads)
        sampler.close()
    whole = step * sampler.steps_per_epoch
    print(
        f"syncmask-emoji, one rank, {data.train_size} samples, {sampler.steps_per_epoch} steps of {step:.3f} s an epoch"
    )
    print(f"  on the step's thread: {1e3 * beside:.2f} ms a step, {100 * beside / step:.2f} % of an epoch")
    print(f"  an order, beside it:  {made:.2f} s on one core, {100 * made / whole:.2f} % of an epoch")


@torch.no_grad()
def embedded(run: Path, data: PairData, epoch: int) -> np.ndarray:
    """(samples, 2, E) float16 of the training samples as they are in an epoch, by the run's exported teacher."""
    model, _, _ = load_exported(run / "export")
    found = []
    for begin in range(0, data.train_size, 256):
        batch = data.train_batch(np.arange(begin, min(begin + 256, data.train_size)), epoch)
        text = model.encode_text(batch.token_ids, batch.token_mask).feature  # type: ignore[operator]
        found.append(torch.stack((model.encode_image(batch.images).feature, text), 1).half().numpy())  # type: ignore[operator]
    return np.concatenate(found)


def batches(run: Path, space: int) -> None:
    recipe = load_run_recipe(run)
    data = load_data(recipe)
    training, share, rows = recipe.training, recipe.training.batch_size // 2, np.arange(data.train_size)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), data.train_size, recipe.model.projection_width)
        for epoch in (0, 1):
            store.write(epoch, rows, embedded(run, data, epoch))
        now, after = Features(store, 0, None), Features(store, 1, None)
        print(f"batches of {share} of {data.train_size} pairs by the teacher of {run.name}, M = {space}")
        print(f"{'':>28} {'mean similarity':>16} {'one epoch on':>13} {'pairs of one group':>20}")

        def line(name: str, order: np.ndarray, rules: Rules) -> None:
            (similar, same), (later, _) = (measure(rules, order, f, data.train_group_id) for f in (now, after))
            print(f"{name:>28} {similar:16.4f} {later:13.4f} {100 * same:18.3f} %")

        kinds = [(s, 1, ruled) for ruled in (True, False) for s in (1, 3, 5)] + [(3, 16, True), (3, share - 1, True)]
        for s, apart, ruled in kinds:
            rules = Rules(recipe.seed, data.train_size, training.batch_size, share, space, s, apart)
            groups = data.train_group_id if ruled else rows
            order, _ = grouped_order(rules, 1, now, groups, torch.device("cpu"))
            line(f"s = {s}, " + (f"apart {apart}" if ruled else "groups not looked at"), order, rules)
        line("plain", permutation(recipe.seed, 1, data.train_size).astype(np.int64), rules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="of the recipe that are timed; 0 = none")
    parser.add_argument("--run", type=Path)
    asked = parser.parse_args()
    print(describe_machine(1)["summary"])
    torch.set_num_threads(1)
    walks(asked.rounds)
    if asked.steps:
        epoch(asked.steps)
    if asked.run:
        batches(asked.run, 1920)


if __name__ == "__main__":
    main()
