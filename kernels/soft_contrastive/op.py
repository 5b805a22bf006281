"""``crossmask::soft_contrastive`` for torch.library: schema, fake kernels, autograd; and which implementation runs.

The op is opaque: torch.compile and torch.export keep it as one node.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from .request import Contrast, Forward, accumulation

_INPUTS = (
    "Tensor queries, Tensor keys, Tensor teacher_queries, Tensor query_groups, Tensor key_groups, Tensor temperature, "
    "Tensor? queue, Tensor? queue_groups, float distillation"
)
_NO_SECOND = "soft_contrastive has no second derivatives; impl='reference' has"
_NO_TRANSFORMS = (
    "soft_contrastive runs under none of torch.func's transforms and not in forward mode: differentiate with "
    "torch.autograd, or use impl='reference'"
)


@torch.library.custom_op(
    "crossmask::soft_contrastive",
    mutates_args=(),
    schema=f"({_INPUTS}, str impl) -> (Tensor loss, Tensor d_temperature, Tensor d_queries, Tensor lse, "
    "Tensor teacher_lse, Tensor matches)",
)
def forward_op(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    temperature: Tensor,
    queue: Tensor | None,
    queue_groups: Tensor | None,
    distillation: float,
    impl: str,
) -> tuple[Tensor, ...]:
    if len(queries) == 0:
        return _rows(queries, impl)
    contrast = Contrast(
        queries, keys, teacher_queries, query_groups, key_groups, temperature, queue, queue_groups, distillation
    )
    with no_autocast(queries.device.type):
        return tuple(_module(impl, False).forward(contrast))


@forward_op.register_fake
def _(queries: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _rows(queries, others[-1])


def _rows(queries: Tensor, impl: str) -> tuple[Tensor, ...]:
    """Of the right shapes and dtypes, without values."""
    rows, width = queries.shape
    dtype = accumulation(queries.dtype)
    loss, d_temperature, lse, teacher_lse, matches = (queries.new_empty((rows,), dtype=dtype) for _ in range(5))
    d_queries = queries.new_empty((rows if impl == "blockwise" else 0, width), dtype=dtype)
    return loss, d_temperature, d_queries, lse, teacher_lse, matches


@torch.library.custom_op(
    "crossmask::soft_contrastive_backward",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor d_queries, Tensor lse, Tensor teacher_lse, Tensor matches, "
    f"{_INPUTS}, bool for_queries, bool for_keys, str impl) -> (Tensor, Tensor)",
)
def backward_op(
    grad_loss: Tensor,
    d_queries: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    matches: Tensor,
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    temperature: Tensor,
    queue: Tensor | None,
    queue_groups: Tensor | None,
    distillation: float,
    for_queries: bool,
    for_keys: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if len(queries) == 0:
        none, d_keys = _gradients(queries, keys, for_queries, for_keys)
        return none, d_keys.zero_()
    contrast = Contrast(
        queries, keys, teacher_queries, query_groups, key_groups, temperature, queue, queue_groups, distillation
    )
    found = Forward(grad_loss, grad_loss, d_queries, lse, teacher_lse, matches)  # no loss is looked at
    with no_autocast(queries.device.type):
        gradients: tuple[Tensor, Tensor] = _module(impl, True).backward(
            grad_loss, contrast, found, for_queries, for_keys
        )
        return gradients


@backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    queries, keys = arguments[5:7]
    return _gradients(queries, keys, *arguments[-3:-1])


def _gradients(queries: Tensor, keys: Tensor, for_queries: bool, for_keys: bool) -> tuple[Tensor, Tensor]:
    """Of the right shapes and dtypes, without values."""
    width = queries.shape[1]
    shapes = ((len(x) if wanted else 0, width) for x, wanted in ((queries, for_queries), (keys, for_keys)))
    d_queries, d_keys = (queries.new_empty(shape) for shape in shapes)
    return d_queries, d_keys


def _module(impl: str, backward: bool) -> Any:
    """The module whose ``forward`` or ``backward`` runs. Triton is imported when it is first needed."""
    if impl == "blockwise":
        from . import blockwise

        return blockwise
    if impl == "triton" and not backward:
        from .triton import launch_forward

        return launch_forward
    if impl == "triton":
        from .triton import launch_backward

        return launch_backward
    raise ValueError(f"crossmask::soft_contrastive has the implementations 'triton' and 'blockwise', not {impl!r}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.distillation, ctx.impl = inputs
    kept = output[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*kept, *tensors)


def _backward(ctx: Any, grad_loss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 10
    if grad_loss is None:
        return tuple(gradients)
    d_temperature, *saved = ctx.saved_tensors
    for_queries, for_keys = ctx.needs_input_grad[:2]
    if for_queries or for_keys:
        found = torch.ops.crossmask.soft_contrastive_backward(
            grad_loss, *saved, ctx.distillation, for_queries, for_keys, ctx.impl
        )
        gradients[0] = found[0] if for_queries else None
        gradients[1] = found[1] if for_keys else None
    if ctx.needs_input_grad[5]:
        gradients[5] = _TemperatureGradient.apply(grad_loss, d_temperature)
    return tuple(gradients)


class _TemperatureGradient(torch.autograd.Function):
    """sum_i of the incoming gradients times dL_i/dtau; further derivatives are refused, as those of the queries are."""

    @staticmethod
    def forward(ctx: Any, grad_loss: Tensor, d_temperature: Tensor) -> Tensor:
        return (grad_loss * d_temperature).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise NotImplementedError(_NO_SECOND)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    raise NotImplementedError(_NO_SECOND)


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
    raise NotImplementedError(_NO_TRANSFORMS)


forward_op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(_no_second_derivative)
forward_op.register_vmap(_no_vmap)
backward_op.register_vmap(_no_vmap)


def refuse_transforms(*tensors: Tensor) -> None:
    """torch.func.grad would fail with an unrelated message, and forward mode would give tangents of zero."""
    if torch.compiler.is_compiling():
        return
    forward_mode = torch.autograd.forward_ad
    dual = forward_mode._current_level >= 0 and any(forward_mode.unpack_dual(x).tangent is not None for x in tensors)
    if dual or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_NO_TRANSFORMS)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products inside an implementation are in the dtypes it says."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()
