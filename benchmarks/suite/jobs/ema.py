"""The moving average of a teacher's weights, in place, against what one would use instead.

All implementations of a problem work on the same memory: pieces of one buffer each for teacher, student and copy, also
those of libraries that keep a copy of the model for a teacher. A library's first updates, which copy, are made before
anything is measured. The most that such an update can reach is the ceiling of an in-place update.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crossmask.kernels import ema_update_
from crossmask.kernels.roofline import ema_update as needed

from ..cases import Case
from ..ceilings import DTYPES
from ..prediction import seconds_of
from ..problem import Implementation, Outputs, Problem, Solve, Unavailable

DECAY = 0.995
ALIGNED, COLUMNS, CHECKED = 32, 1009, 2**21  # elements; a prime; elements that are held to the reference, at least
Shape = tuple[int, ...]
COPIED, FROM_HALF, STOCHASTIC = "with a bf16 copy", "from bf16", "stochastic"
WHATS = {  # teacher, student, copy
    "": ("fp32", "fp32", None),
    COPIED: ("fp32", "fp32", "bf16"),
    FROM_HALF: ("fp32", "bf16", None),
    STOCHASTIC: ("bf16", "bf16", None),
}


def large(width: int = 768) -> Iterator[Shape]:
    """ViT-B/16 at 224 pixels, then a text tower of 11 such layers with RoBERTa's vocabulary: 150 and 138 tensors."""
    layer: list[Shape] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    yield from [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    yield from layer * 12
    yield from [(width,), (width,)]
    yield from [(50265, width), (514, width), (1, width), (width,), (width,), (width,)]
    yield from layer * 11


def flat() -> Iterator[Shape]:
    """As ZeRO's masters lie in memory."""
    yield from [(101_400_000,)] * 2


def small() -> Iterator[Shape]:
    yield from [(96, 72), (72,), (180, 72), (72,)] * 100


LISTS: dict[str, Callable[[], Iterator[Shape]]] = {"ViT-B/16 + BERT": large, "flat": flat, "small": small}
# of 203 M parameters the others take seconds an update on a CPU; and one list of them shows what a copy costs
LEFT_OUT = {
    "cpu": {
        ("ViT-B/16 + BERT", FROM_HALF),
        ("ViT-B/16 + BERT", STOCHASTIC),
        *(("flat", what) for what in WHATS if what),
    },
    "cuda": set(),
}


class Weights:
    """Tensors in one buffer, each at a multiple of 64 bytes or 128; zeros between them, which no update changes."""

    def __init__(self, shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device, std: float) -> None:
        shapes = [torch.Size(shape) for shape in shapes]
        starts = list(itertools.accumulate((-(-s.numel() // ALIGNED) * ALIGNED for s in shapes), initial=0))
        self.buffer = torch.zeros(-(-starts[-1] // COLUMNS) * COLUMNS, dtype=dtype, device=device)
        self.tensors = [self.buffer[at : at + s.numel()].view(s) for at, s in zip(starts, shapes, strict=False)]
        if std:
            for tensor in self.tensors:
                tensor.normal_(std=std)
        # the first rows hold elements from all over the list
        self.rows = self.buffer.view(-1, COLUMNS).T


class Model(nn.Module):
    """A model of these very tensors. A library that copies it for its teacher gets the teacher's memory."""

    def __init__(self, tensors: list[Tensor], twin: list[Tensor]) -> None:
        super().__init__()
        self.list = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)
        self.twin = twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        return Model(self.twin, self.twin)


@dataclass(frozen=True)
class Memory:
    teacher: Weights
    student: Weights
    copy: Weights | None
    begun: Tensor  # what the teacher was

    @property
    def model(self) -> Model:
        return Model(self.student.tensors, self.teacher.tensors)

    def reset(self) -> None:
        self.teacher.buffer.copy_(self.begun)
        if self.copy is not None:
            self.copy.buffer.zero_()

    def updated(self, update: Callable[[list[Tensor], list[Tensor]], object]) -> Solve:
        """What is left after an ``update`` of teacher and student."""
        told = {"teacher": self.teacher.rows}
        if self.copy is not None:
            told["copy"] = self.copy.rows
        teacher, student = self.teacher.tensors, self.student.tensors

        def solve(*_: Tensor) -> Outputs:
            update(teacher, student)
            return told

        return solve


def foreach(teacher: list[Tensor], student: list[Tensor]) -> None:
    torch._foreach_lerp_(teacher, student, 1 - DECAY)


def foreach_of_floats(teacher: list[Tensor], student: list[Tensor]) -> None:
    torch._foreach_lerp_(teacher, [s.float() for s in student], 1 - DECAY)


def one_by_one(teacher: list[Tensor], student: list[Tensor]) -> None:
    for t, s in zip(teacher, student, strict=True):
        t.lerp_(s.float(), 1 - DECAY)


def timm(memory: Memory) -> Solve:
    model = memory.model
    found = ModelEmaV3(model, decay=DECAY)
    return memory.updated(lambda *_: found.update(model))


def swa(memory: Memory) -> Solve:
    model = memory.model
    found = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    found.update_parameters(model)
    return memory.updated(lambda *_: found.update_parameters(model))


def ema_pytorch(memory: Memory) -> Solve:
    if importlib.util.find_spec("ema_pytorch") is None:
        raise Unavailable("is not installed: pip install ema-pytorch")
    from ema_pytorch import EMA

    # min_value: its schedule gives this decay from the third update on
    options: dict[str, Any] = {"beta": DECAY, "min_value": DECAY, "update_after_step": 0, "update_every": 1}
    found = EMA(memory.model, use_foreach=True, include_online_model=False, **options)
    for _ in range(3):
        found.update()
    return memory.updated(lambda *_: found.update())


def implementations(what: str, memory: Memory) -> list[Implementation]:
    copies = memory.copy.tensors if memory.copy is not None else None
    seeds = itertools.count()

    def mine(teacher: list[Tensor], student: list[Tensor]) -> None:
        if what == STOCHASTIC:
            ema_update_(teacher, student, DECAY, rounding="stochastic", seed=next(seeds))
        else:
            ema_update_(teacher, student, DECAY, copies=copies)

    def then_copy(teacher: list[Tensor], student: list[Tensor]) -> None:
        assert copies is not None
        foreach(teacher, student)
        torch._foreach_copy_(copies, teacher)

    makers: dict[str, Callable[[], Solve]] = {
        "crossmask": lambda: memory.updated(mine),
        "torch._foreach_lerp_": lambda: memory.updated(foreach),
        "timm": lambda: timm(memory),
        "swa_utils": lambda: swa(memory),
        "ema-pytorch": lambda: ema_pytorch(memory),
        "_foreach_lerp_, _foreach_copy_": lambda: memory.updated(then_copy),
        "lerp_(p.float())": lambda: memory.updated(one_by_one),
        "_foreach_lerp_ of p.float()": lambda: memory.updated(foreach_of_floats),
    }
    notes = {"timm": "ModelEmaV3", "swa_utils": "torch's AveragedModel", "ema-pytorch": "with use_foreach"}
    return [Implementation(name, makers[name], name == "crossmask", note=notes.get(name, "")) for name in NAMES[what]]


NAMES = {
    "": ("crossmask", "torch._foreach_lerp_", "timm", "swa_utils", "ema-pytorch"),
    COPIED: ("crossmask", "_foreach_lerp_, _foreach_copy_"),
    FROM_HALF: ("crossmask", "lerp_(p.float())", "_foreach_lerp_ of p.float()", "timm"),
    STOCHASTIC: ("crossmask", "timm"),
}


def average(copied: bool, teacher: Tensor, student: Tensor) -> Outputs:
    """Out of place, and rounded to what the teacher is."""
    wide = torch.promote_types(teacher.dtype, torch.float32)
    found = torch.lerp(teacher.to(wide), student.to(wide), 1 - DECAY).to(teacher.dtype)
    if not copied:
        return {"teacher": found}
    return {"teacher": found, "copy": found if found.dtype == torch.float64 else found.bfloat16()}


def problem(name: str, shapes: Iterable[Shape], what: str, device: torch.device) -> Problem:
    """The teacher's weights are small beside the student's: one update is far more than a rounding, in bfloat16 too."""
    shapes, (teacher, student, copy) = list(shapes), WHATS[what]
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    begun = Weights(shapes, DTYPES[teacher], device, 0.02)
    memory = Memory(
        begun,
        Weights(shapes, DTYPES[student], device, 1.0),
        Weights(shapes, DTYPES[copy], device, 0.0) if copy else None,
        begun.buffer.clone(),
    )
    work = needed(parameters, teacher, student, copy)
    return Problem(
        op="ema_update_",
        shape=name,
        size=f"{parameters / 1e6:.1f} M parameters in {len(shapes)} tensors",
        what=what,
        inputs=(memory.teacher.rows, memory.student.rows),
        reference=functools.partial(average, copy is not None),
        plain=functools.partial(average, copy is not None),
        implementations=implementations(what, memory),
        work={"forward": work},
        checked=-(-CHECKED * COLUMNS // memory.teacher.buffer.numel()),
        reset=memory.reset,
        seconds=seconds_of(lambda gpu, backward: work),
    )


def cases(device: str) -> Iterator[Case]:
    for name in LISTS:
        for what, (teacher, *_) in WHATS.items():
            if (name, what) not in LEFT_OUT[device]:
                build = functools.partial(_built, name, what)
                yield Case("ema_update_", name, what, teacher, ("forward",), NAMES[what], build)


def _built(name: str, what: str, device: torch.device) -> Problem:
    return problem(name, LISTS[name](), what, device)
