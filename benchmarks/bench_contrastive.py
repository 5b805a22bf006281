"""Soft-target contrast with a queue on a CPU, forward and backward: blockwise, the reference, which materialises the
logits, and the loss as it is commonly written, with [keys ; queue] concatenated and log-softmax times targets.

    python benchmarks/bench_contrastive.py [--threads 2] [--rounds 9] [--json result.json]

ALBEF's shape is E = 256 and 65,536 queued keys; N queries stand for the local batch, M = N keys for one rank's. Rounds,
ratios and "extra" memory are those of bench_attention_cpu.py. Gradients of the queries and the temperature; "and keys"
also of the in-batch keys, as without a momentum teacher. All sums are in float32, whatever the features are in.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_attention_cpu import Call, extra_memory, machine, time_interleaved
from torch import Tensor

from crossmask.kernels import soft_contrastive

QUERIES = (8, 64, 512)
QUEUE, WIDTH, TAU = 65536, 256, 0.07
BASELINE = "as commonly written"


def commonly(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    tau: Tensor,
    alpha: float,
    queue: Tensor,
    queue_groups: Tensor,
) -> Tensor:
    every = torch.cat((keys, queue.clone().detach())).float()
    with torch.no_grad():
        match = (query_groups[:, None] == torch.cat((key_groups, queue_groups))[None]).float()
        target = match / match.sum(1, keepdim=True)
        if alpha > 0:
            soft = F.softmax(teacher_queries.float() @ every.T / tau, dim=1)
            target = alpha * soft + (1 - alpha) * target
    z = queries.float() @ every.T / tau
    return -(F.log_softmax(z, dim=1) * target).sum(1)


def calls(N: int, dtype: torch.dtype, alpha: float, of_keys: bool) -> dict[str, Call]:
    def features(n: int) -> Tensor:
        return F.normalize(torch.randn(n, WIDTH), dim=1).to(dtype)

    queries, keys, teacher, queue = features(N).requires_grad_(), features(N), features(N), features(QUEUE)
    tau = torch.tensor(TAU, requires_grad=True)
    groups, queue_groups = torch.arange(N), torch.randint(N, 10**6, (QUEUE,))
    wanted = [queries, tau, keys.requires_grad_()] if of_keys else [queries, tau]
    given = (queries, keys, teacher, groups, groups, tau, alpha)

    def run(loss: Any) -> Call:
        return lambda: torch.autograd.grad(loss().mean(), wanted)

    def ours(impl: Any) -> Call:
        return run(lambda: soft_contrastive(*given, queue=queue, queue_groups=queue_groups, impl=impl))

    return {
        BASELINE: run(lambda: commonly(*given, queue, queue_groups)),
        "reference": ours("reference"),
        "blockwise": ours("blockwise"),
    }


def rows(runs: dict[str, Call], rounds: int) -> list[dict[str, Any]]:
    times = time_interleaved(runs, rounds)
    found = []
    for name, run in runs.items():
        pairs = zip(times[name], times[BASELINE], strict=True)
        ratios = torch.tensor([mine / theirs for mine, theirs in pairs])
        low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        milliseconds = float(torch.tensor(times[name]).median())
        memory = extra_memory(run) / 2**20
        found.append({"implementation": name, "milliseconds": milliseconds, "ratio": middle, "extra_mib": memory})
        print(f"  {name:<20}{milliseconds:>10.2f} ms {middle:>6.2f} ({low:.2f} .. {high:.2f}) x {memory:>8.1f} MiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: what PyTorch takes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.4, 0.0])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(machine())
    results = []
    for dtype, N, alpha in itertools.product(arguments.dtype, arguments.queries, arguments.alpha):
        for of_keys in (False, True) if alpha else (False,):
            what = f"{dtype}, N=M={N} Q={QUEUE} E={WIDTH}, alpha {alpha}{', and keys' if of_keys else ''}"
            print(f"\n{what}")
            runs = calls(N, getattr(torch, dtype), alpha, of_keys)
            results.append({"case": what, "rows": rows(runs, arguments.rounds)})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
