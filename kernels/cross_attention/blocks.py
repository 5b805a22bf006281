"""How the blockwise path cuts its work, and the operations on a block that its two directions share.

A block holds some heads x some queries x ALL keys, so that its softmax needs no rescaling, and is of a size that stays
in a CPU's caches, so that the passes over it cost little beside the matrix products. What else was found by measuring:

* Logits are in base 2: torch.exp2 is several times faster than torch.exp, and log2(e) rides on the product's factor.
* The longer axis of a block lies last in memory ("transposed": keys x queries, where there are more queries than keys):
  products and reductions over a short last axis are slow.
* A weighted sum over either axis is a product with a single row, at half the cost of multiplying and summing. Its
  weights are a view of (g, 1, n): as a tensor (g, n, 1) of its own the same product takes ten times as long.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dropout
from .request import Masks, Request

BLOCK = 7 * 2**16  # weights in a block for each thread; heads are worked on together as long as they fit
MOST_THREADS = 8  # that a block grows with; what a GPU's block is made for
LARGEST = 2**20  # weights of a head whose queries stay together: query_attention then needs one sweep, not two
MOST_KEPT = 2**22  # elements of a group's copy of q, k or the like that a thread keeps memory for
MASKED = -1e30  # the logit of a masked key: finite, so that a difference of two is not NaN, and exp2 of it is 0
HALF = -1  # the number of the buffer in half precision
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class Group(NamedTuple):
    """g heads, neighbours in the flattened (B * H) axis: all heads of some samples, or some heads of one sample.

    Its tensors may lie in memory that the next group takes over.
    """

    number: int
    q: Tensor  # (g, S, D) in the dtype of statistics, for logits
    k: Tensor  # (g, P, D) likewise
    q_factor: Tensor  # (g, S, D) in the dtype that weights are multiplied in
    k_factor: Tensor  # (g, P, D) likewise
    v_factor: Tensor  # (g, P, D) likewise
    bias: Tensor | None  # (g, 1, P) MASKED for keys that are masked, else 0
    masked: Tensor | None  # (g, 1, P) bool
    invalid: Tensor | None  # (g, 1, S) bool, queries that do not count
    dead: Tensor | None  # (g, 1, 1) bool, heads that attend to nothing
    closed: Tensor | None  # (g, 1, P) bool, keys that are masked or that no valid query has a link to


class Blocks:
    """The groups, and the blocks of some of their queries.

    What has a value for each query or key is (B * H, 1, length), and (g, 1, length) in a group.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, seed: Tensor | None, request: Request) -> None:
        self.samples, self.heads, self.queries, _ = q.shape
        self.keys = k.shape[2]
        self.device = q.device
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.half = q.dtype if _half_products(q.dtype, q.device.type) else None
        self.seed, self.request = seed, request

        threads = torch.get_num_threads() if q.device.type == "cpu" else MOST_THREADS
        most = BLOCK * min(threads, MOST_THREADS)
        one_head = self.queries * self.keys
        fitting = max(1, most // one_head)
        self._group_samples = max(1, min(fitting // self.heads, self.samples))
        self._group_heads = _even(self.heads, fitting)
        in_samples, in_heads = _cut(self.samples, self._group_samples), _cut(self.heads, self._group_heads)
        self.sizes = [(b.stop - b.start) * (h.stop - h.start) for b in in_samples for h in in_heads]
        rows = self.queries if one_head <= LARGEST else _even(self.queries, max(1, most // self.keys))
        self.row_slices = _cut(self.queries, rows)
        self.whole = len(self.row_slices) == 1  # a block holds all queries of its heads
        self.transposed = rows > self.keys
        self.key_axis, self.query_axis = (1, 2) if self.transposed else (2, 1)

        self._size = max(self.sizes) * rows * self.keys  # of the largest block
        self._memory: dict[int, Tensor] = {}
        self._views: dict[tuple[int, int, int], Tensor] = {}

        self.dead = _dead(masks, self.heads)  # (B, H) bool
        self._masked = self._of_groups(None if masks.key is None else ~masks.key[:, None])
        self._invalid = self._of_groups(None if masks.query is None else ~masks.query[:, None])
        self._dead = self._of_groups(None if self.dead is None else self.dead[..., None])
        self._unlinked, unreached = self._links(masks)
        self.links = masks.link is not None
        self.unreached = unreached  # (B or 1, P) bool, keys that no valid query has a link to
        closed = self._masked
        if unreached is not None:
            every = unreached if masks.key is None else unreached | ~masks.key
            closed = self._of_groups(every.expand(self.samples, -1)[:, None])
        self._closed = closed
        self._parts = {"q": self.parts(q), "k": self.parts(k), "v": self.parts(v)}

    def group(self, number: int) -> Group:
        masked = self._masked[number]
        q, k, v = (self.factor(name, self._parts[name][number]) for name in ("q", "k", "v"))
        logit_q, logit_k = (self.converted(name, x) for name, x in (("q", q), ("k", k)))
        if masked is not None:  # whatever stands there: MASKED is added to a logit of 0
            logit_k = logit_k.masked_fill(masked.mT, 0.0)
        elif logit_k is self._parts["k"][number] and self.device.type == "cpu" and torch.get_num_threads() == 1:
            # Only to bring k into the cache: the logits' product, which packs k transposed, reads memory at half speed.
            k.sum()
        bias = None if masked is None else masked.to(self.dtype).mul_(MASKED)
        return Group(
            *(number, logit_q, logit_k, q, k if self.half else logit_k, v),
            *(bias, masked, self._invalid[number], self._dead[number], self._closed[number]),
        )

    def factor(self, name: str, part: Tensor) -> Tensor:
        """(g, length, D) of a part in the dtype that weights are multiplied in: itself, or a copy in kept memory. With
        two threads the copy costs less than a product for each sample."""
        if part.dim() == 4:
            part = self.stand_in(name, part).copy_(part).flatten(0, 1)
        return part if self.half else self.converted(name, part)

    def converted(self, name: str, x: Tensor) -> Tensor:
        """In the dtype of statistics, in kept memory."""
        return x if x.dtype == self.dtype else self._kept(name, x.shape, self.dtype).copy_(x)

    def result(self, name: str, part: Tensor) -> Tensor:
        """(g, length, D) where products leave what belongs into ``part``: itself, or kept memory."""
        return part if part.dim() == 3 else self.stand_in(name, part).flatten(0, 1)

    def stand_in(self, name: str, part: Tensor) -> Tensor:
        return self._kept(name, part.shape, part.dtype)

    def _kept(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return _workspace(name, shape.numel(), dtype, self.device).view(shape)

    def _links(self, masks: Masks) -> tuple[Tensor | None, Tensor | None]:
        """Where there is no link, (B or 1, S, P) and laid out as blocks are; keys that no valid query has one to."""
        if masks.link is None:
            return None, None
        link = masks.link[:1] if masks.link.stride(0) == 0 else masks.link
        unreached = None
        if self.request.query_attention:
            unreached = ~(link if masks.query is None else link & masks.query[..., None]).any(1)
        unlinked = ~link
        return (unlinked.mT.contiguous().mT if self.transposed else unlinked), unreached

    def _without_links(self, s: Tensor, group: Group, rows: slice) -> Tensor:
        """s, a block of logits, with MASKED where there is no link."""
        if self._unlinked is None:
            return s
        first = sum(self.sizes[: group.number])
        each = min(self.heads, s.shape[0])  # heads of a sample that the group holds
        sample = first // self.heads
        samples = slice(sample, sample + s.shape[0] // each) if len(self._unlinked) > 1 else slice(0, 1)
        off = self._unlinked[samples, rows, :]
        off = (off.mT if self.transposed else off)[:, None]
        s.view(-1, each, *s.shape[1:]).masked_fill_(off, MASKED)
        return s

    def cast(self, x: Tensor) -> Tensor:
        """In the dtype of statistics."""
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """(g, ...) for each group, of (B * H, ...)."""
        return torch.split_with_sizes(x, self.sizes)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """Views of x (B, H, length, D) for each group: (g, length, D), or (samples, heads, length, D) where no other
        view holds the heads of a group."""
        if _evenly_spaced(x):
            return self.split(x.flatten(0, 1))
        samples = torch.split(x, self._group_samples)
        parts = [part for some in samples for part in torch.split(some, self._group_heads, 1)]
        return [part.flatten(0, 1) if _evenly_spaced(part) else part for part in parts]

    def split_heads(self, mask: Tensor) -> Sequence[Tensor]:
        """(g, ...) for each group, of (B, H, ...)."""
        return [part.flatten(0, 1) if part.dim() == 4 else part for part in self.parts(mask)]

    def _of_groups(self, mask: Tensor | None) -> Sequence[Tensor | None]:
        """(g, 1, length) for each group, of (B, 1 or H, length)."""
        if mask is None:
            return [None] * len(self.sizes)
        return self.split_heads(mask.expand(-1, self.heads, -1)[:, :, None])

    def empty(self, length: int) -> Tensor:
        return torch.empty(self.samples * self.heads, 1, length, dtype=self.dtype, device=self.device)

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """(g, 1, rows) of (g, 1, S)."""
        return x if self.whole else x[..., rows]

    def over_queries(self, x: Tensor) -> Tensor:
        """(g, 1, rows) as a factor of a block."""
        return x if self.transposed else x.mT

    def over_keys(self, x: Tensor) -> Tensor:
        """(g, 1, P) as a factor of a block."""
        return x.mT if self.transposed else x

    def by_rows(self, block: Tensor) -> Tensor:
        """A block as (g, rows, P)."""
        return block.mT if self.transposed else block

    def buffer(self, number: int, heads: int, rows: int) -> Tensor:
        """The memory of a block, the same at every call."""
        view = self._views.get((number, heads, rows))
        if view is None:
            if number not in self._memory:
                dtype = self.half if number == HALF else self.dtype
                self._memory[number] = _workspace(number, self._size, dtype or self.dtype, self.device)
            shape = (heads, self.keys, rows) if self.transposed else (heads, rows, self.keys)
            view = self._views[number, heads, rows] = self._memory[number][: math.prod(shape)].view(shape)
        return view

    def product(self, buffer: int, x: Tensor, y: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
        """The block of factor * x_i . y_j + bias_j, from x (g, rows, D), y (g, P, D) and bias (g, 1, P)."""
        heads, rows, _ = x.shape
        found = self.buffer(buffer, heads, rows)
        first, second = (y, x) if self.transposed else (x, y)
        if x.dtype != self.dtype:  # a copy that only changes the dtype is four times faster than any other operation
            half = self.buffer(HALF, heads, rows)
            return found.copy_(torch.baddbmm(half, first, second.mT, beta=0, alpha=factor, out=half))
        if bias is None:
            return torch.baddbmm(found, first, second.mT, beta=0, alpha=factor, out=found)
        return torch.baddbmm(self.over_keys(bias).expand_as(found), first, second.mT, alpha=factor, out=found)

    def logits(self, buffer: int, group: Group, rows: slice) -> Tensor:
        """Base-2 logits."""
        q = group.q if self.whole else group.q[:, rows]
        s = self.product(buffer, q, group.k, self.request.scale * LOG2E, group.bias)
        return self._without_links(s, group, rows)

    def in_half(self, block: Tensor) -> Tensor:
        """A block in half precision where products are, else itself."""
        if not self.half:
            return block
        heads, rows, _ = self.by_rows(block).shape
        return self.buffer(HALF, heads, rows).copy_(block)

    def assign(self, out: Tensor, weights: Tensor, x: Tensor, factor: float = 1.0) -> None:
        """out (g, n, D) = factor * weights (g, n, m) @ x (g, m, D)."""
        if out.dtype == weights.dtype:
            torch.baddbmm(out, weights, x, beta=0, alpha=factor, out=out)
        else:
            torch.mul(torch.bmm(weights, x), factor, out=out)

    def kept(self, group: Group, rows: slice) -> Tensor:
        """Which weights of a block dropout keeps, bool."""
        assert self.seed is not None
        first = sum(self.sizes[: group.number])
        heads = torch.arange(first, first + self.sizes[group.number], device=self.device)
        queries = torch.arange(rows.start, rows.stop, device=self.device)
        return self.by_rows(dropout.keep(self.seed, self.request.dropout_p, heads, queries, self.keys))


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[int | str, torch.dtype], Tensor] = {}


_kept = _Kept()


def _workspace(name: int | str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a block, or for a group's share of a tensor. A CPU's threads keep theirs from call to call, a few
    megabytes each: fresh memory would be mapped page by page, at a tenth of the call's time and more."""
    if device.type != "cpu" or (isinstance(name, str) and size > MOST_KEPT):
        return torch.empty(size, dtype=dtype, device=device)
    held = _kept.memory.get((name, dtype))
    if held is None or len(held) < size:
        held = _kept.memory[name, dtype] = torch.empty(size, dtype=dtype)
    return held[:size]


def _dead(masks: Masks, heads: int) -> Tensor | None:
    """(B, H) heads that attend to nothing, or None where there are no masks that could leave one."""
    unseen = None if masks.key is None else ~masks.key.any(1, keepdim=True).expand(-1, heads)
    off = None if masks.head is None else ~masks.head
    return unseen if off is None else off if unseen is None else unseen | off


@functools.cache
def _half_products(dtype: torch.dtype, device: str) -> bool:
    """Whether products of weights and values are best taken in the half precision of the inputs."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    if device == "cpu":  # four times faster than float32 with the instructions, far slower without
        return dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return True


def _evenly_spaced(x: Tensor) -> bool:
    """Whether the heads of (B, H, ...) lie at even distances, so that B and H are one axis."""
    return x.stride(0) == x.shape[1] * x.stride(1) or x.shape[0] == 1


def _even(length: int, most: int) -> int:
    """The largest part of ``length`` cut evenly into the fewest parts of at most ``most``."""
    return -(-length // -(-length // most))


def _cut(length: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]
