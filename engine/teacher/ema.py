"""The momentum teacher: an exponential moving average of the student, exact in fp32 under ZeRO stages 0 to 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .buffers import Buffers
from .pairing import pair_buffers, pair_parameters
from .schedule import Schedule, as_schedule, decay_at
from .zero import autocast, check_engine, outside_zero_init, shadow_of


class Teacher:
    """``theta' <- m theta' + (1 - m) theta`` over the student's fp32 masters; the teacher computes in its dtype.

    The teacher's parameter ``xyz`` follows the student's ``PREFIXxyz``, from the student's values of now. It is in eval
    mode and takes no gradient. Parameters that no optimizer moves are copied once; tied ones are averaged once.

    Use it as ``with teacher.weights() as model: model.encode_image(...)``. At stages 0 to 2 :attr:`model` will do as
    well, without the no_grad and the autocast of ``weights()``; at stage 3 its weights exist only inside ``weights()``.
    At stages 1 and 2 an update starts the all-gather of the new weights and returns: it runs beside whatever comes
    next, until :attr:`model`, ``weights()`` or ``state_dict()`` is asked for, which wait. A module kept from before the
    update does not: ask for it again. A backward pass through the teacher's weights of before an update is refused by
    torch.

    On a GPU everything is enqueued on the stream that is current at the call: make the calls, and use the weights, on
    the stream that trains the student, or let the streams wait for one another.
    """

    @torch.inference_mode(False)  # a caller's would make the shadow read-only for the updates to come
    def __init__(
        self,
        student_engine: Any,
        build_model: Callable[[], nn.Module],
        decay: float | Schedule,
        *,
        buffers: Literal["copy", "average"] = "copy",
        prefix: str = "model.",
    ) -> None:
        """Collective at stages 1 and 2.

        Args:
            student_engine: the student's initialised DeepSpeed engine.
            build_model: builds the teacher's model, a new one; its values do not matter, so it may build on ``meta``,
                which spares them. Called once, outside ``zero.Init``, and torch's random generators are afterwards as
                they were.
            decay: in [0, 1), or a schedule: the updates made so far -> the decay of the next one, in [0, 1].
            buffers: copied at each update, or floating ones averaged in fp32; each rank follows its own student's.
                The average of one that is not persistent begins anew when a run is resumed.
            prefix: of the student's names.

        Raises:
            ValueError: an argument that cannot be used, or models that do not pair.
            RecipeError: a DeepSpeed configuration that keeps no fp32 masters within reach, or hides skipped steps.
        """
        check_engine(student_engine)
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers {buffers!r} is neither 'copy' nor 'average'")
        self.engine, self.schedule, self.prefix = student_engine, as_schedule(decay), prefix
        self.updates = 0  # updates made so far, resumed ones included
        self._uses = 0
        self._followed = student_engine.global_steps
        self._model = _build(build_model, student_engine.device)
        pairs = pair_parameters(student_engine.module, self._model, prefix)
        slots = pair_buffers(student_engine.module, self._model, prefix)
        self._model.eval().requires_grad_(False)  # not before it is known to be no part of the student
        self._buffers = Buffers(slots, buffers == "average")
        self._shapes = {pair.name: pair.teacher.shape for pair in pairs} | self._buffers.shapes()
        self._shadow = shadow_of(student_engine, pairs)

    @property
    def model(self) -> nn.Module:
        """The teacher's module, as it is: no ``no_grad``, no autocast, and at stage 3 its weights are empty here.

        Waits for weights that are still under way.
        """
        self._shadow.wait()
        return self._model

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the student. Call it once for each optimizer step that was applied, or use follow().

        No communication for the average itself; at stages 1 and 2 it starts one all-gather of the weights, collective.
        """
        decay = decay_at(self.schedule, self.updates)
        self._buffers.update(decay)  # first: it may refuse
        self._shadow.update(decay)
        self.updates += 1

    def follow(self) -> bool:
        """update(), if ``engine.step()`` has changed the student since the last call; True if so. Collective.

        False between accumulated micro-batches and where DeepSpeed skipped an overflowing step; at stage 0 in fp32 only
        the engines of :func:`.zero.initialize_untouched` skip one.
        """
        steps = self.engine.global_steps
        applied = bool(self.engine.was_step_applied()) and steps != self._followed
        self._followed = steps
        if applied:
            self.update()
        return applied

    @contextmanager
    def weights(self, *, dropout: bool = False) -> Iterator[nn.Module]:
        """The model, ready to be called: whole weights, no gradient, autocast where the student has it.

        ``dropout``: in train mode, so that dropout drops, as ALBEF's public code leaves its momentum model; batch norms
        stay in eval mode. Outside, and inside a nested use without it, the model is in eval mode.
        Collective at stage 3: one all-gather of all weights at each outermost use, which are held whole and freed
        afterwards. May be nested. At stages 0 to 2 one rank may use it alone.
        """
        if not self._uses:
            self._shadow.gather()
        self._uses += 1
        outer = self._model.training
        _drop(self._model, dropout)
        try:
            with torch.no_grad(), autocast(self.engine) or nullcontext():
                yield self.model
        finally:
            _drop(self._model, outer)
            self._uses -= 1
            if not self._uses:
                self._shadow.release()

    def state_dict(self, everywhere: bool = False) -> dict[str, Tensor]:
        """Parameters by name (tied ones once), whole, fp32, on the CPU; persistent buffers, those averaged in fp32.

        Independent of ZeRO stage and world size. Collective; only rank 0 gets the tensors, the others an empty dict,
        unless ``everywhere``.
        """
        keep = everywhere or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        # copies: on the CPU these may be the live weights
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._shadow.full() if keep}
        if keep:
            state |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._buffers.state()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int = 0) -> None:
        """Takes back a state_dict of any stage and world size, the same on every rank. Collective.

        Load the student first. ValueError, before anything is changed, names what is missing, has another shape or is
        not the teacher's.
        """
        for name, shape in self._shapes.items():
            if name not in state:
                raise ValueError(f"the saved teacher has no {name}")
            if state[name].shape != shape:
                raise ValueError(
                    f"the saved teacher's {name} is {tuple(state[name].shape)}, this one's is {tuple(shape)}"
                )
        for name in state.keys() - self._shapes.keys():
            raise ValueError(f"the saved teacher has {name}, this one has not")
        self._shadow.load(state)
        self._shadow.refresh()
        self._buffers.load(state)
        self.updates, self._followed = updates, self.engine.global_steps


def _drop(model: nn.Module, on: bool) -> None:
    """Train mode, but for batch norms, whose running means are the student's to move; or eval mode."""
    if model.training == on:
        return
    model.train(on)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _build(build_model: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    if isinstance(build_model, nn.Module) or not callable(build_model):
        raise ValueError(
            f"build_model is a {type(build_model).__name__}: give a function that builds the model, lambda: Model(...)"
        )
    accelerator = {} if device.type == "cpu" else {"device_type": device.type}
    with outside_zero_init(), torch.random.fork_rng([device] if accelerator else [], **accelerator):
        model = build_model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"build_model returned a {type(model).__name__}, not a torch.nn.Module")
    for parameter in model.parameters():
        if parameter.is_meta:
            torch.utils.swap_tensors(parameter, nn.Parameter(torch.empty_like(parameter, device="cpu")))  # keeps ties
    for buffer in model.buffers():
        if buffer.is_meta:
            torch.utils.swap_tensors(buffer, torch.empty_like(buffer, device="cpu"))
    return model
