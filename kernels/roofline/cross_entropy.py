"""The vocabulary's soft cross-entropy: what kernels/soft_cross_entropy/triton reads, writes and multiplies.

N rows of width D, V words; N_N blocks of rows, N_V of words.

    forward_words   a program a block of words and one of rows: the weight N_N times, the hidden features N_V times, a
                    product, two with a teacher. Of a row and block of words 3 numbers are written, 6 with a teacher
    forward_rows    these once
    backward_words  the logits again, of a range of at most 4096 words at a time, whose gradients (N, range) are written
    torch.mm        twice a range: by the hidden features for the weight's gradient, by the weight for the features'

Labels are int64; the bias has the weight's dtype. The products of the backward are a library's: each of its matrices
counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..soft_cross_entropy.triton import configs
from .attention import DTYPES
from .launches import Launch, Op, Read, once, tiles
from .work import BYTES, Work

CHUNK, BUFFER = 4096, 2**25  # as in launch_backward.py
UNALIGNED = 16  # as in launch_forward.py


@dataclass(frozen=True)
class Logits:
    """A call, as launch_forward.Run starts its kernels."""

    n: int
    v: int
    d: int
    dtype: str
    bias: bool
    teacher: bool
    architecture: str

    def tile(self, kernel: str) -> tuple[int, int, int]:
        """Words, rows and block of the width."""
        found = configs.select(kernel, self.architecture, DTYPES[self.dtype], self.n)
        widest = found.block_d if self.d % (16 // BYTES[self.dtype]) == 0 else min(found.block_d, UNALIGNED)
        return found.block_v, found.block_n, min(widest, max(16, 1 << (self.d - 1).bit_length()))

    def reads(self, kernel: str, words: int) -> dict[str, Read]:
        """What the logits of so many words take."""
        block_v, block_n, _ = self.tile(kernel)
        e, blocks, parts = BYTES[self.dtype], tiles(self.n, block_n), tiles(words, block_v)
        hidden, weight = self.n * self.d * e, words * self.d * e
        found = {"Labels": Read(8 * self.n, 8 * self.n * parts)}
        for of in ("", "Teacher") if self.teacher else ("",):
            found |= {f"{of}Hidden": Read(hidden, hidden * parts), f"{of}Weight": Read(weight, weight * blocks)}
            if self.bias:
                found[f"{of}Bias"] = Read(words * e, words * e * blocks)
        return found

    def products(self, words: int) -> int:
        return 2 * self.n * words * self.d * (1 + self.teacher)

    def issued(self, kernel: str, words: int) -> int:
        block_v, block_n, block_d = self.tile(kernel)
        rows, width = tiles(self.n, block_n) * block_n, tiles(self.d, block_d) * block_d
        return 2 * rows * tiles(words, block_v) * block_v * width * (1 + self.teacher)


def forward_op(
    n: int,
    v: int,
    d: int,
    dtype: str,
    bias: bool = True,
    teacher: bool = False,
    architecture: str = "sm_90",
) -> Op:
    """The launches of a forward."""
    one = Logits(n, v, d, dtype, bias, teacher, architecture)
    parts, row = tiles(v, one.tile("forward_words")[0]), 4 * n
    partial = {"Partial": (5 if teacher else 2) * parts * row, "PartialArgmax": parts * row, "LabelLogit": row}
    operations = (6 + 6 * teacher) * n * v
    words = Launch(
        "forward_words",
        one.reads("forward_words", v),
        partial,
        one.products(v),
        one.issued("forward_words", v),
        operations,
    )
    reads = {name: once(size) for name, size in partial.items()} | {"Labels": once(2 * row)}
    writes = {"Loss": row, "Lse": 2 * row, "Argmax": 2 * row} | ({"TeacherLse": 2 * row} if teacher else {})
    return Op(dtype, [words, Launch("forward_rows", reads, writes, vector=12 * n * parts)], frozenset(writes))


def backward_op(
    n: int,
    v: int,
    d: int,
    dtype: str,
    bias: bool = True,
    teacher: bool = False,
    architecture: str = "sm_90",
) -> Op:
    """The launches of a backward by hidden features, weight and bias."""
    one, e, row = Logits(n, v, d, dtype, bias, teacher, architecture), BYTES[dtype], 4 * n
    hidden, full = n * d * e, 4 * n * d
    block_v, block_n, _ = one.tile("backward_words")
    blocks = tiles(n, block_n)
    launches = [
        Launch("torch.mul", {"Hidden": once(hidden), "Factors": once(row)}, {"product": full}, vector=n * d),
        Launch("torch.to", {"product": once(full)}, {"scaled": hidden}),
        Launch("torch.zero_", {}, {"d_hidden": full}),
    ]
    chunk = max(1, min(CHUNK, BUFFER // n) // block_v) * block_v
    for first in range(0, v, chunk):
        words = min(chunk, v - first)
        reads, times = one.reads("backward_words", words), tiles(words, block_v)
        reads |= {"Lse": Read(2 * row, 2 * row * times)}
        if teacher:
            reads["TeacherLse"] = Read(2 * row, 2 * row * times)
        writes = {"GradLogits": words * n * e}
        if bias:
            reads["Factors"] = Read(row, row * times)
            writes["PartialBias"] = 4 * words * blocks
        operations = (6 + 4 * teacher) * n * words
        issued = one.issued("backward_words", words)
        part = {name: f"{name} from {first}" for name in ("Weight", "Bias", "TeacherWeight", "TeacherBias")}
        launches.append(Launch("backward_words", reads, writes, one.products(words), issued, operations, part))
        if bias:
            launches.append(Launch("torch.sum", {"PartialBias": once(4 * words * blocks)}, {"d_bias": 4 * words}))
        dz, product = once(words * n * e), 2 * n * words * d
        weight = words * d * e
        launches.append(
            Launch("torch.mm", {"GradLogits": dz, "scaled": once(hidden)}, {"GradWeight": weight}, product, product)
        )
        launches.append(
            Launch("torch.mm", {"GradLogits": dz, part["Weight"]: once(weight)}, {"addend": full}, product, product)
        )
        reads = {"addend": once(full), "d_hidden": once(full)}
        launches.append(Launch("torch.add_", reads, {"d_hidden": full}, vector=n * d))
    launches += [
        Launch("torch.mul", {"d_hidden": once(full), "Factors": once(row)}, {"d_hidden_scaled": full}, vector=n * d),
        Launch("torch.to", {"d_hidden_scaled": once(full)}, {"GradHidden": hidden}),
    ]
    if bias:
        launches.append(Launch("torch.to", {"d_bias": once(4 * v)}, {"GradBias": v * e}))
    return Op(dtype, launches, frozenset({"GradHidden", "GradWeight", "GradBias"}))


def soft_cross_entropy(
    n: int,
    v: int,
    d: int,
    dtype: str,
    bias: bool = True,
    teacher: bool = False,
    backward: bool = False,
    architecture: str = "sm_90",
) -> Work:
    """Hidden features and weight are read, no logit is written: 2 N V D FLOPs, twice with a teacher. The backward
    computes the logits again and writes their gradients, for 4 N V D more."""
    return (backward_op if backward else forward_op)(n, v, d, dtype, bias, teacher, architecture).work()
