"""The gradient of cross-attention: what kernels/cross_attention/triton/backward.py reads, writes and multiplies.

Letters as in attention.py; O is the output, dO its gradient.

    backward_rows     O and dO once, ρ written. Where key_attention or max_probability has a gradient also Q once and
                      K N_S times, a product
    backward_fused    where the queries fit one block: Q, dO once for each of the programs that share a head, K and V
                      once, dk and dv written; five products. Of several programs each writes a float32 part of dq,
                      which PyTorch sums
    backward_columns  otherwise, for query_attention: Q N_P times, K once, τ written, a product
    backward_queries  Q and dO once, K and V N_S times, dq written; three products
    backward_keys     K and V once, Q and dO N_P times, dk and dv written; four products

So the five products that a backward needs are seven where no block holds all queries.
"""

from __future__ import annotations

from collections.abc import Collection

from .attention import Attention, chosen
from .launches import Launch, Op, Read, once, tiles
from .work import Work

PROGRAMS = 2  # as in launch_backward.py


def backward_op(
    b: int,
    h: int,
    s: int,
    p: int,
    d: int,
    dtype: str,
    statistics: bool | Collection[str] = (),
    architecture: str = "sm_90",
    multiprocessors: int = 132,
) -> Op:
    """The launches of a backward call. ``statistics``: those that a gradient comes through, "lse" among them; the
    largest weight of a key has none. ``multiprocessors``: of the device, which decide how many programs share a head.
    """
    asked, a = chosen(statistics), Attention(b, h, s, p, d, dtype, architecture)
    launches, of_keys, of_queries = [], 4 * b * p, 4 * b * s
    if "key_attention" in asked:
        launches.append(Launch("torch.mul", {"grad_key_attention": once(of_keys)}, {"C": of_keys}, vector=b * p))
    if "query_attention" in asked:
        launches.append(
            Launch("torch.mul", {"grad_query_attention": once(of_queries)}, {"U": of_queries}, vector=b * s)
        )
    launches.append(_rows(a, asked))
    fused = a.tile("backward_fused")
    if fused is None:
        if "query_attention" in asked:
            launches.append(_columns(a))
        launches += [_queries(a, asked), _keys(a, asked)]
        return Op(dtype, launches, frozenset({"GradQ", "GradK", "GradV"}))

    blocks = tiles(p, fused.block_p)
    each = tiles(blocks, min(blocks, tiles(PROGRAMS * multiprocessors, a.heads)))
    splits = tiles(blocks, each)
    reads = {"Q": Read(a.queries, a.queries * splits), "GradOutput": Read(a.queries, a.queries * splits)}
    reads |= {"K": once(a.keys), "V": once(a.keys), "Lse": Read(a.rows, a.rows * splits)}
    reads |= _of_rows(a, asked, blocks) | _of_columns(a, asked, 1)
    part = 4 * a.heads * s * d  # of dq, in float32
    writes = {"GradQ": part * splits if splits > 1 else a.queries, "GradK": a.keys, "GradV": a.keys}
    launches.append(Launch("backward_fused", reads, writes, 5 * a.product, 5 * a.issued(fused), _vector(a, asked)))
    if splits == 1:
        return Op(dtype, launches, frozenset({"GradQ", "GradK", "GradV"}))
    launches.append(Launch("torch.sum", {"GradQ": once(part * splits)}, {"dq_sum": part}, vector=splits * part // 4))
    launches.append(Launch("torch.copy_", {"dq_sum": once(part)}, {"dq": a.queries}))
    return Op(dtype, launches, frozenset({"dq", "GradK", "GradV"}))


def _rows(a: Attention, asked: Collection[str]) -> Launch:
    tile = a.need("backward_rows")
    blocks, sweep = tiles(a.s, tile.block_s), bool({"key_attention", "max_probability"} & set(asked))
    reads = {"Output": once(a.queries), "GradOutput": once(a.queries), "Lse": once(a.rows)}
    writes = {"Rho": a.rows}
    if "lse" in asked:
        reads["GradLse"] = once(a.rows)
    if "entropy" in asked:
        reads |= {"GradEntropy": once(a.rows), "Entropy": once(a.rows)}
    if "max_probability" in asked:
        reads |= {"GradMax": once(a.rows), "MaxProbability": once(a.rows)}
        writes |= {"Peak": a.rows, "Argmax": a.rows}
    if sweep:
        reads |= {"Q": once(a.queries), "K": Read(a.keys, a.keys * blocks)}
    if "key_attention" in asked:
        reads["C"] = Read(4 * a.b * a.p, a.columns * blocks)
    vector = 2 * a.heads * a.s * a.d + 6 * sweep * a.logits
    return Launch("backward_rows", reads, writes, sweep * a.product, sweep * a.issued(tile), vector)


def _columns(a: Attention) -> Launch:
    tile = a.need("backward_columns")
    blocks = tiles(a.p, tile.block_p)
    reads = {"Q": Read(a.queries, a.queries * blocks), "K": once(a.keys), "ColumnLse": once(a.columns)}
    reads["U"] = Read(4 * a.b * a.s, a.rows * blocks)
    return Launch("backward_columns", reads, {"Tau": a.columns}, a.product, a.issued(tile), 5 * a.logits)


def _queries(a: Attention, asked: Collection[str]) -> Launch:
    tile = a.need("backward_queries")
    blocks = tiles(a.s, tile.block_s)
    reads = {"Q": once(a.queries), "GradOutput": once(a.queries), "Lse": once(a.rows)}
    reads |= {"K": Read(a.keys, a.keys * blocks), "V": Read(a.keys, a.keys * blocks)}
    reads |= _of_rows(a, asked, 1) | _of_columns(a, asked, blocks)
    if "query_attention" in asked:
        reads["Tau"] = Read(a.columns, a.columns * blocks)
    return Launch("backward_queries", reads, {"GradQ": a.queries}, 3 * a.product, 3 * a.issued(tile), _vector(a, asked))


def _keys(a: Attention, asked: Collection[str]) -> Launch:
    tile = a.need("backward_keys")
    blocks = tiles(a.p, tile.block_p)
    reads = {"Q": Read(a.queries, a.queries * blocks), "GradOutput": Read(a.queries, a.queries * blocks)}
    reads |= {"K": once(a.keys), "V": once(a.keys), "Lse": Read(a.rows, a.rows * blocks)}
    reads |= _of_rows(a, asked, blocks) | _of_columns(a, asked, 1)
    if "query_attention" in asked:
        reads["Tau"] = once(a.columns)
    writes = {"GradK": a.keys, "GradV": a.keys}
    return Launch("backward_keys", reads, writes, 4 * a.product, 4 * a.issued(tile), _vector(a, asked))


def _of_rows(a: Attention, asked: Collection[str], times: int) -> dict[str, Read]:
    """What a tile's gradient takes from its queries (``row_terms``), read ``times``."""
    names = ["Rho"] + ["GradEntropy"] * ("entropy" in asked) + ["Peak", "Argmax"] * ("max_probability" in asked)
    found = {name: Read(a.rows, a.rows * times) for name in names}
    if "query_attention" in asked:  # which all heads share
        found["U"] = Read(4 * a.b * a.s, a.rows * times)
    return found


def _of_columns(a: Attention, asked: Collection[str], times: int) -> dict[str, Read]:
    """What it takes from its keys (``column_terms``), but for τ."""
    found = {}
    if "key_attention" in asked:  # which all heads share
        found["C"] = Read(4 * a.b * a.p, a.columns * times)
    if "query_attention" in asked:
        found["ColumnLse"] = Read(a.columns, a.columns * times)
    return found


def _vector(a: Attention, asked: Collection[str]) -> int:
    """Scale, difference and exponential, gradient plus ρ, product: 5 a logit, and some for each statistic."""
    more = {"key_attention": 1, "entropy": 3, "max_probability": 2, "query_attention": 7}
    return a.logits * (5 + sum(more.get(name, 0) for name in asked))


def cross_attention_backward(
    b: int,
    h: int,
    s: int,
    p: int,
    d: int,
    dtype: str,
    statistics: bool | Collection[str] = (),
    architecture: str = "sm_90",
    multiprocessors: int = 132,
) -> Work:
    """Through the output alone and in one block of queries: O, dO, Q, K, V and dO again are read, dq, dk and dv
    written, with 12 B H S bytes of log-sum-exps and ρ; 10 B H S P D FLOPs, 14 where no block holds all queries.
    ``statistics``: those that a gradient comes through."""
    return backward_op(b, h, s, p, d, dtype, statistics, architecture, multiprocessors).work()
