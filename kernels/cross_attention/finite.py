"""Looking for NaN and infinity where it costs little: at what came out first, at the inputs only on suspicion."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def costs_nothing(q: Tensor) -> bool:
    """Whether looking at values is possible and waits for nothing: real tensors on a CPU, outside any tracing."""
    return (
        q.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and type(q) in (Tensor, torch.nn.Parameter)
    )


def check(q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor | None) -> None:
    """Raise a ValueError that names the input and the place where a value is not finite. Waits for the device.

    NaN in q or k shows in ``lse`` (B, H, S), in v only in the output, where a weight of 0 too makes NaN of it; an
    infinity of q or k that ``lse`` does not show is not seen. Without ``lse`` q and k are looked at: PyTorch's fused
    attention on CPUs makes zeros from NaN in q.
    """
    smaller = v if v.numel() < output.numel() else output
    scores = map(_sum_is_finite, (q, k)) if lse is None else [bool((lse < torch.inf).all())]  # NaN < inf is False
    if all(scores) and _sum_is_finite(smaller):
        return
    for name, x in (("q", q), ("k", k), ("v", v)):
        bad = (~torch.isfinite(x)).nonzero()
        if len(bad):
            place = tuple(bad[0].tolist())
            raise ValueError(
                f"{name} is not finite: {float(x[place])} at [sample, head, position, channel] = {list(place)}, "
                f"{len(bad)} such values in all. Find what produced it (torch.autograd.set_detect_anomaly), or pass "
                "check_finite=False to let it through"
            )


def _sum_is_finite(x: Tensor) -> bool:
    """False where any element is not; also where only the sum overflows, which the inputs then refute.

    PyTorch adds up half precision in float32 anyway; asked for float32 it takes three times as long.
    """
    return math.isfinite(x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None).item())
