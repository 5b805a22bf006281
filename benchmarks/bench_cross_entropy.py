"""The vocabulary's cross-entropy on a CPU: blockwise against what one would write, with all logits.

    python benchmarks/bench_cross_entropy.py [--threads 2] [--rounds 15] [--json result.json]

Rounds, ratios and "extra" memory are those of bench_attention_cpu.py; of a forward and backward the gradients of weight
and bias are in it, as large in both. Both compute bfloat16's products in bfloat16; blockwise sums and exponentiates in
float32, the other in bfloat16. THP_MEM_ALLOC_ENABLE=1 in the environment gives PyTorch's own large tensors huge pages,
as blockwise asks for: run with it to see what is left without that.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_attention_cpu import Call, extra_memory, machine, time_interleaved
from torch import Tensor

from crossmask.kernels import soft_cross_entropy

SHAPES = [(30, 30522, 768), (240, 30522, 768), (30, 30522, 256)]  # masked words, vocabulary, width
BASELINE = "logits"
ALPHA = 0.4


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
    p = F.log_softmax(F.linear(hidden, weight, bias), 1)
    hard = F.nll_loss(p, labels, reduction="none")
    if not teacher:
        return hard
    with torch.no_grad():
        q = F.softmax(F.linear(*teacher), 1)
    return (1 - ALPHA) * hard - ALPHA * (q * p).sum(1)


def calls(student: tuple[Tensor, ...], labels: Tensor, teacher: tuple[Tensor, ...]) -> dict[str, Call]:
    return {
        BASELINE: lambda: plain(*student, labels),
        "blockwise": lambda: soft_cross_entropy(*student, labels, impl="blockwise"),
        f"{BASELINE}, teacher": lambda: plain(*student, labels, *teacher),
        "blockwise, teacher": lambda: soft_cross_entropy(*student, labels, *teacher, ALPHA, impl="blockwise"),
    }


def with_backward(call: Call, student: tuple[Tensor, ...]) -> Call:
    def run() -> None:
        loss = call()
        torch.autograd.grad(loss, student, torch.full_like(loss, 1 / len(loss)))

    return run


def rows(runs: dict[str, Call], rounds: int) -> list[dict[str, Any]]:
    times = time_interleaved(runs, rounds)
    found = []
    for name, run in runs.items():
        against = times[f"{BASELINE}, teacher" if "teacher" in name else BASELINE]
        ratios = torch.tensor([mine / theirs for mine, theirs in zip(times[name], against, strict=True)])
        low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        milliseconds = float(torch.tensor(times[name]).median())
        memory = extra_memory(run) / 2**20
        found.append({"implementation": name, "milliseconds": milliseconds, "ratio": middle, "extra_mib": memory})
        print(f"  {name:<20}{milliseconds:>10.2f} ms {middle:>6.2f} ({low:.2f} .. {high:.2f}) x {memory:>8.1f} MiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: what PyTorch takes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, nargs="+", help="only these, by number", choices=range(len(SHAPES)))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(machine())
    installed = importlib.util.find_spec("liger_kernel") is not None
    why = "its kernels need a GPU, and have no teacher" if installed else "it is not installed"
    print(f"Liger Kernel's chunked linear cross-entropy is left out: {why}")
    results = []
    shapes = [SHAPES[number] for number in arguments.shapes or range(len(SHAPES))]
    for dtype, (N, V, W) in itertools.product(arguments.dtype, shapes):
        kind = getattr(torch, dtype)
        drawn = [x.to(kind) for _ in range(2) for x in (torch.randn(N, W), torch.randn(V, W) / W**0.5, torch.randn(V))]
        labels, teacher = torch.randint(V, (N,)), tuple(drawn[3:])
        student = tuple(x.requires_grad_() for x in drawn[:3])
        constant = tuple(x.detach() for x in student)
        both = {name: with_backward(call, student) for name, call in calls(student, labels, teacher).items()}
        for what, runs in (("forward", calls(constant, labels, teacher)), ("forward and backward", both)):
            print(f"\n{what}, {dtype}, N={N} V={V} W={W}")
            results.append({"pass": what, "dtype": dtype, "shape": (N, V, W), "rows": rows(runs, arguments.rounds)})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
