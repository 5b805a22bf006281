"""Cross-attention: what kernels/cross_attention/triton/forward.py reads, writes and multiplies.

B samples, H heads, S queries, P keys, D width, e bytes an element; statistics are float32. No masks and no dropout:
masks add at most B (S + P) bytes, dropout none. N_S is the number of blocks of queries, cdiv(S, BLOCK_S), N_P that of
keys. Unique bytes do not depend on tiles, but for partial sums; what is requested does:

    forward_single, forward_online    a program a block of queries: Q once, K and V N_S times, Output and Lse written
                                      once. Two products, 4 B H S P D FLOPs
    forward_online, second sweep      for key and query statistics: K another N_S times, a third product
    key_attention, key_max            a partial (B, H, N_S, P) each, written here and read by a sum of PyTorch's, unless
                                      forward_online has more than 16 blocks: then key_statistics writes (B, H, 1, P)
    query_attention                   ColumnLse (B, H, P): written by the one block of queries, or by column_lse before
                                      and read by each block
    column_lse, key_statistics        a program a block of keys: K once, Q (and Lse) N_P times, one product
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch

from ..cross_attention.triton import configs
from ..cross_attention.triton.configs import Config
from .launches import Launch, Op, Read, once, tiles
from .work import BYTES, Work

ALL = ("max_probability", "entropy", "key_attention", "query_attention", "key_max")
MOST_PARTIALS = 16  # as in launch_forward.py
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def chosen(statistics: bool | Collection[str]) -> frozenset[str]:
    """True: all of them. Raises ValueError for one that there is not."""
    names = frozenset(ALL if statistics is True else statistics or ())
    if unknown := names - {*ALL, "lse"}:
        raise ValueError(f"unknown statistics {sorted(unknown)}: known are {', '.join(ALL)}")
    return names


@dataclass(frozen=True)
class Attention:
    """Sizes of a call, in elements and in bytes, and the tiles that ``architecture`` takes for it."""

    b: int
    h: int
    s: int
    p: int
    d: int
    dtype: str
    architecture: str

    @cached_property
    def heads(self) -> int:
        return self.b * self.h

    @cached_property
    def width(self) -> int:
        return max(16, 1 << (self.d - 1).bit_length())

    @cached_property
    def queries(self) -> int:
        """Bytes of Q, of the output and of their gradients."""
        return self.heads * self.s * self.d * BYTES[self.dtype]

    @cached_property
    def keys(self) -> int:
        """Bytes of K, of V and of their gradients."""
        return self.heads * self.p * self.d * BYTES[self.dtype]

    @cached_property
    def rows(self) -> int:
        """Bytes of a float32 number for every query and head."""
        return 4 * self.heads * self.s

    @cached_property
    def columns(self) -> int:
        """Bytes of a float32 number for every key and head."""
        return 4 * self.heads * self.p

    @cached_property
    def logits(self) -> int:
        return self.heads * self.s * self.p

    @cached_property
    def product(self) -> int:
        """FLOPs of Q Kᵀ, or of another product as large."""
        return 2 * self.logits * self.d

    def tile(self, kernel: str) -> Config | None:
        return configs.select(kernel, self.architecture, self.width, DTYPES[self.dtype], self.s, self.p)

    def need(self, kernel: str) -> Config:
        tile = self.tile(kernel)
        assert tile is not None, kernel
        return tile

    def issued(self, tile: Config) -> int:
        """FLOPs of such a product with what pads the tiles."""
        rows, columns = tiles(self.s, tile.block_s) * tile.block_s, tiles(self.p, tile.block_p) * tile.block_p
        return 2 * self.heads * rows * columns * self.width


def forward_op(
    b: int,
    h: int,
    s: int,
    p: int,
    d: int,
    dtype: str,
    statistics: bool | Collection[str] = (),
    architecture: str = "sm_90",
) -> Op:
    """The launches of a forward call. ``dtype``: bf16, fp16 or fp32."""
    asked, a = chosen(statistics), Attention(b, h, s, p, d, dtype, architecture)
    single = a.tile("forward_single")
    tile = single or a.need("forward_online")
    blocks = tiles(s, tile.block_s)
    partial, local = single is not None or blocks <= MOST_PARTIALS, blocks == 1
    by_key, by_query = asked & {"key_attention", "key_max"}, "query_attention" in asked
    sweep = single is None and bool(by_query or (partial and by_key))
    launches = []
    if by_query and not local:
        launches.append(_column_lse(a))

    reads = {"Q": once(a.queries), "K": Read(a.keys, a.keys * blocks * (1 + sweep)), "V": Read(a.keys, a.keys * blocks)}
    writes = {"Output": a.queries, "Lse": a.rows}
    if "max_probability" in asked:
        writes["MaxProbability"] = a.rows
    if "entropy" in asked:
        writes["Entropy"] = a.rows
    if by_query:
        writes["QuerySum"] = a.rows
        if local:
            writes["ColumnLse"] = a.columns
        else:
            reads["ColumnLse"] = Read(a.columns, a.columns * blocks)
    if partial:
        writes |= dict.fromkeys(_partials(by_key), a.columns * blocks)
    # scale, maximum, difference, exponential, sum; 3 more for the entropy, 2 to 4 for each of the others
    operations = 5 + 3 * ("entropy" in asked) + 3 * sweep + 2 * partial * len(by_key) + 4 * by_query
    launches.append(
        Launch(
            "forward_single" if single else "forward_online",
            reads,
            writes,
            (2 + sweep) * a.product,
            (2 + sweep) * a.issued(tile),
            operations * a.logits,
        )
    )
    if by_key and not partial:
        launches.append(_key_statistics(a, by_key))
    launches += _means(a, asked, blocks if partial else 1)
    results = {"Output", "Lse", "MaxProbability", "Entropy", "KeyAttention", "KeyMaximum", "QueryAttention"}
    return Op(dtype, launches, frozenset(results | {"ColumnLse"}))


def _partials(by_key: Collection[str]) -> list[str]:
    return [name for name, of in (("KeySum", "key_attention"), ("KeyMax", "key_max")) if of in by_key]


def _column_lse(a: Attention) -> Launch:
    tile = a.need("column_lse")
    blocks = tiles(a.p, tile.block_p)
    reads = {"Q": Read(a.queries, a.queries * blocks), "K": once(a.keys)}
    return Launch("column_lse", reads, {"ColumnLse": a.columns}, a.product, a.issued(tile), 5 * a.logits)


def _key_statistics(a: Attention, by_key: Collection[str]) -> Launch:
    tile = a.need("key_statistics")
    blocks = tiles(a.p, tile.block_p)
    reads = {"Q": Read(a.queries, a.queries * blocks), "K": once(a.keys), "Lse": Read(a.rows, a.rows * blocks)}
    writes = dict.fromkeys(_partials(by_key), a.columns)
    return Launch("key_statistics", reads, writes, a.product, a.issued(tile), (3 + len(by_key)) * a.logits)


def _means(a: Attention, asked: Collection[str], blocks: int) -> list[Launch]:
    """PyTorch's: partial sums over blocks, then over heads, then by what one weight counts in a mean."""
    found = []
    of_keys, of_queries = 4 * a.b * a.p, 4 * a.b * a.s
    if "key_attention" in asked:
        if blocks > 1:
            found.append(_torch("torch.sum", "KeySum", a.columns * blocks, "key_sums", a.columns))
        found.append(_torch("torch.sum", "key_sums" if blocks > 1 else "KeySum", a.columns, "key_total", of_keys))
        found.append(_torch("torch.mul", "key_total", of_keys, "KeyAttention", of_keys))
    if "query_attention" in asked:
        found.append(_torch("torch.sum", "QuerySum", a.rows, "query_total", of_queries))
        found.append(_torch("torch.mul", "query_total", of_queries, "QueryAttention", of_queries))
    if "key_max" in asked:
        found.append(_torch("torch.amax", "KeyMax", a.columns * blocks, "KeyMaximum", of_keys))
    return found


def _torch(kernel: str, source: str, read: int, result: str, written: int) -> Launch:
    return Launch(kernel, {source: once(read)}, {result: written}, vector=max(read, written) // 4)


def cross_attention_forward(
    b: int,
    h: int,
    s: int,
    p: int,
    d: int,
    dtype: str,
    statistics: bool | Collection[str] = (),
    architecture: str = "sm_90",
) -> Work:
    """Q, K and V are read, the output and its log-sum-exp written: e B H D (2 S + 2 P) + 4 B H S bytes, 4 B H S P D
    FLOPs. ``statistics``, some of ``ALL`` or True for all, add what the module's docstring says."""
    return forward_op(b, h, s, p, d, dtype, statistics, architecture).work()
