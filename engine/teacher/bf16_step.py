"""DeepSpeed's bf16 step of ZeRO stage 0 with fewer passes over the gradients."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch


def spare_passes(optimizer: Any) -> None:
    """Gives a bf16 ``FP16_UnfusedOptimizer`` a ``step`` that does the same in half the memory traffic.

    DeepSpeed's reads the gradients for their largest and again for their smallest value, copies them to fp32 for their
    norm, copies them to fp32 again for Adam and multiplies that by one. Here one pass finds the norm, which is not
    finite where a gradient is not, and one copies; each bf16 gradient is freed as its copy is made. At 218 M parameters
    on one core of an EPYC this takes 0.25 s off a step of 0.6 s. The gradients are already the same on every rank.
    """
    optimizer.step = MethodType(_step, optimizer)


@torch.no_grad()
def _step(self: Any, closure: None = None) -> bool:
    groups = zip(self.fp32_groups, self.fp16_groups, strict=True)
    pairs = [pair for masters, weights in groups for pair in zip(masters, weights, strict=True)]
    gradients = [weight.grad for _, weight in pairs if weight.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    if not math.isfinite(norm):
        skipped: bool = self._skip_invalid_grad_norm()
        return skipped
    self.overflow, self._global_grad_norm = False, norm
    self._update_scale(False)
    for master, weight in pairs:
        master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.to(master.dtype)
        weight.grad = None
    if self.clip_grad > 0.0:
        self.unscale_and_clip_grads(norm)
    self.optimizer.step()
    for master, weight in pairs:
        master.grad = None
        weight.copy_(master)
    return False
