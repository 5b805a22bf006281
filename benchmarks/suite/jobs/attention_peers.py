"""Cross-attention as others do it: a function for each of those that one would write or install instead of ours.

All take q (B, H, S, D), k and v (B, H, P, D), as a projection leaves them: (B, length, H, D) in memory, which is how
packages want them. They give outputs by name, shaped as those of ``crossmask.kernels.cross_attention``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.utils.checkpoint import checkpoint

from ..problem import Outputs, Solve, Unavailable

Attend = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor]"]  # output and lse
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def eager(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """With the weights materialised, in the inputs' dtype throughout."""
    return {"output": (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v}


def eager_statistics(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """All statistics from the materialised weights; products in the inputs' dtype, all else in float32 or more."""
    s = logits(q, k)
    p = s.softmax(-1)
    lse = s.logsumexp(-1)
    return {"output": p.to(v.dtype) @ v, "lse": lse} | weighed(s, p, lse)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, S, P), float32 for half precision."""
    s = q * q.shape[-1] ** -0.5 @ k.mT
    return s if s.dtype == torch.float64 else s.float()


def weighed(s: Tensor, p: Tensor, lse: Tensor) -> Outputs:
    """The statistics from logits, weights and log-sum-exp. The entropy -sum p log p is lse - sum p s."""
    return {
        "max_probability": p.amax(-1),
        "entropy": lse - (p * s).sum(-1),
        "key_attention": p.mean((1, 2)),
        "query_attention": s.softmax(2).mean((1, 3)),
    }


def head_by_head(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """The same for one head after the other: the weights of one head are in memory at a time, also in training."""
    found = []
    for head in zip(*(x.split(1, dim=1) for x in (q, k, v)), strict=True):
        if q.requires_grad:
            found.append(checkpoint(eager_statistics, *head, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(eager_statistics(*head))
    return {
        name: torch.stack([each[name] for each in found]).mean(0)
        if name in ("key_attention", "query_attention")
        else torch.cat([each[name] for each in found], 1)
        for name in found[0]
    }


def two_calls(attend: Attend, differentiable: bool) -> Solve:
    """The output by a fused kernel; then weights from its log-sum-exp, without a second softmax, and what they tell.

    Args:
        differentiable: the kernel's log-sum-exp has a gradient. Where it has none, training takes one of the second
            call's logits: with a constant, gradients through the weights would be wrong.
    """

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        output, lse = attend(q, k, v)
        if q.requires_grad and not differentiable:
            s = logits(q, k)
            lse = s.logsumexp(-1)
        else:  # logits rounded to half precision do not fit a lse of exact ones: weights would be percents off
            s = logits(q.float(), k.float())
        return {"output": output, "lse": lse} | weighed(s, (s - lse[..., None]).exp(), lse)

    return solve


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return {"output": F.scaled_dot_product_attention(q, k, v)}


def sdpa_by(backend: str, dtype: torch.dtype) -> Solve:
    if backend in ("flash", "cudnn"):
        half_alone(f"sdpa's {backend} backend", dtype)

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        with sdpa_kernel(SDPA[backend]):
            return sdpa(q, k, v)

    return solve


def sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """By what SDPA calls: PyTorch has no public function that also gives the log-sum-exp. It has no gradient."""
    if q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v), q  # lse is not looked at
    if q.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return output, lse
    if q.dtype == torch.float32:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        return output, lse[..., : q.shape[2]]  # padded to a multiple of 32
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return output, lse


def compiled(solve: Solve) -> Solve:
    return torch.compile(solve, dynamic=False)


def flex() -> Solve:
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: {"output": attend(q, k, v)}


def flex_statistics(device: torch.device) -> Solve:
    """Its auxiliary outputs. The largest logit has no gradient."""
    if device.type == "cpu":
        raise Unavailable("PyTorch's FlexAttention has no auxiliary outputs on a CPU")

    def solve(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        largest = not q.requires_grad
        output, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True, max_scores=largest))
        found = {"output": output, "lse": aux.lse}
        return found | {"max_probability": (aux.max_scores - aux.lse).exp()} if largest else found

    return torch.compile(solve, dynamic=False)


def flash(device: torch.device, dtype: torch.dtype) -> Attend:
    """flash-attn (FlashAttention-2). Its log-sum-exp takes gradients without a word, and ignores them."""
    gpu_alone("flash-attn", device)
    half_alone("flash-attn", dtype)
    attend = imported("flash_attn", "flash_attn_func", "flash-attn")

    def solve(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, lse, _ = attend(*(x.transpose(1, 2) for x in (q, k, v)), return_attn_probs=True)
        return output.transpose(1, 2), lse

    return solve


def flash4(device: torch.device, dtype: torch.dtype) -> Attend:
    """flash-attn-4, written in CuTe: forward from sm_80, backward from sm_90."""
    gpu_alone("flash-attn-4", device)
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        raise Unavailable("flash-attn-4 needs an NVIDIA GPU of compute capability 8.0 or more, training 9.0 (Hopper)")
    half_alone("flash-attn-4", dtype)
    attend = imported("flash_attn.cute", "flash_attn_func", "flash-attn-4")

    def solve(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), return_lse=True)
        return output.transpose(1, 2), lse

    return solve


def xformers(device: torch.device) -> Solve:
    gpu_alone("xformers", device)
    attend = imported("xformers.ops", "memory_efficient_attention", "xformers")
    return lambda q, k, v: {"output": attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)}


def output_of(attend: Attend) -> Solve:
    return lambda q, k, v: {"output": attend(q, k, v)[0]}


def gpu_alone(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{name} runs on GPUs alone")


def half_alone(name: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"{name} takes fp16 and bf16 alone")


def imported(module: str, function: str, package: str) -> Any:
    """A function of a package that need not be there. One that is there and broken raises as it does."""
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError):
        raise Unavailable(f"{package} is not installed: pip install {package}") from None
