"""The backward of the blockwise path and of its statistics: weights are recomputed from lse, block by block.

With P_ij = exp(s_ij - lse_i), Z_ij what dropout makes of a weight of one, w_i = 1 for queries that count, R the
softmax over those queries, and the incoming gradients times the means' normalisers c_j = d key_attention_j share and
u_i = d query_attention_i share:

    X_ij  = Z_ij dO_i . v_j + w_i c_j - d entropy_i (s_ij - lse_i)
    dS_ij = P_ij (X_ij - sum_j P_ij X_ij + d lse_i - x_i) + x_i [j = argmax_i] + R_ij (u_i - sum_i R_ij u_i)
    dq = scale dS k,   dk = scale dS^T q,   dv = (P Z)^T dO

with x_i = d max_probability_i max_probability_i. The row sum of P X is dO_i . O_i + w_i sum_j P_ij c_j + d entropy_i
entropy_i; taking it from the block itself costs less than a sweep for its second term, and no rounding of O enters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import LN2, LOG2E, MASKED, Blocks, Group
from .request import Forward, Gradients, Masks, Request, share

# Buffers: s and s - lse; X and dS; P where s - lse is needed too; R, or what rows and columns add to X; 1 at maxima
LOGITS, SLOPES, WEIGHTS, COLUMN, LARGEST = range(5)
# R_ij is P_ij 2^(lse_i - h) 2^(h - column_j), with h the highest lse of a head, while h - column_j is below:
MOST_COLUMN = 64.0


@torch.no_grad()
def backward(
    gradients: Gradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: Forward,
    masks: Masks,
    seed: Tensor | None,
    request: Request,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. Shapes, dtypes and masks as in ``request.py``."""
    blocks = Blocks(q, k, v, masks, seed, request)
    terms = _Terms(blocks, gradients, found, masks)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for number, parts in enumerate(zip(*map(blocks.parts, (dq, dk, dv)), strict=True)):
        targets = [blocks.result(name, part) for name, part in zip(("dq", "dk", "dv"), parts, strict=True)]
        _group(blocks, blocks.group(number), terms, *targets)
        for part, target in zip(parts, targets, strict=True):
            if target is not part:
                part.copy_(target.view(part.shape))
    return dq, dk, dv


class _Terms:
    """What the incoming gradients put into dS, as (B * H, 1, S) or (B * H, 1, P); None where there is none."""

    def __init__(self, blocks: Blocks, gradients: Gradients, found: Forward, masks: Masks) -> None:
        request, H = blocks.request, blocks.heads
        flat = (blocks.samples * H, 1, -1)

        def mean(gradient: Tensor, valid: Tensor | None, length: int) -> Tensor:
            one = share(valid, length, masks.head, H, request, blocks.dtype)
            if not request.per_head:
                return (gradient * one)[:, None].expand(-1, H, -1).reshape(flat)
            return (gradient * (one[..., None] if isinstance(one, Tensor) else one)).reshape(flat)

        # A row that attends to nothing gets an lse that makes its weights 0 = 2^(s - lse).
        self.lse = found.lse.masked_fill(found.lse == -torch.inf, -MASKED).mul_(LOG2E).reshape(flat)
        self.row = None if gradients.lse is None else gradients.lse.reshape(flat)  # d lse - x
        self.peak = self.entropy = self.key = self.counted = self.query = self.column = None
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        if gradients.max_probability is not None:
            assert found.max_probability is not None
            self.peak = (gradients.max_probability * found.max_probability).reshape(flat)  # x
            self.row = -self.peak if self.row is None else self.row - self.peak
        if gradients.entropy is not None:
            self.entropy = gradients.entropy.reshape(flat) * LN2
        if gradients.key_attention is not None:
            self.key = mean(gradients.key_attention, masks.query, blocks.queries)  # c
            counted = torch.ones_like(self.lse) if masks.query is None else masks.query.to(blocks.dtype)  # w
            self.counted = counted if masks.query is None else counted[:, None].expand(-1, H, -1).reshape(flat)
        if gradients.query_attention is not None:
            assert found.column_lse is not None
            self.query = mean(gradients.query_attention, masks.key, blocks.keys)  # u
            column = found.column_lse * LOG2E
            self.column = column.masked_fill_(column == -torch.inf, -MASKED).reshape(flat)  # likewise
            if blocks.device.type == "cpu":  # elsewhere a look at the sums would wait for the device
                self._factors(blocks, masks)
        self._groups = {name: blocks.split(x) for name, x in vars(self).items() if x is not None}
        self.outputs = blocks.parts(gradients.output)

    def _factors(self, blocks: Blocks, masks: Masks) -> None:
        """``a`` (B * H, 1, S) and ``b`` (B * H, 1, P) so that R_ij = P_ij a_i b_j, unless b would be too large."""
        assert self.column is not None
        shape = (blocks.samples, blocks.heads, -1)
        column, lse = self.column.view(shape), self.lse.view(shape)
        if masks.key is not None:
            column = column.masked_fill(~masks.key[:, None], -MASKED)
        off = lse >= -MASKED  # attends to nothing
        lse = lse.masked_fill(off if masks.query is None else off | ~masks.query[:, None], MASKED)
        highest = lse.amax(2, keepdim=True)
        b = highest - column
        if bool((b < MOST_COLUMN).all()):  # NaN is not
            self.a, self.b = (lse - highest).exp2_().flatten(0, 1)[:, None], b.exp2_().flatten(0, 1)[:, None]

    def of(self, name: str, group: Group) -> Tensor:
        return self._groups[name][group.number]


def _group(blocks: Blocks, group: Group, terms: _Terms, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The gradients (g, length, D) of some heads."""
    scale, kept_factor = blocks.request.scale, 1 / (1 - blocks.request.dropout_p)
    over_queries, over_keys, by_rows = blocks.over_queries, blocks.over_keys, blocks.by_rows
    factored = terms.a is not None
    tau = _tau(blocks, group, terms) if terms.query is not None and not blocks.whole else None
    dk_sum, dv_sum = (_Sum(blocks, out) for out in (dk, dv))
    grads = blocks.factor("gradient", terms.outputs[group.number])

    for rows in blocks.row_slices:

        def of_rows(name: str, rows: slice = rows) -> Tensor:
            return over_queries(blocks.rows(terms.of(name, group), rows))

        grad, q = ((x if blocks.whole else x[:, rows]) for x in (grads, group.q_factor))
        s = blocks.logits(LOGITS, group, rows)
        shape = by_rows(s).shape[:2]
        largest = _largest(blocks, s, of_rows("peak")) if terms.peak is not None else None
        r = _column_softmax(blocks, group, terms, s, rows) if terms.query is not None and not factored else None
        s.sub_(of_rows("lse"))
        p = s.exp2_() if terms.entropy is None else torch.exp2(s, out=blocks.buffer(WEIGHTS, *shape))

        kept = blocks.kept(group, rows) if blocks.request.dropout_p else None
        weights = p if kept is None else torch.mul(p, kept, out=blocks.buffer(SLOPES, *shape))
        dv_sum.add(by_rows(blocks.in_half(weights)).mT, grad, kept_factor)

        x = blocks.product(SLOPES, grad, group.v_factor, kept_factor)
        if kept is not None:
            x.mul_(kept)
        if terms.key is not None:
            x.addcmul_(of_rows("counted"), over_keys(terms.of("key", group)))
        if terms.entropy is not None:
            x.addcmul_(s, of_rows("entropy"), value=-1)
        x.mul_(p)
        row = x.sum(blocks.key_axis, keepdim=True).neg_()
        if terms.row is not None:
            row.add_(of_rows("row"))
        x.addcmul_(p, _rows_and_columns(blocks, group, terms, p, row, rows, tau) if factored else row)
        if r is not None:
            u = blocks.rows(terms.of("query", group), rows)
            of_keys = torch.bmm(u, by_rows(r)) if tau is None else tau
            x.addcmul_(r, over_queries(u)).addcmul_(r, over_keys(of_keys), value=-1)
        if largest is not None:
            x.addcmul_(largest, of_rows("peak"))

        x = by_rows(blocks.in_half(x))
        blocks.assign(dq if blocks.whole else dq[:, rows], x, group.k_factor, scale)
        dk_sum.add(x.mT, q, scale)
    dk_sum.finish()
    dv_sum.finish()


def _largest(blocks: Blocks, s: Tensor, peak: Tensor) -> Tensor:
    """1 at the first of a row's largest logits, 0 elsewhere; as it likes in a row whose ``peak`` is 0."""
    found = blocks.buffer(LARGEST, *blocks.by_rows(s).shape[:2])
    if s.device.type == "cpu":  # argmax takes ten to fifty times as long as any other pass over a block
        torch.eq(s, s.amax(blocks.key_axis, keepdim=True), out=found)
        if not bool(found.sum(blocks.key_axis, keepdim=True).sub_(1.0).mul_(peak).any()):
            return found
    return found.zero_().scatter_(blocks.key_axis, s.argmax(blocks.key_axis, keepdim=True), 1.0)


def _rows_and_columns(
    blocks: Blocks, group: Group, terms: _Terms, p: Tensor, row: Tensor, rows: slice, tau: Tensor | None
) -> Tensor:
    """The block of row_i + a_i b_j (u_i - tau_j): with R_ij = P_ij a_i b_j the column softmax costs no exponential."""
    over_queries, over_keys = blocks.over_queries, blocks.over_keys
    found = blocks.buffer(COLUMN, *blocks.by_rows(p).shape[:2])
    a, b = blocks.rows(terms.of("a", group), rows), terms.of("b", group)
    weighed = blocks.rows(terms.of("query", group), rows) * a
    tau = torch.bmm(weighed, blocks.by_rows(p)).mul_(b) if tau is None else tau
    torch.addcmul(row, over_queries(weighed), over_keys(b), out=found)  # two passes; a product of width 3 takes four
    return found.addcmul_(over_queries(a), over_keys(b * tau), value=-1)


class _Sum:
    """A product that is summed over blocks of queries in the dtype of statistics, or goes straight to its place."""

    def __init__(self, blocks: Blocks, out: Tensor) -> None:
        self._blocks, self._out = blocks, out
        self._total: Tensor | None = None

    def add(self, weights: Tensor, x: Tensor, factor: float) -> None:
        if self._blocks.whole:
            self._blocks.assign(self._out, weights, x, factor)
        elif self._total is None:
            self._total = torch.bmm(weights, x).to(self._blocks.dtype).mul_(factor)
        elif weights.dtype == self._total.dtype:
            self._total.baddbmm_(weights, x, alpha=factor)
        else:
            self._total.add_(torch.bmm(weights, x), alpha=factor)

    def finish(self) -> None:
        if self._total is not None:
            self._out.copy_(self._total)


def _column_softmax(blocks: Blocks, group: Group, terms: _Terms, s: Tensor, rows: slice) -> Tensor:
    """R of a block: 0 for queries that do not count and for masked keys."""
    r = torch.sub(
        s, blocks.over_keys(terms.of("column", group)), out=blocks.buffer(COLUMN, *blocks.by_rows(s).shape[:2])
    )
    if group.invalid is not None:
        r.masked_fill_(blocks.over_queries(blocks.rows(group.invalid, rows)), MASKED)
    return r.exp2_()


def _tau(blocks: Blocks, group: Group, terms: _Terms) -> Tensor:
    """(g, 1, P) sum_i R_ij u_i, in a sweep of its own."""
    total = torch.zeros_like(terms.of("column", group))
    for rows in blocks.row_slices:
        r = _column_softmax(blocks, group, terms, blocks.logits(LOGITS, group, rows), rows)
        total.baddbmm_(blocks.rows(terms.of("query", group), rows), blocks.by_rows(r))
    return total
