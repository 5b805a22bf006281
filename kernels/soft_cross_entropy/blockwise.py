"""Linear and cross-entropy in plain PyTorch on any device, by blocks of the vocabulary that fit a core's cache.

A block's logits are computed in the forward, and again in the backward, where both of its products read the block's
rows of the weight while they are in cache, and write its rows of the gradient once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..linear import linear
from . import huge_pages
from .request import Forward, Gradients, Inputs, Needed, accumulate, row_factors

BLOCK = 2**19  # logits of a block
FEWEST, MOST = 256, 4096  # words of a block
PIECE = 512  # words whose gradients are computed before they are put in place


@torch.no_grad()
def forward(inputs: Inputs) -> Forward:
    hidden, weight = inputs.hidden, inputs.weight
    dtype = accumulate(hidden.dtype)
    rows, words = len(hidden), len(weight)
    student = _Running(hidden, dtype)
    label, argmax = student.zeros(), torch.zeros_like(inputs.labels)
    teacher, expected = _Running(hidden, dtype), student.zeros()
    logits, teacher_logits = _logits(hidden, weight, inputs.bias), _teacher_logits(inputs)
    for block, place, inside in _blocks(rows, words, inputs.labels):
        z = logits(block)
        top = z.amax(1)
        argmax = _argmax(z, top > student.highest, block.start, argmax)
        label = torch.where(inside, z.gather(1, place)[:, 0], label)
        if teacher_logits is not None:
            weights, shrink = teacher.add(teacher_logits(block))
            expected.mul_(shrink).add_(weights.mul_(z).sum(1))
        student.add(z, top)
    lse = student.lse()
    loss = lse[1] + (1 - inputs.distillation) * (lse[0] - label)
    if teacher_logits is not None:
        loss += inputs.distillation * (lse[0] - expected / teacher.total)
    if inputs.token_weights is not None:
        loss *= inputs.token_weights.to(dtype)
    return Forward(loss, argmax, lse, teacher.lse() if teacher_logits is not None else lse.new_empty(2, 0))


@torch.no_grad()
def backward(grad_loss: Tensor, inputs: Inputs, lse: Tensor, teacher_lse: Tensor, needed: Needed) -> Gradients:
    """With dz = p - alpha q - (1 - alpha) delta and g the rows' factors, dW = dz^T (g hidden), dhidden = g (dz W):
    the factors never meet the logits."""
    hidden, weight, alpha = inputs.hidden, inputs.weight, inputs.distillation
    factors = row_factors(grad_loss, inputs.token_weights)
    operand = _operand(hidden.dtype)  # dtype of the products
    scaled = (hidden * factors[:, None]).to(operand) if needed.weight else None
    d_hidden = torch.zeros(hidden.shape, dtype=factors.dtype, device=hidden.device) if needed.hidden else None
    d_weight = huge_pages.empty_like(weight) if needed.weight else None
    d_bias = None
    if needed.bias and inputs.bias is not None:
        d_bias = torch.empty(inputs.bias.shape, dtype=inputs.bias.dtype, device=inputs.bias.device)
    logits, teacher_logits = _logits(hidden, weight, inputs.bias), _teacher_logits(inputs)
    for block, place, inside in _blocks(len(hidden), len(weight), inputs.labels):
        dz = _exp(logits(block), *lse)
        if teacher_logits is not None:
            dz.sub_(_exp(teacher_logits(block), *teacher_lse), alpha=alpha)
        dz.scatter_add_(1, place, (inside.to(dz.dtype) * (alpha - 1))[:, None])
        if d_bias is not None:
            d_bias[block] = dz.T @ factors
        dz = dz.to(operand)
        if d_weight is not None:
            assert scaled is not None
            _product_into(d_weight[block], dz.T, scaled)
        if d_hidden is not None:
            d_hidden += linear(dz, weight[block].to(operand).T)
    if d_hidden is not None:
        d_hidden = (d_hidden * factors[:, None]).to(hidden.dtype)
    return Gradients(d_hidden, d_weight, d_bias)


class _Running:
    """The log-sum-exp of rows over blocks: the highest logit so far and the sum of exp of the others less it."""

    def __init__(self, hidden: Tensor, dtype: torch.dtype) -> None:
        self._like = hidden.new_empty(len(hidden), dtype=dtype)
        # finite, so that a block of words that a bias of -inf rules out adds exp(-inf) and not exp(inf - inf)
        self.highest, self.total = torch.full_like(self._like, torch.finfo(dtype).min), self.zeros()

    def zeros(self) -> Tensor:
        return torch.zeros_like(self._like)

    def add(self, z: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Takes a block's logits (N, words). Returns them as exp(z - highest), in place, and what to multiply earlier
        sums of such by."""
        highest = torch.maximum(self.highest, z.amax(1) if top is None else top)
        shrink = (self.highest - highest).exp_()
        self.total.mul_(shrink).add_(_exp(z, highest).sum(1))
        self.highest = highest
        return z, shrink

    def lse(self) -> Tensor:
        return torch.stack([self.highest, self.total.log()])


def _argmax(z: Tensor, above: Tensor, start: int, before: Tensor) -> Tensor:
    """Where rows are largest, counted from ``start``, in those that are ``above`` all that was ``before``."""
    if z.device.type != "cpu":
        return torch.where(above, z.argmax(1) + start, before)
    rows = above.nonzero()[:, 0]  # few: where a maximum is takes ten times the maximum, and a CPU need not be awaited
    before[rows] = z[rows].argmax(1) + start
    return before


def _exp(z: Tensor, highest: Tensor, log_total: Tensor | None = None) -> Tensor:
    """exp(z - highest - log_total) row by row, in place. To base 2, which PyTorch has four times as fast on a CPU."""
    z.sub_(highest[:, None])
    if log_total is not None:
        z.sub_(log_total[:, None])
    return z.mul_(math.log2(math.e)).exp2_()


def _blocks(rows: int, words: int, labels: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of words with where in it each row's label is (N, 1), and whether it is (N,)."""
    size = min(MOST, max(FEWEST, BLOCK // rows // FEWEST * FEWEST))
    for start in range(0, words, size):
        stop = min(start + size, words)
        place = labels - start
        inside = (place >= 0) & (place < stop - start)
        yield slice(start, stop), place.clamp_(0, stop - start - 1)[:, None], inside


def _operand(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 is multiplied as it is, with its result rounded: anything else is many times slower on a CPU."""
    return torch.float32 if dtype == torch.float16 else dtype


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[slice], Tensor]:
    dtype, operand = accumulate(hidden.dtype), _operand(hidden.dtype)
    hidden = hidden.to(operand)

    def of(block: slice) -> Tensor:
        shift = None if bias is None else bias[block].to(operand)
        return linear(hidden, weight[block].to(operand), shift).to(dtype)

    return of


def _teacher_logits(inputs: Inputs) -> Callable[[slice], Tensor] | None:
    if inputs.teacher_hidden is None or inputs.teacher_weight is None:
        return None
    return _logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b; what cannot be multiplied into its place, a few rows at a time."""
    if out.dtype == a.dtype != torch.float32:
        torch.mm(a, b, out=out)
        return
    for rows, factors in zip(out.split(PIECE), a.split(PIECE), strict=True):
        rows.copy_(linear(factors, b.T))
