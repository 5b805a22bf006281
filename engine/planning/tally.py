"""Every kernel that a step launches, with what it reads, writes and computes, and the memory that lives meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from crossmask.kernels.roofline import Device, Work
from crossmask.kernels.roofline.attention import cross_attention_forward
from crossmask.kernels.roofline.attention_backward import cross_attention_backward
from crossmask.kernels.roofline.contrastive import soft_contrastive
from crossmask.kernels.roofline.cross_entropy import soft_cross_entropy
from crossmask.kernels.roofline.selection import max_similarity

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# statistics by whose gradients a backward is called, in its arguments' order
GRADIENTS = ("lse", "max_probability", "entropy", "key_attention", "query_attention")
NOTHING = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "scalar_tensor", "promote_types")


@dataclass(frozen=True)
class Rates:
    """How much of a GPU's peak a step reaches: assumptions, which decide most of a predicted time."""

    matrix: float = 0.6  # share of the peak that matrix products reach
    memory: float = 0.8  # share of the bandwidth that everything reaches
    network: float = 0.7  # share of the links that collectives reach
    launch: float = 5e-6  # seconds that no launch goes below: Python and the driver, where a GPU waits for them


@dataclass(frozen=True)
class Launched:
    part: str  # of the step
    name: str
    work: Work

    def seconds(self, device: Device, rates: Rates) -> float:
        work = self.work
        arithmetic = work.matrix_seconds(device) / rates.matrix + work.vector_seconds(device)
        return max(arithmetic, work.memory_seconds(device) / rates.memory, rates.launch)


class Tally(TorchDispatchMode):
    """Writes down what runs inside. An operation reads each of its inputs and writes each of its results once, as
    PyTorch's kernels do that are not fused; the matrix products of PyTorch's own operations are counted by
    ``torch.utils.flop_counter``, those of this package by ``crossmask.kernels.roofline``.
    """

    def __init__(self, hidden: int, patches: int, device: Device) -> None:
        """``hidden`` of ``patches``: how many a mask of patches, of which there are only shapes, selects. ``device``:
        whose tiles and partial sums this package's kernels take."""
        super().__init__()
        self.hidden, self.patches, self.device = hidden, patches, device
        self.part = "rest"
        self.launched: list[Launched] = []
        self.live = 0  # bytes of what was made inside and is still held
        self.highest: dict[str, int] = {}  # at most, by part
        self._held: set[int] = set()

    @property
    def most(self) -> int:
        return max(self.highest.values(), default=0)

    def leave_out(self, outside: Iterable[Tensor]) -> None:
        """Tensors that are there anyway: neither they nor views of them are counted as held."""
        self._held.update(x.untyped_storage()._cdata for x in outside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":  # what a host asks of a GPU's booleans: "is nothing masked?"
            return False
        if name == "nonzero":
            found: Any = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        elif name == "index" and (mask := _boolean(args[1])) is not None:
            rows = mask.numel() * self.hidden // self.patches if mask.shape[-1] == self.patches else mask.numel()
            found = args[0].new_empty((rows, *args[0].shape[mask.ndim :]))
        else:
            found = func(*args, **kwargs)
        inputs, outputs = list(tensors([args, kwargs])), list(tensors(found))
        self._hold(outputs)
        if name.split(".")[0] in NOTHING or _is_view(func, inputs, outputs):
            return found
        work = self._work(func, name, args, kwargs, found, inputs, outputs)
        self.launched.append(Launched(self.part, name, work))
        return found

    def _work(
        self, func: Any, name: str, args: Any, kwargs: Any, found: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> Work:
        if name in OURS:
            return OURS[name](args, self.device)
        vector, flops = float(sum(x.numel() for x in outputs)), {}
        if func._overloadpacket in flop_registry:
            count = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=found))
            flops = {_dtype(next(x for x in inputs if x.is_floating_point())): count}
        return Work(flops, vector, float(sum(map(size, inputs))), float(sum(map(size, outputs))))

    def _hold(self, outputs: Sequence[Tensor]) -> None:
        for x in outputs:
            storage = x.untyped_storage()
            key, count = storage._cdata, storage.nbytes()
            if count and key not in self._held:
                self._held.add(key)
                self.live += count
                self.highest[self.part] = max(self.highest.get(self.part, 0), self.live)
                weakref.finalize(storage, self._drop, key, count)

    def _drop(self, key: int, count: int) -> None:
        self._held.discard(key)
        self.live -= count


def tensors(value: Any) -> Iterator[Tensor]:
    """Of nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)


def size(x: Tensor) -> int:
    """Bytes that reading ``x`` moves: those of its storage where it is expanded."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if not outputs or func._schema.is_mutable:
        return False
    own = {x.untyped_storage()._cdata for x in inputs}
    return all(x.untyped_storage()._cdata in own for x in outputs)


def _boolean(index: Sequence[Tensor | None]) -> Tensor | None:
    return next((x for x in index if x is not None and x.dtype is torch.bool), None)


def _dtype(x: Tensor) -> str:
    return DTYPES.get(x.dtype, "fp32")


def _attention(args: Any, device: Device) -> Work:
    q, k, statistics = args[0], args[1], args[12]
    b, h, s, d = q.shape
    return cross_attention_forward(b, h, s, k.shape[2], d, _dtype(q), statistics or (), device.architecture)


def _attention_backward(args: Any, device: Device) -> Work:
    q, k = args[6], args[7]
    b, h, s, d = q.shape
    through = [name for name, gradient in zip(GRADIENTS, args[1:6], strict=True) if gradient is not None]
    sizes = (b, h, s, k.shape[2], d)
    return cross_attention_backward(*sizes, _dtype(q), through, device.architecture, device.multiprocessors)


def _contrast(first: int) -> Callable[[Any, Device], Work]:
    def work(args: Any, device: Device) -> Work:
        queries, keys = args[first], args[first + 1]
        queue, distillation = args[first + 6], args[first + 8]
        return soft_contrastive(
            len(queries), len(keys), 0 if queue is None else len(queue), queries.shape[1], _dtype(queries),
            None if queue is None else _dtype(queue), bool(distillation), backward=first > 0,
            architecture=device.architecture, multiprocessors=device.multiprocessors,
        )  # fmt: skip

    return work


def _vocabulary(first: int) -> Callable[[Any, Device], Work]:
    def work(args: Any, device: Device) -> Work:
        hidden, weight, bias, teacher = args[first], args[first + 1], args[first + 2], args[first + 4]
        return soft_cross_entropy(
            len(hidden), len(weight), hidden.shape[1], _dtype(hidden), bias is not None, teacher is not None,
            backward=first > 0, architecture=device.architecture,
        )  # fmt: skip

    return work


def _similarity(first: int) -> Callable[[Any, Device], Work]:
    def work(args: Any, device: Device) -> Work:
        image, text = args[first], args[first + 1]
        b, p, d = image.shape
        return max_similarity(
            b, p, text.shape[1], d, _dtype(image), backward=first > 0, architecture=device.architecture
        )

    return work


OURS: dict[str, Callable[[Any, Device], Work]] = {  # where an op's queries or features stand among its arguments
    "crossmask::cross_attention": _attention,
    "crossmask::cross_attention_backward": _attention_backward,
    "crossmask::soft_contrastive": _contrast(0),
    "crossmask::soft_contrastive_backward": _contrast(5),
    "crossmask::soft_cross_entropy": _vocabulary(0),
    "crossmask::soft_cross_entropy_backward": _vocabulary(3),
    "crossmask::max_similarity": _similarity(0),
    "crossmask::max_similarity_backward": _similarity(1),
}
