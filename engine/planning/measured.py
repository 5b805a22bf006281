"""What a real run holds and sends, to hold a plan against: storages of tensors, collectives as torch sees them."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..teacher import gather, shadows
from ..training.pretrainer import Pretrainer
from .tally import tensors

FLAG = 16  # bytes: norms, overflow flags and the like are no traffic
OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}


def live_storages() -> dict[int, int]:
    """Address and bytes of every storage that a tensor of this process's Python objects has, gradients included."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, Tensor) and not one.is_meta:
            _note(found, (one, one.grad) if one.is_leaf else (one,))
    return found


def _note(found: dict[int, int], held: Iterable[Tensor | None]) -> None:
    for tensor in held:
        if tensor is not None:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()


def held_bytes(pretrainer: Pretrainer, before: dict[int, int]) -> dict[str, int]:
    """Bytes that a run holds between two steps, beyond what was there ``before`` it was built: of the teacher, the
    queue, the optimizer's moments, and of everything else (weights, masters, buffers of DeepSpeed)."""
    everything = {at: count for at, count in live_storages().items() if at not in before}
    teacher, queue = pretrainer.teacher, pretrainer.queue
    shadow = teacher._shadow
    owned = {
        "teacher": [*shadow.tensors, *(shadow.copies or []), *getattr(shadow, "_low", []), *teacher.model.parameters()],
        "queue": [queue._image, queue._text, queue._group_id, queue.pointer],
        "moments": list(_moments(pretrainer.engine.optimizer)),
    }
    owned["teacher"] += list(teacher.model.buffers())
    found: dict[str, int] = {}
    for name, parts in owned.items():
        storages: dict[int, int] = {}
        _note(storages, parts)
        found[name] = sum(everything.pop(at, 0) for at in storages)
    return {**found, "student": sum(everything.values())}


def _moments(optimizer: Any) -> Iterator[Tensor]:
    """Of whichever optimizer does the arithmetic, below DeepSpeed's."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in inner.state.values():
        yield from tensors(state)


class Wire(TorchDispatchMode):
    """Adds up the bytes that collectives are given inside, by (kind, operation): the longer side of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self._kind: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            operation = OPERATIONS.get(name, name)
            sides = [sum(x.numel() * x.element_size() for x in tensors(side)) for side in args[:2]]
            count = max(sides)
            if count > FLAG and operation in OPERATIONS.values():
                reduces = operation in ("all_reduce", "reduce_scatter")
                self.sent[self._kind or ("gradients" if reduces else "parameters"), operation] += count
        return func(*args, **(kwargs or {}))

    @contextmanager
    def listening(self) -> Iterator[Wire]:
        """Inside, what the teacher and the features send is told from what DeepSpeed sends."""

        def of(kind: str, call: Any) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                before, self._kind = self._kind, kind
                try:
                    return call(*args, **options)
                finally:
                    self._kind = before

            return run

        with ExitStack() as stack:
            for owner, name, kind in (
                (shadows, "start_gather", "teacher"),
                (gather, "_gather_into", "features"),
                (gather, "_scatter_sum", "features"),
            ):
                stack.enter_context(mock.patch.object(owner, name, of(kind, getattr(owner, name))))
            stack.enter_context(self)
            yield self


class Most(TorchDispatchMode):
    """The most bytes that live at once of what is made inside, by moment: the teacher's look, the student's forward and
    backward, the optimizer's step."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.most = 0, {"look": 0, "backward": 0, "step": 0}
        self._moment = ""
        self._held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors([args, kwargs])}  # whose views are nothing new
        for tensor in tensors(found):
            storage = tensor.untyped_storage()
            key, count = storage._cdata, storage.nbytes()
            if count and key not in self._held and key not in given:
                self._held.add(key)
                self.live += count
                weakref.finalize(storage, self._drop, key, count)
        if self._moment:
            self.most[self._moment] = max(self.most[self._moment], self.live)
        return found

    def _drop(self, key: int, count: int) -> None:
        self._held.discard(key)
        self.live -= count

    @contextmanager
    def listening(self, pretrainer: Pretrainer) -> Iterator[Most]:
        """Inside, the moments of ``pretrainer``'s steps are told apart."""

        def of(moment: str, call: Any) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                self._moment = moment
                try:
                    return call(*args, **options)
                finally:
                    self._moment = ""

            return run

        engine, shadow = pretrainer.engine, pretrainer.teacher._shadow
        with ExitStack() as stack:
            for owner, name, moment in (
                (shadow, "gather", "look"),
                (engine, "forward", "backward"),
                (engine, "backward", "backward"),
                (engine, "step", "step"),
            ):
                stack.enter_context(mock.patch.object(owner, name, of(moment, getattr(owner, name))))
            stack.enter_context(self)
            yield self


def measure(pretrainer: Pretrainer, before: dict[int, int], warm_up: int = 2) -> dict[str, Any]:
    """What a step sends, after some that settle DeepSpeed's buffers and order, the most that another one holds beyond
    what is held between steps, and that."""
    for _ in range(warm_up):
        pretrainer.step()
    with Wire().listening() as wire:
        pretrainer.step()
        _ = pretrainer.teacher.model  # waits for what is under way
    with Most().listening(pretrainer) as most:
        pretrainer.step()
        _ = pretrainer.teacher.model
    held = held_bytes(pretrainer, before)
    alone = (
        not dist.is_initialized() or dist.get_world_size() == 1
    )  # DeepSpeed then calls collectives that send nothing
    sent = {} if alone else {f"{kind} {operation}": n for (kind, operation), n in sorted(wire.sent.items())}
    return {"held": held, "sent": sent, "most": most.most}
