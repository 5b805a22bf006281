"""The contrastive loss in plain PyTorch on any device, by blocks of keys whose logits fit a core's cache.

One pass reads every key once. Beside the two log-sum-exps it sums each softmax's mean key, O = p K and O' = q K, as
attention does. With the mean key P of a row's matches, what is left is of size (N, E):

    T_i = a O'_i + (1 - a) P_i,     L_i = c_i lse_i - <query_i, T_i> / tau
    dL_i / dquery_i = (c_i O_i - T_i) / tau,     dL_i / dtau = -<query_i, dL_i / dquery_i> / tau

so that the backward reads no key again for the queries: four products in all, where two passes would take five.
Matches are looked up by group, not compared in pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .request import Contrast, Forward, accumulation

LOGITS = 2**20  # bytes of a block's logits, of student and teacher
ROWS = 2**20  # bytes of a block's keys
NARROWEST = 32  # keys of a block, where there are very many queries


@torch.no_grad()
def forward(contrast: Contrast) -> Forward:
    a, tau, count = contrast.distillation, contrast.temperature, len(contrast.queries)
    scaled = _scaled(contrast)
    step, (rows, width) = _step(scaled), scaled.shape
    peak, total = scaled.new_full((rows, 1), -torch.inf), scaled.new_zeros((rows, 1))
    mean = scaled.new_zeros((rows, width))
    workspace = scaled.new_empty(rows * step)
    for source, _ in contrast.sources():
        for keys in source.split(step):
            keys = keys.to(scaled.dtype)
            z = torch.mm(scaled, keys.T, out=workspace[: rows * len(keys)].view(rows, -1))
            top = torch.maximum(peak, z.amax(1, keepdim=True))
            shrink = (peak - top).exp_()
            z.sub_(top).exp_()
            total.mul_(shrink).add_(z.sum(1, keepdim=True))
            mean.mul_(shrink).addmm_(z, keys)
            peak = top
    lse, mean = (peak + total.log()).squeeze(1), mean.div_(total)

    groups = _Groups(contrast.query_groups)
    sums, counts = scaled.new_zeros((groups.number, width)), torch.zeros_like(groups.ids)
    for source, of_key in contrast.sources():
        for at, group in groups.matches(of_key, step):
            sums.index_add_(0, group, source[at].to(scaled.dtype))
            counts += group.bincount(minlength=groups.number)
    matches = counts[groups.of_query].to(scaled.dtype)
    share = _share(a, matches)
    target = sums[groups.of_query].mul_(((1 - a) / matches.clamp(min=1))[:, None])
    if a > 0:
        target.add_(mean[count:], alpha=a)
    queries, d_queries = scaled[:count], torch.addcmul(target.neg(), mean[:count], share[:, None])
    return Forward(
        loss=share * lse[:count] - (queries * target).sum(1),
        d_temperature=(queries * d_queries).sum(1).div_(-tau),
        d_queries=d_queries.div_(tau),
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
    scaled = _scaled(contrast)
    step, queries = _step(scaled), scaled[:count]  # over tau, which the chain rule asks for
    lse = torch.cat((found.lse, found.teacher_lse))[: len(scaled), None]
    d_keys = torch.empty(contrast.keys.shape, dtype=scaled.dtype, device=scaled.device)
    student = (grad_loss * _share(a, found.matches))[:, None]
    for keys, out in zip(contrast.keys.split(step), d_keys.split(step), strict=True):
        z = torch.mm(scaled, keys.to(scaled.dtype).T).sub_(lse).exp_()
        dz = z[:count].mul_(student)
        if a > 0:
            dz.addcmul_(z[count:], grad_loss[:, None], value=-a)
        torch.mm(dz.T, queries, out=out)

    groups = _Groups(contrast.query_groups)
    of_match = queries * (grad_loss * (1 - a) / found.matches.clamp(min=1))[:, None]
    sums = of_match.new_zeros((groups.number, of_match.shape[1])).index_add_(0, groups.of_query, of_match)
    for at, group in groups.matches(contrast.key_groups, step):
        d_keys.index_add_(0, at, sums[group], alpha=-1)
    return d_queries, d_keys.to(contrast.dtype)


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


def _scaled(contrast: Contrast) -> Tensor:
    """The queries over tau, and below them the teacher's where they count: one product gives both logits."""
    both = (contrast.queries, contrast.teacher_queries) if contrast.distillation > 0 else (contrast.queries,)
    dtype = accumulation(contrast.dtype)
    return torch.cat([x.to(dtype) for x in both]).div_(contrast.temperature)


def _step(scaled: Tensor) -> int:
    """Keys of a block."""
    (rows, width), size = scaled.shape, scaled.element_size()
    return max(NARROWEST, min(LOGITS // (rows * size), ROWS // (max(width, 1) * size)))


def _share(distillation: float, matches: Tensor) -> Tensor:
    """c: the targets' sum, of a row that has no match what the teacher gives."""
    return distillation + (1 - distillation) * (matches > 0).to(matches.dtype)
