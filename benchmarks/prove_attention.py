"""Compiles every cross-attention kernel with every tile that ships, for every architecture, without a GPU.

    python benchmarks/prove_attention.py                      # writes benchmarks/static/cross_attention.{csv,md}
    python benchmarks/prove_attention.py --arch sm_90 --kernel forward_online --width 64     # prints, writes nothing
    python benchmarks/prove_attention.py --search backward_keys --arch sm_80 --width 64      # ranks other tiles

What is compiled is what the host functions launch (attention_launches.py), as the JIT would (ahead_of_time.py). A row
whose kernel and arguments did not change is taken from the run before; --fresh compiles all. The rules that a row has
to keep are ``violations``; tests/test_cross_attention_static.py holds the committed table to them, and compiles a
sample again.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]  # the interpreter replaces the kernels; dumps and overrides would change what is compiled

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import proof
import triton
from ahead_of_time import PROCESSORS, Job
from attention_launches import BATCH, DTYPES, FEW, VARIANTS, WIDTHS, Row, cases, describe, launches

from crossmask.kernels.cross_attention.triton import configs


def violations(row: Row) -> list[str]:
    """What is wrong with a compile; nothing, for all that ships."""
    wrong = proof.misfits(row)
    multiplies = row.kernel != "backward_rows" or not {"key", "max"}.isdisjoint(
        row.flags.split()
    )  # else sums rows alone
    if multiplies and row.dtype != "float32":
        rows = row.block_p if row.transposed else row.block_s
        if not row.matrix:
            wrong.append("no matrix instructions")
        if row.arch == "sm_90" and rows >= 64 and "HGMMA" not in row.matrix:
            wrong.append(f"tiles of {rows} rows without HGMMA")
    rows = max(row.block_s, row.block_p if multiplies else 0)
    lanes = row.warps * (64 if row.arch.startswith("gfx") else 32)
    if not row.wide_loads and rows * row.width * (4 if row.dtype == "float32" else 2) >= 16 * lanes:
        wrong.append("no 128-bit loads")  # though each thread has 16 bytes to load
    return wrong


def order(row: Row) -> tuple[Any, ...]:
    place = [*PROCESSORS].index(row.arch), configs.KERNELS.index(row.kernel), [*DTYPES].index(row.dtype)
    return *place, row.width, dataclasses.astuple(row.tile), [*VARIANTS].index(row.variant), row.d, row.flags, row.job


def summary(rows: Sequence[Row]) -> str:
    """The table for people: the worst of each tile's compiles."""
    name = "cross_attention.csv"
    made = f"Triton {triton.__version__}, {len(rows)} compiles; every figure is in [{name}]({name})."
    text = [
        "# What the compiler makes of the cross-attention kernels",
        "",
        f"`python benchmarks/prove_attention.py` wrote this without a GPU, so nothing here is a time. {made}",
        "For each tile the worst over plain calls, all statistics, dropout: `registers` of a thread (at most 255 on",
        "NVIDIA, 512 on gfx942), `spill` bytes, `shared` KiB a block of the limit, `blocks` that fit a multiprocessor.",
        "A tile is queries x keys; T computes it as keys x queries. w: warps, s: stages of the load pipeline.",
    ]
    key = {"arch": 0, "kernel": 1, "dtype": 2, "width": 3, "tile": 4}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        dtype = "half" if row.dtype != "float32" else "float32"
        groups.setdefault((row.arch, row.kernel, dtype, row.width, label(row.tile)), []).append(row)
    for arch, of_arch in itertools.groupby(groups.items(), lambda item: item[0][key["arch"]]):
        text += [
            "",
            f"## {arch}",
            "",
            "| kernel | dtype | width | tile | registers | spill | shared | blocks | instructions |",
        ]
        text += ["|---|---|---|---|---|---|---|---|---|"]
        for (_, kernel, dtype, width, tile), members in of_arch:
            shared = max(row.shared_bytes for row in members) / 1024
            kinds = sorted({name.split(":")[0] for row in members for name in row.matrix.split()})
            text.append(
                f"| {kernel} | {dtype} | {width} | {tile} | {max(row.registers for row in members)} "
                f"| {max(row.spill_bytes for row in members)} | {shared:.0f} / {members[0].shared_limit // 1024} "
                f"| {min(row.blocks_per_processor for row in members)} | {' '.join(kinds) or 'FMA'} |"
            )
    return "\n".join(text) + "\n"


def label(tile: configs.Config) -> str:
    return f"{tile.block_s}x{tile.block_p}{'T' if tile.transposed else ''} w{tile.warps} s{tile.stages}"


def line(row: Row) -> str:
    return f"{row.kernel} {row.arch} {row.dtype} D={row.d} {label(row.tile)} {row.flags}"


KERNELS = proof.ROOT / "kernels"
PROOF: proof.Proof[Row] = proof.Proof(
    name="cross_attention",
    script="prove_attention.py",
    row=Row,
    sources=[
        KERNELS / "launch.py",
        KERNELS / "cross_attention/request.py",
        *sorted(path for path in (KERNELS / "cross_attention/triton").glob("*.py") if path.name != "tune.py"),
        *(proof.ROOT / f"benchmarks/{name}.py" for name in ("ahead_of_time", "attention_launches", "proof")),
    ],
    describe=line,
    violations=violations,
    order=order,
    summary=summary,
)
TABLE = PROOF.table
SUMMARY = TABLE.with_suffix(".md")
fingerprint, read = PROOF.fingerprint, PROOF.read


# ---- search


def candidates(kernel: str, dtype: str) -> Iterator[configs.Config]:
    sizes = (16, 32, 64) if dtype == "float32" else (32, 64, 128)
    keys = (*sizes, 256) if kernel == "forward_single" else sizes
    for block_s, block_p, warps, transposed in itertools.product(sizes, keys, (4, 8), (False, True)):
        if warps == 4 or block_s * block_p >= 2048:
            yield configs.Config(block_s, block_p, warps, 2, transposed)


def search(
    kernel: str,
    arch: str,
    width: int,
    dtype: str,
    tiles: Sequence[configs.Config],
    variants: Sequence[str],
    processes: int,
) -> None:
    """Compiles ``tiles`` and prints them ranked, the worst of each."""
    todo: dict[str, tuple[Row, Job]] = {}
    for tile in tiles:
        forced: dict[str, configs.Config | None] = {"forward_single": None, "backward_fused": None, kernel: tile}
        keys = tile.block_p - 1 if kernel == "forward_single" else 577
        lengths = [(tile.block_s - 1, FEW)] + [(577, BATCH)] * (kernel != "backward_fused")
        for (queries, batch), variant in itertools.product([(tile.block_s - 1, BATCH), *lengths], variants):
            with configs.assuming(forced=forced):
                for one in launches(arch, width, DTYPES[dtype], queries, keys, variant, batch):
                    row, job = describe(one, arch, width, width, dtype, variant)
                    todo |= {row.job: (row, job)} if row.kernel == kernel else {}
    groups: dict[configs.Config, list[Row]] = {}
    for row in PROOF.compiled(list(todo.values()), processes, {}, strict=False):
        groups.setdefault(row.tile, []).append(row)

    def rank(item: tuple[configs.Config, list[Row]]) -> tuple[Any, ...]:
        tile, rows = item
        warps = min(row.blocks_per_processor for row in rows) * tile.warps
        kinds = min(("UTCHMMA" in row.matrix) + ("HGMMA" in row.matrix) for row in rows)
        return any(violations(row) for row in rows), -kinds, -min(warps, 16), -tile.block_s * tile.block_p, tile.warps

    for tile, rows in sorted(groups.items(), key=rank):
        worst = max(rows, key=lambda row: (row.spill_bytes, row.registers))
        wrong = "; ".join(sorted({text for row in rows for text in violations(row)}))
        print(
            f"{kernel} {arch} {dtype} D={width} {label(tile):14s} registers {worst.registers:3d} "
            f"blocks {min(row.blocks_per_processor for row in rows)} shared {worst.shared_bytes // 1024:3d}K "
            f"code {worst.code_bytes // 1024:3d}K {worst.matrix:20s} {wrong}",
            flush=True,
        )


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proof.arguments(parse)
    parse.add_argument(
        "--kernel", action="append", default=[], help="compile these alone; prints, and leaves the table"
    )
    parse.add_argument("--arch", action="append", default=[], choices=[*PROCESSORS])
    parse.add_argument("--width", action="append", default=[], type=int, choices=WIDTHS)
    parse.add_argument("--search", metavar="KERNEL", help="rank other tiles for one kernel")
    parse.add_argument("--dtype", default="bfloat16", choices=[*DTYPES], help="with --search")
    parse.add_argument("--variant", nargs="+", default=["dropout"], choices=[*VARIANTS], help="with --search")
    parse.add_argument("--tiles", help='with --search, such as "32x64 64x64T,w8,s1"')
    options = parse.parse_args()
    archs, widths = options.arch or [*PROCESSORS], options.width or WIDTHS
    if options.search:
        tiles = list(
            map(tile_of, options.tiles.split()) if options.tiles else candidates(options.search, options.dtype)
        )
        for arch, width in itertools.product(archs, widths):
            search(options.search, arch, width, options.dtype, tiles, options.variant, options.processes)
        return 0
    if options.again:
        places = sorted({(row.arch, row.width) for row in PROOF.read()[1] if row.job in options.again})
        launched = [case for place in places for case in cases(place[:1], place[1:])]
        PROOF.again(options.again, launched, options.processes)
        return 0
    whole = not (options.kernel or options.arch or options.width)
    return PROOF.prove(cases(archs, widths, options.kernel), whole, options)


def tile_of(text: str) -> configs.Config:
    """``64x32T,w8,s1``."""
    head, *rest = text.split(",")
    block_s, block_p = map(int, head.rstrip("T").split("x"))
    numbers = {part[0]: int(part[1:]) for part in rest}
    return configs.Config(block_s, block_p, numbers.get("w", 4), numbers.get("s", 2), head.endswith("T"))


if __name__ == "__main__":
    sys.exit(main())
