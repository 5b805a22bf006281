"""What DeepSpeed keeps and sends at each ZeRO stage, as its version 0.19 does it and the teacher follows it.

Read from its optimizers and held against two real ranks by ``benchmarks/bench_scaling.py``. Where it differs from the
usual description (Rajbhandari et al., ZeRO, 2020): stages 1 and 2 *all-reduce* gradients in buckets and keep a part, so
they save memory and no traffic; a bucket of ``reduce_bucket_size`` elements is allocated whole, however small the
model is; stage 3 keeps parameters of up to ``stage3_param_persistence_threshold`` elements whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..deepspeed_config import build_deepspeed_config, quiet_deepspeed
from ..errors import RecipeError
from ..recipe import Recipe
from .trace import Parameter, Trace

STAGES = (0, 1, 2, 3)
ALIGNMENT = 2  # elements, times the ranks: what DeepSpeed pads a flat group of stages 1 and 2 to
STAGE0_BUCKET = 500_000_000  # elements: what stage 0 joins into one all-reduce
FP32 = 4
READ_OUTSIDE = "word_embeddings.weight"  # by the vocabulary's loss, too, which is no module


@dataclass(frozen=True)
class Zero:
    """The settings of one stage that decide memory and traffic."""

    stage: int
    bucket: int  # elements
    overlap: bool  # whether gradients travel while the backward goes on
    persistence: int  # parameters of up to so many elements stay whole at stage 3 ...
    model_persistence: int  # ... as long as they are no more than this together
    reuse: int  # elements of other parameters within which one that is needed again is not released
    prefetch: int  # elements that stage 3 gathers at a time
    sub_group: int  # elements of a rank's part that stage 3 steps at a time

    @classmethod
    def of(cls, recipe: Recipe, ranks: int, stage: int) -> Zero:
        """The recipe's ``deepspeed`` section at another stage, DeepSpeed's defaults for what it leaves out.

        Raises:
            RecipeError: a batch that does not divide, or offload, which is not modelled.
        """
        section: dict[str, Any] = dict(build_deepspeed_config(recipe, ranks, "cuda")["zero_optimization"])
        for name in ("offload_optimizer", "offload_param", "cpu_offload"):
            given = section.get(name)
            if given and (given is True or given.get("device", "none") != "none"):
                raise RecipeError(f"deepspeed.zero_optimization.{name}: a plan knows no offload; leave it out")
        with quiet_deepspeed():
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

            known = DeepSpeedZeroConfig(**{**section, "stage": stage})
        return cls(
            stage,
            int(known.reduce_bucket_size),
            stage > 0 and bool(known.overlap_comm),
            int(known.param_persistence_threshold),
            int(known.model_persistence_threshold),
            int(known.max_reuse_distance),
            int(known.prefetch_bucket_size),
            int(known.sub_group_size),
        )


def recipe_stage(recipe: Recipe) -> int:
    """The stage that the recipe itself trains at."""
    section = recipe.deepspeed.get("zero_optimization", {}) if isinstance(recipe.deepspeed, dict) else {}
    return int(section.get("stage", 2))


@dataclass(frozen=True)
class Layout:
    """Elements of a student and its teacher as a stage lays them out over ``ranks``."""

    zero: Zero
    ranks: int
    whole: int  # of the student as this stage sends it: padding included
    part: int  # of one rank
    reached: int  # of what gradients reach, as they are sent
    persistent: int  # stage 3: what stays whole
    teacher: int  # of the teacher as it is sent: padding included
    teacher_part: int

    @classmethod
    def of(cls, zero: Zero, parameters: Sequence[Parameter], ranks: int) -> Layout:
        if zero.stage == 0:
            whole = sum(p.numel for p in parameters)
            taught = sum(p.numel for p in parameters if p.taught)
            return cls(zero, ranks, whole, whole, whole, whole, taught, taught)  # what no loss reached travels as zeros
        if zero.stage < 3:
            unit, groups = ALIGNMENT * ranks, sorted({p.group for p in parameters})
            whole = sum(-(-sum(p.numel for p in parameters if p.group == g) // unit) * unit for g in groups)
            reached = sum(p.numel for p in parameters if p.reached)
            return cls(zero, ranks, whole, whole // ranks, reached, whole, whole, whole // ranks)
        parts = {p.name: -(-p.numel // ranks) for p in parameters}
        part = sum(parts.values())
        kept = persistent(zero, parameters)
        return cls(
            zero,
            ranks,
            part * ranks,
            part,
            ranks * sum(parts[p.name] for p in parameters if p.reached),
            ranks * sum(parts[name] for name in kept) if ranks > 1 else 0,  # a single rank's part is whole
            ranks * sum(parts[p.name] for p in parameters if p.taught),
            part,  # masters of a sub-group are averaged together, those without a teacher unread
        )


def persistent(zero: Zero, parameters: Sequence[Parameter]) -> set[str]:
    """Names of those that stage 3 keeps whole."""
    kept: set[str] = set()
    together = 0
    for p in parameters:
        if p.numel <= zero.persistence and p.numel + together <= zero.model_persistence:
            kept.add(p.name)
            together += p.numel
    return kept


def held(layout: Layout, trace: Trace, element: int) -> dict[str, int]:
    """Bytes on each rank between two steps; ``element``: bytes of a weight, 2 or 4.

    In fp32 the teacher's average is its weights at stages 0 to 2, and at stage 0 the student's weights are the masters.
    """
    stage, part, low = layout.zero.stage, layout.part, element < FP32
    found = {"moments": 2 * FP32 * part}
    if stage == 0:
        found |= {"weights": element * layout.whole, "masters": FP32 * part if low else 0}
        average, weights = FP32 * layout.teacher, element * layout.teacher if low else 0
    elif stage < 3:
        found |= {"weights": element * layout.whole, "masters": FP32 * part}
        average, weights = FP32 * layout.teacher_part if low else 0, element * layout.teacher
    else:
        found |= {"weights": element * (part + layout.persistent), "masters": FP32 * part}
        average, weights = FP32 * layout.teacher_part, element * part if low else 0
    return {
        "weights": found["weights"] + trace.buffers,
        "masters": found["masters"],
        "moments": found["moments"],
        "teacher's average": average,
        "teacher's weights": weights + trace.buffers,
    }


def lasting_buffers(layout: Layout, element: int) -> int:
    """Bytes that stage 3 holds between steps for gradients: a flat buffer of this rank's part, and the bucket."""
    return element * (layout.part + layout.zero.bucket) if layout.zero.stage == 3 else 0


def on_top(layout: Layout, element: int, accumulates: bool) -> dict[str, dict[str, int]]:
    """Bytes that come and go: those of the backward, beside activations, those of the optimizer's step, and those of
    the teacher's look, beside its few activations.

    Beside the bucket DeepSpeed joins what it reduces in memory of its own: at stage 3 while the backward goes on, at
    stages 1 and 2 (without ``overlap_comm``) when activations are gone. At stage 3 the whole student is gathered, as
    far as it is reused, and a bucket of it lies there twice; a single rank computes with its own part. The teacher is
    copied together on any number of ranks. The step flattens this rank's gradients, and in 16 bits makes fp32 of them.
    """
    zero, whole, part = layout.zero, layout.whole, layout.part
    fp32 = FP32 if element < FP32 else 0
    buckets = element * zero.bucket * (2 if zero.overlap else 1)
    if zero.stage == 0:
        joined = element * min(whole, STAGE0_BUCKET) if layout.ranks > 1 else 0
        return {
            "backward": {"gradients": element * whole},
            "step": {"gradients": element * whole + max(joined, fp32 * whole)},
            "look": {},
        }
    if zero.stage == 3:
        gathered = max(0, min(zero.reuse, layout.whole - layout.persistent)) if layout.ranks > 1 else 0
        weights = element * (gathered + min(zero.prefetch, gathered))
        return {
            "backward": {"gathered weights": weights, "gradients": element * min(whole, zero.bucket)},
            "step": {"gradients": (fp32 + element) * min(part, zero.sub_group)},
            "look": {"gathered weights": element * layout.teacher},
        }
    gradients = element * (whole if zero.stage == 1 else part * (2 if accumulates else 1))
    optimizer = (2 * element + fp32) * part  # this rank's gradients, flat, and in fp32
    joins = buckets + element * min(whole, zero.bucket)
    reduction = gradients + max(joins, element * part if zero.stage == 1 else 0)  # stage 1 then copies its part of them
    return {
        "backward": {"gradients": gradients, "bucket": buckets},
        "step": {"gradients": max(optimizer, reduction)},
        "look": {},
    }


@dataclass(frozen=True)
class Collective:
    """What one step gives to a collective, summed over calls; bytes of its longer side."""

    kind: str  # "gradients", "parameters", "features" or "teacher"
    operation: str  # "all_reduce", "all_gather" or "reduce_scatter"
    count: int
    hidden_by: str = ""  # the part of the step that goes on meanwhile, if one does

    def sent(self, ranks: int) -> float:
        """Bytes that each GPU sends, by a ring (Patarasuk and Yuan 2009), which none can do with less."""
        return (2 if self.operation == "all_reduce" else 1) * (ranks - 1) / ranks * self.count


def wire(layout: Layout, trace: Trace, element: int, accumulation: int, follows: bool) -> list[Collective]:
    """Everything that travels in one step of ``accumulation`` micro-batches, but for flags of a few bytes.

    ``follows``: whether the teacher is not read by the step, so that its weights travel while the next one goes on.
    """
    zero, ranks = layout.zero, layout.ranks
    if ranks == 1:
        return []
    k, found = accumulation, []
    behind = "backward" if zero.overlap else ""
    if zero.stage == 3:
        found.append(Collective("gradients", "reduce_scatter", k * element * layout.reached, behind))
        at_use = k * element * gathered_elements(layout, trace)
        found.append(Collective("parameters", "all_gather", at_use, "forward and backward"))
        if layout.persistent:
            found.append(Collective("parameters", "all_gather", element * layout.persistent))
        if not follows:
            found.append(Collective("teacher", "all_gather", k * element * layout.teacher))
    else:
        times = k if zero.stage == 2 else 1
        found.append(Collective("gradients", "all_reduce", times * element * layout.reached, behind))
    if zero.stage in (1, 2):
        found.append(Collective("parameters", "all_gather", element * layout.whole))
        found.append(Collective("teacher", "all_gather", element * layout.teacher, "next step" if follows else ""))
    features: Mapping[str, int] = {
        operation: k * sum(s.count for s in trace.sent if s.kind == operation)
        for operation in ("all_gather", "reduce_scatter")
    }
    found += [Collective("features", operation, count) for operation, count in features.items() if count]
    return [one for one in found if one.count]


def gathered_elements(layout: Layout, trace: Trace) -> int:
    """Elements of weights that stage 3 gathers in a micro-step: once, and again where more than
    ``stage3_max_reuse_distance`` elements of others lie between two uses.

    As DeepSpeed does it once it knows the order of the modules, from the third step on.
    """
    kept = persistent(layout.zero, trace.parameters)
    places: list[int] = [0]
    for count in trace.traffic:
        places.append(places[-1] + count)
    total = 0
    for p in trace.parameters:
        if p.name in kept or not (p.uses or p.reached):
            continue
        if not p.uses or p.name.endswith(READ_OUTSIDE):  # held from the first use of the whole student to the last
            total += -(-p.numel // layout.ranks) * layout.ranks
            continue
        again = sum(
            1
            for one, other in zip(p.uses, p.uses[1:], strict=False)
            if places[other] - places[one + 1] >= layout.zero.reuse
        )
        total += (1 + again) * -(-p.numel // layout.ranks) * layout.ranks
    return total
