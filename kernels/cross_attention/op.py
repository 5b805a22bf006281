"""``crossmask::cross_attention`` for torch.library: schema, fake kernels, autograd, autocast, and no vmap.

The op is opaque: torch.compile and torch.export keep it as one node. What was not asked for comes back as an empty
tensor, because a schema has no optional results.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import finite
from .request import Forward, Gradients, Masks, Request

_MASKS = "Tensor? key_mask, Tensor? query_mask, Tensor? head_mask, Tensor? link_mask, Tensor? dropout_seed"
_REQUEST = "float scale, float dropout_p, bool per_head, bool normalise, str[] statistics, str impl"
_NO_SECOND = "cross_attention has no second derivatives; impl='reference' has"


def request(scale: float, dropout_p: float, per_head: bool, normalise: bool, statistics: Sequence[str]) -> Request:
    flags = {name: True for name in statistics if name != "lse"}  # lse is always there
    return Request(scale, dropout_p, per_head, normalise=normalise, **flags)


@torch.library.custom_op(
    "crossmask::cross_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_MASKS}, {_REQUEST}, bool check_finite) -> "
    "(Tensor output, Tensor lse, Tensor max_probability, Tensor entropy, Tensor key_attention, "
    "Tensor query_attention, Tensor key_max, Tensor column_lse)",
)
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    head_mask: Tensor | None,
    link_mask: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    dropout_p: float,
    per_head: bool,
    normalise: bool,
    statistics: Sequence[str],
    impl: str,
    check_finite: bool,
) -> tuple[Tensor, ...]:
    asked = request(scale, dropout_p, per_head, normalise, statistics)
    masks = Masks(key_mask, query_mask, head_mask, link_mask)
    if q.shape[0] == 0:
        return _empty(q, k, asked)
    with no_autocast(q.device.type):
        found = _module(impl, backward=False).forward(q, k, v, masks, dropout_seed, asked)
    if check_finite:
        finite.check(q, k, v, found.output, found.lse)
    return tuple(q.new_empty(0, dtype=found.lse.dtype) if x is None else x for x in found)


@forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _empty(q, k, request(*others[5:10]))


def _empty(q: Tensor, k: Tensor, asked: Request) -> tuple[Tensor, ...]:
    """Results of the right shapes, dtypes and strides, without values."""
    B, H, S, _ = q.shape
    P = k.shape[2]
    heads = (B, H) if asked.per_head else (B,)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    def empty(wanted: bool, *shape: Any) -> Tensor:
        return q.new_empty(shape if wanted else 0, dtype=dtype)

    return (
        torch.empty_like(q),
        empty(True, B, H, S),
        empty(asked.max_probability, B, H, S),
        empty(asked.entropy, B, H, S),
        empty(asked.key_attention, *heads, P),
        empty(asked.query_attention, *heads, S),
        empty(asked.key_max, *heads, P),
        empty(asked.query_attention, B, H, P),
    )


@torch.library.custom_op(
    "crossmask::cross_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_lse, Tensor? grad_max_probability, Tensor? grad_entropy, "
    "Tensor? grad_key_attention, Tensor? grad_query_attention, Tensor q, Tensor k, Tensor v, "
    "Tensor output, Tensor lse, Tensor max_probability, Tensor entropy, Tensor column_lse, "
    f"{_MASKS}, {_REQUEST}) -> (Tensor, Tensor, Tensor)",
)
def backward_op(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grad_max_probability: Tensor | None,
    grad_entropy: Tensor | None,
    grad_key_attention: Tensor | None,
    grad_query_attention: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    max_probability: Tensor,
    entropy: Tensor,
    column_lse: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    head_mask: Tensor | None,
    link_mask: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    dropout_p: float,
    per_head: bool,
    normalise: bool,
    statistics: Sequence[str],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    asked = request(scale, dropout_p, per_head, normalise, statistics)
    found = Forward(
        output,
        lse,
        max_probability=max_probability if asked.max_probability else None,
        entropy=entropy if asked.entropy else None,
        column_lse=column_lse if asked.query_attention else None,
    )
    gradients = Gradients(
        grad_output, grad_lse, grad_max_probability, grad_entropy, grad_key_attention, grad_query_attention
    )
    masks = Masks(key_mask, query_mask, head_mask, link_mask)
    if q.shape[0] == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with no_autocast(q.device.type):
        return _module(impl, backward=True).backward(gradients, q, k, v, found, masks, dropout_seed, asked)


@backward_op.register_fake
def _(grad_output: Tensor, *others: Any) -> tuple[Tensor, ...]:
    q, k, v = others[5:8]
    return tuple(torch.empty_like(x) for x in (q, k, v))


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
    raise ValueError(f"crossmask::cross_attention has the implementations 'triton' and 'blockwise', not {impl!r}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, key_mask, query_mask, head_mask, link_mask, dropout_seed, *request_fields, _check_finite = inputs
    found = Forward(*output)
    asked = request(*request_fields[:-1])
    told = {name: getattr(found, name) for name in ("max_probability", "entropy", "key_attention", "query_attention")}
    ctx.set_materialize_grads(False)  # a statistic without a gradient costs its backward nothing
    constant = (x for name, x in told.items() if not getattr(asked, name))
    ctx.mark_non_differentiable(found.key_max, found.column_lse, *constant)
    ctx.save_for_backward(
        *(q, k, v, found.output, found.lse, found.max_probability, found.entropy, found.column_lse),
        *(key_mask, query_mask, head_mask, link_mask, dropout_seed),
    )
    ctx.request_fields = request_fields


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    by_output, by_lse, by_max, by_entropy, by_key, by_query = gradients[:6]
    nothing = (None,) * 12
    if all(gradient is None for gradient in gradients[:6]):
        return (None, None, None, *nothing)
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    if by_output is None:
        by_output = torch.zeros_like(saved[3])
    found = torch.ops.crossmask.cross_attention_backward(
        by_output, by_lse, by_max, by_entropy, by_key, by_query, *saved, *ctx.request_fields
    )
    needed = (x if need else None for x, need in zip(found, ctx.needs_input_grad[:3], strict=True))
    return (*needed, *nothing)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    raise NotImplementedError(_NO_SECOND)


forward_op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(_no_second_derivative)


_NO_TRANSFORMS = (
    "cross_attention runs under none of torch.func's transforms and not in forward mode: differentiate with "
    "torch.autograd, fold a dimension that vmap would map into the batch, or use impl='reference'"
)


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
    raise NotImplementedError(_NO_TRANSFORMS)


def refuse_transforms(*tensors: Tensor) -> None:
    """torch.func.grad would fail with an unrelated message, and forward mode would give tangents of zero."""
    if torch.compiler.is_compiling():
        return
    forward_mode = torch.autograd.forward_ad
    dual = forward_mode._current_level >= 0 and any(forward_mode.unpack_dual(x).tangent is not None for x in tensors)
    if dual or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_NO_TRANSFORMS)


forward_op.register_vmap(_no_vmap)
backward_op.register_vmap(_no_vmap)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products inside an implementation are in the dtypes it says."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _register_autocast(device_type: str) -> None:
    """Cast to the dtype that autocast has at the time of the call; torch.library's own registration fixes one."""
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device_type))
    overload = torch.ops.crossmask.cross_attention.default

    def cast(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
        q, k, v = autocast(q, k, v)  # before the key is excluded: that is what switches autocast off
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            found: tuple[Tensor, ...] = overload(q, k, v, *others)
            return found

    overload.py_impl(key)(cast)
    _library.impl("cross_attention", lambda _keys, *arguments: cast(*arguments), key.name, with_keyset=True)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in autocast's dtype where it is on for their device; float64 stays, as PyTorch's own ops leave it."""
    device = q.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    ours = (torch.float32, torch.float16, torch.bfloat16)
    q, k, v = (x.to(dtype) if x.dtype in ours and x.device.type == device else x for x in (q, k, v))
    return q, k, v


_library = torch.library.Library("crossmask", "FRAGMENT")
for _device_type in ("cpu", "cuda"):
    _register_autocast(_device_type)
