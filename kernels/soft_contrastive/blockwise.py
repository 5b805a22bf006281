"""The contrastive loss in plain PyTorch on any device, by blocks of keys whose logits fit a core's cache.

One pass reads every key once. Beside the two log-sum-exps it sums each softmax's mean key, O = p K and O' = q K, as
attention does. With the mean key P of a row's matches, what is left is of size (N, E), and the means of z under p and
q, which are <query_i, O_i> / tau and <query_i, O'_i> / tau:

    L_i = c_i lse_i - a E_q[z_i] - (1 - a) <query_i, P_i> / tau
    dL_i / dquery_i = (c_i O_i - a O'_i - (1 - a) P_i) / tau
    dL_i / dtau = -(c_i E_p[z_i] - a E_q[z_i] - (1 - a) <query_i, P_i> / tau) / tau

so that the backward reads no key again for the queries: four products in all, where two passes would take five.
Matches are looked up by group, not compared in pairs. Exponentials are to base 2, which PyTorch has ten times as fast
on a CPU.

Logits are float32's for every dtype but float64, as PyTorch rounds a product of bfloat16 to it, too coarse over tau. Of
bfloat16 features the weights of O are rounded to it, where the processor multiplies it (``bf16_products``) and the
product is worth it, as the gradient is in the end; no loss is worked out from such an O. The keys' gradient is float32
until its matches are taken off, which it may cancel with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..linear import bf16_products, linear
from .request import Contrast, Forward, accumulation

LOGITS = 2**20  # bytes of a block's logits, of student and teacher
ROWS = 2**20  # bytes of a block's keys
NARROWEST = 32  # keys of a block, where there are very many queries
SMALLEST = 2**20  # multiply-adds of a product below which weights stay float32


@torch.no_grad()
def forward(contrast: Contrast) -> Forward:
    a, tau, count = contrast.distillation, contrast.temperature, len(contrast.queries)
    logits = _Logits(contrast)
    step, (rows, width), dtype = logits.step, logits.rows.shape, logits.rows.dtype
    peak, total = tau.new_full((rows, 1), -torch.inf), tau.new_zeros((rows, 1))
    mean, expected = tau.new_zeros((rows, width)), tau.new_zeros((rows // count, count, 1))
    for source, _ in contrast.sources():
        for keys in source.split(step):
            wide = keys.to(dtype)
            z = logits.of(wide)
            top = torch.maximum(peak, z.amax(1, keepdim=True))
            shrink = (peak - top).exp_()
            weights = _exp(z - top if logits.half else z.sub_(top))
            total.mul_(shrink).add_(weights.sum(1, keepdim=True))
            factors, others = (weights.to(torch.bfloat16), keys) if logits.half else (weights, wide)
            mean.mul_(shrink).add_(linear(factors, others.T))
            if logits.half:
                sums = weights.view(-1, count, len(keys)).mul_(z[:count]).sum(2, keepdim=True)
                expected.mul_(shrink.view_as(expected)).add_(sums)
            peak = top
            del z, weights, factors  # before the next ones are made
    lse, mean = (peak + total.log()).squeeze(1), mean.div_(total)

    queries = logits.rows[:count]
    if logits.half:
        expected = expected.div_(total.view_as(expected)).squeeze(2)
    else:
        expected = (mean.view(-1, count, width) * queries).sum(2)
    groups = _Groups(contrast.query_groups)
    sums, counts = mean.new_zeros((groups.number, width)), torch.zeros_like(groups.ids)
    for source, of_key in contrast.sources():
        for at, group in groups.matches(of_key, step):
            sums.index_add_(0, group, source[at].to(dtype))
            counts += group.bincount(minlength=groups.number)
    matches = counts[groups.of_query].to(dtype)
    share = _share(a, matches)
    target = sums[groups.of_query].mul_(((1 - a) / matches.clamp(min=1))[:, None])
    of_target = (queries * target).sum(1)
    if a > 0:
        target.add_(mean[count:], alpha=a)
        of_target.add_(expected[1], alpha=a)
    return Forward(
        loss=(share * lse[:count]).sub_(of_target),
        d_temperature=(share * expected[0]).sub_(of_target).div_(-tau),
        d_queries=torch.addcmul(target.neg_(), mean[:count], share[:, None]).div_(tau),
        lse=lse[:count].clone(),
        teacher_lse=lse[count:].clone() if a > 0 else torch.zeros_like(matches),
        matches=matches,
    )


@torch.no_grad()
def backward(
    grad_loss: Tensor, contrast: Contrast, found: Forward, for_queries: bool, for_keys: bool
) -> tuple[Tensor, Tensor]:
    """d queries (N, E), d keys (M, E), of the in-batch keys; what is not asked for is (0, E)."""
    a, count = contrast.distillation, len(contrast.queries)
    empty = contrast.queries.new_empty((0, contrast.queries.shape[1]))
    d_queries = (grad_loss[:, None] * found.d_queries).to(contrast.dtype) if for_queries else empty
    if not for_keys:
        return d_queries, empty
    logits = _Logits(contrast)
    step = logits.step
    lse = torch.cat((found.lse, found.teacher_lse))[: len(logits.rows), None]
    d_keys = torch.empty(contrast.keys.shape, dtype=logits.rows.dtype, device=grad_loss.device)
    queries = logits.rows[:count]  # over tau, which the chain rule asks for
    student = (grad_loss * _share(a, found.matches))[:, None]
    for keys, out in zip(contrast.keys.split(step), d_keys.split(step), strict=True):
        z = _exp(logits.of(keys.to(queries.dtype)).sub_(lse))
        dz = z[:count].mul_(student)
        if a > 0:
            dz.addcmul_(z[count:], grad_loss[:, None], value=-a)
        out.copy_(linear(dz.T, queries.T))

    groups = _Groups(contrast.query_groups)
    of_match = queries * (grad_loss * (1 - a) / found.matches.clamp(min=1))[:, None]
    sums = of_match.new_zeros((groups.number, of_match.shape[1])).index_add_(0, groups.of_query, of_match)
    for at, group in groups.matches(contrast.key_groups, step):
        d_keys.index_add_(0, at, sums[group], alpha=-1)
    return d_queries, d_keys.to(contrast.dtype)


class _Logits:
    """z of the queries, and below them of the teacher's where they count: one product gives both.

    Attributes:
        rows: (N or 2 N, E) what keys are multiplied with, over tau.
        step: keys of a block.
        half: products with the weights are bfloat16's.
    """

    def __init__(self, contrast: Contrast) -> None:
        both = (contrast.queries, contrast.teacher_queries) if contrast.distillation > 0 else (contrast.queries,)
        dtype = accumulation(contrast.dtype)
        self.rows = torch.cat([x.to(dtype) for x in both]).div_(contrast.temperature)
        (rows, width), size = self.rows.shape, self.rows.element_size()
        self.step = max(NARROWEST, min(LOGITS // (rows * size), ROWS // (max(width, 1) * size)))
        longest = min(self.step, max(len(source) for source, _ in contrast.sources()))
        able = contrast.dtype == torch.bfloat16 and bf16_products(self.rows.device.type)
        self.half = able and rows * width * longest >= SMALLEST

    def of(self, keys: Tensor) -> Tensor:
        """(rows, keys), to be written to."""
        return linear(self.rows, keys)


def _exp(z: Tensor) -> Tensor:
    return z.mul_(math.log2(math.e)).exp2_()


class _Groups:
    """The distinct groups of the queries, and which keys belong to them."""

    def __init__(self, query_groups: Tensor) -> None:
        self.ids, self.of_query = query_groups.unique(return_inverse=True)
        self.number = len(self.ids)

    def matches(self, key_groups: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions of keys that match some query, and their group's number, at most ``step`` at a time."""
        group = torch.searchsorted(self.ids, key_groups.contiguous()).clamp_(max=self.number - 1)
        found = ((self.ids[group] == key_groups) & (key_groups != -1)).nonzero().squeeze(1)
        for at in found.split(step):
            if len(at):
                yield at, group[at]


def _share(distillation: float, matches: Tensor) -> Tensor:
    """c: the targets' sum, of a row that has no match what the teacher gives."""
    return distillation + (1 - distillation) * (matches > 0).to(matches.dtype)
