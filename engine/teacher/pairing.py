"""Which of the student's parameters and buffers each of the teacher's follows, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from .shadows import Pair
from .zero import is_partitioned, whole_shape


class Slot(NamedTuple):
    """Where a buffer hangs. A module may put another tensor there at any time, so it is looked up at each use."""

    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        buffer = self.module._buffers[self.key]
        assert buffer is not None
        return buffer

    @property
    def persistent(self) -> bool:
        """Whether the module's state_dict has it."""
        return self.key not in self.module._non_persistent_buffers_set


class BufferPair(NamedTuple):
    """One buffer of the teacher and the student's buffer it follows."""

    name: str
    student: Slot
    teacher: Slot


def pair_parameters(student: nn.Module, teacher: nn.Module, prefix: str) -> list[Pair]:
    """Every parameter of ``teacher`` with the student's ``prefix + name``; tied ones once, by their first name.

    ValueError names a parameter that has no counterpart, another shape, other ties, or that is the student's own.
    """
    students = dict(student.named_parameters(remove_duplicate=False))
    own = {id(parameter) for parameter in students.values()}
    pairs: dict[int, Pair] = {}  # by the teacher's parameter
    followers: dict[int, Pair] = {}  # by the student's
    for name, parameter in teacher.named_parameters(remove_duplicate=False):
        followed = students.get(prefix + name)
        if followed is None:
            raise ValueError(
                f"the teacher's {name} has no counterpart {prefix + name} in the student (prefix {prefix!r})"
            )
        if id(parameter) in own:
            raise ValueError(f"the teacher's {name} is the student's own parameter: build_model must build a new model")
        if is_partitioned(parameter):
            raise ValueError(f"the teacher's {name} is partitioned: build_model must not enter deepspeed.zero.Init")
        shape = whole_shape(followed)
        if parameter.shape != shape:
            raise ValueError(f"the teacher's {name} is {tuple(parameter.shape)}, the student's is {tuple(shape)}")
        known = pairs.setdefault(id(parameter), Pair(name, followed, parameter))
        if known.student is not followed:
            raise ValueError(f"the teacher ties {name} to {known.name}, the student does not")
        first = followers.setdefault(id(followed), known)
        if first.teacher is not parameter:
            raise ValueError(f"the student ties {name} to {first.name}, the teacher does not")
    if not pairs:
        raise ValueError("the teacher has no parameters")
    return list(pairs.values())


def pair_buffers(student: nn.Module, teacher: nn.Module, prefix: str) -> list[BufferPair]:
    """The same for buffers, with the same errors."""
    students = dict(_slots(student))
    own = {id(slot.tensor) for slot in students.values()}
    pairs: dict[int, BufferPair] = {}
    followers: dict[int, BufferPair] = {}
    for name, slot in _slots(teacher):
        if prefix + name not in students:
            raise ValueError(f"the teacher's buffer {name} has no counterpart {prefix + name} in the student")
        if id(slot.tensor) in own:
            raise ValueError(f"the teacher's buffer {name} is the student's own: build_model must build a new model")
        followed = students[prefix + name]
        if (own_shape := slot.tensor.shape) != (shape := followed.tensor.shape):
            raise ValueError(f"the teacher's buffer {name} is {tuple(own_shape)}, the student's is {tuple(shape)}")
        known = pairs.setdefault(id(slot.tensor), BufferPair(name, followed, slot))
        if known.student.tensor is not followed.tensor:
            raise ValueError(f"the teacher ties buffer {name} to {known.name}, the student does not")
        first = followers.setdefault(id(followed.tensor), known)
        if first.teacher.tensor is not slot.tensor:
            raise ValueError(f"the student ties buffer {name} to {first.name}, the teacher does not")
    return list(pairs.values())


def _slots(root: nn.Module) -> Iterator[tuple[str, Slot]]:
    for path, module in root.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield f"{path}.{key}" if path else key, Slot(module, key)
