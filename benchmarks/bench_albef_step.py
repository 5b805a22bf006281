"""One training step of ALBEF-base by this package against the same step written the common way, on a CPU.

    python benchmarks/bench_albef_step.py [--quick] [--rounds 3] [--lengths 25 75] [--threads 2] [--json F]

ViT-B/16 at 256 pixels, BERT-base cut in two, queue of 65,536, 30,522 words, random weights, batches of 8 whose captions
fill three quarters of the padded rectangle (``albef_step/sizes.py``). Forward, backward, optimizer, average and queue.
``albef_step/common.py`` is the common way; ``tests/test_bench_albef.py`` holds that both compute the same losses and
gradients. Dropout is on in both, the common teacher's included.

All sides work in this process. Each runs once untimed at each text length; then in every round each runs once, in an
order drawn for the round, and ratios are taken within the round, so that what else the machine does meets all alike.
Precision and algorithm are told apart: fp32 against fp32, both sides under torch.autocast in bf16, and our bf16 weights
(DeepSpeed's, with fp32 masters) against both. So are algorithm and library: where ``crossmask.kernels.linear``
multiplies float32 by oneDNN, both sides are measured with PyTorch's own products and with those. Ours runs DeepSpeed at
ZeRO stage 0, as one rank has nothing to share out; --stage says otherwise.

Memory is of processes of their own: resident beyond the imports, and tensors by PyTorch's allocator, at their most
during a step. The parts of a step stand beside the time that their matrix products alone need at the rate that this
machine reaches in this run. About 11 minutes on two cores; --quick, about 4, measures text length 25 and no memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from albef_step import flops, memory, parts
from albef_step.common import CommonStep
from albef_step.ours import OurStep
from albef_step.products import give_back, without_onednn
from albef_step.sizes import BASE, Captioned, random_batch
from rich.console import Console
from rich.table import Table
from suite import machine

from crossmask.kernels.linear import api as products
from crossmask.kernels.linear import use_linear

Row = Callable[[Captioned], Any]
Times = dict[tuple[str, int], list[float]]
console = Console(width=132)
BASELINE, BASELINE_BF16 = "common, fp32", "common, bf16 autocast"
OURS, OURS_BF16, OURS_AUTOCAST = "ours, fp32", "ours, bf16", "ours, bf16 autocast"
ONEDNN = ", oneDNN's products"
AGAINST = {"ours-fp32": "common-fp32", "ours-autocast": "common-autocast", "ours-bf16": "common-autocast"}  # memory


def rates(rounds: int = 5) -> dict[str, float]:
    """FLOP/s of the image tower's largest product and its two gradients, the median of their mean."""
    rows, width, hidden = BASE.batch * BASE.image_tokens, BASE.width, BASE.mlp_ratio * BASE.width
    found = {}
    for name, dtype in (("fp32", torch.float32), ("fp32 by oneDNN", torch.float32), ("bf16", torch.bfloat16)):
        if "oneDNN" in name and not products.applies():
            continue
        x, w = (
            torch.randn(rows, width).to(dtype).requires_grad_(),
            torch.randn(hidden, width).to(dtype).requires_grad_(),
        )
        gradient = torch.randn(rows, hidden).to(dtype)
        call = products.linear if "oneDNN" in name else F.linear
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            torch.autograd.grad(call(x, w), (x, w), gradient)
            seconds.append(time.perf_counter() - start)
        found[name] = 3 * flops.linear(rows, width, hidden) / statistics.median(seconds[1:])
    return found


def measure(rows: dict[str, Row], batches: dict[int, Captioned], rounds: int, times: Times, only: set[str]) -> None:
    """``only``: rows that run at the first text length alone."""
    cases = [(name, longest) for longest in batches for name in rows if longest == min(batches) or name not in only]
    for name, longest in cases:
        rows[name](batches[longest])
    for number in range(rounds):
        for name, longest in random.sample(cases, len(cases)):
            start = time.perf_counter()
            rows[name](batches[longest])
            times.setdefault((name, longest), []).append(time.perf_counter() - start)
        console.print(f"[dim]round {number + 1} of {rounds}[/dim]")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(times: Times, slow: str, fast: str, longest: int, target: float | None) -> dict[str, Any] | None:
    if (slow, longest) not in times or (fast, longest) not in times:
        return None
    pairs = zip(times[slow, longest], times[fast, longest], strict=True)
    low, middle, high = quartiles([a / b for a, b in pairs])
    return {"of": fast, "against": slow, "length": longest, "ratio": middle, "quartiles": [low, high], "target": target}


def show_times(times: Times) -> list[dict[str, Any]]:
    table = Table("text length", "", "seconds a step", "quartiles", "samples/s", title="speed", title_justify="left")
    told = []
    for (name, longest), found in sorted(times.items(), key=lambda item: item[0][1]):
        low, middle, high = quartiles(found)
        table.add_row(str(longest), name, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}", f"{BASE.batch / middle:.3f}")
        told.append({"row": name, "length": longest, "seconds": middle, "quartiles": [low, high], "all": found})
    console.print(table)
    return told


def show_ratios(found: list[dict[str, Any]]) -> None:
    table = Table(
        "text length", "", "× samples/s", "quartiles", "at least", title="ratios within rounds", title_justify="left"
    )
    for row in found:
        low, high = row["quartiles"]
        wanted = (
            "" if row["target"] is None else f"{row['target']} {'met' if row['ratio'] >= row['target'] else 'MISSED'}"
        )
        name = f"{row['of']} : {row['against']}"
        table.add_row(str(row["length"]), name, f"{row['ratio']:.2f}", f"{low:.2f} .. {high:.2f}", wanted)
    console.print(table)


def show_memory(lengths: list[int], stage: int) -> list[dict[str, Any]]:
    found = {side: memory.in_own_process(side, lengths, stage) for side in memory.SIDES}
    table = Table(
        "text length", "", "resident GB", "tensors GB", "× common", "at most", title="peak memory", title_justify="left"
    )
    for longest in lengths:
        for side, figures in found.items():
            here = figures[str(longest)]
            row = [str(longest), side, f"{here['resident'] / 1e9:.2f}", f"{here['tensors'] / 1e9:.2f}", "", ""]
            if side in AGAINST:
                there = found[AGAINST[side]][str(longest)]
                ratios = [here[what] / max(1, there[what]) for what in ("resident", "tensors")]
                row[4] = " / ".join(f"{r:.2f}" for r in ratios)
                # bf16 weights have fp32 masters beside them, which no common side has: told, without a target
                if side != "ours-bf16":
                    row[5] = f"0.85 {'met' if ratios[0] <= 0.85 else 'MISSED'}"
            table.add_row(*row)
    console.print(table)
    return list(found.values())


def show_parts(step: OurStep, batches: dict[int, Captioned], name: str, rate: float) -> list[dict[str, Any]]:
    told = []
    for longest, batch in batches.items():
        found, whole = parts.seconds(step, batch)
        title = f"{name}, text length {longest}: {whole:.2f} s, profiled; products at {rate / 1e9:.0f} GFLOP/s"
        table = Table(
            "part", "forward", "backward", "teacher", "all", "its products alone", title=title, title_justify="left"
        )
        rows = parts.rows(BASE, longest, found, rate)
        for row in rows:
            values = [row["forward"], row["backward"], row["teacher"]]
            table.add_row(row["part"], *(f"{x:.2f}" for x in (*values, sum(values), row["needed"])))
        table.add_row("all", "", "", "", f"{whole:.2f}", f"{sum(row['needed'] for row in rows):.2f}")
        console.print(table)
        told.append({"row": name, "length": longest, "seconds": whole, "rate": rate, "parts": rows})
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: what PyTorch takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 75])
    parser.add_argument("--stage", type=int, default=0, choices=[0, 1, 2], help="of ZeRO, ours")
    parser.add_argument("--quick", action="store_true", help="text length 25, two rounds, no memory")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.lengths, arguments.rounds, arguments.no_memory = [25], min(2, arguments.rounds), True
    random.seed(0)
    console.print(machine.line())
    result: dict[str, Any] = {"machine": machine.line(), "stage": arguments.stage, "rounds": arguments.rounds}
    batches = {longest: random_batch(BASE, longest) for longest in arguments.lengths}
    result["flops"] = {}
    for longest in batches:
        work = flops.Work.expected(BASE, longest)
        pair = result["flops"][longest] = {"common": flops.common(BASE, work), "least": flops.least(BASE, work)}
        shipped, needed = (sum(each.values()) / 1e9 for each in pair.values())
        ratio = f"{shipped / needed:.2f} ×"
        console.print(f"text length {longest}: {shipped:.0f} GFLOP as commonly written, {needed:.0f} at least, {ratio}")
    if not arguments.no_memory:
        result["memory"] = show_memory(arguments.lengths, arguments.stage)
    result["rates"] = rates()
    console.print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in result["rates"].items()))

    times: Times = {}
    told = []
    common, onednn = CommonStep(BASE), products.applies()
    use_linear(common.model)  # which its rows below switch off where they say so
    ours = OurStep(BASE, "fp32", arguments.stage)
    rows: dict[str, Row] = {BASELINE: without_onednn(common), OURS: without_onednn(ours)}
    if onednn:
        rows |= {BASELINE + ONEDNN: common, OURS + ONEDNN: ours}
    measure(rows, batches, arguments.rounds, times, only=set())
    fp32 = result["rates"]["fp32 by oneDNN" if onednn else "fp32"]
    told += show_parts(ours, batches, OURS + (ONEDNN if onednn else ""), fp32)
    del ours, rows
    give_back()

    later: Times = {}
    half = OurStep(BASE, "bf16", arguments.stage)
    rows = {BASELINE: without_onednn(common), OURS_BF16: half}
    rows[BASELINE_BF16] = without_onednn(lambda batch: common(batch, bf16=True))
    rows[OURS_AUTOCAST] = without_onednn(OurStep(BASE, "autocast", arguments.stage))
    measure(rows, batches, arguments.rounds, later, only={BASELINE})
    told += show_parts(half, batches, OURS_BF16, result["rates"]["bf16"])
    result["parts"] = told

    ratios = []
    for longest in batches:
        first = longest == min(batches)
        for found, slow, fast, target in (
            (times, BASELINE, OURS, 1.3),
            (times, BASELINE + ONEDNN, OURS + ONEDNN, None),
            (times, BASELINE, OURS + ONEDNN, None),
            (later, BASELINE_BF16, OURS_AUTOCAST, 1.2),
            (later, BASELINE_BF16, OURS_BF16, None),
            (later, BASELINE, OURS_BF16, 2.4),
        ):
            row = compare(found, slow, fast, longest, target if first else None)
            ratios += [row] if row else []
    result["times"] = show_times(times | {key: found for key, found in later.items() if key[0] != BASELINE})
    show_ratios(ratios)
    result["ratios"] = ratios
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
