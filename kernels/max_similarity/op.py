"""``crossmask::max_similarity`` for torch.library: schema, fake kernels, autograd; and which implementation runs.

The op is opaque: torch.compile and torch.export keep it as one node.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

Implementation = Literal["triton", "blockwise", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looks for it without importing it
_NO_SECOND = "max_similarity has no second derivatives; impl='reference' has"
_NO_TRANSFORMS = (
    "max_similarity runs under none of torch.func's transforms and not in forward mode: differentiate with "
    "torch.autograd, fold a dimension that vmap would map into the batch, or use impl='reference'"
)


def choose(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation that runs; ``impl`` None picks one."""
    if impl is None:
        return _pick(device.type, dtype)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {impl!r}; choose from {list(IMPLEMENTATIONS)}")
    if impl == "triton":
        _require_triton(device, dtype)
    return impl


def _pick(device_type: str, dtype: torch.dtype) -> str:
    if device_type == "cuda" and dtype in _TRITON_DTYPES:  # ROCm too is called cuda by PyTorch
        if HAS_TRITON:
            return "triton"
        warnings.warn(  # shown once, as warnings are
            "crossmask: max_similarity runs in plain PyTorch on this GPU because triton is not installed: "
            "pip install triton",
            stacklevel=4,
        )
    return "blockwise"


def _require_triton(device: torch.device, dtype: torch.dtype) -> None:
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton: pip install triton, or use impl='blockwise'")
    if dtype not in _TRITON_DTYPES:
        raise ValueError(f"impl='triton' takes float32, float16 and bfloat16, not {dtype}; use impl='blockwise'")
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"impl='triton' needs a CUDA or ROCm device, but the tokens are on {device}: use impl='blockwise', or "
            "start Python with TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter on a CPU"
        )


def implementation(device_type: str) -> str:
    """What ``impl=None`` picks for tensors on this device type; ``crossmask doctor`` shows it."""
    return _pick(device_type, torch.float32)


@torch.library.custom_op(
    "crossmask::max_similarity",
    mutates_args=(),
    schema="(Tensor image_tokens, Tensor text_tokens, Tensor? text_mask, str impl) -> (Tensor score, Tensor argmax)",
)
def forward_op(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    if image_tokens.shape[0] == 0:
        return _results(image_tokens, text_tokens, text_mask, impl)
    with no_autocast(image_tokens.device.type):
        found: tuple[Tensor, Tensor] = _module(impl, False).forward(image_tokens, text_tokens, text_mask)
        return found


@forward_op.register_fake
def _results(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """Of the right shapes and dtypes, without values."""
    shape = image_tokens.shape[:2]
    dtype = torch.float64 if image_tokens.dtype == torch.float64 else torch.float32
    return image_tokens.new_empty(shape, dtype=dtype), image_tokens.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op(
    "crossmask::max_similarity_backward",
    mutates_args=(),
    schema="(Tensor grad_score, Tensor image_tokens, Tensor text_tokens, Tensor argmax, str impl) -> (Tensor, Tensor)",
)
def backward_op(
    grad_score: Tensor, image_tokens: Tensor, text_tokens: Tensor, argmax: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    if image_tokens.shape[0] == 0:
        return _gradients(grad_score, image_tokens, text_tokens, argmax, impl)
    with no_autocast(image_tokens.device.type):
        found: tuple[Tensor, Tensor] = _module(impl, True).backward(grad_score, image_tokens, text_tokens, argmax)
        return found


@backward_op.register_fake
def _gradients(
    grad_score: Tensor, image_tokens: Tensor, text_tokens: Tensor, argmax: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return image_tokens.new_empty(image_tokens.shape), text_tokens.new_empty(text_tokens.shape)


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
    raise ValueError(f"crossmask::max_similarity has the implementations 'triton' and 'blockwise', not {impl!r}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image_tokens, text_tokens, _text_mask, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(image_tokens, text_tokens, output[1])


def _backward(ctx: Any, grad_score: Tensor | None, _grad_argmax: None) -> tuple[Tensor | None, ...]:
    if grad_score is None:
        return None, None, None, None
    found = torch.ops.crossmask.max_similarity_backward(grad_score, *ctx.saved_tensors, ctx.impl)
    needed = (x if need else None for x, need in zip(found, ctx.needs_input_grad[:2], strict=True))
    return (*needed, None, None)


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


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype where it is on for their device; float64 stays, as PyTorch's own ops leave it."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in _TRITON_DTYPES and x.device.type == device else x for x in tensors)
