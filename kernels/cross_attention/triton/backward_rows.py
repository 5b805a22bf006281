"""What the gradient of cross-attention needs first: ρ and a for queries, τ for keys. Formulas: backward.py."""

import triton
import triton.language as tl

from .primitives import (
    INF,
    LOG2E,
    NOTHING,
    SIZES,
    at_head,
    by_key,
    by_query,
    linked,
    load_rows,
    product,
    row_lse2,
    valid,
    weights,
)


@triton.jit
def allowed(
    KeyMask, HeadMask, head, H, keys, P, HAS_KEY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr
):  # fmt: skip
    """[BP] bool: keys inside the axis that the mask allows, none of a head that is off."""
    counted = valid(KeyMask, head // H, keys, P, HAS_KEY_MASK)
    if HAS_HEAD_MASK:
        counted = counted & (tl.load(HeadMask + head) != 0)
    return counted


@triton.jit
def column_lse2(ColumnLse, column, counted, HAS_LINK_MASK: tl.constexpr):
    """Base-2 log-sum-exp of columns; NOTHING for keys that do not count, or that no valid query has a link to."""
    lse = tl.load(ColumnLse + column, mask=counted, other=0.0)
    if HAS_LINK_MASK:
        counted = counted & (lse != -INF)
    return tl.where(counted, lse * LOG2E, NOTHING)


@triton.jit
def column_weights(s2, column2, w, TRANSPOSED: tl.constexpr):
    """r: softmax weights over the queries that are valid, from base-2 logits and ``column_lse2``."""
    return tl.where(by_query(w, TRANSPOSED), tl.exp2(s2 - by_key(column2, TRANSPOSED)), 0.0)


@triton.jit(do_not_specialize=SIZES)
def backward_rows(
    Q, K, Output, GradOutput, Lse, Entropy, MaxProbability, GradLse, GradEntropy, GradMax, C,
    KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row, Rho, Peak, Argmax,
    q_batch, q_head, q_row, k_batch, k_head, k_row, o_batch, o_head, o_row, do_batch, do_head, do_row,
    c_batch, c_head,
    H, S, P, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, UNIT: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_MAX: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr, HAS_LINK_MASK: tl.constexpr,
    TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ρ; with HAS_MAX also x pmax (Peak) and a (Argmax, int32, -1 without any key). A program per block of queries."""
    blocks = tl.cdiv(S, BLOCK_S)
    head = tl.program_id(0) // blocks  # b * H + h
    rows = (tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BS]
    inside, at = rows < S, head.to(tl.int64) * S + rows
    lse2 = row_lse2(Lse, at, inside)

    output = load_rows(at_head(Output, head, H, o_batch, o_head, UNIT), rows, o_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
    do = load_rows(at_head(GradOutput, head, H, do_batch, do_head, UNIT), rows, do_row, S, D, BLOCK_D, UNIT)
    rho = -tl.sum(output.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_LSE:
        rho += tl.load(GradLse + at, mask=inside, other=0.0)
    if HAS_ENTROPY:
        rho -= tl.load(GradEntropy + at, mask=inside, other=0.0) * tl.load(Entropy + at, mask=inside, other=0.0)
    if HAS_MAX:
        peak = tl.load(GradMax + at, mask=inside, other=0.0) * tl.load(MaxProbability + at, mask=inside, other=0.0)
        rho -= peak
        tl.store(Peak + at, peak, mask=inside)

    if HAS_KEY or HAS_MAX:
        AXIS: tl.constexpr = 0 if TRANSPOSED else 1  # of the keys in a tile
        q = load_rows(at_head(Q, head, H, q_batch, q_head, UNIT), rows, q_row, S, D, BLOCK_D, UNIT)
        K = at_head(K, head, H, k_batch, k_head, UNIT)
        C = at_head(C, head, H, c_batch, c_head, 1)
        t = tl.zeros((BLOCK_S,), tl.float32)
        largest = tl.full((BLOCK_S,), -INF, tl.float32)
        argmax = tl.full((BLOCK_S,), -1, tl.int32)
        for start in tl.range(0, P, BLOCK_P, num_stages=STAGES):
            keys = start + tl.arange(0, BLOCK_P)  # [BP]
            counted = allowed(KeyMask, HeadMask, head, H, keys, P, HAS_KEY_MASK, HAS_HEAD_MASK)
            s2 = product(q, load_rows(K, keys, k_row, P, D, BLOCK_D, UNIT), TRANSPOSED) * (scale * LOG2E)
            if HAS_LINK_MASK:
                s2 = linked(s2, LinkMask, head // H, link_batch, link_row, rows, keys, S, P, -INF, TRANSPOSED)
            if HAS_KEY:
                c = tl.load(C + keys, mask=keys < P, other=0.0)
                t += tl.sum(weights(s2, lse2, counted, TRANSPOSED) * by_key(c, TRANSPOSED), AXIS)
            if HAS_MAX:
                s2 = tl.where(by_key(counted, TRANSPOSED), s2, -INF)
                top = tl.max(s2, AXIS)
                first = tl.where(s2 == by_query(top, TRANSPOSED), by_key(keys, TRANSPOSED), P)
                argmax = tl.where(top > largest, tl.min(first, AXIS), argmax)
                largest = tl.maximum(largest, top)
        if HAS_KEY:
            rho -= tl.where(valid(QueryMask, head // H, rows, S, HAS_QUERY_MASK), t, 0.0)
        if HAS_MAX:
            tl.store(Argmax + at, argmax, mask=inside)
    tl.store(Rho + at, tl.where(lse2 < NOTHING, rho, 0.0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def backward_columns(
    Q, K, ColumnLse, U, KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row, Tau,
    q_batch, q_head, q_row, k_batch, k_head, k_row, u_batch, u_head,
    H, S, P, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, UNIT: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr, HAS_LINK_MASK: tl.constexpr,
    TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """τ. A program per block of keys, sweeping the queries."""
    blocks = tl.cdiv(P, BLOCK_P)
    head = tl.program_id(0) // blocks
    keys = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    Q = at_head(Q, head, H, q_batch, q_head, UNIT)
    U = at_head(U, head, H, u_batch, u_head, 1)
    at = head.to(tl.int64) * P + keys
    counted = allowed(KeyMask, HeadMask, head, H, keys, P, HAS_KEY_MASK, HAS_HEAD_MASK)
    k = load_rows(at_head(K, head, H, k_batch, k_head, UNIT), keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
    column2 = column_lse2(ColumnLse, at, counted, HAS_LINK_MASK)
    tau = tl.zeros((BLOCK_P,), tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_S)  # [BS]
        w = valid(QueryMask, head // H, rows, S, HAS_QUERY_MASK)
        u = tl.load(U + rows, mask=rows < S, other=0.0)
        s2 = product(load_rows(Q, rows, q_row, S, D, BLOCK_D, UNIT), k, TRANSPOSED) * (scale * LOG2E)
        if HAS_LINK_MASK:
            s2 = linked(s2, LinkMask, head // H, link_batch, link_row, rows, keys, S, P, -INF, TRANSPOSED)
        r = column_weights(s2, column2, w, TRANSPOSED)
        tau += tl.sum(r * by_query(u, TRANSPOSED), 1 if TRANSPOSED else 0)
    tl.store(Tau + at, tau, mask=keys < P)
