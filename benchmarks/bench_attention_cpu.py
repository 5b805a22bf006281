"""Cross-attention on a CPU, in one run: blockwise with all statistics, PyTorch's fused attention without any, and eager
attention that materialises the weights to compute the same statistics.

    python benchmarks/bench_attention_cpu.py [--threads 2] [--rounds 15] [--json result.json]

Every round times each implementation once, right after an untimed call of it, so that none pays for memory that its
predecessor gave back to the system. Ratios are taken within a round: what else runs on the machine falls on all alike.
"extra" is the most memory a call had allocated at one time beyond its inputs, results included, as reported by
PyTorch's allocator (torch.profiler); what the libraries below PyTorch allocate for themselves is not in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels import cross_attention

SHAPES = [
    (16, 12, 30, 577, 64),
    (16, 12, 577, 30, 64),
    (4, 12, 77, 4096, 64),
    (8, 12, 257, 257, 64),
    (192, 4, 16, 37, 32),
    (8, 12, 30, 257, 64),
]
ALL = ("lse", "max_probability", "entropy", "key_attention", "query_attention")
WITH_MAX = (*ALL, "key_max")
Call = Callable[[], Any]


def calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    def ours(told: tuple[str, ...], impl: Any) -> Call:
        return lambda: cross_attention(q, k, v, statistics=told, impl=impl, check_finite=False)

    return {
        "sdpa, output only": lambda: F.scaled_dot_product_attention(q, k, v),
        "blockwise, all statistics": ours(ALL, "blockwise"),
        "blockwise, and key_max": ours(WITH_MAX, "blockwise"),
        "blockwise, output only": ours((), "blockwise"),
        "eager, all statistics": ours(ALL, "reference"),
        "eager, output only": ours((), "eager"),
    }


def with_backward(call: Call, inputs: tuple[Tensor, ...], every_gradient: bool) -> Call:
    """Forward and backward, from gradients of the output or also of every statistic."""

    def run() -> None:
        found = call()
        if isinstance(found, Tensor):
            outputs = [found]
        else:
            told = (getattr(found.statistics, name) for name in ALL)
            outputs = [found.output, *(x for x in told if x is not None and every_gradient)]
        torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])

    return run


def time_interleaved(runs: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def extra_memory(run: Call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    del found
    return max(itertools.accumulate(changes), default=0)


def summarise(times: dict[str, list[float]], runs: dict[str, Call]) -> list[dict[str, Any]]:
    rows = []
    baseline = times["sdpa, output only"]
    for name, run in runs.items():
        ratios = [mine / theirs for mine, theirs in zip(times[name], baseline, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "implementation": name,
                "milliseconds": statistics.median(times[name]),
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "extra_mib": extra_memory(run) / 2**20,
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n  {'':<28}{'median ms':>10}{'x sdpa':>9}{'quartiles':>15}{'extra MiB':>11}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"  {row['implementation']:<28}{row['milliseconds']:>10.2f}{row['ratio']:>9.2f}"
            f"{f'{low:.2f} .. {high:.2f}':>15}{row['extra_mib']:>11.1f}",
            flush=True,
        )


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    found = torch.cpu.get_capabilities()
    features = [feature for feature in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if found.get(feature)]
    return f"{name} ({', '.join(features)}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: what PyTorch takes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, nargs="+", help="only these, by number", choices=range(len(SHAPES)))
    parser.add_argument("--forward", action="store_true", help="no backward")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(machine())
    results = []
    shapes = [SHAPES[number] for number in arguments.shapes or range(len(SHAPES))]
    for dtype, shape in itertools.product(arguments.dtype, shapes):
        B, H, S, P, D = shape
        inputs = tuple(torch.randn(B, H, n, D).to(getattr(torch, dtype)) for n in (S, P, P))
        forward = calls(*inputs)
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        both = {name: with_backward(call, leaves, False) for name, call in calls(*leaves).items()}
        key = "blockwise, all statistics"
        both["blockwise, every gradient"] = with_backward(calls(*leaves)[key], leaves, True)
        both["eager, every gradient"] = with_backward(calls(*leaves)["eager, all statistics"], leaves, True)
        for what, runs in (("forward", forward), ("forward and backward", both))[: 1 if arguments.forward else 2]:
            rows = summarise(time_interleaved(runs, arguments.rounds), runs)
            show(f"{what}, {dtype}, B={B} H={H} S={S} P={P} D={D}", rows)
            results.append({"pass": what, "dtype": dtype, "shape": shape, "rows": rows})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
