"""Exact top-k selection as a mask: the public face of the op."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..cross_attention.finite import costs_nothing
from . import op, reference
from .checks import check_amount, check_gumbel, check_scores, check_valid
from .dispatch import Implementation, announce, choose, implementation
from .request import Request, fixed_point, largest_share

__all__ = ["Selection", "implementation", "topk_mask"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class Selection:
    """What :func:`topk_mask` returns where it is asked for indices, too."""

    mask: Tensor  # (B, N) bool
    indices: Tensor  # (B, K) int64 positions of the selected, ascending, then -1
    count: Tensor  # (B,) int64 selected
    nan: Tensor  # (B,) int64 NaN among the valid scores, after the mean over partials


@overload
def topk_mask(
    scores: Tensor,
    *,
    k: int | Tensor | None = None,
    ratio: float | Tensor | None = None,
    threshold: float | None = None,
    valid: Tensor | None = None,
    largest: bool = True,
    return_indices: Literal[False] = False,
    gumbel_seed: int | Tensor | None = None,
    gumbel_rows: Tensor | None = None,
    impl: Implementation | None = None,
) -> Tensor: ...


@overload
def topk_mask(
    scores: Tensor,
    *,
    k: int | Tensor | None = None,
    ratio: float | Tensor | None = None,
    threshold: float | None = None,
    valid: Tensor | None = None,
    largest: bool = True,
    return_indices: Literal[True],
    gumbel_seed: int | Tensor | None = None,
    gumbel_rows: Tensor | None = None,
    impl: Implementation | None = None,
) -> Selection: ...


def topk_mask(
    scores: Tensor,
    *,
    k: int | Tensor | None = None,
    ratio: float | Tensor | None = None,
    threshold: float | None = None,
    valid: Tensor | None = None,
    largest: bool = True,
    return_indices: bool = False,
    gumbel_seed: int | Tensor | None = None,
    gumbel_rows: Tensor | None = None,
    impl: Implementation | None = None,
) -> Tensor | Selection:
    """Mark each row's highest (or lowest) scores, without sorting them.

    Ties go to the lower index, and the two zeros are one number. NaN counts as the lowest score of all, in either
    direction: it is marked last. A row with nothing valid gives nothing.

    Args:
        scores: (B, N), any floating dtype and strides; or (B, R, N) partials, such as one for each head, whose mean
            over R is selected from: added in their order in float32, then times 1/R. float64 stays float64.
        k: how many to mark, in [0, N], or (B,) ints; a row with fewer valid positions marks those.
        ratio: share of the valid positions, in [0, 1], or (B,) float32 or float64. A row marks ``floor(ratio * number
            valid)``, at least 1 when anything is valid and ``ratio > 0``; 0.3 of 10 is 3, however 0.3 is rounded. Not
            with ``k``.
        threshold: additionally require ``score > threshold`` (``<`` when ``largest`` is False), compared in
            float32, or in float64 where the scores are; NaN never passes. Without ``k`` and ``ratio`` every valid score
            that passes is marked.
        valid: (B, N) bool, True = may be marked; default all.
        largest: False marks the lowest.
        return_indices: give a :class:`Selection`, whose indices have ``K = min(k, N)`` columns for an int ``k``, what a
            row of N valid positions would mark for a float ``ratio``, and N columns otherwise.
        gumbel_seed: int, or (1,) int64 on the device of ``scores``: add standard Gumbel noise ``-log(-log(u))`` to
            every score, which draws positions without replacement with probabilities proportional to ``exp(score)``
            (Gumbel-top-k: Kool et al., Stochastic Beams and Where to Find Them, ICML 2019).
        gumbel_rows: (B,) int64, what each row's noise is drawn for, such as the sample's index in the data set: the
            same number draws the same noise wherever the row stands. Default ``arange(B)``.
        impl: None picks ``triton`` on a GPU (N up to 16384) and ``native``, C++, on a CPU; ``reference`` is the
            specification, plain PyTorch with stable sorts, and runs where those are missing. A name forces one.

    Returns:
        (B, N) bool, or with ``return_indices`` a :class:`Selection`. No gradient flows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ``k`` or ``ratio`` outside its range (tensors: on a CPU;
            elsewhere they are clamped, for looking would wait for the device), both or, without a threshold, neither,
            an implementation that is unknown or cannot run.
        TypeError: an argument of another type than the above.

    Warns:
        RuntimeWarning: NaN among the valid scores; on a CPU, outside torch.compile. ``Selection.nan`` counts them
            everywhere.

    The k-th largest score is found by bisecting its bit pattern: each step counts the scores above a bound.
    """
    check_scores(scores)
    if valid is not None:
        check_valid(valid, scores)
    check_amount(k, ratio, threshold, scores)
    if gumbel_seed is not None or gumbel_rows is not None:
        check_gumbel(gumbel_seed, gumbel_rows, scores)
    B, N = scores.shape[0], scores.shape[-1]
    chosen = choose(impl, scores.device, N)
    if chosen == "reference" and impl is None and not torch.compiler.is_compiling():
        announce(scores.device.type)

    if scores.requires_grad:
        scores = scores.detach()
    partials = scores if scores.ndim == 3 else scores.unsqueeze(1)
    if partials.dtype not in _DTYPES:
        partials = partials.float()
    fixed = None if ratio is None else fixed_point(ratio)
    if isinstance(k, Tensor):
        k = k.long().contiguous() if costs_nothing(k) else k.long().clamp(0, N)
    seed = rows = None
    if gumbel_seed is not None:
        if isinstance(gumbel_seed, Tensor):
            seed = gumbel_seed.reshape(1)
        else:
            seed = torch.full((1,), gumbel_seed, dtype=torch.int64, device=scores.device)
        rows = torch.arange(B, device=scores.device) if gumbel_rows is None else gumbel_rows.contiguous()
    width = 0
    if return_indices:
        width = min(k, N) if isinstance(k, int) else largest_share(fixed, N) if isinstance(fixed, int) else N

    if chosen == "reference":
        request = Request(k, fixed, threshold, largest, seed, rows, width)
        mask, indices, count, nan = reference.select(partials, valid, request)
    else:
        run = op.TRITON if chosen == "triton" else op.NATIVE
        mask, indices, count, nan = run(partials, valid, *op.arguments(k, fixed), threshold, largest, seed, rows, width)
    if costs_nothing(scores):
        _report(nan)
    return Selection(mask, indices, count, nan) if return_indices else mask


def _report(nan: Tensor) -> None:
    """One text, so that a run full of NaN warns once for each place that selects."""
    if nan.count_nonzero().item():
        warnings.warn(
            "topk_mask: NaN among the valid scores; it ranks lowest. Selection.nan counts it for each row "
            "(return_indices=True), torch.autograd.set_detect_anomaly finds what produced it",
            RuntimeWarning,
            stacklevel=3,
        )


pytree.register_dataclass(Selection, serialized_type_name="crossmask.Selection")  # for torch.export
