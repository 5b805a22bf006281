"""What masks by attention cost: a rank's training step of a CPU recipe with them against one with random masks.

    python benchmarks/bench_masking_step.py [--recipe syncmask-emoji] [--rounds 40] [--threads 1] [--json F]

The recipe's own data, model and objectives, on one rank with the share of the batch that each of its ranks has, fused
objectives and soft labels on, as after ``objectives.fusion_start`` and the ramp of alpha. All sides work in this
process and differ in ``masking`` alone. In every round each takes one step on the same samples, in an order drawn for
the round, and ratios are taken within the round, so that what else the machine does meets all alike. Told are the
median ratio, its quartiles over rounds, and an interval of the median by resampling rounds; of the time on the clock,
and of the processor's time alone, which other programs on the machine do not add to. About two minutes.

Of a SyncMask recipe: synchronised masks, by the fusion layer and by a block of their own. ``no labels`` are the same
steps without distillation of words: random masks then need no pass of the teacher through the fusion encoder at all,
synchronised ones do.

Of a SyCoCa recipe (``--recipe sycoca-emoji``): what becomes of the patches that the captions are written without.
``keep`` is a step in which they are read like the others; ``drop`` leaves them out of what the decoder reads of the
image's own pass, ``encode`` encodes the image once more without them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from suite import machine

from crossmask.engine.data import PairData, load_data
from crossmask.engine.recipe_files import load_recipe
from crossmask.engine.training.distributed import init_distributed
from crossmask.engine.training.pretrainer import Pretrainer

RANDOM, SYNC = "random", "synchronised"
TWO, NO_LABELS = "synchronised, two blocks", "no labels"
Sides = dict[str, tuple[str, ...]]
Pairs = tuple[tuple[str, str, float | None], ...]  # a side, the one it is divided by, and what the ratio may be
FUSION: Sides = {
    RANDOM: ("masking.policy=random", "masking.options={}"),
    SYNC: ("masking.policy=syncmask", "masking.options={}"),
    TWO: ("masking.policy=syncmask", "masking.options={direction: two_blocks}"),
    f"{RANDOM}, {NO_LABELS}": ("masking.policy=random", "masking.options={}", "objectives.mlm.distillation=0"),
    f"{SYNC}, {NO_LABELS}": ("masking.policy=syncmask", "masking.options={}", "objectives.mlm.distillation=0"),
}
FUSION_PAIRS: Pairs = (
    (SYNC, RANDOM, 1.08),
    (TWO, RANDOM, None),
    (f"{SYNC}, {NO_LABELS}", f"{RANDOM}, {NO_LABELS}", None),
)
RANDOM_BOTH = ("masking.policy=random", "masking.options={low_ratio: 0.5}")
CAPTIONER: Sides = {
    "keep": ("objectives.caption.low_patches=keep",),
    "drop": ("objectives.caption.low_patches=drop",),
    "encode": ("objectives.caption.low_patches=encode",),
    "drop, random": ("objectives.caption.low_patches=drop", *RANDOM_BOTH),
}
CAPTIONER_PAIRS: Pairs = (
    ("drop", "keep", None),
    ("encode", "keep", None),
    ("encode", "drop", None),
    ("drop", "drop, random", None),
)
STEPS = ("objectives.fusion_start=0", "objectives.distillation_ramp=0", "objectives.itc.queue_start=0")
console = Console(width=120)


def build(recipe: str, overrides: tuple[str, ...], data: PairData) -> Pretrainer:
    whole = load_recipe(recipe)
    share = whole.training.batch_size // whole.training.cpu_ranks // whole.training.accumulation_steps
    steps = () if whole.model.captioner is not None else STEPS
    fixed = (*steps, f"training.batch_size={share}", "training.accumulation_steps=1")
    described = load_recipe(recipe, [*fixed, *overrides])
    world = init_distributed()
    return Pretrainer(described, data, 0, 1, world.device)


def median_interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % of the medians of resampled rounds."""
    drawn = np.random.default_rng(0).choice(values, (draws, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="syncmask-emoji")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=4, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--only", nargs="+", choices=[*FUSION, *CAPTIONER], help="these sides alone")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    recipe = load_recipe(arguments.recipe)
    data = load_data(recipe)
    described, pairs = (FUSION, FUSION_PAIRS) if recipe.model.captioner is None else (CAPTIONER, CAPTIONER_PAIRS)
    sides = {name: build(arguments.recipe, described[name], data) for name in arguments.only or described}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    parts: dict[str, dict[str, float]] = {}
    for number in range(arguments.warm_up + arguments.rounds):
        for name in random.sample(list(sides), len(sides)):
            if number == arguments.warm_up:
                sides[name].seconds.clear()
            start, begun = time.perf_counter(), time.process_time()
            sides[name].step()
            if number >= arguments.warm_up:
                seconds[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - begun)
    for name, side in sides.items():
        parts[name] = {part: total / arguments.rounds for part, total in side.seconds.items()}

    told: dict[str, Any] = {"machine": machine.line(), "recipe": arguments.recipe, "rounds": arguments.rounds}
    console.print(f"{machine.line()}; {arguments.recipe}, {arguments.rounds} rounds", highlight=False)
    clocks = {"clock": seconds, "processor": busy}
    table = Table("", "ms a step", "quartiles", "processor", *next(iter(parts.values())))
    for name, found in seconds.items():
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        shares = [f"{1e3 * value:.1f}" for value in (statistics.median(busy[name]), *parts[name].values())]
        table.add_row(name, f"{1e3 * middle:.1f}", f"{1e3 * low:.1f} .. {1e3 * high:.1f}", *shares)
    console.print(table)
    told |= {"seconds": clocks, "parts": parts, "ratios": []}
    table = Table("", "time", "ratio", "quartiles", "95 % of medians", "at most")
    for name, base, limit in pairs:
        for clock, of_sides in clocks.items():
            if name not in of_sides or base not in of_sides:
                continue
            ratios = [mine / its for mine, its in zip(of_sides[name], of_sides[base], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            interval = median_interval(ratios)
            wanted = "" if limit is None else f"{limit} {'met' if middle <= limit else 'MISSED'}"
            between = f"{interval[0]:.3f} .. {interval[1]:.3f}"
            table.add_row(f"{name} : {base}", clock, f"{middle:.3f}", f"{low:.3f} .. {high:.3f}", between, wanted)
            row = {"of": name, "to": base, "time": clock, "ratio": middle, "quartiles": [low, high], "median": interval}
            told["ratios"].append(row)
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
