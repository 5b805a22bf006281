"""A recipe's own step: its data, model, precision and DeepSpeed settings, as one of its ranks takes it.

One rank with its share of the batch, on all cores; objectives of the fusion encoder on, alpha past its ramp and the
queue full, as they are for most of a run. Recipes that go on from another run begin with random weights: a step costs
the same whatever they are.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from albef_step.memory import forget, resident

from ..results import Job, Row
from .planned import Options, Planned
from .trace import REST, Traced, labelled, trace

if TYPE_CHECKING:
    from crossmask.engine.recipe import Recipe
    from crossmask.engine.training.pretrainer import Pretrainer

WARM_UP, AT_LEAST, TRACED = 3, 5, 2  # steps
SECONDS, QUICK_SECONDS = 3.0, 1.0  # of timed steps


@dataclass(frozen=True)
class RecipeStep:
    name: str
    overrides: tuple[str, ...] = ()  # for tests

    def recipe(self) -> Recipe:
        from crossmask.engine.recipe_files import load_recipe

        whole = load_recipe(self.name, self.overrides)
        training, objectives = whole.training, whole.objectives
        share = training.batch_size // training.cpu_ranks // training.accumulation_steps
        fixed = [f"training.batch_size={share}", "training.accumulation_steps=1", "objectives.fusion_start=0"]
        if whole.model.captioner is None:
            fixed += ["objectives.distillation_ramp=0", "objectives.itc.queue_start=0"]
        if objectives.itc.queue_length:
            fixed.append("objectives.itc.queue_initial=random")
        return load_recipe(self.name, [*self.overrides, *fixed])

    def planned(self, options: Options) -> list[Planned]:
        training = self.recipe().training
        job = Job("step", self.name, f"batch {training.batch_size}, one rank", training.precision, "", "step")
        return [Planned(job, "crossmask", True, training.batch_size)]

    def measure(self, options: Options) -> Iterator[Row]:
        from crossmask.engine.data import load_data
        from crossmask.engine.training.distributed import init_distributed
        from crossmask.engine.training.pretrainer import Pretrainer

        imports = resident(peak=False)
        device = init_distributed().device
        recipe = self.recipe()
        run = Pretrainer(recipe, load_data(recipe), 0, 1, device)
        for _ in range(WARM_UP):
            one(run)
        settle(device)
        forget()
        seconds: list[float] = []
        end = time.perf_counter() + (QUICK_SECONDS if options.quick else SECONDS)
        while len(seconds) < AT_LEAST or time.perf_counter() < end:
            start = time.perf_counter()
            one(run)
            settle(device)
            seconds.append(time.perf_counter() - start)
        gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if gpu else resident(peak=True) - imports
        found = [trace(lambda: one(run), labelled(run), device) for _ in range(TRACED)]
        yield self.planned(options)[0].row("measured", seconds=tuple(seconds), peak_bytes=peak, parts=mean(found))


def one(run: Pretrainer) -> None:
    run.step()
    assert run.last is not None
    if run.last.skipped:
        raise ArithmeticError("a step was left out, its loss was not finite")


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mean(found: list[Traced]) -> dict[str, float]:
    """Seconds of each part; they sum to the mean of the steps."""
    parts: dict[str, list[float]] = defaultdict(list)
    for name in dict.fromkeys(name for each in found for name in each.whole()):
        parts[name] = [each.whole().get(name, 0.0) for each in found]
    told = {name: statistics.fmean(values) for name, values in parts.items()}
    return dict(sorted(told.items(), key=lambda item: (item[0] == REST, -item[1])))
