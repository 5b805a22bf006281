"""The soft contrastive loss: what kernels/soft_contrastive/triton reads, writes and multiplies.

N queries of width E, M in-batch keys and Q of the queue; a source is one of the two matrices of keys. N_N is the number
of blocks of queries, N_K of a source's keys, N_W of the width (backward alone); a split is what one program takes of a
source's keys, several blocks of them.

    forward_keys      a program a block of queries and a split: queries (and the teacher's) N_K times, keys N_N times;
                      5 float32 statistics a query and split, 8 with a teacher. A product, two with a teacher
    forward_rows      these statistics once
    backward_queries  the logits again for each block of the width, the keys once more by parts of the width; a float32
                      part of the gradient (N, E) a split, which PyTorch sums, scales and casts
    backward_keys     the same with queries and keys exchanged; no parts

Groups are int64. The queue may have a dtype of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..soft_contrastive.triton import configs
from .attention import DTYPES
from .launches import Launch, Op, Read, once, tiles
from .work import BYTES, Work

PROGRAMS, UNEVEN, UNALIGNED = 2, 32, (16, 64)  # as in launch_forward.py


@dataclass(frozen=True)
class Sweep:
    """The queries against one source, as launch_forward.Sweep starts its kernels."""

    queries: int
    keys: int
    width: int
    dtype: str
    key_dtype: str
    teacher: bool
    architecture: str
    multiprocessors: int
    tensors: dict[str, str]  # which the kernels' parameters are

    def tile(self, kernel: str) -> tuple[int, int, int, int]:
        """Queries, keys, block of the width that logits are summed over, and that a program gives."""
        found = configs.select(kernel, self.architecture, DTYPES[self.dtype], self.queries, self.width)
        covering = max(16, 1 << (self.width - 1).bit_length())
        block_e, block_w = min(found.block_e, covering), min(found.block_w, covering)
        if self.width % (16 // max(BYTES[self.dtype], BYTES[self.key_dtype])):
            block_e, block_w = min(block_e, UNALIGNED[0]), min(block_w, UNALIGNED[1])
        while self.width % block_e and block_e > UNEVEN:
            block_e //= 2
        return found.block_n, found.block_k, block_e, block_w

    def splits(self, kernel: str) -> int:
        block_n, block_k, _, block_w = self.tile(kernel)
        blocks = tiles(self.queries, block_n) * (tiles(self.width, block_w) if kernel.startswith("backward") else 1)
        parts = tiles(self.keys, block_k)
        return tiles(parts, tiles(parts, max(1, PROGRAMS * self.multiprocessors // blocks)))

    @property
    def query_bytes(self) -> int:
        return self.queries * self.width * BYTES[self.dtype]

    @property
    def key_bytes(self) -> int:
        return self.keys * self.width * BYTES[self.key_dtype]

    @property
    def product(self) -> int:
        return 2 * self.queries * self.keys * self.width

    def issued(self, kernel: str) -> tuple[int, int]:
        """FLOPs of the logits, and of the product that a backward makes of them, with what pads the tiles."""
        block_n, block_k, block_e, block_w = self.tile(kernel)
        pairs = 2 * tiles(self.queries, block_n) * block_n * tiles(self.keys, block_k) * block_k
        chunks = tiles(self.width, block_w) if block_w else 1
        logits = pairs * tiles(self.width, block_e) * block_e * (1 + self.teacher) * chunks
        return logits, pairs * chunks * block_w

    def logits(self, times_queries: int, times_keys: int, programs: int) -> dict[str, Read]:
        """What the logits and the matches take."""
        reads = {
            "Query": Read(self.query_bytes, self.query_bytes * times_queries),
            "Key": Read(self.key_bytes, self.key_bytes * times_keys),
            "QueryGroup": Read(8 * self.queries, 8 * self.queries * times_queries),
            "KeyGroup": Read(8 * self.keys, 8 * self.keys * times_keys),
            "Temperature": Read(4, 4 * programs),
        }
        if self.teacher:
            reads["Teacher"] = Read(self.query_bytes, self.query_bytes * times_queries)
        return reads

    def statistics(self, times: int) -> dict[str, Read]:
        names = ["Lse", "Matches"] + ["TeacherLse"] * self.teacher
        return {name: Read(4 * self.queries, 4 * self.queries * times) for name in names}


def sources(
    n: int, m: int, q: int, e: int, dtype: str, queue: str | None, teacher: bool, architecture: str, processors: int
) -> list[Sweep]:
    """The in-batch keys and the queue, where there are any."""
    device = (teacher, architecture, processors)
    found = [Sweep(n, m, e, dtype, dtype, *device, {})] if m else []
    names = {"Key": "Queue", "KeyGroup": "QueueGroup"}
    return found + ([Sweep(n, q, e, dtype, queue or dtype, *device, names)] if q else [])


def forward_op(
    n: int,
    m: int,
    q: int,
    e: int,
    dtype: str,
    queue: str | None = None,
    teacher: bool = True,
    architecture: str = "sm_90",
    multiprocessors: int = 132,
) -> Op:
    """The launches of a forward; ``queue``: the queue's dtype, that of the queries if not said."""
    sweeps = sources(n, m, q, e, dtype, queue, teacher, architecture, multiprocessors)
    statistics, launches, row = 8 if teacher else 5, [], 4 * n
    splits = sum(sweep.splits("forward_keys") for sweep in sweeps)
    for sweep in sweeps:
        block_n, block_k, *_ = sweep.tile("forward_keys")
        blocks, parts, own = tiles(n, block_n), tiles(sweep.keys, block_k), sweep.splits("forward_keys")
        launches.append(
            Launch(
                "forward_keys",
                sweep.logits(parts, blocks, blocks * own),
                {"Partial": statistics * own * row},
                sweep.product * (1 + teacher),
                sweep.issued("forward_keys")[0],
                (9 + 6 * teacher) * n * sweep.keys,
                sweep.tensors,
            )
        )
    block = configs.select("forward_rows", architecture, DTYPES[dtype], n, 0).block_n
    reads = {"Partial": once(statistics * splits * row), "Temperature": Read(4, 4 * tiles(n, block))}
    names = ["Loss", "GradTemperature", "Lse", "Matches", "TeacherLse"]
    if not teacher:
        launches.append(Launch("torch.zero_", {}, {"TeacherLse": row}))
    writes = dict.fromkeys(names if teacher else names[:-1], row)
    launches.append(Launch("forward_rows", reads, writes, vector=20 * n * splits))
    launches += [Launch("torch.clone", {name: once(row)}, {f"{name}_result": row}) for name in names]
    return Op(dtype, launches, frozenset(f"{name}_result" for name in names))


def backward_op(
    n: int,
    m: int,
    q: int,
    e: int,
    dtype: str,
    queue: str | None = None,
    teacher: bool = True,
    architecture: str = "sm_90",
    multiprocessors: int = 132,
) -> Op:
    """The launches of a backward by queries and in-batch keys."""
    sweeps = sources(n, m, q, e, dtype, queue, teacher, architecture, multiprocessors)
    launches, full, half = [], 4 * n * e, n * e * BYTES[dtype]
    splits = sum(sweep.splits("backward_queries") for sweep in sweeps)
    for sweep in sweeps:
        block_n, block_k, _, block_w = sweep.tile("backward_queries")
        blocks, parts, own = tiles(n, block_n), tiles(sweep.keys, block_k), sweep.splits("backward_queries")
        chunks = tiles(e, block_w)
        reads = sweep.logits(parts * chunks, blocks * chunks, blocks * own * chunks) | sweep.statistics(own * chunks)
        reads["Key"] = Read(sweep.key_bytes, sweep.key_bytes * blocks * (chunks + 1))
        products, issued = sweep.product * (2 + teacher), sum(sweep.issued("backward_queries"))
        launches.append(
            Launch(
                "backward_queries", reads, {"Part": own * full}, products, issued, 12 * n * sweep.keys, sweep.tensors
            )
        )
    launches.append(Launch("torch.sum", {"Part": once(splits * full)}, {"d_queries": full}, vector=splits * n * e))
    launches.append(Launch("torch.div", {"grad_loss": once(4 * n), "Temperature": once(4)}, {"factors": 4 * n}))
    launches.append(Launch("torch.mul_", {"d_queries": once(full), "factors": once(4 * n)}, {"d_queries_scaled": full}))
    launches.append(Launch("torch.to", {"d_queries_scaled": once(full)}, {"GradQuery": half}))
    if m:
        sweep = sweeps[0]
        block_n, block_k, _, block_w = sweep.tile("backward_keys")
        blocks, parts, chunks = tiles(n, block_n), tiles(m, block_k), tiles(e, block_w)
        programs = parts * chunks
        reads = sweep.logits(programs, blocks * chunks, programs) | sweep.statistics(programs)
        reads["Query"] = Read(sweep.query_bytes, sweep.query_bytes * parts * (chunks + 1))
        reads["GradLoss"], reads["Largest"] = Read(4 * n, 4 * n * programs), Read(4, 4 * programs)
        products, issued = sweep.product * (2 + teacher), sum(sweep.issued("backward_keys"))
        launches.append(Launch("torch.amax", {"GradLoss": once(4 * n)}, {"Largest": 4}, vector=2 * n))
        launches.append(Launch("backward_keys", reads, {"GradKey": sweep.key_bytes}, products, issued, 13 * n * m))
    return Op(dtype, launches, frozenset({"GradQuery", "GradKey"}))


def soft_contrastive(
    n: int,
    m: int,
    q: int,
    e: int,
    dtype: str,
    queue: str | None = None,
    teacher: bool = True,
    backward: bool = False,
    architecture: str = "sm_90",
    multiprocessors: int = 132,
) -> Work:
    """Queries, the teacher's and all keys are read, no logit is written: 2 N (M + Q) E FLOPs, twice with a teacher. The
    backward computes the logits again for each of its two gradients."""
    op = backward_op if backward else forward_op
    return op(n, m, q, e, dtype, queue, teacher, architecture, multiprocessors).work()
