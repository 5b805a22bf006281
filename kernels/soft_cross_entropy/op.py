"""``crossmask::soft_cross_entropy`` for torch.library: schema, fake kernels, autograd.

The op is opaque: torch.compile and torch.export keep it as one node. What is not there comes back as an empty tensor,
because a schema has no optional results.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from .checks import check_labels
from .request import Inputs, Needed, accumulate

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, float distillation, Tensor? token_weights"
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # that autocast casts
_NO_SECOND = "soft_cross_entropy has no second derivatives; impl='reference' has"
_NO_TRANSFORMS = (
    "soft_cross_entropy runs under none of torch.func's transforms and not in forward mode: differentiate with "
    "torch.autograd, fold a dimension that vmap would map into the rows, or use impl='reference'"
)


@torch.library.custom_op(
    "crossmask::soft_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, str impl) -> (Tensor loss, Tensor argmax, Tensor lse, Tensor teacher_lse)",
)
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    distillation: float,
    token_weights: Tensor | None,
    impl: str,
) -> tuple[Tensor, ...]:
    given = (hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, distillation, token_weights)
    if len(hidden) == 0:
        return _results(*given, impl)
    check_labels(labels, len(weight))
    with no_autocast(hidden.device.type):
        return tuple(_module(impl, False).forward(Inputs(*given)))


@forward_op.register_fake
def _results(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Of the right shapes and dtypes, without values."""
    rows, dtype = len(hidden), accumulate(hidden.dtype)
    lse, teacher_lse = (hidden.new_empty((2, n), dtype=dtype) for n in (rows, rows if others[3] is not None else 0))
    return hidden.new_empty((rows,), dtype=dtype), hidden.new_empty((rows,), dtype=torch.int64), lse, teacher_lse


@torch.library.custom_op(
    "crossmask::soft_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor lse, Tensor teacher_lse, {_INPUTS}, bool for_hidden, bool for_weight, "
    "bool for_bias, str impl) -> (Tensor, Tensor, Tensor)",
)
def backward_op(
    grad_loss: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    distillation: float,
    token_weights: Tensor | None,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    given = (hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, distillation, token_weights)
    needed = Needed(for_hidden, for_weight, for_bias)
    if len(hidden) == 0:
        return tuple(x.zero_() for x in _gradients(grad_loss, lse, teacher_lse, *given, *needed, impl))
    with no_autocast(hidden.device.type):
        found = _module(impl, True).backward(grad_loss, Inputs(*given), lse, teacher_lse, needed)
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


@backward_op.register_fake
def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Of the right shapes and dtypes, without values."""
    tensors = zip(arguments[3:6], arguments[-4:-1], strict=True)
    hidden = arguments[3]
    return tuple(x.new_empty(x.shape) if needed and x is not None else hidden.new_empty(0) for x, needed in tensors)


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
    raise ValueError(f"crossmask::soft_cross_entropy has the implementations 'triton' and 'blockwise', not {impl!r}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.distillation, token_weights, ctx.impl = inputs
    _, argmax, lse, teacher_lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax, lse, teacher_lse)
    # the weights themselves, which ZeRO stage 3 gathers again for the backward; never where they lie now
    ctx.save_for_backward(lse, teacher_lse, *tensors, token_weights)


def _backward(ctx: Any, grad_loss: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if grad_loss is None or not any(needed):
        return (None,) * 10
    *saved, token_weights = ctx.saved_tensors
    found = torch.ops.crossmask.soft_cross_entropy_backward(
        grad_loss, *saved, ctx.distillation, token_weights, *needed, ctx.impl
    )
    return (*(x if need else None for x, need in zip(found, needed, strict=True)), *(None,) * 7)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    raise NotImplementedError(_NO_SECOND)


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
    raise NotImplementedError(_NO_TRANSFORMS)


forward_op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(_no_second_derivative)
forward_op.register_vmap(_no_vmap)
backward_op.register_vmap(_no_vmap)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """torch.func.grad would fail with an unrelated message, and forward mode would give tangents of zero."""
    if torch.compiler.is_compiling():
        return
    forward_mode = torch.autograd.forward_ad
    given = [x for x in tensors if x is not None]
    dual = forward_mode._current_level >= 0 and any(forward_mode.unpack_dual(x).tangent is not None for x in given)
    if dual or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_NO_TRANSFORMS)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products inside an implementation are in the dtypes it says."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def autocast(inputs: Inputs) -> Inputs:
    """What is multiplied, in autocast's dtype where it is on for its device; float64 stays, as in PyTorch's own ops."""
    device = inputs.hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    names = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")
    found = {name: x for name in names if (x := getattr(inputs, name)) is not None}
    return inputs._replace(
        **{name: x.to(dtype) for name, x in found.items() if x.dtype in _FLOATS and x.device.type == device}
    )
