"""What would make a recipe fit that fits nowhere: each piece of advice has been planned before it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from ..recipe import Recipe
from .assumed import Assumed
from .estimate import Plan, memory_at, usable
from .trace import Trace, trace
from .zero import STAGES, Layout, Zero

FAR = 1_000_000  # GPUs or micro-batches, at most: nobody has more, and a batch of 10¹² has to be advised on, too
ACCUMULATION, STAGE = "training.accumulation_steps", "deepspeed.zero_optimization.stage"


def help_for(found: Plan, assumed: Assumed | None = None) -> str:
    """In words. More micro-batches or more GPUs, at the recipe's own stage, else at the highest at which they help."""
    recipe, device, gpus = found.recipe, found.device, found.gpus
    taken = assumed or Assumed.of(recipe)

    @cache
    def seen(pairs: int, ranks: int) -> Trace:
        return trace(recipe, taken, pairs, ranks, device)

    def fits(stage: int, ranks: int, micro: int) -> bool:
        divided, one = accumulated(recipe, micro), seen(recipe.training.batch_size // (ranks * micro), ranks)
        layout = Layout.of(Zero.of(divided, ranks, stage), one.parameters, ranks)
        return sum(memory_at(divided, layout, one).values()) <= usable(device)

    batch, micro = recipe.training.batch_size, recipe.training.accumulation_steps
    least = 2 if recipe.objectives.itm.weight > 0 else 1  # of one pair there is no negative

    def more(first: int, other: int, step: int = 1) -> list[int]:
        """Larger numbers than ``first`` that divide the batch, ``other`` staying as it is."""
        most = min(FAR, batch // (other * least))
        return [n for n in range(first + 1, most + 1) if batch % (n * other) == 0 and n % step == 0]

    steps, node = more(micro, gpus), device.gpus_per_node
    ranks = [n for n in more(gpus, micro) if n <= node or n % node == 0]
    for stage in (found.own, *(n for n in reversed(STAGES) if n != found.own)):
        micros = smallest(steps, partial(fits, stage, gpus))
        wide = smallest(ranks, partial(fits, stage, micro=micro))
        ways = [] if micros is None else [f"set {ACCUMULATION} to {micros}"]
        ways += [] if wide is None else [f"take {wide} GPUs"]
        if ways:
            return ("" if stage == found.own else f"with {STAGE}={stage} ") + ", or ".join(ways)
    return (
        f"neither {ACCUMULATION} nor more GPUs help, as far as the batch divides: take GPUs with more memory,"
        " or a smaller model, image or batch"
    )


def accumulated(recipe: Recipe, micro: int) -> Recipe:
    """The recipe with so many micro-batches a step."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"accumulation_steps": micro})})


def smallest(numbers: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The smallest of rising ``numbers`` that fits, if all behind one that fits do; what is returned was looked at."""
    if not numbers or not fits(numbers[-1]):
        return None
    low, high = 0, len(numbers) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(numbers[middle]) else (middle + 1, high)
    return numbers[high]
