"""A momentum teacher of any module in any training loop: no DeepSpeed, no engine, no process group."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crossmask.kernels import ema_update_

from .buffers import Buffers
from .pairing import pair_buffers, pair_parameters
from .schedule import Schedule, as_schedule, decay_at

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class EmaTeacher:
    """``theta' <- m theta' + (1 - m) theta`` over a student's parameters, kept in fp32 whatever the student is in.

    :attr:`model` is a copy of the student in eval mode that takes no gradient; ``teacher(batch)`` calls it. Call
    :meth:`follow` after each optimizer step, or :meth:`attach` it to the optimizer once. Tied parameters are averaged
    once, and all of them in one launch. Under DistributedDataParallel every rank has the same teacher without
    communication, but for buffers, which follow the rank's own student.

    A student in 16 bits moves by less than its weights can show: average one whose optimizer keeps fp32 weights
    (autocast), or accept that the teacher follows the rounded ones. For a DeepSpeed engine :class:`.Teacher` follows
    the fp32 masters.
    """

    @torch.inference_mode(False)  # a caller's would make the average read-only for the updates to come
    def __init__(
        self,
        student: nn.Module,
        decay: float | Schedule,
        *,
        buffers: Literal["copy", "average"] = "copy",
        dtype: torch.dtype | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """
        Args:
            student: on the device where it trains; wrapped by DistributedDataParallel or torch.compile, or bare.
            decay: in [0, 1), or a schedule: the updates made so far -> the decay of the next one, in [0, 1].
            buffers: copied at each update, or floating ones averaged in fp32.
            dtype: of :attr:`model`'s parameters, float32, bfloat16 or float16; default: each as the student's. Where
                it is float32 the average takes no memory of its own.
            model: what becomes :attr:`model`, of the student's names and shapes; default a deep copy of the student.

        Raises:
            ValueError: an argument that cannot be used; a student that is sharded, of another dtype, or that cannot be
                copied; models that do not pair.
        """
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers {buffers!r} is neither 'copy' nor 'average'")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype} is none of float32, bfloat16 and float16")
        self.schedule = as_schedule(decay)
        self.updates = 0  # made so far, resumed ones included
        self._average_buffers, self._dtype = buffers == "average", dtype
        self._student = unwrap(student)
        _check(self._student)
        self.model = _copied(self._student) if model is None else model
        pairs = pair_parameters(self._student, self.model, "")
        device = pairs[0].student.device
        self.model.to(device).eval().requires_grad_(False)  # not before it is known to be no part of the student
        self._average: dict[str, Tensor] = {}
        self._copies: list[Tensor | None] = []
        for pair in pairs:
            self._average[pair.name] = pair.student.detach().to(torch.float32, copy=True)
            kept = dtype or pair.student.dtype
            own = self._average[pair.name] if kept is torch.float32 else pair.student.detach().to(kept, copy=True)
            pair.teacher.data = own
            self._copies.append(None if kept is torch.float32 else own)
        self._bind(self._student)

    def _bind(self, student: nn.Module) -> None:
        """Follow ``student`` from here on."""
        pairs = pair_parameters(student, self.model, "")
        self._buffers = Buffers(pair_buffers(student, self.model, ""), self._average_buffers)
        for buffer in self.model.buffers() if self._dtype else ():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(self._dtype)  # as module.to(dtype), beside parameters of that dtype
        # where the student's parameters hang: a loop may put others there, as load_state_dict(assign=True) does
        places = (pair.name.rpartition(".") for pair in pairs)
        self._places = [(student.get_submodule(path), key) for path, _, key in places]
        self._student = student

    def _followed(self) -> list[Tensor]:
        return [module._parameters[key].detach() for module, key in self._places]  # type: ignore[union-attr]

    @torch.no_grad()
    def follow(self, student: nn.Module | None = None) -> None:
        """One step towards the student; call it once for each optimizer step that was applied.

        Args:
            student: another module of the same names and shapes to follow from here on; its buffers are taken as they
                are.

        Raises:
            ValueError: a student that does not pair, or that has changed its shapes or its device.
        """
        if student is not None and (bare := unwrap(student)) is not self._student:
            _check(bare)
            self._bind(bare)
        decay, followed, average = decay_at(self.schedule, self.updates), self._followed(), list(self._average.values())
        if followed[0].device != average[0].device:
            raise ValueError(
                f"the student is on {followed[0].device} and its teacher on {average[0].device}: build the"
                " teacher after the student has been moved"
            )
        self._buffers.update(decay)  # first: it may refuse
        ema_update_(average, followed, decay, copies=self._copies if any(x is not None for x in self._copies) else None)
        self.updates += 1

    def attach(self, optimizer: Any) -> RemovableHandle:
        """follow() after each step of ``optimizer`` from here on, until the handle's ``remove()``.

        Steps that a GradScaler skips are none, nor are micro-batches that are accumulated: torch's hook runs where the
        optimizer has stepped. For optimizers of torch, bare or inside Accelerate's or Lightning's wrapper.

        Raises:
            ValueError: something else, such as a DeepSpeed optimizer.
        """
        inner = optimizer
        while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
            inner = inner.optimizer
        if not isinstance(inner, torch.optim.Optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} is no torch optimizer: call follow() after its steps, or take"
                " crossmask.engine.teacher.Teacher for a DeepSpeed engine"
            )

        def stepped(stepping: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
            # A fused optimizer leaves a step out itself, by what the GradScaler has left with it.
            found_inf = getattr(stepping, "found_inf", None)
            if found_inf is None or not bool(found_inf):
                self.follow()

        return inner.register_step_post_hook(stepped)

    @torch.no_grad()
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What :attr:`model` says, without a gradient."""
        return self.model(*arguments, **options)

    @contextmanager
    def in_student(self) -> Iterator[nn.Module]:
        """The student with the teacher's weights and buffers, for an evaluation that wants the student's own object.

        Its weights come back afterwards; what is written into them meanwhile is lost. Takes the student's memory once
        more.
        """
        own = list(self.model.buffers())
        of_student = [dict(self._student.named_buffers())[name] for name, _ in self.model.named_buffers()]
        followed, kept = [*self._followed(), *of_student], [*self._average.values(), *own]
        before = [x.clone() for x in followed]
        try:
            with torch.no_grad():
                for there, value in zip(followed, kept, strict=True):
                    there.copy_(value)
            yield self._student
        finally:
            with torch.no_grad():
                for there, value in zip(followed, before, strict=True):
                    there.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """``average``: parameters by name (tied ones once) in fp32 and persistent buffers, copied to the CPU; and
        ``updates``. What ``Teacher.state_dict()`` of a DeepSpeed run gives may stand in for ``average``."""
        held = self._average | dict(self._buffers.state())
        return {
            "average": {name: x.detach().to("cpu", copy=True) for name, x in held.items()},
            "updates": self.updates,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state_dict back.

        Raises:
            ValueError: before anything is changed: what is missing, has another shape or is not the teacher's.
        """
        if not {"average", "updates"} <= state.keys():
            raise ValueError("not the state of an EmaTeacher: it has no 'average' and 'updates'")
        given: Mapping[str, Tensor] = state["average"]
        shapes = {name: x.shape for name, x in self._average.items()} | self._buffers.shapes()
        for name, shape in shapes.items():
            if name not in given:
                raise ValueError(f"the saved teacher has no {name}")
            if given[name].shape != shape:
                raise ValueError(f"the saved teacher's {name} is {tuple(given[name].shape)}, this one's {tuple(shape)}")
        for name in given.keys() - shapes.keys():
            raise ValueError(f"the saved teacher has {name}, this one has not")
        for (name, average), own in zip(self._average.items(), self._copies, strict=True):
            average.copy_(given[name])
            if own is not None:
                own.copy_(average)
        self._buffers.load(given)
        self.updates = int(state["updates"])


def unwrap(student: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data parallelism's wrappers.

    Raises:
        ValueError: no module, or a DeepSpeed engine.
    """
    while isinstance(student, nn.Module):
        if type(student).__name__ == "DeepSpeedEngine":
            raise ValueError("the student is a DeepSpeed engine: crossmask.engine.teacher.Teacher follows its masters")
        if type(student).__name__ == "FullyShardedDataParallel":
            raise ValueError("the student is sharded by FSDP, and no rank has it whole: EmaTeacher cannot average it")
        if isinstance(inner := getattr(student, "_orig_mod", None), nn.Module):
            student = inner
        elif isinstance(student, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            student = student.module
        else:
            return student
    raise ValueError(f"the student is a {type(student).__name__}, not a torch.nn.Module")


def _check(student: nn.Module) -> None:
    devices = set()
    for name, parameter in student.named_parameters():
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):  # DTensor, ZeRO stage 3
            raise ValueError(f"the student's {name} is sharded, and no rank has it whole: EmaTeacher cannot average it")
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"the student's {name} is {parameter.dtype}: float32, bfloat16 and float16 are averaged")
        if parameter.is_meta:
            raise ValueError(f"the student's {name} is on meta and has no values: give it some, then build the teacher")
        devices.add(parameter.device)
    if len(devices) > 1:
        raise ValueError(f"the student lies on several devices ({', '.join(sorted(map(str, devices)))}); put it on one")


def _copied(student: nn.Module) -> nn.Module:
    """A deep copy whose forward is its own."""
    try:
        model = copy.deepcopy(student)
    except Exception as error:  # whatever a module may hold
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"the student cannot be copied ({reason}); give model=, one that is built like it") from None
    for name, module in model.named_modules():
        own = vars(module)
        if "_original_forward" in own:  # Accelerate's: it wraps the student's forward in autocast
            own.pop("forward", None)
            del own["_original_forward"]
        given = own.get("forward")
        if given is not None and not (isinstance(given, MethodType) and given.__self__ is module):
            raise ValueError(
                f"{name or type(module).__name__} has been given a forward of its own, which a copy would share with"
                " the student; give model=, one that is built like it"
            )
    return model
