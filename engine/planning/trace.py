"""One micro-step of a recipe on shapes alone: the engine's own step, run on the device ``meta``, where nothing is
computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from crossmask.kernels.roofline import DEVICES, Device

from ..recipe import Recipe
from ..teacher import FeatureQueue
from ..training import caption_step, step, systems
from ..training.clock import Clock
from ..training.families import Family
from ..training.optimizer import parameter_groups
from ..training.step import Schedule
from .assumed import Assumed, AssumedMasks, hidden_patches, meta_batch, on_a_gpu
from .tally import Launched, Tally, size

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OBJECTIVES = {  # where the step calls each, and the part that its time is counted under
    "image_text_contrast": "ITC",
    "image_text_matching": "fusion for ITM",
    "masked_language_modelling": "fusion for MLM",
    "masked_image_modelling": "MIM",
    "text_guided_retrieval": "fusion of triplets",
    "recognise": "fusion for recognition",
    "image_captioning": "captioning",
    "text_guided_image_modelling": "TG-MIM",
    "choose_masks": "choice of masks",
}


@dataclass(frozen=True)
class Parameter:
    """Of the student."""

    name: str
    numel: int
    group: int  # of the optimizer's
    reached: bool  # whether a step's loss gives it a gradient
    taught: bool  # whether the teacher has it too
    uses: tuple[int, ...] = ()  # places in the order in which modules run, forward and then backward


@dataclass(frozen=True)
class Sent:
    """A collective of the step itself: what features cost."""

    kind: str  # "all_gather" or "reduce_scatter"
    count: int  # bytes of its longer side
    when: str  # "forward" or "backward"


@dataclass(frozen=True)
class Trace:
    """A micro-step of ``pairs`` pairs on each of ``ranks`` GPUs."""

    pairs: int
    ranks: int
    launched: list[Launched]
    saved: int  # bytes that wait for the backward at the end of the forward, inputs included, weights not
    most: int  # bytes that live at the worst moment, weights and their gradients not included
    sent: list[Sent]
    parameters: list[Parameter]
    teacher: int  # parameters
    buffers: int  # bytes of the student's; the teacher's are as many
    traffic: list[int] = field(default_factory=list)  # parameters of each module in the order in which they run
    looked: int = 0  # of most, while the teacher runs


class _Teacher:
    """What a step asks of a ``Teacher``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def weights(self, *, dropout: bool = False) -> Iterator[nn.Module]:
        self.model.train(dropout)
        with torch.no_grad():
            yield self.model


def build(recipe: Recipe, assumed: Assumed) -> tuple[Family, nn.Module, nn.Module]:
    """The recipe's system, its student and its teacher on ``meta``, with as many parameters as real ones."""
    masks = AssumedMasks(recipe, assumed)
    system = systems.build_system(recipe, assumed.data, masks)
    with torch.device("meta"):
        return system, system.build_student(), system.build_teacher()


def trace(recipe: Recipe, assumed: Assumed, pairs: int, ranks: int, device: Device = DEVICES["h100"]) -> Trace:
    """What one micro-step launches, saves and sends at the end of the run, where all objectives are on.

    ``device`` decides how this package's kernels divide their work, and nothing of memory or what is sent.
    """
    dtype = PRECISIONS[recipe.training.precision]
    system, student, teacher = build(recipe, assumed)
    groups = [group["params"] for group in parameter_groups(student, recipe.optimizer)]
    student.to(dtype)
    teacher.to(dtype).requires_grad_(False)
    patches = (recipe.model.image.size // recipe.model.image.patch_size) ** 2
    tally = Tally(hidden_patches(recipe), patches, device)
    batch = meta_batch(recipe, assumed, pairs)
    given = [x for x in vars(batch).values() if isinstance(x, Tensor)]
    inputs = sum(size(x) for x in given)
    itc = recipe.objectives.itc
    queue = FeatureQueue(itc.queue_length, recipe.model.projection_width, "meta")
    queue.count = queue.length
    rings = [queue.image, queue.text, queue.group_id, queue.pointer]
    models = (student, teacher)
    weights = [x for model in models for x in (*model.parameters(), *model.buffers())]
    tally.leave_out([*weights, *given, *rings])
    sent: list[Sent] = []
    backward = False

    def send(kind: str, whole: Tensor) -> None:
        sent.append(Sent(kind, size(whole), "backward" if backward else "forward"))

    reached: set[int] = set()

    def reach(parameter: Tensor) -> None:
        reached.add(id(parameter))
        parameter.grad = None  # gradients are counted by how ZeRO keeps them

    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(reach)
    order = _Order(student)
    schedule = Schedule.at(recipe.training.max_steps - 1, recipe)
    with on_a_gpu(recipe, assumed, ranks, send), _parts(tally, student, teacher), tally, order:
        found = system.forward(student, _Teacher(teacher), queue, batch, schedule, None, Clock({}))  # type: ignore[arg-type]
        saved = tally.live
        tally.part, backward = "backward", True
        found.loss.backward()
    number = {id(p): n for n, group in enumerate(groups) for p in group}
    taught = {f"model.{name}" for name, _ in teacher.named_parameters()}
    uses = order.uses()
    parameters = [
        Parameter(name, p.numel(), number[id(p)], id(p) in reached, name in taught, tuple(uses.get(id(p), ())))
        for name, p in student.named_parameters()
    ]
    return Trace(
        pairs, ranks, tally.launched, saved + inputs, tally.most + inputs, sent, parameters,
        sum(p.numel() for p in teacher.parameters()), sum(size(b) for b in student.buffers()), order.traffic(),
        tally.highest.get("teacher", 0) + inputs,
    )  # fmt: skip


class _Order:
    """Inside, writes down which modules with parameters of their own run, as ZeRO stage 3 gathers those."""

    def __init__(self, student: nn.Module) -> None:
        self.modules = [m for m in student.modules() if any(True for _ in m.parameters(recurse=False))]
        self.ran: list[nn.Module] = []

    def __enter__(self) -> None:
        self._handles = [m.register_forward_pre_hook(lambda m, args: self.ran.append(m)) for m in self.modules]

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _all(self) -> list[nn.Module]:
        return [*self.ran, *reversed(self.ran)]  # the backward runs them the other way round

    def uses(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for place, module in enumerate(self._all()):
            for parameter in module.parameters(recurse=False):
                found.setdefault(id(parameter), []).append(place)
        return found

    def traffic(self) -> list[int]:
        return [sum(p.numel() for p in module.parameters(recurse=False)) for module in self._all()]


@contextmanager
def _parts(tally: Tally, student: Any, teacher: Any) -> Iterator[None]:
    """Inside, the tally knows which part of the step runs: a tower by itself, else the objective it runs for."""
    with ExitStack() as stack:

        def inside(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                before, tally.part = tally.part, before_or(tally.part, part)
                try:
                    return call(*args, **options)
                finally:
                    tally.part = before

            return run

        def before_or(now: str, part: str) -> str:
            return now if now == "teacher" else part

        for module in (step, caption_step):
            for name, part in OBJECTIVES.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, inside(part, getattr(module, name))))
        for name, part in (("image", "image tower"), ("text", "text tower")):
            tower = getattr(student.model, name)
            stack.enter_context(mock.patch.object(tower, "forward", inside(part, tower.forward)))
        if hasattr(student.model, "project_image"):
            project = inside("images' keys and values", student.model.project_image)
            stack.enter_context(mock.patch.object(student.model, "project_image", project))
        stack.enter_context(mock.patch.object(teacher, "forward", inside("teacher", teacher.forward)))
        yield
