"""Compiles the kernels of the losses with every tile that ships, for every architecture, without a GPU.

    python benchmarks/prove_losses.py                      # writes benchmarks/static/losses.{csv,md}
    python benchmarks/prove_losses.py --arch sm_90 --op soft_contrastive         # prints, writes nothing

What is compiled is what the host functions launch (losses_launches.py), as the JIT would (ahead_of_time.py). A row
whose kernel and arguments did not change is taken from the run before; --fresh compiles all. The rules that a row has
to keep are ``violations``; tests/test_losses_static.py holds the committed table to them, and compiles a sample again.
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
from losses_launches import DTYPES, OPS, VARIANTS, cases
from selection_launches import Row

# kernels without a product, by op; every other one is held to matrix instructions in half precision
NO_PRODUCT = {"soft_contrastive": {"forward_rows"}, "soft_cross_entropy": {"forward_rows"}}


def violations(row: Row) -> list[str]:
    """What is wrong with a compile; nothing, for all that ships."""
    wrong = proof.misfits(row)
    if row.kernel in NO_PRODUCT.get(row.op, ()):
        return wrong
    if row.dtype != "float32":
        if not row.matrix:
            wrong.append("no matrix instructions")
        rows = int(row.tile.split("x")[0])
        if row.arch == "sm_90" and rows >= 64 and "HGMMA" not in row.matrix:
            wrong.append(f"tiles of {rows} rows without HGMMA")
    # what is half as wide as what it is multiplied with is loaded in 8 bytes
    if "UNIT=1" not in row.flags.split() and row.variant != "mixed" and not row.wide_loads:
        wrong.append("no 128-bit loads")
    return wrong


def order(row: Row) -> tuple[Any, ...]:
    place = [*PROCESSORS].index(row.arch), [*OPS].index(row.op), row.kernel, [*DTYPES].index(row.dtype)
    sizes = [int(size) for size in row.tile.split("x")]
    return *place, sizes, row.warps, row.stages, VARIANTS.index(row.variant), row.flags, row.job


def summary(rows: Sequence[Row]) -> str:
    """The table for people: the worst of each tile's compiles."""
    name = "losses.csv"
    made = f"Triton {triton.__version__}, {len(rows)} compiles; every figure is in [{name}]({name})."
    text = [
        "# What the compiler makes of the kernels of the losses",
        "",
        f"`python benchmarks/prove_losses.py` wrote this without a GPU, so nothing here is a time. {made}",
        "For each tile the worst over its calls: `registers` of a thread (at most 255 on NVIDIA, 512 on gfx942),",
        "`spill` bytes, `shared` KiB a block of the limit, `blocks` that fit a multiprocessor. w: warps, s: stages of",
        "the load pipeline. A tile of soft_contrastive is queries x keys x width of a product x width of a gradient,",
        "of soft_cross_entropy words x rows x width of a product.",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        dtype = "half" if row.dtype in ("bfloat16", "float16") else row.dtype
        tile = f"{row.tile} w{row.warps} s{row.stages}"
        groups.setdefault((row.arch, row.op, row.kernel, dtype, tile), []).append(row)
    for arch, of_arch in itertools.groupby(groups.items(), lambda item: item[0][0]):
        text += ["", f"## {arch}", "", "| kernel | dtype | tile | registers | spill | shared | blocks | instructions |"]
        text += ["|---|---|---|---|---|---|---|---|"]
        for (_, op, kernel, dtype, tile), members in of_arch:
            shared = max(row.shared_bytes for row in members) / 1024
            kinds = sorted({name.split(":")[0] for row in members for name in row.matrix.split()})
            product = " ".join(kinds) or ("" if kernel in NO_PRODUCT.get(op, ()) else "FMA")
            text.append(
                f"| {op} {kernel} | {dtype} | {tile} | {max(row.registers for row in members)} "
                f"| {max(row.spill_bytes for row in members)} | {shared:.0f} / {members[0].shared_limit // 1024} "
                f"| {min(row.blocks_per_processor for row in members)} | {product} |"
            )
    return "\n".join(text) + "\n"


def line(row: Row) -> str:
    return f"{row.op} {row.kernel} {row.arch} {row.dtype} {row.tile} w{row.warps} s{row.stages} {row.flags}"


KERNELS = proof.ROOT / "kernels"
PROOF: proof.Proof[Row] = proof.Proof(
    name="losses",
    script="prove_losses.py",
    row=Row,
    sources=[
        KERNELS / "launch.py",
        *(KERNELS / op / "request.py" for op in OPS),
        *(path for op in OPS for path in sorted((KERNELS / op / "triton").glob("*.py"))),
        *(
            proof.ROOT / f"benchmarks/{name}.py"
            for name in ("ahead_of_time", "losses_launches", "proof", "selection_launches")
        ),
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
    todo = cases(archs, [options.op] if options.op else OPS)
    return PROOF.prove(todo, not (options.op or options.arch), options)


if __name__ == "__main__":
    sys.exit(main())
