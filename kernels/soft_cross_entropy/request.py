"""What an implementation is given and hands back.

Every implementation is a module with two functions over these types, and none imports another:

    forward(inputs) -> Forward
    backward(grad_loss, inputs, lse, teacher_lse, needed) -> Gradients

A log-sum-exp is kept as two numbers, the largest logit and the log of the sum of exp less it: (z - largest) is exact
where it matters, and so a probability is as exact as its logit however large that is.

N rows, V words, W width. Statistics are float32, or float64 for float64 inputs. N, V and W are positive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """One call, checked. Without a teacher ``distillation`` is 0 and everything of the teacher None."""

    hidden: Tensor  # (N, W)
    weight: Tensor  # (V, W)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,) int64
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    distillation: float
    token_weights: Tensor | None  # (N,) any float dtype


class Forward(NamedTuple):
    loss: Tensor  # (N,)
    argmax: Tensor  # (N,) int64
    lse: Tensor  # (2, N) of a row's logits: the largest, and the log of the sum of exp less it
    teacher_lse: Tensor  # the same of the teacher's; (2, 0) without one


class Needed(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Of the inputs' dtypes, contiguous; None where it is not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_factors(grad_loss: Tensor, token_weights: Tensor | None) -> Tensor:
    """(N,) contiguous, what every row's gradient is multiplied by."""
    return (grad_loss if token_weights is None else grad_loss * token_weights.to(grad_loss.dtype)).contiguous()
