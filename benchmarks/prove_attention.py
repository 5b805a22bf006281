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
import concurrent.futures
import csv
import dataclasses
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import sys
import time
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from ahead_of_time import PROCESSORS, Figures, Job, compile
from attention_launches import BATCH, DTYPES, FEW, VARIANTS, WIDTHS, Row, cases, describe, launches

from crossmask.kernels.cross_attention.triton import configs

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks/static/cross_attention.csv"
SUMMARY = TABLE.with_suffix(".md")
PARTIAL = TABLE.with_name(TABLE.name + ".partial")  # what a run that was cut short, or asked for a part, has found
FIGURES = (
    "registers",
    "spill_bytes",
    "shared_bytes",
    "shared_limit",
    "blocks_per_processor",
    "tensor_memory",
    "matrix",
)
FIGURES += ("wide_loads", "code_bytes")


def work(job: Job) -> Figures:
    module, name = job.kernel.split(":")
    return compile(job, getattr(importlib.import_module(module), name))


def filled(row: Row, found: Figures) -> Row:
    return dataclasses.replace(
        row,
        registers=found.registers,
        spill_bytes=found.spill,
        shared_bytes=found.shared,
        shared_limit=found.shared_limit,
        blocks_per_processor=found.ctas,
        tensor_memory=found.tensor_memory,
        matrix=" ".join(f"{name}:{count}" for name, count in sorted(found.matrix.items())),
        wide_loads=found.wide_loads,
        code_bytes=found.code,
    )


def compiled(
    todo: Sequence[tuple[Row, Job]], processes: int, known: Mapping[tuple[str, str], Row], strict: bool = True
) -> Iterator[Row]:
    """Rows in order, with progress on stderr. ``strict``: a compile that fails ends it, and says which."""
    start, count = time.monotonic(), sum((row.job, row.source) not in known for row, _ in todo)
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {row.job: pool.submit(work, job) for row, job in todo if (row.job, row.source) not in known}
        done = 0
        for row, _ in todo:
            if row.job not in futures:
                before = known[row.job, row.source]
                yield dataclasses.replace(row, **{name: getattr(before, name) for name in FIGURES})
                continue
            try:
                found = futures[row.job].result()
            except Exception as error:
                what = f"{row.kernel} {row.arch} {row.dtype} D={row.d} {label(row.tile)} {row.flags}: {error!r:.300}"
                if strict or isinstance(error, concurrent.futures.BrokenExecutor):
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise SystemExit(what) from error
                print(what, file=sys.stderr)
                continue
            finally:
                done += 1
            left = (time.monotonic() - start) / done * (count - done)
            print(f"\r{done}/{count} compiles, {left / 60:.1f} min left ", end="", file=sys.stderr, flush=True)
            yield filled(row, found)
    print(file=sys.stderr)


def again(jobs: set[str], processes: int) -> list[Row]:
    """Rows of the committed table, compiled from what is launched now."""
    places = sorted({(row.arch, row.width) for row in read()[1] if row.job in jobs})
    todo = [case for place in places for case in cases(place[:1], place[1:]) if case[0].job in jobs]
    if missing := jobs - {row.job for row, _ in todo}:
        raise SystemExit(f"nothing that is launched today is compiled as {sorted(missing)}: the table is stale")
    return list(compiled(todo, processes, {}))


def violations(row: Row) -> list[str]:
    """What is wrong with a compile; nothing, for all that ships."""
    wrong = []
    if row.spill_bytes:
        wrong.append(f"{row.spill_bytes} bytes of registers spilled")
    if row.shared_bytes > row.shared_limit:
        wrong.append(f"{row.shared_bytes} bytes of shared memory, limit {row.shared_limit}")
    if row.tensor_memory > 512:
        wrong.append(f"{row.tensor_memory} columns of tensor memory, limit 512")
    if row.blocks_per_processor < 1:
        wrong.append("does not fit a multiprocessor")
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


def fingerprint() -> str:
    """Of the sources, comments and blank lines aside, and of Triton: a table with another one is stale."""
    digest = hashlib.sha256(triton.__version__.encode())
    house = ROOT / "kernels/cross_attention"
    kernels = sorted(path for path in (house / "triton").glob("*.py") if path.name != "tune.py")
    here = [Path(__file__).with_name(f"{name}.py") for name in ("ahead_of_time", "attention_launches")]
    for path in [house / "request.py", *kernels, *here]:
        lines = path.read_text().splitlines()
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
        digest.update("\n".join(line.rstrip() for line in lines if line.strip()).encode())
    return digest.hexdigest()[:16]


def order(row: Row) -> tuple[Any, ...]:
    place = [*PROCESSORS].index(row.arch), configs.KERNELS.index(row.kernel), [*DTYPES].index(row.dtype)
    return *place, row.width, dataclasses.astuple(row.tile), [*VARIANTS].index(row.variant), row.d, row.flags, row.job


COLUMNS = {field.name: field.type for field in dataclasses.fields(Row)}


def write(rows: Sequence[Row]) -> None:
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        file.write(f"# made by benchmarks/prove_attention.py from {fingerprint()} with Triton {triton.__version__}\n")
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in rows)
    SUMMARY.write_text(summary(rows))
    PARTIAL.unlink(missing_ok=True)


def read() -> tuple[str, list[Row]]:
    """The fingerprint that the committed table was made from, and its rows."""
    with TABLE.open(newline="") as file:
        made_from = file.readline().split(" from ")[1].split()[0]
        return made_from, [parsed(line) for line in csv.DictReader(file)]


def parsed(line: Mapping[str, str]) -> Row:
    kinds: dict[str, Any] = {"int": int, "str": str, "bool": "True".__eq__}
    return Row(**{name: kinds[str(kind)](line[name]) for name, kind in COLUMNS.items()})


def known() -> dict[tuple[str, str], Row]:
    """What earlier runs found, by what it depends on. A table with other columns is of no use."""
    rows: list[Row] = []
    for path in (TABLE, PARTIAL):
        if path.exists():
            lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
            reader = csv.DictReader(lines, None if path == TABLE else list(COLUMNS))
            rows += [parsed(line) for line in reader if set(line) == set(COLUMNS) and None not in line.values()]
    return {(row.job, row.source): row for row in rows}


def summary(rows: Sequence[Row]) -> str:
    """The table for people: the worst of each tile's compiles."""
    made = f"Triton {triton.__version__}, {len(rows)} compiles; every figure is in [cross_attention.csv]({TABLE.name})."
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
    for row in compiled(list(todo.values()), processes, {}, strict=False):
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
    parse.add_argument("--processes", type=int, default=2)
    parse.add_argument("--fresh", action="store_true", help="compile what did not change, too")
    parse.add_argument(
        "--kernel", action="append", default=[], help="compile these alone; prints, and leaves the table"
    )
    parse.add_argument("--arch", action="append", default=[], choices=[*PROCESSORS])
    parse.add_argument("--width", action="append", default=[], type=int, choices=WIDTHS)
    parse.add_argument("--search", metavar="KERNEL", help="rank other tiles for one kernel")
    parse.add_argument("--dtype", default="bfloat16", choices=[*DTYPES], help="with --search")
    parse.add_argument("--variant", nargs="+", default=["dropout"], choices=[*VARIANTS], help="with --search")
    parse.add_argument("--tiles", help='with --search, such as "32x64 64x64T,w8,s1"')
    parse.add_argument("--again", metavar="JOB", nargs="+", help="compile these rows of the table, and print JSON")
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
        print(json.dumps([dataclasses.asdict(row) for row in again(set(options.again), options.processes)]))
        return 0
    partial = bool(options.kernel or options.arch or options.width)
    rows = []
    TABLE.parent.mkdir(exist_ok=True)
    before = {} if options.fresh else known()
    with PARTIAL.open("a", newline="") as file:
        for row in compiled(cases(archs, widths, options.kernel), options.processes, before):
            rows.append(row)
            if (row.job, row.source) not in before:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(dataclasses.asdict(row))
                file.flush()
            if wrong := violations(row):
                print(
                    f"\r{row.kernel} {row.arch} {row.dtype} D={row.d} {label(row.tile)} {row.flags}: {'; '.join(wrong)}"
                )
    rows.sort(key=order)
    if partial:
        print(summary(rows))
    else:
        write(rows)
        print(f"{TABLE.relative_to(ROOT)}: {len(rows)} compiles")
    bad = sum(bool(violations(row)) for row in rows)
    if bad:
        print(f"{bad} of {len(rows)} compiles break a rule", file=sys.stderr)
    return 1 if bad else 0


def tile_of(text: str) -> configs.Config:
    """``64x32T,w8,s1``."""
    head, *rest = text.split(",")
    block_s, block_p = map(int, head.rstrip("T").split("x"))
    numbers = {part[0]: int(part[1:]) for part in rest}
    return configs.Config(block_s, block_p, numbers.get("w", 4), numbers.get("s", 2), head.endswith("T"))


if __name__ == "__main__":
    sys.exit(main())
