"""A recipe on so many GPUs of a kind: memory, traffic and time, all predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from crossmask.kernels.roofline import Device, Work, adamw, elementwise, ema_update

from ..errors import RecipeError
from ..recipe import Recipe
from ..recipe_files import check_world
from .assumed import Assumed
from .expected import queue_bytes
from .tally import Rates
from .trace import PRECISIONS, Trace, trace
from .zero import STAGES, Collective, Layout, Zero, held, lasting_buffers, on_top, recipe_stage, wire

RESERVED = 0.08  # share of a GPU's memory for CUDA's context, libraries and what the allocator cannot use
TOLERANCE = 0.1  # of step times: a stage has to be faster by more, as overlap is never perfect, to be worth going up

DEEPEST = 128  # blocks of a tower: a plan goes through each of them several times, at a tenth of a second
LOOKS = 8  # traces, at most, in search of the largest batch


@dataclass(frozen=True)
class Transfer:
    """A collective of the step on a given cluster."""

    collective: Collective
    inside: float  # bytes each GPU sends to others of its node
    between: float  # bytes each GPU sends to other nodes
    seconds: float
    exposed: float  # seconds of them that the step waits for


@dataclass(frozen=True)
class Stage:
    """The recipe at one ZeRO stage."""

    stage: int
    memory: dict[str, int]  # bytes on each GPU at the worst moment, by what they are
    transfers: list[Transfer]
    parts: dict[str, float]  # seconds of a step
    pairs: int  # the largest batch of a GPU that fits; 0 where none does

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    device: Device
    gpus: int
    rates: Rates
    pairs: int  # of one GPU's micro-batch
    own: int  # the recipe's stage
    stages: list[Stage]
    flops: float  # of matrix products in a step, on each GPU
    parameters: int
    teacher: int
    notes: list[str]

    @property
    def usable(self) -> float:
        return usable(self.device)

    def fits(self, stage: Stage) -> bool:
        return stage.total <= self.usable

    @property
    def recommended(self) -> Stage | None:
        """The fastest stage that fits, of equally fast ones the lowest."""
        fitting = [stage for stage in self.stages if self.fits(stage)]
        if not fitting:
            return None
        fastest = min(stage.seconds for stage in fitting)
        return next(stage for stage in fitting if stage.seconds <= (1 + TOLERANCE) * fastest)


def usable(device: Device) -> float:
    """Bytes of its memory that a run can have."""
    return device.memory * (1 - RESERVED)


def plan(recipe: Recipe, device: Device, gpus: int, rates: Rates, assumed: Assumed | None = None) -> Plan:
    """Work it out. Nothing is allocated, no data are opened.

    Raises:
        RecipeError: a batch that does not divide by ``gpus``, a DeepSpeed setting that is not modelled, or a tower of
            more than :data:`DEEPEST` blocks.
    """
    _refuse_too_deep(recipe)
    assumed = assumed or Assumed.of(recipe)
    pairs = check_world(recipe, gpus)
    seen = trace(recipe, assumed, pairs, gpus, device)

    @cache
    def other(some: int) -> Trace:
        return seen if some == pairs else trace(recipe, assumed, some, gpus, device)

    stages = [_stage(recipe, device, gpus, rates, number, seen, other) for number in STAGES]
    notes = assumed.notes(recipe)
    if pairs == 1 and recipe.objectives.itm.weight > 0:
        notes.append("ITM is left out: a GPU's batch is one pair, of which there is no negative (training.batch_size)")
    micro = recipe.training.accumulation_steps
    return Plan(
        recipe, device, gpus, rates, pairs, recipe_stage(recipe), stages,
        micro * sum(sum(one.work.flops.values()) for one in seen.launched),
        sum(p.numel for p in seen.parameters), seen.teacher, notes,
    )  # fmt: skip


def _refuse_too_deep(recipe: Recipe) -> None:
    """Before a step of thousands of blocks is gone through, which would take many minutes."""
    model, captioner = recipe.model, recipe.model.captioner
    depths = {"image.depth": model.image.depth, "text.depth": model.text.depth, "fusion.depth": model.fusion.depth}
    if captioner is not None:
        depths |= {"captioner.depth": captioner.depth, "captioner.image_depth": captioner.image_depth or 0}
    for name, depth in depths.items():
        if depth > DEEPEST:
            raise RecipeError(
                f"model.{name} ({depth:,}): a plan goes through every block of the step and is made for up to {DEEPEST}"
                f" in a tower; set it to {DEEPEST} or less"
            )


def _stage(
    recipe: Recipe, device: Device, gpus: int, rates: Rates, number: int, seen: Trace, other: Callable[[int], Trace]
) -> Stage:
    element = PRECISIONS[recipe.training.precision].itemsize
    micro = recipe.training.accumulation_steps
    layout = Layout.of(Zero.of(recipe, gpus, number), seen.parameters, gpus)
    follows = recipe.model.captioner is not None
    parts = _computing(recipe, device, rates, layout, seen)
    transfers = [_transfer(one, device, gpus, rates, parts) for one in wire(layout, seen, element, micro, follows)]
    for kind in sorted({one.collective.kind for one in transfers}):
        parts[f"{kind} on the wire"] = sum(one.exposed for one in transfers if one.collective.kind == kind)
    room, fitting = usable(device) - sum(_fixed(recipe, layout, seen).values()), 0
    moments = _moments(recipe, layout)
    if sum(moments["step"].values()) <= room:
        fitting = largest_batch(room, lambda pairs: max(_needed(moments, other(pairs)).values()), max(8, seen.pairs))
    return Stage(number, memory_at(recipe, layout, seen), transfers, parts, fitting)


def _fixed(recipe: Recipe, layout: Layout, seen: Trace) -> dict[str, int]:
    """Bytes that are there all the time, whatever the batch."""
    element = PRECISIONS[recipe.training.precision].itemsize
    lasting = {"DeepSpeed's buffers": lasting_buffers(layout, element)}
    return {**held(layout, seen, element), "queue": queue_bytes(recipe), **lasting}


def _moments(recipe: Recipe, layout: Layout) -> dict[str, dict[str, int]]:
    """Bytes that come and go beside activations, whatever the batch."""
    return on_top(layout, PRECISIONS[recipe.training.precision].itemsize, recipe.training.accumulation_steps > 1)


def _needed(moments: Mapping[str, Mapping[str, int]], seen: Trace) -> dict[str, int]:
    """Bytes that come and go at each moment, activations included: by the step these are gone."""
    activations = {"backward": seen.most, "look": seen.looked}
    return {name: sum(parts.values()) + activations.get(name, 0) for name, parts in moments.items()}


def memory_at(recipe: Recipe, layout: Layout, seen: Trace) -> dict[str, int]:
    """Bytes at the worst moment, which the backward is unless the optimizer's copies of gradients are more, or the
    teacher's weights, gathered while it looks."""
    fixed, moments = _fixed(recipe, layout, seen), _moments(recipe, layout)
    backward, needed = moments["backward"], _needed(moments, seen)
    lasting = fixed.pop("DeepSpeed's buffers")
    features = sum(one.count for one in seen.sent if one.kind == "all_gather")
    copies = max(0, needed["step"] - needed["backward"])
    return {
        **fixed,
        "gradients": backward["gradients"],
        "DeepSpeed's buffers": lasting + backward.get("bucket", 0) + backward.get("gathered weights", 0),
        "features of all ranks": features,
        "activations": max(0, seen.most - features),
        "optimizer's copies": copies,
        "teacher, gathered": max(0, needed["look"] - needed["backward"] - copies),
    }


def largest_batch(room: float, most: Callable[[int], float], start: int) -> int:
    """The largest batch whose activations ``most(pairs)`` fit into ``room``: a multiple of 8, or a power of two below;
    0: none.

    A straight line through ``start`` and eight times it says where to look; where more is needed there, because pairs
    that meet each other grow with the square, a chord says where to look next. A batch that is told has been looked at.
    """

    def rounded(pairs: float) -> int:
        whole = max(0, int(pairs))
        return whole // 8 * 8 if whole >= 8 else (1 << whole.bit_length()) >> 1

    base = float(most(start))
    guess = rounded(start + (room - base) * 7 * start / (most(8 * start) - base))
    fitting, above = (start, base) if base <= room else (0, 0.0), 0
    if base > room:
        fitting = (0, float(2 * most(max(1, start // 2)) - base) if start > 1 else 0.0)
    for _ in range(LOOKS):
        if guess <= fitting[0] or guess == above:
            break
        found = float(most(guess))
        if found <= room:
            fitting = (guess, found)
            if not above:
                break
            guess = rounded((guess + above) / 2)
        else:
            above = guess
            guess = rounded(fitting[0] + (room - fitting[1]) * (guess - fitting[0]) / (found - fitting[1]))
    return rounded(fitting[0])


def _computing(recipe: Recipe, device: Device, rates: Rates, layout: Layout, seen: Trace) -> dict[str, float]:
    """Seconds by part, communication left out."""
    micro, precision = recipe.training.accumulation_steps, recipe.training.precision
    parts: dict[str, float] = {}
    for one in seen.launched:
        parts[one.part] = parts.get(one.part, 0.0) + micro * one.seconds(device, rates)
    rest = parts.pop("rest", 0.0)
    backward = parts.pop("backward", 0.0)
    low = None if precision == "fp32" else precision
    optimizer = adamw(layout.part, "fp32", low)
    if low is not None:  # the gradients' norm, and their copy in fp32
        optimizer = optimizer + elementwise(layout.part, low) + elementwise(layout.part, "fp32")
    average = ema_update(layout.teacher_part, copy=low)
    return {
        **parts,
        "other heads and losses": rest,
        "backward": backward,
        "optimizer": _stream(optimizer, device, rates),
        "teacher's average": _stream(average, device, rates),
    }


def _stream(work: Work, device: Device, rates: Rates) -> float:
    return max(work.vector_seconds(device), work.memory_seconds(device) / rates.memory, rates.launch)


def _transfer(one: Collective, device: Device, gpus: int, rates: Rates, parts: Mapping[str, float]) -> Transfer:
    """By rings that pass each node once, one for each of its GPUs and network cards: of what a GPU sends, one share in
    as many as the node has GPUs leaves the node."""
    total = one.sent(gpus)
    node = min(gpus, device.gpus_per_node)
    between = total / node if gpus > node else 0.0
    inside = total - between
    seconds = max(inside / device.link, between / device.network) / rates.network
    meanwhile = sum(value for name, value in parts.items() if _goes_on(name, one.hidden_by))
    return Transfer(one, inside, between, seconds, max(0.0, seconds - meanwhile))


def _goes_on(part: str, hidden_by: str) -> bool:
    forward = part not in ("backward", "optimizer", "teacher's average")
    return {
        "": False,
        "backward": part == "backward",
        "forward and backward": forward or part == "backward",
        "next step": True,
    }[hidden_by]


def described(found: Plan) -> dict[str, object]:
    """The plan for a JSON file: bytes, seconds and pairs, nothing rounded."""
    recommended = found.recommended
    training = found.recipe.training

    def of_stage(stage: Stage) -> dict[str, object]:
        return {
            "stage": stage.stage,
            "memory": {**stage.memory, "total": stage.total, "left": found.usable - stage.total},
            "fits": found.fits(stage),
            "pairs_that_fit": stage.pairs,
            "wire": [
                {
                    "kind": one.collective.kind,
                    "operation": one.collective.operation,
                    "given": one.collective.count,
                    "sent_inside_node": one.inside,
                    "sent_between_nodes": one.between,
                    "seconds": one.seconds,
                    "waited_for": one.exposed,
                    "hidden_by": one.collective.hidden_by,
                }
                for one in stage.transfers
            ],
            "seconds": {**stage.parts, "step": stage.seconds},
            "samples_per_s": training.batch_size / stage.seconds,
            "run_seconds": training.max_steps * stage.seconds,
        }

    return {
        "label": "predicted",
        "recipe": found.recipe.name,
        "gpu": found.device.name,
        "gpus": found.gpus,
        "assumed": {**vars(found.rates), "reserved": RESERVED, "notes": found.notes},
        "pairs_per_gpu": found.pairs,
        "parameters": found.parameters,
        "teacher_parameters": found.teacher,
        "matrix_flops_per_step_and_gpu": found.flops,
        "recipe_stage": found.own,
        "recommended_stage": None if recommended is None else recommended.stage,
        "stages": [of_stage(stage) for stage in found.stages],
    }


def kinds(stages: Sequence[Stage]) -> list[str]:
    """Rows of a table of memory: all that any stage has."""
    return [name for name in stages[0].memory if any(stage.memory[name] for stage in stages)]
