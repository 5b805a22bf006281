"""Maximum similarity on a CPU: blockwise against the einsum and maximum that one would write, with all similarities.

    python benchmarks/bench_max_similarity_cpu.py [--threads 2] [--rounds 15] [--json result.json]

Rounds, ratios and "extra" memory are those of bench_attention_cpu.py. The einsum computes in the dtype of the tokens,
blockwise always sums in float32: in half precision they do not give the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from bench_attention_cpu import Call, extra_memory, machine, time_interleaved
from torch import Tensor

from crossmask.kernels import max_similarity

SHAPES = [(64, 196, 77, 256), (256, 36, 26, 128), (8, 577, 77, 768), (1, 4096, 512, 256)]
BASELINE = "einsum"


def plain(image: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    s = torch.einsum("bpd,bsd->bps", image, text)
    if mask is not None:
        s = s.masked_fill(~mask[:, None], -torch.inf)
    return s.max(2).values


def calls(image: Tensor, text: Tensor, mask: Tensor) -> dict[str, Call]:
    return {
        BASELINE: lambda: plain(image, text, None),
        "blockwise": lambda: max_similarity(image, text, impl="blockwise"),
        "einsum, masked": lambda: plain(image, text, mask),
        "blockwise, masked": lambda: max_similarity(image, text, mask, impl="blockwise"),
    }


def with_backward(call: Call, image: Tensor, text: Tensor) -> Call:
    def run() -> None:
        score = call()
        torch.autograd.grad(score, (image, text), torch.ones_like(score))

    return run


def rows(runs: dict[str, Call], rounds: int) -> list[dict[str, Any]]:
    times = time_interleaved(runs, rounds)
    found = []
    for name, run in runs.items():
        against = times[BASELINE if "masked" not in name else f"{BASELINE}, masked"]
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
    results = []
    shapes = [SHAPES[number] for number in arguments.shapes or range(len(SHAPES))]
    for dtype, shape in itertools.product(arguments.dtype, shapes):
        B, P, S, D = shape
        image, text = (torch.randn(B, n, D).to(getattr(torch, dtype)).requires_grad_() for n in (P, S))
        mask = torch.arange(S) < torch.randint(S // 2, S + 1, (B, 1))
        both = {name: with_backward(call, image, text) for name, call in calls(image, text, mask).items()}
        for what, runs in (("forward", calls(image.detach(), text.detach(), mask)), ("forward and backward", both)):
            print(f"\n{what}, {dtype}, B={B} P={P} S={S} D={D}")
            results.append({"pass": what, "dtype": dtype, "shape": shape, "rows": rows(runs, arguments.rounds)})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
