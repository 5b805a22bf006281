"""ema_update_ against the memory it moves and against what one would use instead, on a CPU.

    OMP_NUM_THREADS=2 python benchmarks/bench_ema.py [--threads 2] [--rounds 15] [--sizes large flat small] [--json F]

Three lists of tensors. ``large``: 203 M parameters in 288 tensors, ViT-B/16 and a text tower of 11 such layers with
RoBERTa's vocabulary. ``flat``: as many in two, as ZeRO's masters lie in memory. ``small``: 2 M in 400. All rows of a
list work on the same memory, aligned pieces of one buffer each for teacher, student and copy. Each row runs once
untimed; then in every round each runs once, in an order drawn for the round, so that what else the machine does, and
what ran before, meets all of them alike. Ratios are taken within a round; the table gives their median and quartiles.

The in-place memory limit is ``y.add_(x, alpha=a)`` over the whole buffers in one call: it reads the same two streams
and writes the same one, with one multiply-add and no list. "limit / row" is the share of that speed which a row
reaches, "row / ours" how many times as long as ``ema_update_`` it takes. GB/s counts each byte that the job must move,
once: a row that moves more does not look faster for it. ema-pytorch is measured where it is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from suite import machine
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crossmask.kernels import ema_update_

DECAY = 0.995
Row = Callable[[], Any]
JOBS = ["same", "copy", "bf16", "low"]  # fp32 from fp32; with a bf16 copy; fp32 from bf16; bf16 from bf16
LIMIT, OURS = "in-place memory limit", "ema_update_"


def large(width: int = 768) -> Iterator[tuple[int, ...]]:
    """ViT-B/16 at 224 pixels, then the text tower: 150 and 138 tensors."""
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    yield from [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    yield from layer * 12
    yield from [(width,), (width,)]
    yield from [(50265, width), (514, width), (1, width), (width,), (width,), (width,)]
    yield from layer * 11


def flat() -> Iterator[tuple[int, ...]]:
    yield from [(101_400_000,)] * 2


def small() -> Iterator[tuple[int, ...]]:
    yield from [(96, 72), (72,), (180, 72), (72,)] * 100


SIZES: dict[str, Callable[[], Iterator[tuple[int, ...]]]] = {"large": large, "flat": flat, "small": small}


def pieces(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """One buffer of small normal numbers, touched, and the tensors in it, each at a multiple of 64 bytes."""
    step = 64 // dtype.itemsize
    sizes = [torch.Size(shape).numel() for shape in shapes]
    buffer = torch.empty(sum(-(-size // step) * step for size in sizes), dtype=dtype)
    buffer.normal_(std=0.02)
    tensors, offset = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        tensors.append(buffer[offset : offset + size].view(shape))
        offset += -(-size // step) * step
    return buffer, tensors


class Parameters(nn.Module):
    """A model of these very tensors. A library that copies it for its teacher gets the teacher's memory."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.list = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameters:
        return Parameters(self.twin)

    twin: list[Tensor]


def ema_pytorch_row(model: nn.Module) -> tuple[str, Row | None]:
    try:
        from ema_pytorch import EMA
    except ImportError as error:
        return f"ema-pytorch: not measured ({error})", None
    # min_value: its schedule gives this decay throughout; the student is not to be part of its module tree
    options: dict[str, Any] = {
        "update_after_step": 0,
        "update_every": 1,
        "use_foreach": True,
        "include_online_model": False,
    }
    ema = EMA(model, beta=DECAY, min_value=DECAY, **options)
    for _ in range(3):  # the first calls copy
        ema.update()
    return "ema-pytorch, foreach", ema.update


def same_dtype(teacher: list[Tensor], student: list[Tensor], buffers: tuple[Tensor, Tensor]) -> dict[str, Row | None]:
    model = Parameters(student)
    model.twin = teacher
    timm = ModelEmaV3(model, decay=DECAY)
    swa = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema_name, ema_row = ema_pytorch_row(model)
    return {
        LIMIT: lambda: buffers[0].add_(buffers[1], alpha=1e-6),
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(teacher, student, 1 - DECAY),
        OURS: lambda: ema_update_(teacher, student, DECAY),
        "timm ModelEmaV3": lambda: timm.update(model),
        "torch swa_utils": lambda: swa.update_parameters(model),
        ema_name: ema_row,
    }


def from_bf16(teacher: list[Tensor], student: list[Tensor]) -> dict[str, Row | None]:
    def loop() -> None:
        for t, s in zip(teacher, student, strict=True):
            t.lerp_(s.float(), 1 - DECAY)

    return {
        OURS: lambda: ema_update_(teacher, student, DECAY),
        "lerp_(p.float())": loop,
        "_foreach_lerp_([p.float()])": lambda: torch._foreach_lerp_(teacher, [s.float() for s in student], 1 - DECAY),
    }


def with_copy(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor]) -> dict[str, Row | None]:
    def then_copy() -> None:
        torch._foreach_lerp_(teacher, student, 1 - DECAY)
        torch._foreach_copy_(copies, teacher)

    return {
        OURS: lambda: ema_update_(teacher, student, DECAY, copies=copies),
        "_foreach_lerp_, then _foreach_copy_": then_copy,
    }


def low_precision(teacher: list[Tensor], student: list[Tensor]) -> dict[str, Row | None]:
    seeds = iter(range(10**9))
    model = Parameters(student)
    model.twin = teacher
    timm = ModelEmaV3(model, decay=DECAY)  # which rounds bf16 stochastically
    return {
        OURS: lambda: ema_update_(teacher, student, DECAY),
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(teacher, student, 1 - DECAY),
        "ema_update_, stochastic": lambda: ema_update_(
            teacher, student, DECAY, rounding="stochastic", seed=next(seeds)
        ),
        "timm ModelEmaV3, stochastic": lambda: timm.update(model),
    }


def measure(title: str, rows: dict[str, Row | None], elements: int, traffic: int, rounds: int) -> list[dict[str, Any]]:
    timed = {name: row for name, row in rows.items() if row is not None}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for row in timed.values():
        row()
    for _ in range(rounds):
        for name, row in random.sample(list(timed.items()), len(timed)):
            start = time.perf_counter()
            row()
            times[name].append(time.perf_counter() - start)
    print(f"\n{title}: {traffic} bytes a parameter")
    print(
        f"  {'':<38}{'median ms':>10}{'GB/s':>7}{'limit / row':>13}{'quartiles':>15}{'row / ours':>12}{'quartiles':>15}"
    )
    result = []
    for name in rows:
        if name not in timed:
            print(f"  {name}")
            continue
        median = statistics.median(times[name])
        row = {"row": name, "milliseconds": median * 1e3, "GB/s": elements * traffic / median / 1e9}
        line = f"  {name:<38}{median * 1e3:>10.3f}{row['GB/s']:>7.1f}"
        for key, other, inverse in (("limit / row", LIMIT, True), ("row / ours", OURS, False)):
            if other not in timed:
                line += f"{'':>28}"
                continue
            pairs = zip(times[other], times[name], strict=True)
            ratios = [a / b if inverse else b / a for a, b in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row[key], row[f"{key}, quartiles"] = middle, [low, high]
            line += f"{middle:>{13 if inverse else 12}.3f}{f'{low:.2f} .. {high:.2f}':>15}"
        print(line, flush=True)
        result.append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: what PyTorch takes")
    parser.add_argument(
        "--rounds", type=int, default=15, help="of the large list; the small one takes twenty times as many"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)
    print(machine.line(), flush=True)
    results: dict[str, Any] = {}
    for size in arguments.sizes:
        shapes = list(SIZES[size]())
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        rounds = arguments.rounds * (20 if size == "small" else 1)
        name = f"{elements / 1e6:.1f} M in {len(shapes)} tensors"
        t_all, teacher = pieces(shapes, torch.float32)
        s_all, student = pieces(shapes, torch.float32)
        if "same" in arguments.jobs:
            rows = same_dtype(teacher, student, (t_all, s_all))
            results[f"{size}, fp32"] = measure(f"{name}, fp32 from fp32", rows, elements, 12, rounds)
        _, half = pieces(shapes, torch.bfloat16)
        if "copy" in arguments.jobs:
            rows = with_copy(teacher, student, half)
            results[f"{size}, copy"] = measure(f"{name}, fp32 from fp32 with a bf16 copy", rows, elements, 14, rounds)
        if "bf16" in arguments.jobs:
            results[f"{size}, bf16"] = measure(
                f"{name}, fp32 from bf16", from_bf16(teacher, half), elements, 10, rounds
            )
        del t_all, teacher, s_all, student
        if "low" in arguments.jobs:
            _, teacher = pieces(shapes, torch.bfloat16)
            results[f"{size}, low"] = measure(
                f"{name}, bf16 from bf16", low_precision(teacher, half), elements, 6, rounds
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.line(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
