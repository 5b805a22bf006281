"""Starts the forward kernels: which of them, on which tiles, and what becomes of their partial results."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .. import dropout
from ..request import Forward, Masks, Request, share
from . import configs
from .configs import Config
from .forward import column_lse, forward_online, forward_single, key_statistics
from .launch import dense, masks_of, run, strides, unit, writable

# Above this many blocks of queries, key statistics come from a kernel of their own. A block's partial sums cost 8 bytes
# a key, written and read again: 16 blocks cost what a key's own row does (128 bytes: half precision, D = 64), and their
# memory grows with the queries. Either way Q Kᵀ is computed once more.
# forward_single keeps its partials: it has them without a second product, and its few keys make them few bytes.
MOST_PARTIALS = 16


def forward(q: Tensor, k: Tensor, v: Tensor, masks: Masks, seed: Tensor | None, request: Request) -> Forward:
    """What ``request`` asks for. Shapes, dtypes and masks as in ``request.py``; float16, bfloat16 or float32."""
    B, H, S, _ = q.shape
    P = k.shape[2]
    output = torch.empty_like(q)
    lse = _new(q, B, H, S)
    written = writable(output)
    call = _Call(dense(q), dense(k), dense(v), written, masks)
    kernel, tile = forward_single, call.tile("forward_single")
    if tile is None:
        kernel, tile = forward_online, call.need("forward_online")
    blocks = triton.cdiv(S, tile.block_s)
    partial = kernel is forward_single or blocks <= MOST_PARTIALS
    local = blocks == 1

    max_probability = _new(q, B, H, S) if request.max_probability else None
    entropy = _new(q, B, H, S) if request.entropy else None
    rows = (B, H, blocks if partial else 1, P)
    key_sum = _new(q, *rows) if request.key_attention else None
    key_max = _new(q, *rows) if request.key_max else None
    query_sum = columns = None
    if request.query_attention:
        query_sum = _new(q, B, H, S)
        columns = _new(q, B, H, P)
        if not local:
            call.column_lse(columns, request)

    arguments = {
        "V": call.v,
        "Output": written,
        "Lse": lse,
        "MaxProbability": _or(max_probability, lse),
        "Entropy": _or(entropy, lse),
        "KeySum": _or(key_sum, lse),
        "KeyMax": _or(key_max, lse),
        "QuerySum": _or(query_sum, lse),
        "ColumnLse": _or(columns, lse),
        "Seed": _or(seed, lse),
        **strides("v", call.v, call.unit),
        **strides("output", written, call.unit),
        "threshold": dropout.threshold(request.dropout_p) - 2**31 if request.dropout_p else 0,
        "keep_scale": 1.0 / (1.0 - request.dropout_p),
        "HAS_DROPOUT": request.dropout_p > 0,
        "HAS_MAX_PROBABILITY": request.max_probability,
        "HAS_ENTROPY": request.entropy,
        "HAS_KEY_SUM": partial and request.key_attention,
        "HAS_KEY_MAX": partial and request.key_max,
        "HAS_QUERY_SUM": request.query_attention,
        "LOCAL": local and request.query_attention,
    }
    call.start(kernel, tile, B * H * blocks, request, arguments)
    if not partial and (request.key_attention or request.key_max):
        call.key_statistics(lse, key_sum, key_max, request)
    if written is not output:
        output.copy_(written)
    return Forward(
        output,
        lse,
        max_probability,
        entropy,
        None if key_sum is None else _mean(_over_blocks(key_sum), masks.query, S, masks.head, request),
        None if query_sum is None else _mean(query_sum, masks.key, P, masks.head, request),
        None if key_max is None else _largest(key_max, request),
        columns,
    )


class _Call:
    """One call's tensors, and how kernels are started on them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, masks: Masks) -> None:
        self.q, self.k, self.v = q, k, v
        self.unit = unit(q, k, v, output)
        B, H, S, D = q.shape
        self.heads, self.queries, self.keys = B * H, S, k.shape[2]
        self.width = max(16, triton.next_power_of_2(D))
        self.shared = {
            "Q": q,
            "K": k,
            **masks_of(masks, q),
            **strides("q", q, self.unit),
            **strides("k", k, self.unit),
            "H": H,
            "S": S,
            "P": self.keys,
            "D": D,
            "UNIT": self.unit,
            "BLOCK_D": self.width,
        }

    def tile(self, kernel: str) -> Config | None:
        arch = configs.architecture(self.q.device)
        links = bool(self.shared["HAS_LINK_MASK"])
        return configs.select(kernel, arch, self.width, self.q.dtype, self.queries, self.keys, links)

    def need(self, kernel: str) -> Config:
        tile = self.tile(kernel)
        assert tile is not None, kernel
        return tile

    def start(self, kernel: Any, tile: Config, programs: int, request: Request, arguments: dict[str, Any]) -> None:
        every = {**self.shared, "scale": float(request.scale), **arguments}
        own = {name: value for name, value in every.items() if name in kernel.arg_names}
        run(kernel, (programs,), own, tile, self.q.device)

    def column_lse(self, columns: Tensor, request: Request) -> None:
        tile = self.need("column_lse")
        programs = self.heads * triton.cdiv(self.keys, tile.block_p)
        self.start(column_lse, tile, programs, request, {"ColumnLse": columns})

    def key_statistics(self, lse: Tensor, key_sum: Tensor | None, key_max: Tensor | None, request: Request) -> None:
        tile = self.need("key_statistics")
        programs = self.heads * triton.cdiv(self.keys, tile.block_p)
        arguments = {
            "Lse": lse,
            "KeySum": _or(key_sum, lse),
            "KeyMax": _or(key_max, lse),
            "HAS_KEY_SUM": request.key_attention,
            "HAS_KEY_MAX": request.key_max,
        }
        self.start(key_statistics, tile, programs, request, arguments)


def _over_blocks(sums: Tensor) -> Tensor:
    """(B, H, blocks, n) partial sums as (B, H, n); of one block the sum itself, which needs no launch."""
    return sums.sum(2) if sums.shape[2] > 1 else sums[:, :, 0]


def _largest(maxima: Tensor, request: Request) -> Tensor:
    """Over blocks, (B, H, n), and over heads too, (B, n)."""
    if not request.per_head:
        return maxima.amax((1, 2))
    return maxima.amax(2) if maxima.shape[2] > 1 else maxima[:, :, 0]


def _mean(sums: Tensor, valid: Tensor | None, length: int, heads: Tensor | None, request: Request) -> Tensor:
    """(B, H, n) sums over ``length`` positions made (B, n) means over heads too, or per head (B, H, n) ones."""
    if not request.normalise:
        return sums if request.per_head else sums.sum(1)
    one = share(valid, length, heads, sums.shape[1], request)
    if request.per_head:
        return sums * (one[..., None] if isinstance(one, Tensor) else one)
    return sums.sum(1) * one


def _new(q: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer that is not read where there is nothing to point to."""
    return stand_in if x is None else x
