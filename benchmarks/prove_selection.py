"""Compiles the kernels of mask selection with every tile that ships, for every architecture, without a GPU.

    python benchmarks/prove_selection.py                      # writes benchmarks/static/selection.{csv,md}
    python benchmarks/prove_selection.py --arch sm_90 --op topk_mask         # prints, writes nothing

What is compiled is what the host functions launch (selection_launches.py), as the JIT would (ahead_of_time.py). A row
whose kernel and arguments did not change is taken from the run before; --fresh compiles all. The rules that a row has
to keep are ``violations``; tests/test_selection_static.py holds the committed table to them, and compiles a sample
again.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]  # the interpreter replaces the kernels; dumps and overrides would change what is compiled

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import proof
import triton
from ahead_of_time import PROCESSORS
from selection_launches import DTYPES, VARIANTS, Row, cases

OPS = ("topk_mask", "max_similarity")


def violations(row: Row) -> list[str]:
    """What is wrong with a compile; nothing, for all that ships."""
    wrong = proof.misfits(row)
    half = row.dtype in ("bfloat16", "float16")
    sizes = [int(size) for size in row.tile.split("x")]
    if row.kernel in ("forward", "backward_text") and half:
        if not row.matrix:
            wrong.append("no matrix instructions")
        rows = sizes[0] if row.kernel == "forward" else sizes[1]
        if row.arch == "sm_90" and rows >= 64 and "HGMMA" not in row.matrix:
            wrong.append(f"tiles of {rows} rows without HGMMA")
    # where rows are aligned, and each thread has 16 bytes to load
    positions = sizes[0] if row.op == "topk_mask" else sizes[0] * sizes[2]
    lanes = row.warps * (64 if row.arch.startswith("gfx") else 32)
    if (
        "UNIT=1" not in row.flags.split()
        and positions * DTYPES[row.dtype].itemsize >= 16 * lanes
        and not row.wide_loads
    ):
        wrong.append("no 128-bit loads")
    return wrong


def order(row: Row) -> tuple[Any, ...]:
    place = [*PROCESSORS].index(row.arch), OPS.index(row.op), row.kernel, [*DTYPES].index(row.dtype)
    sizes = [int(size) for size in row.tile.split("x")]
    return *place, sizes, row.warps, row.stages, VARIANTS.index(row.variant), row.flags, row.job


def summary(rows: Sequence[Row]) -> str:
    """The table for people: the worst of each tile's compiles."""
    name = "selection.csv"
    made = f"Triton {triton.__version__}, {len(rows)} compiles; every figure is in [{name}]({name})."
    text = [
        "# What the compiler makes of the kernels of mask selection",
        "",
        f"`python benchmarks/prove_selection.py` wrote this without a GPU, so nothing here is a time. {made}",
        "For each tile the worst over its calls: `registers` of a thread (at most 255 on NVIDIA, 512 on gfx942),",
        "`spill` bytes, `shared` KiB a block of the limit, `blocks` that fit a multiprocessor. A tile of topk_mask is",
        "a block of positions, of max_similarity patches x words x width; w: warps, s: stages of the load pipeline.",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        dtype = "half" if row.dtype in ("bfloat16", "float16") else row.dtype
        tile = f"{row.tile} w{row.warps} s{row.stages}"
        kernel = row.op if row.op == row.kernel else f"{row.op} {row.kernel}"
        groups.setdefault((row.arch, kernel, dtype, tile), []).append(row)
    for arch, of_arch in itertools.groupby(groups.items(), lambda item: item[0][0]):
        text += ["", f"## {arch}", "", "| kernel | dtype | tile | registers | spill | shared | blocks | instructions |"]
        text += ["|---|---|---|---|---|---|---|---|"]
        for (_, kernel, dtype, tile), members in of_arch:
            shared = max(row.shared_bytes for row in members) / 1024
            kinds = sorted({name.split(":")[0] for row in members for name in row.matrix.split()})
            product = " ".join(kinds) or ("FMA" if kernel.endswith(("forward", "text")) else "")
            text.append(
                f"| {kernel} | {dtype} | {tile} | {max(row.registers for row in members)} "
                f"| {max(row.spill_bytes for row in members)} | {shared:.0f} / {members[0].shared_limit // 1024} "
                f"| {min(row.blocks_per_processor for row in members)} | {product} |"
            )
    return "\n".join(text) + "\n"


def line(row: Row) -> str:
    return f"{row.op} {row.kernel} {row.arch} {row.dtype} {row.tile} w{row.warps} s{row.stages} {row.flags}"


KERNELS = proof.ROOT / "kernels"
PROOF: proof.Proof[Row] = proof.Proof(
    name="selection",
    script="prove_selection.py",
    row=Row,
    sources=[
        KERNELS / "launch.py",
        KERNELS / "topk_mask/request.py",
        *(path for op in OPS for path in sorted((KERNELS / op / "triton").glob("*.py"))),
        *(proof.ROOT / f"benchmarks/{name}.py" for name in ("ahead_of_time", "selection_launches", "proof")),
    ],
    describe=line,
    violations=violations,
    order=order,
    summary=summary,
)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proof.arguments(parse)
    parse.add_argument("--op", choices=OPS, help="compile these kernels alone; prints, and leaves the table")
    parse.add_argument("--arch", action="append", default=[], choices=[*PROCESSORS])
    options = parse.parse_args()
    archs = options.arch or [*PROCESSORS]
    if options.again:
        archs = sorted({row.arch for row in PROOF.read()[1] if row.job in options.again})
        PROOF.again(options.again, cases(archs), options.processes)
        return 0
    todo = [case for case in cases(archs) if options.op in (None, case[0].op)]
    return PROOF.prove(todo, not (options.op or options.arch), options)


if __name__ == "__main__":
    sys.exit(main())
