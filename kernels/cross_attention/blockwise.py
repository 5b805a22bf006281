"""Cross-attention with statistics in plain PyTorch, block by block: memory O(S + P) for each head and a few blocks.

The backward is in ``blockwise_backward.py``, the cutting in ``blocks.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import LN2, MASKED, Blocks, Group
from .blockwise_backward import backward
from .request import Forward, Masks, Request, share

__all__ = ["backward", "forward"]

# Column sums are taken relative to the largest logit of their head. One below this may have lost its largest terms to
# underflow, and is taken again relative to its own largest logit.
SMALLEST_COLUMN = 1e-20


@torch.no_grad()
def forward(q: Tensor, k: Tensor, v: Tensor, masks: Masks, seed: Tensor | None, request: Request) -> Forward:
    """What ``request`` asks for. Shapes, dtypes and masks as in ``request.py``."""
    blocks = Blocks(q, k, v, masks, seed, request)
    sums = _Sums(blocks, request)
    output = torch.empty_like(q)
    for number, part in enumerate(blocks.parts(output)):
        group = blocks.group(number)
        out = blocks.result("output", part)
        for rows in blocks.row_slices:
            _block(blocks, group, rows, sums, out if blocks.whole else out[:, rows])
        if out is not part:
            part.copy_(out.view(part.shape))
    if request.query_attention:
        _finish_columns(blocks, sums)
    return _result(blocks, sums, output, masks)


class _Sums:
    """Row and column sums of e_ij = 2^(s_ij - m_i), where s are base-2 logits and m_i is the largest of a row.

    The row's sum l_i gives lse = ln 2 (m_i + log2 l_i) and max_probability = 1 / l_i; with sum_j e_ij (s_ij - m_i),
    entropy = ln 2 (log2 l_i - sum / l_i), two terms that do not cancel. The softmax over queries needs no second
    exponential: with a_i = 2^(m_i - c) and c the largest logit of a head, r_ij = a_i e_ij / sum_i a_i e_ij.
    """

    def __init__(self, blocks: Blocks, request: Request) -> None:
        S, P, by_query = blocks.queries, blocks.keys, request.query_attention
        self.peak = blocks.empty(S)  # m
        self.total = blocks.empty(S)  # l
        self.surprise = blocks.empty(S if request.entropy else 0)  # sum_j e_ij (s_ij - m_i)
        self.key_sum = blocks.empty(P if request.key_attention else 0)  # p over valid queries
        self.key_max = blocks.empty(P if request.key_max else 0)
        self.column = blocks.empty(P if by_query else 0)  # a_i e_ij over valid queries; in the end log2 of it, plus c
        self.highest = blocks.empty(1 if by_query else 0)  # c
        self.query_sum = blocks.empty(S if by_query else 0)  # r over allowed keys
        self._groups = {name: blocks.split(x) for name, x in vars(self).items()}

    def of(self, name: str, group: Group) -> Tensor:
        return self._groups[name][group.number]


def _block(blocks: Blocks, group: Group, rows: slice, sums: _Sums, out: Tensor) -> None:
    """The output of some queries (g, rows, D), their row sums, and their part of the column sums."""
    request, along_keys = blocks.request, blocks.key_axis
    peak, total = blocks.rows(sums.of("peak", group), rows), blocks.rows(sums.of("total", group), rows)
    s = blocks.logits(0, group, rows)
    s.sub_(torch.amax(s, along_keys, keepdim=True, out=blocks.over_queries(peak)))
    if request.entropy:
        e = torch.exp2(s, out=blocks.buffer(1, *peak.shape[::2]))
    else:
        e = s.exp2_()
    torch.sum(e, along_keys, keepdim=True, out=blocks.over_queries(total))
    if request.entropy:
        surprise = blocks.rows(sums.of("surprise", group), rows)
        torch.sum(s.mul_(e), along_keys, keepdim=True, out=blocks.over_queries(surprise))
    inverse = total.reciprocal() if group.dead is None else total.reciprocal().masked_fill_(group.dead, 0.0)
    if blocks.links:  # a row without any has MASKED for its largest logit, and weights of one
        inverse.masked_fill_(peak == MASKED, 0.0)
    _output(blocks, group, rows, e, inverse, out)

    first = rows.start == 0
    invalid = None if group.invalid is None else blocks.rows(group.invalid, rows)
    counted = inverse if invalid is None else inverse.masked_fill(invalid, 0.0)
    together = request.key_attention and request.query_attention and blocks.whole  # one product for both
    if request.key_attention and not together:
        key_sum = sums.of("key_sum", group)
        torch.baddbmm(key_sum, counted, blocks.by_rows(e), beta=0 if first else 1, out=key_sum)
    if request.key_max:
        largest = (
            torch.mul(e, blocks.over_queries(counted), out=_spare(blocks, peak)).amax(blocks.query_axis).unsqueeze(1)
        )
        key_max = sums.of("key_max", group)
        key_max.copy_(largest if first else torch.maximum(key_max, largest))
    if request.query_attention:
        peak = peak if invalid is None else peak.masked_fill(invalid, MASKED)
        _columns(blocks, group, rows, e, peak, sums, counted if together else None)


def _spare(blocks: Blocks, of_rows: Tensor) -> Tensor:
    """The buffer that does not hold e; entropy, which leaves s - m there, has been summed by now."""
    return blocks.buffer(0 if blocks.request.entropy else 1, *of_rows.shape[::2])


def _output(blocks: Blocks, group: Group, rows: slice, e: Tensor, inverse: Tensor, out: Tensor) -> None:
    if blocks.request.dropout_p:
        e = torch.mul(e, blocks.kept(group, rows), out=_spare(blocks, inverse))
        inverse = inverse / (1 - blocks.request.dropout_p)
    if blocks.half:  # normalised before it is rounded, so that the output is rounded once
        p = torch.mul(e, blocks.over_queries(inverse), out=_spare(blocks, inverse))
        blocks.assign(out, blocks.by_rows(blocks.in_half(p)), group.v_factor)
    elif out.dtype == e.dtype:
        blocks.assign(out, blocks.by_rows(e), group.v_factor)
        out.mul_(inverse.mT)
    else:
        torch.mul(torch.bmm(blocks.by_rows(e), group.v_factor), inverse.mT, out=out)


def _columns(
    blocks: Blocks, group: Group, rows: slice, e: Tensor, peak: Tensor, sums: _Sums, counted: Tensor | None
) -> None:
    """Adds some rows to the column sums and, with all at hand, divides by them. ``peak`` is MASKED where invalid.

    With ``counted`` (g, 1, S), a row's factor in the key sums, these come from the same product.
    """
    column, highest = sums.of("column", group), sums.of("highest", group)
    top = peak.amax(2, keepdim=True)
    if rows.start > 0:
        top = torch.maximum(top, highest)
        column.mul_((highest - top).exp2_())
    highest.copy_(top)
    a = (peak - top).exp2_()
    if counted is None:
        torch.baddbmm(column, a, blocks.by_rows(e), beta=0 if rows.start == 0 else 1, out=column)
    else:
        found = torch.bmm(torch.cat((counted, a), 1), blocks.by_rows(e))  # (g, 2, P)
        sums.of("key_sum", group).copy_(found[:, :1])
        column.copy_(found[:, 1:])
    if blocks.whole:
        if group.closed is not None:
            column.masked_fill_(group.closed, torch.inf)
        query_sum = sums.of("query_sum", group)
        torch.bmm(column.reciprocal(), blocks.by_rows(e).mT, out=query_sum)
        query_sum.mul_(a)


def _finish_columns(blocks: Blocks, sums: _Sums) -> None:
    """Makes the column sums logarithms, and takes the column softmax where the first sweep could not."""
    on_cpu = blocks.device.type == "cpu"  # elsewhere a look at the sums would wait for the device
    if blocks.whole and on_cpu and not bool(sums.column.amin() < SMALLEST_COLUMN):
        sums.column.log2_().add_(sums.highest)
        return
    for number in range(len(blocks.sizes)):
        group = blocks.group(number)
        column = sums.of("column", group)
        if group.closed is not None:
            column.masked_fill_(group.closed, torch.inf)
        if on_cpu and not bool(column.amin() < SMALLEST_COLUMN):
            column.log2_().add_(sums.of("highest", group))
            if blocks.whole:
                continue
        else:
            _exact_columns(blocks, group, column)
        for rows in blocks.row_slices:
            r = blocks.logits(0, group, rows).sub_(blocks.over_keys(column)).exp2_()
            query_sum = blocks.rows(sums.of("query_sum", group), rows)
            torch.sum(r, blocks.key_axis, keepdim=True, out=blocks.over_queries(query_sum))


def _exact_columns(blocks: Blocks, group: Group, column: Tensor) -> None:
    """log2 of the sum over valid queries of 2^s, each key relative to its own largest logit; inf for closed keys."""
    highest, total = torch.full_like(column, 2 * MASKED), torch.zeros_like(column)
    for rows in blocks.row_slices:
        s = blocks.logits(0, group, rows)
        if group.invalid is not None:
            s.masked_fill_(blocks.over_queries(blocks.rows(group.invalid, rows)), MASKED)
        top = torch.maximum(highest, s.amax(blocks.query_axis).unsqueeze(1))
        e = s.sub_(blocks.over_keys(top)).exp2_()
        total.mul_((highest - top).exp2_()).add_(e.sum(blocks.query_axis).unsqueeze(1))
        highest = top
    torch.add(highest, total.log2_(), out=column)
    if group.closed is not None:
        column.masked_fill_(group.closed, torch.inf)


def _result(blocks: Blocks, sums: _Sums, output: Tensor, masks: Masks) -> Forward:
    """Statistics from sums, in place: fresh memory costs page faults. Dead heads get their values here."""
    request, dead = blocks.request, blocks.dead
    alone = (sums.peak == MASKED).view(blocks.samples, blocks.heads, -1) if blocks.links else None  # without a link
    B, H, S, P = blocks.samples, blocks.heads, blocks.queries, blocks.keys

    def wiped(x: Tensor, value: float = 0.0) -> Tensor:
        x = x.view(B, H, -1)
        return x if dead is None else x.masked_fill_(dead[..., None], value)

    def wiped_rows(x: Tensor, value: float = 0.0) -> Tensor:
        return wiped(x, value) if alone is None else wiped(x, value).masked_fill_(alone, value)

    def mean(x: Tensor, valid: Tensor | None, length: int) -> Tensor:
        one = share(valid, length, masks.head, H, request, blocks.dtype)
        if request.per_head:
            return x.mul_(one[..., None] if isinstance(one, Tensor) else one)
        return x.sum(1).mul_(one)

    inverse = sums.total.reciprocal() if request.max_probability or request.entropy else None
    log_total = sums.total.log2_()
    lse = wiped_rows(sums.peak.add_(log_total).mul_(LN2), -torch.inf)
    entropy = key_attention = query_attention = key_max = column_lse = None
    if request.entropy:
        assert inverse is not None
        entropy = wiped_rows(torch.addcmul(log_total, sums.surprise, inverse, value=-1).mul_(LN2))
    if request.key_attention:
        key_attention = mean(wiped(sums.key_sum), masks.query, S)
    if request.key_max:
        key_max = wiped(sums.key_max) if request.per_head else wiped(sums.key_max).amax(1)
    if request.query_attention:
        query_sum, column_lse = wiped(sums.query_sum), wiped(sums.column.mul_(LN2), -torch.inf)
        if masks.query is not None:
            query_sum.masked_fill_(~masks.query[:, None], 0.0)
            column_lse.masked_fill_(~masks.query.any(1)[:, None, None], -torch.inf)
        if blocks.unreached is not None:
            column_lse.masked_fill_(blocks.unreached[:, None], -torch.inf)
        query_attention = mean(query_sum, masks.key, P)
    return Forward(
        output,
        lse,
        wiped_rows(inverse) if request.max_probability and inverse is not None else None,
        entropy,
        key_attention,
        query_attention,
        key_max,
        column_lse,
    )
