"""Forward kernels: the output, and whichever statistics are asked for, without the (B, H, S, P) weights in memory.

    forward_single  a block of queries against all keys in one tile: exact softmax, statistics from the same tile
    forward_online  a block of queries, online softmax over blocks of keys; a second sweep for key and query statistics
    column_lse      a block of keys, online over all queries: what the softmax over queries is divided by
    key_statistics  a block of keys, over all queries with their lse: key statistics where the query axis is long

Grids are one-dimensional, (b * H + h) * blocks + block, so that neighbours share a head's keys in the L2 cache.
Nothing is added atomically: two runs agree bitwise. Flags, each constexpr and paid for only where it is set:

    HAS_KEY_MASK, HAS_QUERY_MASK, HAS_HEAD_MASK, HAS_DROPOUT    the call has one
    HAS_LINK_MASK           likewise; without one LinkMask and its strides are None, and no part of the kernel
    HAS_MAX_PROBABILITY     (B, H, S): exp(m - lse) = 1 / l
    HAS_ENTROPY             (B, H, S): log l + sum p (m - s), two terms that are not negative, so nothing cancels
    HAS_KEY_SUM             (B, H, query blocks, P): sum of p over the block's valid queries
    HAS_KEY_MAX             (B, H, query blocks, P): their maximum
    HAS_QUERY_SUM           (B, H, S): sum over keys of the softmax over valid queries
    LOCAL                   with HAS_QUERY_SUM: the block holds all queries, so the softmax over them is the tile's own
                            and ColumnLse is written; where it does not, column_lse has written it before

In a row, m is the largest base-2 logit, l the sum of exp2(s - m) and ``spread`` the sum of exp2(s - m) (m - s). m
starts at -NOTHING, which is finite: a row that attends to nothing then computes 0 * 1e30 and never inf - inf.
"""

import triton
import triton.language as tl

from .primitives import (
    INF,
    LN2,
    LOG2E,
    NOTHING,
    SIZES,
    at_head,
    by_key,
    by_query,
    kept,
    length_if_on,
    linked,
    load_rows,
    product,
    row_lse2,
    store_rows,
    valid,
    weights,
)


@triton.jit
def reciprocal(x):
    """1 / x, and 0 for 0. NaN stays, so that a value that is not finite shows."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def log_sum_exp(m, l):
    """Natural log-sum-exp; -inf of nothing."""
    return tl.where(l == 0, -INF, (m + tl.log2(tl.where(l == 0, 1.0, l))) * LN2)


@triton.jit
def accumulate(output, p, v, TRANSPOSED: tl.constexpr):
    """output + p v: [BS, BD], or transposed [BD, BS], where the width is in the rows of the matrix instruction."""
    if TRANSPOSED:
        output = tl.dot(tl.trans(v), p.to(v.dtype), output, input_precision="ieee")
    else:
        output = tl.dot(p.to(v.dtype), v, output, input_precision="ieee")
    return output


@triton.jit
def softmax_over_queries(s, counted, allowed, ColumnLse, column, inside, TRANSPOSED: tl.constexpr, LOCAL: tl.constexpr):
    """[BS] sums over the tile's keys of the softmax over queries. LOCAL writes ``ColumnLse + column``, else reads it.

    The exponentials are taken twice: kept from the sum for a division, they spill registers.
    """
    QUERIES: tl.constexpr = 1 if TRANSPOSED else 0
    if LOCAL:
        t = tl.where(by_query(counted, TRANSPOSED), s, -INF)
        m = tl.maximum(tl.max(t, QUERIES), -NOTHING)
        l = tl.sum(tl.exp2(t - by_key(m, TRANSPOSED)), QUERIES)
        lse2 = tl.where(l == 0, NOTHING, m + tl.log2(tl.where(l == 0, 1.0, l)))
        tl.store(ColumnLse + column, tl.where(l == 0, -INF, lse2 * LN2), mask=inside)
    else:
        lse2 = row_lse2(ColumnLse, column, inside)
    r = tl.exp2(s - by_key(tl.where(allowed, lse2, NOTHING), TRANSPOSED))
    return tl.where(counted, tl.sum(r, 1 - QUERIES), 0.0)  # of an uncounted query it may have overflowed


@triton.jit
def store_row_statistics(
    Lse, MaxProbability, Entropy, row, inside, m, l, spread,
    HAS_MAX_PROBABILITY: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    tl.store(Lse + row, log_sum_exp(m, l), mask=inside)
    if HAS_MAX_PROBABILITY:
        tl.store(MaxProbability + row, reciprocal(l), mask=inside)
    if HAS_ENTROPY:
        log_l = tl.log2(tl.where(l == 0, 1.0, l))
        tl.store(Entropy + row, (log_l + spread * reciprocal(l)) * LN2, mask=inside)


@triton.jit
def store_key_statistics(
    KeySum, KeyMax, at, inside, p,
    TRANSPOSED: tl.constexpr, HAS_KEY_SUM: tl.constexpr, HAS_KEY_MAX: tl.constexpr,
):  # fmt: skip
    """Of a tile of weights, zero where a query does not count."""
    QUERIES: tl.constexpr = 1 if TRANSPOSED else 0
    if HAS_KEY_SUM:
        tl.store(KeySum + at, tl.sum(p, QUERIES), mask=inside)
    if HAS_KEY_MAX:
        tl.store(KeyMax + at, tl.max(p, QUERIES), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def forward_single(
    Q, K, V, Output, Lse, MaxProbability, Entropy, KeySum, KeyMax, QuerySum, ColumnLse,
    KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row, Seed,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, output_batch, output_head, output_row,
    H, S, P, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr,
    HAS_LINK_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_MAX_PROBABILITY: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KEY_SUM: tl.constexpr, HAS_KEY_MAX: tl.constexpr,
    HAS_QUERY_SUM: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """A program for every block of queries and head; P <= BLOCK_P. Writes what the module docstring lists."""
    KEYS: tl.constexpr = 0 if TRANSPOSED else 1
    program = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_S)
    head = program // blocks  # b * H + h
    sample = head // H
    first_query = program % blocks * BLOCK_S
    queries = first_query + tl.arange(0, BLOCK_S)
    keys = tl.arange(0, BLOCK_P)
    row = head.to(tl.int64) * S + queries

    q = load_rows(at_head(Q, head, H, q_batch, q_head, UNIT), queries, q_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
    k = load_rows(at_head(K, head, H, k_batch, k_head, UNIT), keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
    counted = valid(QueryMask, sample, queries, S, HAS_QUERY_MASK)
    allowed = valid(KeyMask, sample, keys, P, HAS_KEY_MASK)
    if HAS_HEAD_MASK:
        allowed = allowed & (keys < length_if_on(HeadMask, head, P, HAS_HEAD_MASK))
    s = product(q, k, TRANSPOSED) * (scale * LOG2E)  # [BS, BP], transposed [BP, BS]
    if HAS_LINK_MASK:
        s = linked(s, LinkMask, sample, link_batch, link_row, queries, keys, S, P, -INF, TRANSPOSED)
    if HAS_QUERY_SUM:
        column = head.to(tl.int64) * P + keys
        query_sum = softmax_over_queries(s, counted, allowed, ColumnLse, column, keys < P, TRANSPOSED, LOCAL)
        tl.store(QuerySum + row, query_sum, mask=queries < S)

    s = tl.where(by_key(allowed, TRANSPOSED), s, -INF)
    m = tl.maximum(tl.max(s, KEYS), -NOTHING)
    below = s - by_query(m, TRANSPOSED)
    p = tl.exp2(below)
    l = tl.sum(p, KEYS)
    spread = l
    if HAS_ENTROPY:
        spread = -tl.sum(p * tl.maximum(below, -NOTHING), KEYS)  # 0 * -NOTHING where 0 * -inf would be NaN
    inside = queries < S
    store_row_statistics(Lse, MaxProbability, Entropy, row, inside, m, l, spread, HAS_MAX_PROBABILITY, HAS_ENTROPY)
    if HAS_KEY_SUM or HAS_KEY_MAX:
        at = program.to(tl.int64) * P + keys
        shares = p * by_query(tl.where(counted, reciprocal(l), 0.0), TRANSPOSED)
        store_key_statistics(KeySum, KeyMax, at, keys < P, shares, TRANSPOSED, HAS_KEY_SUM, HAS_KEY_MAX)

    v = load_rows(at_head(V, head, H, v_batch, v_head, UNIT), keys, v_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
    if HAS_DROPOUT:
        p = tl.where(kept(Seed, head, first_query, 0, P, threshold, BLOCK_S, BLOCK_P, TRANSPOSED), p, 0.0)
    output = tl.zeros((BLOCK_D, BLOCK_S) if TRANSPOSED else (BLOCK_S, BLOCK_D), tl.float32)
    output = accumulate(output, p, v, TRANSPOSED) * by_query(reciprocal(l) * keep_scale, TRANSPOSED)
    output = tl.trans(output) if TRANSPOSED else output
    store_rows(
        at_head(Output, head, H, output_batch, output_head, UNIT), queries, output_row, S, output, D, BLOCK_D, UNIT
    )


@triton.jit(do_not_specialize=SIZES)
def forward_online(
    Q, K, V, Output, Lse, MaxProbability, Entropy, KeySum, KeyMax, QuerySum, ColumnLse,
    KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row, Seed,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, output_batch, output_head, output_row,
    H, S, P, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr,
    HAS_LINK_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_MAX_PROBABILITY: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KEY_SUM: tl.constexpr, HAS_KEY_MAX: tl.constexpr,
    HAS_QUERY_SUM: tl.constexpr, LOCAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program for every block of queries and head; any P. Writes what the module docstring lists."""
    KEYS: tl.constexpr = 0 if TRANSPOSED else 1
    program = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_S)
    head = program // blocks  # b * H + h
    sample = head // H
    first_query = program % blocks * BLOCK_S
    queries = first_query + tl.arange(0, BLOCK_S)
    row = head.to(tl.int64) * S + queries
    K = at_head(K, head, H, k_batch, k_head, UNIT)
    V = at_head(V, head, H, v_batch, v_head, UNIT)

    q = load_rows(at_head(Q, head, H, q_batch, q_head, UNIT), queries, q_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
    counted = valid(QueryMask, sample, queries, S, HAS_QUERY_MASK)
    m = tl.full((BLOCK_S,), -NOTHING, tl.float32)
    l = tl.zeros((BLOCK_S,), tl.float32)
    spread = tl.zeros((BLOCK_S,), tl.float32)
    output = tl.zeros((BLOCK_D, BLOCK_S) if TRANSPOSED else (BLOCK_S, BLOCK_D), tl.float32)
    end = length_if_on(HeadMask, head, P, HAS_HEAD_MASK)
    for first_key in tl.range(0, end, BLOCK_P, num_stages=STAGES):
        keys = first_key + tl.arange(0, BLOCK_P)
        k = load_rows(K, keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
        allowed = valid(KeyMask, sample, keys, P, HAS_KEY_MASK)
        s = product(q, k, TRANSPOSED) * (scale * LOG2E)  # [BS, BP], transposed [BP, BS]
        if HAS_LINK_MASK:
            s = linked(s, LinkMask, sample, link_batch, link_row, queries, keys, S, P, -INF, TRANSPOSED)
        s = tl.where(by_key(allowed, TRANSPOSED), s, -INF)
        higher = tl.maximum(m, tl.max(s, KEYS))
        shrink = tl.exp2(m - higher)
        below = s - by_query(higher, TRANSPOSED)
        p = tl.exp2(below)
        if HAS_ENTROPY:
            # a higher maximum adds (higher - m) to every m - s so far, whose weights sum to l
            spread = shrink * (spread + l * (higher - m)) - tl.sum(p * tl.maximum(below, -NOTHING), KEYS)
        l = l * shrink + tl.sum(p, KEYS)
        m = higher
        v = load_rows(V, keys, v_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
        if HAS_DROPOUT:
            p = tl.where(kept(Seed, head, first_query, first_key, P, threshold, BLOCK_S, BLOCK_P, TRANSPOSED), p, 0.0)
        output = accumulate(output * by_query(shrink, TRANSPOSED), p, v, TRANSPOSED)

    output *= by_query(reciprocal(l) * keep_scale, TRANSPOSED)
    output = tl.trans(output) if TRANSPOSED else output
    store_rows(
        at_head(Output, head, H, output_batch, output_head, UNIT), queries, output_row, S, output, D, BLOCK_D, UNIT
    )
    inside = queries < S
    store_row_statistics(Lse, MaxProbability, Entropy, row, inside, m, l, spread, HAS_MAX_PROBABILITY, HAS_ENTROPY)

    # The second sweep: a row's weights are known only once its lse is. The softmax over queries does not wait for that,
    # but beside the output and its sums it would spill registers.
    if HAS_KEY_SUM or HAS_KEY_MAX or HAS_QUERY_SUM:
        lse2 = tl.where(counted & (l != 0), m + tl.log2(tl.where(l == 0, 1.0, l)), NOTHING)
        query_sum = tl.zeros((BLOCK_S,), tl.float32)
        for first_key in tl.range(0, P, BLOCK_P, num_stages=STAGES):
            keys = first_key + tl.arange(0, BLOCK_P)
            k = load_rows(K, keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
            allowed = valid(KeyMask, sample, keys, P, HAS_KEY_MASK)
            if HAS_HEAD_MASK:
                allowed = allowed & (keys < end)
            s = product(q, k, TRANSPOSED) * (scale * LOG2E)  # [BS, BP], transposed [BP, BS]
            if HAS_LINK_MASK:
                s = linked(s, LinkMask, sample, link_batch, link_row, queries, keys, S, P, -INF, TRANSPOSED)
            if HAS_QUERY_SUM:
                column = head.to(tl.int64) * P + keys
                query_sum += softmax_over_queries(s, counted, allowed, ColumnLse, column, keys < P, TRANSPOSED, LOCAL)
            at = program.to(tl.int64) * P + keys
            p = weights(s, lse2, allowed, TRANSPOSED)
            store_key_statistics(KeySum, KeyMax, at, keys < P, p, TRANSPOSED, HAS_KEY_SUM, HAS_KEY_MAX)
        if HAS_QUERY_SUM:
            tl.store(QuerySum + row, query_sum, mask=queries < S)


@triton.jit(do_not_specialize=SIZES)
def column_lse(
    Q, K, ColumnLse, QueryMask, HeadMask, LinkMask, link_batch, link_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, H, S, P, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr, HAS_LINK_MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ColumnLse (B, H, P): log of the sum over valid queries of exp(s), -inf of none and where the head is off.

    A program for every block of keys and head. Masked keys are not looked at: theirs is finite and nobody reads it.
    """
    QUERIES: tl.constexpr = 1 if TRANSPOSED else 0
    blocks = tl.cdiv(P, BLOCK_P)
    head = tl.program_id(0) // blocks  # b * H + h
    keys = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    Q = at_head(Q, head, H, q_batch, q_head, UNIT)

    k = load_rows(at_head(K, head, H, k_batch, k_head, UNIT), keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
    m = tl.full((BLOCK_P,), -NOTHING, tl.float32)
    l = tl.zeros((BLOCK_P,), tl.float32)
    for first_query in tl.range(0, length_if_on(HeadMask, head, S, HAS_HEAD_MASK), BLOCK_S, num_stages=STAGES):
        queries = first_query + tl.arange(0, BLOCK_S)
        q = load_rows(Q, queries, q_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
        counted = valid(QueryMask, head // H, queries, S, HAS_QUERY_MASK)
        s = product(q, k, TRANSPOSED) * (scale * LOG2E)  # [BS, BP], transposed [BP, BS]
        if HAS_LINK_MASK:
            s = linked(s, LinkMask, head // H, link_batch, link_row, queries, keys, S, P, -INF, TRANSPOSED)
        s = tl.where(by_query(counted, TRANSPOSED), s, -INF)
        higher = tl.maximum(m, tl.max(s, QUERIES))
        l = l * tl.exp2(m - higher) + tl.sum(tl.exp2(s - by_key(higher, TRANSPOSED)), QUERIES)
        m = higher
    tl.store(ColumnLse + head.to(tl.int64) * P + keys, log_sum_exp(m, l), mask=keys < P)


@triton.jit(do_not_specialize=SIZES)
def key_statistics(
    Q, K, Lse, KeySum, KeyMax, KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, H, S, P, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr, HAS_LINK_MASK: tl.constexpr,
    HAS_KEY_SUM: tl.constexpr, HAS_KEY_MAX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """KeySum, KeyMax (B, H, P): sum and maximum over all valid queries of p, which their Lse (B, H, S) gives.

    A program for every block of keys and head.
    """
    QUERIES: tl.constexpr = 1 if TRANSPOSED else 0
    blocks = tl.cdiv(P, BLOCK_P)
    head = tl.program_id(0) // blocks  # b * H + h
    keys = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    Q = at_head(Q, head, H, q_batch, q_head, UNIT)

    k = load_rows(at_head(K, head, H, k_batch, k_head, UNIT), keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
    total = tl.zeros((BLOCK_P,), tl.float32)
    highest = tl.zeros((BLOCK_P,), tl.float32)
    for first_query in tl.range(0, length_if_on(HeadMask, head, S, HAS_HEAD_MASK), BLOCK_S, num_stages=STAGES):
        queries = first_query + tl.arange(0, BLOCK_S)
        q = load_rows(Q, queries, q_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
        counted = valid(QueryMask, head // H, queries, S, HAS_QUERY_MASK)
        lse2 = row_lse2(Lse, head.to(tl.int64) * S + queries, counted)
        s = product(q, k, TRANSPOSED) * (scale * LOG2E)  # [BS, BP], transposed [BP, BS]
        if HAS_LINK_MASK:
            s = linked(s, LinkMask, head // H, link_batch, link_row, queries, keys, S, P, -INF, TRANSPOSED)
        p = tl.exp2(s - by_query(lse2, TRANSPOSED))
        if HAS_KEY_SUM:
            total += tl.sum(p, QUERIES)
        if HAS_KEY_MAX:
            highest = tl.maximum(highest, tl.max(p, QUERIES))
    allowed = valid(KeyMask, head // H, keys, P, HAS_KEY_MASK)
    at = head.to(tl.int64) * P + keys
    if HAS_KEY_SUM:  # a masked key may have overflowed
        tl.store(KeySum + at, tl.where(allowed, total, 0.0), mask=keys < P)
    if HAS_KEY_MAX:
        tl.store(KeyMax + at, tl.where(allowed, highest, 0.0), mask=keys < P)
