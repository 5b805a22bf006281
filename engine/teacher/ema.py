"""The momentum teacher: an exponential moving average of the student, exact in fp32 under ZeRO stages 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from crossmask.kernels import ema_update_

from .schedule import momentum_at
from .zero import Pair, Shadow, autocast, parameter_dtype, shadow_of


class Teacher:
    """``theta' <- m theta' + (1 - m) theta`` over the student's fp32 masters; the teacher computes in its dtype.

    ``model`` is a plain module (built outside ``zero.Init``) whose parameter ``xyz`` follows the student's
    ``PREFIXxyz``; its own values are replaced by the student's at once. It is set to eval() and takes no gradient.
    Parameters that are frozen in the student are copied once; tied ones are averaged once; buffers are copied after
    each update.

    Use it as ``with teacher.weights() as model: model.encode_image(...)``. At ZeRO stages 0 to 2 ``teacher.model``
    can be called at any time; at stage 3 its weights exist only inside ``weights()``.
    """

    def __init__(
        self, engine: Any, model: nn.Module, momentum: float, warmup: bool = False, prefix: str = "model."
    ) -> None:
        """``engine``: the student's initialised DeepSpeed engine. ValueError where the two models do not pair."""
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum {momentum} is not in [0, 1)")
        self.engine, self.model, self.prefix = engine, model, prefix
        self.momentum, self.warmup = momentum, warmup
        self.updates = 0  # updates made so far, resumed ones included
        self._uses = 0
        model.to(engine.device, parameter_dtype(engine)).eval().requires_grad_(False)
        self._buffers = self._pair_buffers()
        self._shadow: Shadow = shadow_of(engine, self._pair_parameters())
        self._publish()

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the student. Call it once for each optimizer step that was applied, or use follow().

        No communication for the average itself; one all-gather of the weights at stages 1 and 2. Collective there.
        """
        decay = momentum_at(self.updates, self.momentum, self.warmup)
        ema_update_(self._shadow.tensors, self._shadow.masters(), decay)
        self.updates += 1
        self._publish()

    def follow(self) -> bool:
        """update(), if the ``engine.step()`` just called changed the student; True if so. Collective.

        False between accumulated micro-batches and where DeepSpeed skipped an overflowing step. The engine remembers
        its last ``step()``: do not call this for a batch that never came to one.
        """
        applied = bool(self.engine.was_step_applied())
        if applied:
            self.update()
        return applied

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The model, ready to be called: whole weights, no gradient, autocast where the student has it.

        Collective at stage 3 (one all-gather of all weights, freed afterwards); may be nested. At stages 0 to 2 one
        rank may use it alone.
        """
        if not self._uses:
            self._shadow.gather()
        self._uses += 1
        try:
            with torch.no_grad(), autocast(self.engine) or nullcontext():
                yield self.model
        finally:
            self._uses -= 1
            if not self._uses:
                self._shadow.release()

    def state_dict(self, everywhere: bool = False) -> dict[str, Tensor]:
        """Every parameter by its name (tied ones once): whole, fp32, on the CPU; persistent buffers in their dtype.

        Independent of ZeRO stage and world size. Collective; only rank 0 gets the tensors, the others an empty dict,
        unless ``everywhere``.
        """
        keep = everywhere or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        # clone: at stage 0 on the CPU these would be the live weights
        state = {name: tensor.cpu().clone() for name, tensor in self._shadow.full() if keep}
        if keep:
            persistent = self.model.state_dict().keys()
            state.update({name: own.cpu().clone() for name, own, _ in self._buffers if name in persistent})
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int = 0) -> None:
        """Takes back a state_dict of any stage and world size, the same on every rank. Collective.

        Load the student first: weights and buffers are published from what is loaded here. ValueError names a
        parameter that is missing or has another shape.
        """
        for name, shape in self._shapes.items():
            if name not in state:
                raise ValueError(f"the saved teacher has no parameter {name}")
            if tuple(state[name].shape) != shape:
                raise ValueError(f"the saved teacher's {name} is {tuple(state[name].shape)}, this one's is {shape}")
        self._shadow.load(state)
        self.updates = updates
        self._publish()
        for name, own, _ in self._buffers:
            if name in state:
                own.copy_(state[name])

    def _publish(self) -> None:
        self._shadow.publish()
        for _, own, students in self._buffers:
            own.copy_(students)

    def _pair_parameters(self) -> list[Pair]:
        students = dict(self.engine.module.named_parameters(remove_duplicate=False))
        pairs: dict[int, Pair] = {}  # by the teacher's parameter, so that tied ones count once
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            student = students.get(self.prefix + name)
            if student is None:
                raise ValueError(f"the teacher's {name} has no counterpart {self.prefix + name} in the student")
            if hasattr(parameter, "ds_id"):
                raise ValueError(f"the teacher's {name} is partitioned: build the teacher outside deepspeed.zero.Init")
            shape = tuple(getattr(student, "ds_shape", student.shape))
            if tuple(parameter.shape) != shape:
                raise ValueError(f"the teacher's {name} is {tuple(parameter.shape)}, the student's is {shape}")
            known = pairs.setdefault(id(parameter), Pair(name, student, parameter))
            if known.student is not student:
                raise ValueError(f"the teacher ties {name} to {known.name}, the student does not")
        if not pairs:
            raise ValueError("the teacher has no parameters")
        self._shapes = {pair.name: tuple(pair.teacher.shape) for pair in pairs.values()}
        return list(pairs.values())

    def _pair_buffers(self) -> list[tuple[str, Tensor, Tensor]]:
        students = dict(self.engine.module.named_buffers())
        buffers = []
        for name, buffer in self.model.named_buffers():
            if self.prefix + name not in students:
                raise ValueError(f"the teacher's buffer {name} has no counterpart in the student")
            buffers.append((name, buffer, students[self.prefix + name]))
        return buffers
