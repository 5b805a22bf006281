"""What every op has to move and to compute at the shapes that matter, and how fast GPUs can at best do that.

    python benchmarks/prove_roofline.py           # writes benchmarks/static/roofline.{csv,md}, docs/images/roofline.png
    python benchmarks/prove_roofline.py --check   # writes nothing; 1 where the table is not what the formulas give

Predicted, and measured by nobody: bytes and FLOPs are those of kernels/roofline, which benchmarks/traffic.py holds
against what the kernels load and store in Triton's interpreter; the GPUs' rates are those of their data sheets.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossmask.kernels.roofline import DEVICES, Device, Work, ema_update
from crossmask.kernels.roofline.attention import ALL, forward_op
from crossmask.kernels.roofline.attention_backward import backward_op
from crossmask.kernels.roofline.contrastive import backward_op as contrastive_backward
from crossmask.kernels.roofline.contrastive import forward_op as contrastive_forward
from crossmask.kernels.roofline.cross_entropy import backward_op as entropy_backward
from crossmask.kernels.roofline.cross_entropy import forward_op as entropy_forward
from crossmask.kernels.roofline.launches import Op
from crossmask.kernels.roofline.selection import similarity_op, topk_op

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks/static/roofline.csv"
PICTURE = ROOT / "docs/images/roofline.png"
MEASURED = ROOT / "benchmarks/results/cuda.json"  # once somebody ran `make bench-gpu`
SHAPES = {  # queries x keys; B=64, H=12, D=64, bf16
    "ALBEF 30x257": (30, 257),
    "ALBEF 30x577": (30, 577),
    "ALBEF 577x30": (577, 30),
    "CoCa 77x257": (77, 257),
    "long 256x4096": (256, 4096),
}
BATCH, HEADS, WIDTH = 64, 12, 64
GRADIENTS = ("lse", "max_probability", "entropy", "key_attention", "query_attention")
DRAWN = ("h100", "a100-80gb", "mi300x", "rtx-4090")


@dataclasses.dataclass(frozen=True)
class Row:
    """An op, a shape and a GPU. Bytes and FLOPs are exact but for ``vector``; times are predicted."""

    op: str
    shape: str
    statistics: str  # "", or "all"
    gpu: str
    read_bytes: int
    written_bytes: int
    kept_bytes: int  # that a cache could save
    requested_bytes: int  # that loads ask the caches for
    matrix_flops: int
    issued_flops: int  # with what pads the tiles
    vector_flops: int  # an estimate
    flops_per_byte: float
    bound: str
    predicted_at_least_us: float
    predicted_launch_by_launch_us: float
    statistics_add_percent: str  # to predicted_at_least_us
    statistics_add_launch_by_launch_percent: str


def ops(gpu: Device) -> Iterator[tuple[str, str, str, Op | Work]]:
    """Op, shape, statistics, and what it does on that GPU, whose tiles and processors decide the partial sums."""
    arch, processors = gpu.architecture, gpu.multiprocessors
    for shape, (queries, keys) in SHAPES.items():
        size = (BATCH, HEADS, queries, keys, WIDTH, "bf16")
        for statistics in ((), ALL):
            name = "all" if statistics else ""
            yield "cross_attention forward", shape, name, forward_op(*size, statistics, arch)
            through = GRADIENTS if statistics else ()
            yield "cross_attention backward", shape, name, backward_op(*size, through, arch, processors)
    selection = topk_op(BATCH, 256, partials=HEADS, valid=True, width=77, architecture=arch)
    yield "topk_mask", f"{BATCH}x256, means over {HEADS} heads", "", selection
    for name, backward in (("forward", False), ("backward", True)):
        found = similarity_op(BATCH, 256, 30, 256, "bf16", backward, architecture=arch)
        yield f"max_similarity {name}", f"{BATCH}x256x30, D=256", "", found
    losses = (64, 64, 65536, 256, "bf16", None, True, arch, processors)
    yield "soft_contrastive forward", "64 x (64 + 65536), E=256", "", contrastive_forward(*losses)
    yield "soft_contrastive backward", "64 x (64 + 65536), E=256", "", contrastive_backward(*losses)
    words = (288, 30522, 768, "bf16", True, True, arch)
    yield "soft_cross_entropy forward", "288 x 30522, D=768", "", entropy_forward(*words)
    yield "soft_cross_entropy backward", "288 x 30522, D=768", "", entropy_backward(*words)
    if gpu.architecture.startswith("sm_"):  # the kernel is CUDA
        yield "ema_update", "210 M parameters, fp32", "", ema_update(210_000_000)


def rows() -> list[Row]:
    found = []
    for gpu in DEVICES.values():
        plain: dict[tuple[str, str], tuple[float, float]] = {}
        for name, shape, statistics, done in ops(gpu):
            work = done.work() if isinstance(done, Op) else done
            times = work.lower_bound(gpu), (done if isinstance(done, Op) else work).seconds(gpu)
            before = plain.setdefault((name, shape), times)
            added = [
                f"{100 * (now / was - 1):.1f}" if statistics else "" for now, was in zip(times, before, strict=True)
            ]
            found.append(
                Row(
                    name,
                    shape,
                    statistics,
                    gpu.name,
                    round(work.read),
                    round(work.written),
                    round(work.kept),
                    round(work.requested),
                    round(sum(work.flops.values())),
                    done.issued if isinstance(done, Op) else 0,
                    round(work.vector),
                    round(work.intensity, 2),
                    work.bound(gpu),
                    *(round(1e6 * time, 2) for time in times),
                    *added,
                )
            )
    return found


def text(found: Sequence[Row]) -> str:
    """The CSV file."""
    file = io.StringIO()
    file.write("# predicted by benchmarks/prove_roofline.py from data sheets; measured by nobody\n")
    table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    table.writeheader()
    table.writerows(dataclasses.asdict(row) for row in found)
    return file.getvalue()


def summary(found: Sequence[Row], measured: bool | None = None) -> str:
    """The tables for people: one GPU whole, and the times of all. ``measured``: whether there is a record of a GPU."""
    lines = [
        "# What the ops have to do, and how fast GPUs can at best do it",
        "",
        "`python benchmarks/prove_roofline.py` wrote this without a GPU. **Every time is predicted; nobody measured",
        "one.** `at least` is a lower bound: bytes that no cache can save by the memory's bandwidth, or FLOPs by the",
        "rate of the units that do them, whichever takes longer, at the rates of the data sheets. `launch by launch`",
        "takes each launch's bytes from memory anew, and leaves matrix and other arithmetic to take turns. Neither has",
        "the cost of a launch. Attention has B=64, H=12, D=64, bfloat16; what statistics add is said of both times.",
        "Every figure is in [roofline.csv](roofline.csv); how they are counted, and what of it is checked, in",
        "[docs/roofline.md](../../docs/roofline.md).",
        "",
        "## NVIDIA H100 SXM",
        "",
        "| op | shape | statistics | MB read | MB written | GFLOP | padding | FLOP/byte | bound | at least, µs "
        "| launch by launch, µs | statistics add |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.gpu == "h100":
            padded = f"{row.issued_flops / row.matrix_flops - 1:.0%}" if row.issued_flops and row.matrix_flops else ""
            added = f"{row.statistics_add_percent} %, {row.statistics_add_launch_by_launch_percent} %"
            added *= bool(row.statistics)
            lines.append(
                f"| {row.op} | {row.shape} | {row.statistics} | {row.read_bytes / 1e6:.2f} "
                f"| {row.written_bytes / 1e6:.2f} | {row.matrix_flops / 1e9:.2f} | {padded} | {row.flops_per_byte:.1f} "
                f"| {row.bound} | {row.predicted_at_least_us:.1f} | {row.predicted_launch_by_launch_us:.1f} | {added} |"
            )
    lines += ["", "## At least, µs (predicted)", "", f"| op | shape | statistics | {' | '.join(DEVICES)} |"]
    lines.append("|---|---|---|" + "---|" * len(DEVICES))
    times: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in found:
        key = row.op, row.shape, row.statistics
        times.setdefault(key, {})[row.gpu] = f"{row.predicted_at_least_us:.1f}"
    for key, by_gpu in times.items():
        lines.append("| " + " | ".join([*key, *(by_gpu.get(name, "") for name in DEVICES)]) + " |")
    told = "\n".join(lines) + "\n"
    if MEASURED.exists() if measured is None else measured:
        page = "[docs/performance.md](../../docs/performance.md)"
        told = told.replace("; nobody measured\none.**", f".**\nMeasured ones: {page}.")
    return told


def draw(found: Sequence[Row], path: Path) -> None:
    """The rooflines of four GPUs with the ops of the first on it, and what the statistics add to its times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (roofs, bars) = pyplot.subplots(1, 2, figsize=(13, 5.2), width_ratios=(1.25, 1))
    for number, name in enumerate(DRAWN):
        gpu = DEVICES[name]
        intensities = [0.2, gpu.matrix["bf16"] / gpu.bandwidth, 2000]
        roof = [min(gpu.bandwidth * x, gpu.matrix["bf16"]) / 1e12 for x in intensities]
        roofs.plot(intensities, roof, color=f"C{number}", label=gpu.title, linewidth=2.2 if number == 0 else 1.2)
    first = DEVICES[DRAWN[0]]
    own = [row for row in found if row.gpu == first.name]
    shown = dict.fromkeys(row.op for row in own)
    markers = dict(zip(shown, "o^sDdPXvp*<>", strict=False))
    for name in shown:
        points = [row for row in own if row.op == name]
        flops = [row.matrix_flops + row.vector_flops for row in points]
        needed = [row.read_bytes + row.written_bytes - row.kept_bytes for row in points]
        x = [a / b for a, b in zip(flops, needed, strict=True)]
        y = [a / row.predicted_launch_by_launch_us / 1e6 for a, row in zip(flops, points, strict=True)]
        roofs.scatter(x, y, marker=markers[name], s=34, color="black", facecolors="none", label=name, zorder=3)
    roofs.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP a byte that no cache can save",
        ylabel="TFLOP/s: roofs, and ops launch by launch",
    )
    roofs.set_title(f"Predicted, not measured: the ops under the roof of an {first.title}")
    roofs.grid(alpha=0.3)
    roofs.legend(fontsize=7)
    labels = [f"{shape}\n{way}" for shape in SHAPES for way in ("forward", "backward")]
    for offset, statistics, colour in ((-0.2, "", "C0"), (0.2, "all", "C1")):
        picked = [
            next(
                row
                for row in own
                if (row.op, row.shape, row.statistics) == (f"cross_attention {way}", shape, statistics)
            )
            for shape in SHAPES
            for way in ("forward", "backward")
        ]
        heights = [row.predicted_at_least_us for row in picked]
        places = [place + offset for place in range(len(picked))]
        bars.barh(places, heights, 0.38, color=colour, label="all statistics" if statistics else "output alone")
        bars.scatter([row.predicted_launch_by_launch_us for row in picked], places, marker="|", s=60, color="black")
        for place, row in zip(places, picked, strict=True):
            both = row.predicted_at_least_us, row.predicted_launch_by_launch_us
            bars.text(1.05 * both[1], place, f"{both[0]:.0f} | {both[1]:.0f}", va="center", fontsize=7)
    bars.set_yticks(range(len(labels)), labels, fontsize=7)
    bars.invert_yaxis()
    bars.set(xscale="log", xlabel="µs, predicted: at least (bar), launch by launch (line)")
    bars.set_title("Cross-attention, B=64, H=12, D=64, bfloat16")
    bars.margins(x=0.15)
    bars.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--check", action="store_true", help="write nothing; 1 where the table is stale")
    options, _ = parse.parse_known_args()  # make hands the same ARGS to all of the sheet's scripts
    found = rows()
    if options.check:
        stale = not TABLE.exists() or TABLE.read_text() != text(found)
        print(
            f"benchmarks/static/{TABLE.name} is {'stale: run python benchmarks/prove_roofline.py' * stale or 'right'}"
        )
        return int(stale)
    TABLE.write_text(text(found))
    TABLE.with_suffix(".md").write_text(summary(found))
    draw(found, PICTURE)
    print(f"benchmarks/static/{TABLE.name}: {len(found)} predictions, none of them measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
