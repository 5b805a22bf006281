"""Counts what the Triton kernels load, store and multiply, in Triton's interpreter, beside what kernels/roofline says.

    TRITON_INTERPRET=1 python benchmarks/traffic.py            # a line a launch; exits 1 where the two differ
    TRITON_INTERPRET=1 python benchmarks/traffic.py --json

Every element that a mask lets through counts, by the tensor that its address lies in: bytes that are stored, bytes that
are asked for, and bytes that are read at least once and were not stored before by the launch itself. Of products, the
FLOPs of every tl.dot, padding included. The three have to be exactly what the formulas give; unique bytes may be fewer
where the data decides which rows are gathered (max_similarity's backward_image).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from crossmask.kernels import launch
from crossmask.kernels.cross_attention.request import Forward as Attended
from crossmask.kernels.cross_attention.request import Gradients, Masks
from crossmask.kernels.cross_attention.request import Request as AttentionRequest
from crossmask.kernels.cross_attention.triton import launch_backward as attention_backward
from crossmask.kernels.cross_attention.triton import launch_forward as attention_forward
from crossmask.kernels.cross_attention.triton.configs import assuming
from crossmask.kernels.max_similarity.triton import launch_backward as similarity_backward
from crossmask.kernels.max_similarity.triton import launch_forward as similarity_forward
from crossmask.kernels.roofline import attention, contrastive, cross_entropy, selection
from crossmask.kernels.roofline.attention_backward import backward_op as attention_backward_op
from crossmask.kernels.roofline.launches import Op
from crossmask.kernels.soft_contrastive.request import Contrast
from crossmask.kernels.soft_contrastive.triton import launch_backward as contrastive_backward
from crossmask.kernels.soft_contrastive.triton import launch_forward as contrastive_forward
from crossmask.kernels.soft_cross_entropy.request import Inputs, Needed
from crossmask.kernels.soft_cross_entropy.triton import launch_backward as entropy_backward
from crossmask.kernels.soft_cross_entropy.triton import launch_forward as entropy_forward
from crossmask.kernels.topk_mask.request import Request as TopkRequest
from crossmask.kernels.topk_mask.request import fixed_point
from crossmask.kernels.topk_mask.triton import launch as topk_launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Tensor:
    """A range of memory that one or more of a kernel's parameters point to, and what was done with it."""

    def __init__(self, start: int, item: int) -> None:
        self.start, self.item, self.names, self.length = start, item, [""][:0], 0
        self.seen = self.stored = np.zeros(0, bool)
        self.requested = self.written = 0

    def cover(self, name: str, length: int) -> None:
        self.names.append(name)
        self.length = max(self.length, length)
        self.seen, self.stored = np.zeros(self.length, bool), np.zeros(self.length, bool)

    def load(self, at: np.ndarray) -> None:
        self.requested += len(at) * self.item
        self.seen[at[~self.stored[at]]] = True

    def store(self, at: np.ndarray) -> None:
        self.written += len(at) * self.item
        self.stored[at] = True

    @property
    def unique(self) -> int:
        return int(self.seen.sum()) * self.item


@dataclasses.dataclass
class Counted:
    """One launch: by the names that share a tensor, unique and requested bytes, and written ones."""

    kernel: str
    tensors: list[Tensor]
    flops: int = 0

    def find(self, pointers: np.ndarray, mask: np.ndarray) -> tuple[Tensor, np.ndarray] | None:
        addresses = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(pointers.shape, mask.shape))
        ].astype(np.int64)
        if not addresses.size:
            return None
        for tensor in self.tensors:
            first, last = int(addresses.min()) - tensor.start, int(addresses.max()) - tensor.start
            if first >= 0 and last < tensor.length * tensor.item:
                return tensor, (addresses - tensor.start) // tensor.item
        raise AssertionError(f"{self.kernel} touches memory of none of its tensors")


@contextmanager
def counting() -> Iterator[list[Counted]]:
    """Every launch while it lasts, counted."""
    found: list[Counted] = []
    start = launch.start
    load, store, dot = (
        getattr(InterpreterBuilder, f"create_{name}") for name in ("masked_load", "masked_store", "dot")
    )

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if place := found[-1].find(pointers.data, mask.data):
            place[0].load(place[1])
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if place := found[-1].find(pointers.data, mask.data):
            place[0].store(place[1])
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        found[-1].flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def started(kernel: Any, grid: Any, arguments: dict[str, Any], *rest: Any) -> None:
        tensors: dict[int, Tensor] = {}
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor) and x.numel():
                extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                tensors.setdefault(x.data_ptr(), Tensor(x.data_ptr(), x.element_size())).cover(name, extent)
        found.append(Counted(kernel.__name__, list(tensors.values())))
        start(kernel, grid, arguments, *rest)

    patches = {"create_masked_load": counted_load, "create_masked_store": counted_store, "create_dot": counted_dot}
    with mock.patch.multiple(InterpreterBuilder, **patches), mock.patch.object(launch, "start", started):
        yield found


# ---- the cases


@dataclasses.dataclass(frozen=True)
class Case:
    """An op as the formulas have it, and the call that does it."""

    name: str
    op: Op
    run: Callable[[], Any]


def attention_case(
    b: int, h: int, s: int, p: int, d: int, dtype: str, statistics: tuple[str, ...], arch: str, backward: bool
) -> Case:
    label = " ".join(statistics) if len(statistics) < 5 else "all statistics"
    name = f"cross_attention {'backward' if backward else 'forward'} {s}x{p} B={b} H={h} D={d} {dtype} {arch} {label}"
    asked = {name: True for name in statistics if name != "lse"}
    q, k, v = (torch.randn(b, h, n, d).to(DTYPES[dtype]) for n in (s, p, p))
    request = AttentionRequest(scale=d**-0.5, **asked)
    if not backward:
        op = attention.forward_op(b, h, s, p, d, dtype, statistics, arch)
        return Case(name, op, lambda: attention_forward.forward(q, k, v, Masks(), None, request))

    # what the forward gives, which no count needs to be true: any numbers will do
    found = {name: torch.rand(b, h, n) for name, n in (("lse", s), ("max_probability", s), ("entropy", s))}
    found |= {"column_lse": torch.rand(b, h, p), "key_attention": torch.rand(b, p), "query_attention": torch.rand(b, s)}
    gradients = Gradients(torch.randn_like(q), **{name: torch.rand_like(found[name]) for name in statistics})
    op = attention_backward_op(b, h, s, p, d, dtype, statistics, arch, attention_backward.INTERPRETED)
    attended = Attended(torch.randn_like(q), **found)
    return Case(name, op, lambda: attention_backward.backward(gradients, q, k, v, attended, Masks(), None, request))


def topk_case(rows: int, positions: int, arch: str, **asked: Any) -> Case:
    partials, noise, width = asked.get("partials", 1), asked.get("noise", False), asked.get("width", 0)
    scores, identity = torch.randn(rows, partials, positions), torch.arange(rows)
    valid = torch.ones(rows, positions, dtype=torch.bool) if asked.get("valid") else None
    ratio = torch.full((rows,), int(fixed_point(0.3))) if asked.get("per_row") else fixed_point(0.3)
    seed = torch.zeros(1, dtype=torch.int64) if noise else None
    request = TopkRequest(ratio=ratio, seed=seed, rows=identity if noise else None, width=width)
    op = selection.topk_op(rows, positions, architecture=arch, **asked)
    said = " ".join(f"{name}={value}" for name, value in asked.items())
    return Case(f"topk_mask {rows}x{positions} {arch} {said}", op, lambda: topk_launch.select(scores, valid, request))


def similarity_case(b: int, p: int, s: int, d: int, dtype: str, arch: str, backward: bool) -> Case:
    image, text = (torch.randn(b, n, d).to(DTYPES[dtype]) for n in (p, s))
    op = selection.similarity_op(b, p, s, d, dtype, backward, not backward, arch)
    name = f"max_similarity {'backward' if backward else 'forward'} {p}x{s} B={b} D={d} {dtype} {arch}"
    if not backward:
        mask = torch.ones(b, s, dtype=torch.bool)
        return Case(name, op, lambda: similarity_forward.forward(image, text, mask))
    gradient, argmax = torch.randn(b, p), torch.randint(s, (b, p))
    return Case(name, op, lambda: similarity_backward.backward(gradient, image, text, argmax))


def contrastive_case(n: int, m: int, q: int, e: int, dtype: str, teacher: bool, arch: str, backward: bool) -> Case:
    def of(rows: int, kind: torch.dtype = DTYPES[dtype]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, e), dim=-1).to(kind)

    groups = [torch.arange(rows) for rows in (n, m, q)]
    queue = of(q, torch.float32) if q else None
    tau, distillation = torch.tensor(0.07), 0.4 if teacher else 0.0
    contrast = Contrast(of(n), of(m), of(n), groups[0], groups[1], tau, queue, groups[2], distillation)
    sizes = (n, m, q, e, dtype, "fp32", teacher, arch, contrastive_forward.INTERPRETED)
    name = f"soft_contrastive {'backward' if backward else 'forward'} N={n} M={m} Q={q} E={e} {dtype} {arch}"
    name += " teacher" * teacher
    if not backward:
        return Case(name, contrastive.forward_op(*sizes), lambda: contrastive_forward.forward(contrast))

    def run() -> None:
        row = torch.ones(n)
        found = contrastive_forward.Forward(row, row, row, row.clone(), row.clone(), row.clone())
        contrastive_backward.backward(torch.rand(n), contrast, found, True, m > 0)

    return Case(name, contrastive.backward_op(*sizes), run)


def entropy_case(n: int, v: int, d: int, dtype: str, bias: bool, teacher: bool, arch: str, backward: bool) -> Case:
    def of(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(DTYPES[dtype])

    second = (of(n, d), of(v, d), of(v) if bias else None, 0.4) if teacher else (None, None, None, 0.0)
    inputs = Inputs(of(n, d), of(v, d), of(v) if bias else None, torch.randint(v, (n,)), *second, None)
    name = f"soft_cross_entropy {'backward' if backward else 'forward'} N={n} V={v} D={d} {dtype} {arch}"
    name += " bias" * bias + " teacher" * teacher
    sizes = (n, v, d, dtype, bias, teacher, arch)
    if not backward:
        return Case(name, cross_entropy.forward_op(*sizes), lambda: entropy_forward.forward(inputs))
    lse, needed = torch.rand(2, n), Needed(True, True, bias)
    return Case(
        name,
        cross_entropy.backward_op(*sizes),
        lambda: entropy_backward.backward(torch.rand(n), inputs, lse, lse.clone(), needed),
    )


ROWS = ("lse", "max_probability", "entropy", "key_attention", "query_attention")  # that have a gradient


def cases() -> Iterator[Case]:
    """Small, with odd lengths, and such that every kernel and every way through the launches is taken."""
    for arch, dtype in (("sm_80", "fp16"), ("sm_90", "fp16"), ("sm_80", "fp32")):
        for s, p in ((30, 77), (17, 33), (1, 197), (70, 45))[: 4 if dtype == "fp16" else 2]:
            yield attention_case(1, 2, s, p, 24, dtype, (), arch, False)
            yield attention_case(1, 2, s, p, 24, dtype, attention.ALL, arch, False)
            yield attention_case(1, 2, s, p, 24, dtype, (), arch, True)
            yield attention_case(1, 2, s, p, 24, dtype, ROWS, arch, True)
    for statistics in (("max_probability",), ("key_attention",)):
        yield attention_case(2, 3, 30, 77, 16, "fp32", statistics, "sm_80", False)
        yield attention_case(2, 3, 30, 77, 16, "fp32", statistics, "gfx942", True)
    yield attention_case(2, 1, 77, 30, 16, "fp32", ("entropy", "query_attention"), "sm_80", True)
    yield attention_case(1, 1, 545, 33, 16, "fp32", ("key_attention", "key_max"), "sm_80", False)
    for arch in ("sm_80", "gfx942"):
        for asked in ({}, {"width": 20, "valid": True}, {"partials": 3, "per_row": True, "noise": True, "width": 77}):
            yield from (topk_case(3, positions, arch, **asked) for positions in (77, 197, 1030))
        yield topk_case(1, 8197, arch, width=9)
    for dtype, arch in (("fp16", "sm_90"), ("fp32", "gfx942")):
        for p, s, d in ((30, 77, 40), (17, 33, 33), (197, 1, 24)):
            yield from (similarity_case(2, p, s, d, dtype, arch, backward) for backward in (False, True))
        for n, m, q, e in ((30, 30, 77, 40), (17, 17, 33, 33), (1, 1, 197, 24), (70, 0, 45, 272)):
            for backward in (False, True):
                yield contrastive_case(n, m, q, e, dtype, n != 17, arch, backward)
        for n, v, d in ((30, 77, 40), (17, 333, 33), (1, 197, 24), (140, 33, 72)):
            for backward in (False, True):
                yield entropy_case(n, v, d, dtype, n != 17, n != 1, arch, backward)


# ---- the comparison


def compared(case: Case) -> list[dict[str, Any]]:
    """A line for every launch: what was counted, and what differs from the formulas."""
    arch = next(word for word in case.name.split() if word.startswith(("sm_", "gfx")))
    with counting() as found, assuming(arch), torch.no_grad():
        case.run()
    expected = [one for one in case.op.launches if "." not in one.kernel]
    lines = []
    if [one.kernel for one in found] != [one.kernel for one in expected]:
        wrong = f"launches {[one.kernel for one in found]}, expected {[one.kernel for one in expected]}"
        return [
            {"case": case.name, "kernel": "", "read": 0, "requested": 0, "written": 0, "flops": 0, "wrong": [wrong]}
        ]
    for one, formula in zip(found, expected, strict=True):
        wrong = [] if one.flops == formula.issued else [f"{one.flops} FLOPs, expected {formula.issued}"]
        named = {name for tensor in one.tensors for name in tensor.names}
        wrong += [f"{name} is no tensor of it" for name in {*formula.reads, *formula.writes} - named]
        for tensor in one.tensors:
            reads = [formula.reads[name] for name in tensor.names if name in formula.reads]
            unique, requested = sum(read.unique for read in reads), sum(read.requested for read in reads)
            written = sum(formula.writes.get(name, 0) for name in tensor.names)
            name = "/".join(tensor.names)
            if tensor.written != written:
                wrong.append(f"{name}: {tensor.written} bytes written, expected {written}")
            if tensor.requested != requested:
                wrong.append(f"{name}: {tensor.requested} bytes requested, expected {requested}")
            gathered = one.kernel == "backward_image" and name == "Text"
            if tensor.unique > unique or (tensor.unique < unique and not gathered):
                wrong.append(f"{name}: {tensor.unique} bytes read, expected {unique}")
        counts = {"read": "unique", "requested": "requested", "written": "written"}
        sums = {to: sum(getattr(tensor, of) for tensor in one.tensors) for to, of in counts.items()}
        lines.append({"case": case.name, "kernel": one.kernel, **sums, "flops": one.flops, "wrong": wrong})
    return lines


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--json", action="store_true")
    parse.add_argument("--only", default="", help="cases whose name holds this")
    options = parse.parse_args()
    torch.manual_seed(0)
    lines = [line for case in cases() if options.only in case.name for line in compared(case)]
    if options.json:
        print(json.dumps(lines))
        return 0
    for line in lines:
        sums = f"read {line['read']} requested {line['requested']} written {line['written']} FLOPs {line['flops']}"
        print(f"{line['case']}: {line['kernel']} {sums}  {'; '.join(line['wrong']) or 'as the formula says'}")
    bad = sum(bool(line["wrong"]) for line in lines)
    print(f"{len(lines)} launches counted, {bad} differ", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
