"""The gradient of cross-attention by q, k and v, also through its statistics, from the output and the log-sum-exps.

For one sample and head, with queries i, keys j and everything that may be missing equal to zero:

    s_ij      scale q_i·k_j
    p_ij      softmax of s over the allowed keys;   Z_ij = kept_ij / (1 - dropout)
    r_ij      softmax of s over the valid queries; 0 for other queries and for keys that are not allowed
              (a link mask is part of s: -inf, so that p and r are 0 and nothing flows)
    g, e, x   gradients of lse, entropy and max_probability, one for each query
    c_j, u_i  gradients of key_attention and query_attention times what one weight counts in them (``request.share``)
    w_i       1 for valid queries, else 0

A function f of the weights p of one row reaches its logits by ds_j = p_j (f'_j - Σ p f'). For all the loss sees:

    output           f'_j = Z_j dO·v_j           Σ p f' = dO·O: O holds the dropout already
    key_attention    f'_j = w c_j                Σ p f' = w t,  t = Σ p c
    entropy          f'_j = -e (s_j - lse + 1)   Σ p f' = e (ent - 1), since ent = lse - Σ p s
    max_probability  f'_a = x at the first maximum a, where p_a = pmax: ds_j = x pmax ([j = a] - p_j)
    lse              ds_j = g p_j
    query_attention  the same along a column of r: ds_ij = r_ij (u_i - τ_j),  τ_j = Σ_i r_ij u_i

which gives, with all terms that are constant along a row gathered in ρ:

    ds_ij = p_ij (Z_ij dO_i·v_j + w_i c_j - e_i (s_ij - lse_i) + ρ_i) + [j = a_i] x_i pmax_i + r_ij (u_i - τ_j)
    ρ_i   = -dO_i·O_i + g_i - e_i ent_i - x_i pmax_i - w_i t_i
    dq    = scale ds k        dk = scale dsᵀ q        dv = (p∘Z)ᵀ dO

p and r are recomputed from the log-sum-exps, as in FlashAttention (Dao et al., 2022). A row that attends to nothing has
``NOTHING`` for its log-sum-exp and 0 for ρ and e: its weights are 0, and nothing they are multiplied with is infinite.

ds is rounded to the inputs' dtype before its products, as in other fused kernels: in float16 a loss that is scaled too
far makes dq infinite, which a gradient scaler steps back from.

The launches have no atomics, so that two runs agree bitwise:

    backward_rows     ρ, and a, for every query: where t or a are needed, one sweep over the keys for both
    backward_columns  τ for every key by a sweep over the queries: for query_attention, before the two kernels below
    backward_queries  dq by a sweep over the keys
    backward_keys     dk and dv by a sweep over the queries
    backward_fused    instead of these three where the queries fit one block: a program sweeps its share of the keys
                      once. dk and dv are finished with each block of keys; dq, or a float32 part of it where several
                      programs share a head, stays in registers

Statistics of rows and columns are contiguous float32, (B, H, S) and (B, H, P); masks are uint8. Strides are those of
sample, head and row in elements; c and u have a head stride of 0 where the heads share them.
"""

import triton
import triton.language as tl

from .backward_rows import allowed, column_lse2, column_weights
from .primitives import (
    LN2,
    LOG2E,
    NOTHING,
    SIZES,
    UNLINKED,
    at_head,
    by_key,
    by_query,
    kept,
    linked,
    load_rows,
    product,
    row_lse2,
    store_rows,
    valid,
    weights,
)


@triton.jit
def row_terms(
    Rho, Peak, Argmax, GradEntropy, U, QueryMask, head, H, rows, S, lse2,
    HAS_MAX: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_QUERY_MASK: tl.constexpr,
):  # fmt: skip
    """What ds takes from its queries but their ``lse2``, each [BS]: ρ, e ln 2, x pmax, a, w and u.

    Those without a flag are stand-ins, which ``logit_gradient`` ignores.
    """
    inside, at = rows < S, head.to(tl.int64) * S + rows
    rho = tl.load(Rho + at, mask=inside, other=0.0)
    entropy, peak, argmax, u = rho, rho, rows, rho
    if HAS_ENTROPY:  # times ln 2, because s - lse is formed in base 2
        entropy = tl.load(GradEntropy + at, mask=inside, other=0.0) * LN2
        entropy = tl.where(lse2 < NOTHING, entropy, 0.0)
    if HAS_MAX:
        peak = tl.load(Peak + at, mask=inside, other=0.0)
        argmax = tl.load(Argmax + at, mask=inside, other=-1)
    if HAS_QUERY:
        u = tl.load(U + rows, mask=inside, other=0.0)
    return rho, entropy, peak, argmax, valid(QueryMask, head // H, rows, S, HAS_QUERY_MASK), u


@triton.jit
def column_terms(
    C, ColumnLse, Tau, head, keys, P, counted,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_TAU: tl.constexpr, HAS_LINK_MASK: tl.constexpr,
):  # fmt: skip
    """What ds takes from its keys, each [BP]: c, base-2 column log-sum-exp and τ, or stand-ins."""
    inside, at = keys < P, head.to(tl.int64) * P + keys
    c = tl.zeros_like(keys).to(tl.float32)
    column2, tau = c, c
    if HAS_KEY:
        c = tl.load(C + keys, mask=inside, other=0.0)
    if HAS_QUERY:
        column2 = column_lse2(ColumnLse, at, counted, HAS_LINK_MASK)
    if HAS_TAU:
        tau = tl.load(Tau + at, mask=inside, other=0.0)
    return c, column2, tau


@triton.jit
def logit_gradient(
    s2, p, dp, lse2, row, column, keys,
    HAS_MAX: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr,
    HAS_QUERY_MASK: tl.constexpr, HAS_TAU: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """ds for a tile, from base-2 logits, weights, Z dO·v and the terms of its queries and keys.

    Without ``HAS_TAU`` the tile holds all queries, and τ is summed here.
    """
    rho, entropy, peak, argmax, w, u = row
    c, column2, tau = column
    gradient = dp + by_query(rho, TRANSPOSED)
    if HAS_KEY:
        if HAS_QUERY_MASK:
            gradient += by_query(w.to(tl.float32), TRANSPOSED) * by_key(c, TRANSPOSED)
        else:
            gradient += by_key(c, TRANSPOSED)
    if HAS_ENTROPY:
        gradient -= by_query(entropy, TRANSPOSED) * (s2 - by_query(lse2, TRANSPOSED))
    ds = p * gradient
    if HAS_MAX:
        ds += tl.where(by_query(argmax, TRANSPOSED) == by_key(keys, TRANSPOSED), by_query(peak, TRANSPOSED), 0.0)
    if HAS_QUERY:
        r = column_weights(s2, column2, w, TRANSPOSED)
        if not HAS_TAU:
            tau = tl.sum(r * by_query(u, TRANSPOSED), 1 if TRANSPOSED else 0)
        ds += r * (by_query(u, TRANSPOSED) - by_key(tau, TRANSPOSED))
    return ds


@triton.jit(do_not_specialize=SIZES)
def backward_fused(
    Q, K, V, GradOutput, Lse, ColumnLse, GradEntropy, C, U, Rho, Peak, Argmax,
    KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row, Seed, GradQ, GradK, GradV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dq_split, dq_batch, dq_head, dq_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    c_batch, c_head, u_batch, u_head,
    H, S, P, splits, split_keys, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, UNIT: tl.constexpr,
    HAS_MAX: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr,
    HAS_LINK_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv where S <= BLOCK_S. ``splits`` programs for each head, with ``split_keys`` keys each (a multiple of
    BLOCK_P) and parts of dq that are ``dq_split`` elements apart."""
    split = tl.program_id(0) % splits
    head = tl.program_id(0) // splits
    rows = tl.arange(0, BLOCK_S)
    K = at_head(K, head, H, k_batch, k_head, UNIT)
    V = at_head(V, head, H, v_batch, v_head, UNIT)
    GradK = at_head(GradK, head, H, dk_batch, dk_head, UNIT)
    GradV = at_head(GradV, head, H, dv_batch, dv_head, UNIT)
    C = at_head(C, head, H, c_batch, c_head, 1)
    U = at_head(U, head, H, u_batch, u_head, 1)
    q = load_rows(at_head(Q, head, H, q_batch, q_head, UNIT), rows, q_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
    do = load_rows(at_head(GradOutput, head, H, do_batch, do_head, UNIT), rows, do_row, S, D, BLOCK_D, UNIT)
    lse2 = row_lse2(Lse, head.to(tl.int64) * S + rows, rows < S)
    dq = tl.zeros((BLOCK_D, BLOCK_S) if TRANSPOSED else (BLOCK_S, BLOCK_D), tl.float32)
    for start in tl.range(split * split_keys, tl.minimum((split + 1) * split_keys, P), BLOCK_P, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_P)  # [BP]
        counted = allowed(KeyMask, HeadMask, head, H, keys, P, HAS_KEY_MASK, HAS_HEAD_MASK)
        k = load_rows(K, keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
        v = load_rows(V, keys, v_row, P, D, BLOCK_D, UNIT)
        s2 = product(q, k, TRANSPOSED) * (scale * LOG2E)
        if HAS_LINK_MASK:
            s2 = linked(s2, LinkMask, head // H, link_batch, link_row, rows, keys, S, P, UNLINKED, TRANSPOSED)
        p = weights(s2, lse2, counted, TRANSPOSED)
        pz = p
        if HAS_DROPOUT:
            keep = kept(Seed, head, 0, start, P, threshold, BLOCK_S, BLOCK_P, TRANSPOSED)
            pz = tl.where(keep, p * keep_scale, 0.0)
        pz = pz.to(do.dtype)  # dv leaves for memory before ds needs its registers
        dv = tl.dot(pz if TRANSPOSED else tl.trans(pz), do, input_precision="ieee")
        store_rows(GradV, keys, dv_row, P, dv, D, BLOCK_D, UNIT)
        dp = product(do, v, TRANSPOSED)
        if HAS_DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        # read again for every block, from the L1 cache: held in registers throughout the loop they would spill
        column = column_terms(C, ColumnLse, ColumnLse, head, keys, P, counted, HAS_KEY, HAS_QUERY, False, HAS_LINK_MASK)
        row = row_terms(
            Rho, Peak, Argmax, GradEntropy, U, QueryMask, head, H, rows, S, lse2,
            HAS_MAX, HAS_ENTROPY, HAS_QUERY, HAS_QUERY_MASK,
        )  # fmt: skip
        ds = logit_gradient(
            s2, p, dp, lse2, row, column, keys,
            HAS_MAX, HAS_ENTROPY, HAS_KEY, HAS_QUERY, HAS_QUERY_MASK, False, TRANSPOSED,
        ).to(k.dtype)  # fmt: skip
        dk = tl.dot(ds if TRANSPOSED else tl.trans(ds), q, input_precision="ieee")
        store_rows(GradK, keys, dk_row, P, dk * scale, D, BLOCK_D, UNIT)
        if TRANSPOSED:
            dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee")
        else:
            dq = tl.dot(ds, k, dq, input_precision="ieee")
    GradQ = at_head(GradQ, head, H, dq_batch, dq_head, UNIT) + split.to(tl.int64) * dq_split * UNIT
    store_rows(GradQ, rows, dq_row, S, (tl.trans(dq) if TRANSPOSED else dq) * scale, D, BLOCK_D, UNIT)


@triton.jit(do_not_specialize=SIZES)
def backward_queries(
    Q, K, V, GradOutput, Lse, ColumnLse, Tau, GradEntropy, C, U, Rho, Peak, Argmax,
    KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row, Seed, GradQ,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dq_batch, dq_head, dq_row, c_batch, c_head, u_batch, u_head,
    H, S, P, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, UNIT: tl.constexpr,
    HAS_MAX: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr,
    HAS_LINK_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq. A program per block of queries, sweeping the keys."""
    blocks = tl.cdiv(S, BLOCK_S)
    head = tl.program_id(0) // blocks
    first_row = (tl.program_id(0) % blocks) * BLOCK_S
    rows = first_row + tl.arange(0, BLOCK_S)
    K = at_head(K, head, H, k_batch, k_head, UNIT)
    V = at_head(V, head, H, v_batch, v_head, UNIT)
    C = at_head(C, head, H, c_batch, c_head, 1)
    U = at_head(U, head, H, u_batch, u_head, 1)
    q = load_rows(at_head(Q, head, H, q_batch, q_head, UNIT), rows, q_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
    do = load_rows(at_head(GradOutput, head, H, do_batch, do_head, UNIT), rows, do_row, S, D, BLOCK_D, UNIT)
    lse2 = row_lse2(Lse, head.to(tl.int64) * S + rows, rows < S)
    row = row_terms(
        Rho, Peak, Argmax, GradEntropy, U, QueryMask, head, H, rows, S, lse2,
        HAS_MAX, HAS_ENTROPY, HAS_QUERY, HAS_QUERY_MASK,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_D, BLOCK_S) if TRANSPOSED else (BLOCK_S, BLOCK_D), tl.float32)
    for start in tl.range(0, P, BLOCK_P, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_P)  # [BP]
        counted = allowed(KeyMask, HeadMask, head, H, keys, P, HAS_KEY_MASK, HAS_HEAD_MASK)
        column = column_terms(C, ColumnLse, Tau, head, keys, P, counted, HAS_KEY, HAS_QUERY, HAS_QUERY, HAS_LINK_MASK)
        k = load_rows(K, keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
        s2 = product(q, k, TRANSPOSED) * (scale * LOG2E)
        if HAS_LINK_MASK:
            s2 = linked(s2, LinkMask, head // H, link_batch, link_row, rows, keys, S, P, UNLINKED, TRANSPOSED)
        p = weights(s2, lse2, counted, TRANSPOSED)
        dp = product(do, load_rows(V, keys, v_row, P, D, BLOCK_D, UNIT), TRANSPOSED)
        if HAS_DROPOUT:
            keep = kept(Seed, head, first_row, start, P, threshold, BLOCK_S, BLOCK_P, TRANSPOSED)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = logit_gradient(
            s2, p, dp, lse2, row, column, keys,
            HAS_MAX, HAS_ENTROPY, HAS_KEY, HAS_QUERY, HAS_QUERY_MASK, True, TRANSPOSED,
        ).to(k.dtype)  # fmt: skip
        if TRANSPOSED:
            dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee")
        else:
            dq = tl.dot(ds, k, dq, input_precision="ieee")
    GradQ = at_head(GradQ, head, H, dq_batch, dq_head, UNIT)
    store_rows(GradQ, rows, dq_row, S, (tl.trans(dq) if TRANSPOSED else dq) * scale, D, BLOCK_D, UNIT)


@triton.jit(do_not_specialize=SIZES)
def backward_keys(
    Q, K, V, GradOutput, Lse, ColumnLse, Tau, GradEntropy, C, U, Rho, Peak, Argmax,
    KeyMask, QueryMask, HeadMask, LinkMask, link_batch, link_row, Seed, GradK, GradV,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, c_batch, c_head, u_batch, u_head,
    H, S, P, scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, UNIT: tl.constexpr,
    HAS_MAX: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_QUERY_MASK: tl.constexpr, HAS_HEAD_MASK: tl.constexpr,
    HAS_LINK_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv. A program per block of keys, sweeping the queries."""
    blocks = tl.cdiv(P, BLOCK_P)
    head = tl.program_id(0) // blocks
    first_key = (tl.program_id(0) % blocks) * BLOCK_P
    keys = first_key + tl.arange(0, BLOCK_P)
    Q = at_head(Q, head, H, q_batch, q_head, UNIT)
    GradOutput = at_head(GradOutput, head, H, do_batch, do_head, UNIT)
    U = at_head(U, head, H, u_batch, u_head, 1)
    counted = allowed(KeyMask, HeadMask, head, H, keys, P, HAS_KEY_MASK, HAS_HEAD_MASK)
    C = at_head(C, head, H, c_batch, c_head, 1)
    column = column_terms(C, ColumnLse, Tau, head, keys, P, counted, HAS_KEY, HAS_QUERY, HAS_QUERY, HAS_LINK_MASK)
    k = load_rows(at_head(K, head, H, k_batch, k_head, UNIT), keys, k_row, P, D, BLOCK_D, UNIT)  # [BP, BD]
    v = load_rows(at_head(V, head, H, v_batch, v_head, UNIT), keys, v_row, P, D, BLOCK_D, UNIT)
    dk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_S)  # [BS]
        lse2 = row_lse2(Lse, head.to(tl.int64) * S + rows, rows < S)
        q = load_rows(Q, rows, q_row, S, D, BLOCK_D, UNIT)  # [BS, BD]
        do = load_rows(GradOutput, rows, do_row, S, D, BLOCK_D, UNIT)
        s2 = product(q, k, TRANSPOSED) * (scale * LOG2E)
        if HAS_LINK_MASK:
            s2 = linked(s2, LinkMask, head // H, link_batch, link_row, rows, keys, S, P, UNLINKED, TRANSPOSED)
        p = weights(s2, lse2, counted, TRANSPOSED)
        pz = p
        if HAS_DROPOUT:
            keep = kept(Seed, head, start, first_key, P, threshold, BLOCK_S, BLOCK_P, TRANSPOSED)
            pz = tl.where(keep, p * keep_scale, 0.0)
        pz = pz.to(do.dtype)
        dv = tl.dot(pz if TRANSPOSED else tl.trans(pz), do, dv, input_precision="ieee")
        dp = product(do, v, TRANSPOSED)
        if HAS_DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        row = row_terms(
            Rho, Peak, Argmax, GradEntropy, U, QueryMask, head, H, rows, S, lse2,
            HAS_MAX, HAS_ENTROPY, HAS_QUERY, HAS_QUERY_MASK,
        )  # fmt: skip
        ds = logit_gradient(
            s2, p, dp, lse2, row, column, keys,
            HAS_MAX, HAS_ENTROPY, HAS_KEY, HAS_QUERY, HAS_QUERY_MASK, True, TRANSPOSED,
        ).to(q.dtype)  # fmt: skip
        dk = tl.dot(ds if TRANSPOSED else tl.trans(ds), q, dk, input_precision="ieee")
    store_rows(at_head(GradK, head, H, dk_batch, dk_head, UNIT), keys, dk_row, P, dk * scale, D, BLOCK_D, UNIT)
    store_rows(at_head(GradV, head, H, dv_batch, dv_head, UNIT), keys, dv_row, P, dv, D, BLOCK_D, UNIT)
