"""Attention heads that are switched off for a step: HeadMask.

Sun et al. 2020, "Alleviating the inequality of attention heads for neural machine translation": with heads off at
random, or the most important ones off, the others have to learn too. A reconstruction: the paper switches off a number
of heads of the whole network, here it is the same number in each layer, and no layer loses all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossmask.kernels import topk_mask

from ..recipe import HeadsSection
from .draws import Draws

_TIE = 1e-30  # tells apart what has no importance at all; lost in rounding beside any that has


def head_masks(
    section: HeadsSection, layers: int, heads: int, draws: Draws, importance: Tensor | None = None
) -> Tensor | None:
    """A recipe's heads: bool, True = on, (layers, H) where ``draws`` is of one row, which holds for all samples, else
    (layers, B, H); None where all are on.

    Args:
        importance: (layers, H), for ``kind: importance``.
    """
    if section.kind == "none":
        return None
    purposes = [f"heads of layer {layer}" for layer in range(layers)]
    if section.kind == "random":
        masks = torch.stack([random_heads(heads, section.count, draws, purpose) for purpose in purposes])
        return masks[:, 0] if len(draws.index) == 1 else masks
    if importance is None or importance.shape != (layers, heads):
        given = "none" if importance is None else tuple(importance.shape)
        raise ValueError(f"heads of kind importance need an importance of shape {(layers, heads)}, got {given}")
    ties = torch.stack([draws.uniform(purpose, heads)[0] for purpose in purposes])
    return important_heads(importance.double() + _TIE * ties, section.count)


def random_heads(heads: int, count: int, draws: Draws, purpose: str = "heads") -> Tensor:
    """(B, H) bool, True = on: ``count`` heads of each sample are off, all equally likely."""
    _leaves_one(count, heads)
    return ~topk_mask(draws.uniform(purpose, heads), k=count)


def important_heads(importance: Tensor, count: int) -> Tensor:
    """(H,) or (layers, H) bool, True = on: the ``count`` most important heads are off, of equals the first.

    Args:
        importance: (H,) or (layers, H) floating, as :func:`head_importance` gives it.
    """
    _leaves_one(count, importance.shape[-1])
    return ~topk_mask(importance.reshape(-1, importance.shape[-1]), k=count).view(importance.shape)


def head_importance(output: Tensor, gradient: Tensor) -> Tensor:
    """How much the loss would change without each head, to first order.

    Michel et al. 2019, "Are sixteen heads really better than one?": I_h = E_x |output_h(x) . dL/d output_h(x)|.

    Args:
        output: (B, H, S, D) what the heads give, before they are mixed.
        gradient: (B, H, S, D) of the loss with respect to it.

    Returns:
        (H,) float32: the mean over samples of |sum over queries and width|.
    """
    return (output.float() * gradient.float()).sum((2, 3)).abs().mean(0)


def _leaves_one(count: int, heads: int) -> None:
    if not 0 <= count < heads:
        raise ValueError(f"count ({count}) must leave one of the {heads} heads on: pass 0 to {heads - 1}")
