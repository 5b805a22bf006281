"""The scaling model beside what ranks on this machine really hold and send, and how fast they are.

    python benchmarks/bench_scaling.py [--recipe albef-emoji] [--ranks 1 2] [--stages 0 1 2 3] [--steps 4] [--json F]

Trains a recipe for a few steps on CPU ranks under each ZeRO stage. Held: each tensor that the run's Python objects have
between two steps, by storage, less what was there before. Sent: what collectives are given in one step, as PyTorch's
dispatcher sees them below torch.distributed, all-gathers and reduce-scatters by their longer side. Both stand beside
what ``crossmask plan`` counts with, for the vocabulary and the caption length that the data turn out to have. Peak
memory of a process (RSS) and samples/s are told as measured: they are of this CPU, of which the model says nothing.

Runs a batch of 64 unless --batch says otherwise; DeepSpeed's bucket is made as long as the model, as its default, a
gigabyte, would be most of what stage 3 holds. About 4 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crossmask.engine.training.distributed import free_port

BUCKET = 2_000_000  # elements
console = Console(width=110)


def overrides(options: argparse.Namespace, stage: int) -> list[str]:
    return [
        f"training.batch_size={options.batch}",
        f"training.precision={options.precision}",
        "objectives.fusion_start=0",
        "objectives.fusion_rows=null",
        f"deepspeed={{zero_optimization: {{stage: {stage}, reduce_bucket_size: {BUCKET}}}}}",
    ]


def one_rank(options: argparse.Namespace) -> None:
    """Inside a rank: train, measure, and write both measurement and expectation."""
    import torch
    from albef_step.memory import resident

    from crossmask.engine.data import load_data
    from crossmask.engine.planning.assumed import Assumed
    from crossmask.engine.planning.expected import expected
    from crossmask.engine.planning.measured import live_storages, measure
    from crossmask.engine.recipe_files import load_recipe
    from crossmask.engine.training.distributed import init_distributed, leave
    from crossmask.engine.training.pretrainer import Pretrainer

    (stage,) = options.stages
    imports = resident(peak=False)
    rank, ranks, device = init_distributed()
    recipe = load_recipe(options.recipe, overrides(options, stage))
    data = load_data(recipe)
    before = live_storages()
    pretrainer = Pretrainer(recipe, data, rank, ranks, device)
    gpu = device.type == "cuda"
    pretrainer.step()
    seconds: list[float] = []
    for _ in range(options.steps):
        started = time.perf_counter()
        pretrainer.step()
        if gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    found: dict[str, Any] = {
        "seconds": seconds,
        "samples_per_s": options.batch * len(seconds) / sum(seconds),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        # of the GPU's memory, or of the process beyond what its imports take
        "peak": torch.cuda.max_memory_allocated(device) if gpu else resident(peak=True) - imports,
    }
    if not options.speed:
        classes = None if data.classes is None else data.classes.classes
        assumed = Assumed(data.tokenizer.vocabulary_size, data.max_tokens, classes)
        found["measured"] = measure(pretrainer, before, warm_up=1)
        found["expected"] = expected(recipe, assumed, ranks)
    found["torch"] = torch.__version__
    Path(f"{options.output}.{rank}.json").write_text(json.dumps(found))
    leave(0, together=True)


class RankFailed(Exception):
    """A rank that did not come to its end; its last line."""


def start(options: argparse.Namespace, ranks: int, stage: int, limit: float = 600.0) -> dict[str, Any]:
    """Rank 0's findings; the others hold and send as much.

    Raises:
        RankFailed: a rank ended otherwise than it should, or not within ``limit`` seconds. None is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "found")
        logs = [Path(f"{output}.{rank}.log") for rank in range(ranks)]
        command = [sys.executable, __file__, "--output", str(output), "--stages", str(stage)]
        for name in ("recipe", "batch", "steps", "precision"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--speed"] if options.speed else []
        processes: list[subprocess.Popen[bytes]] = []
        port = options.port or free_port()
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as out:
                    of_rank = environment(options.device, rank, ranks, port)
                    process = subprocess.Popen(command, env=of_rank, stdout=out, stderr=subprocess.STDOUT)
                processes.append(process)
            wait(processes, logs, limit)
        except RankFailed as error:
            raise RankFailed(f"{ranks} ranks at ZeRO stage {stage}: {error}") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found: dict[str, Any] = json.loads(Path(f"{output}.0.json").read_text())
        return found


def environment(device: str, rank: int, ranks: int, port: int) -> dict[str, str]:
    of_rank = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return os.environ | of_rank | (on_cpu if device == "cpu" else {})


def wait(processes: list[subprocess.Popen[bytes]], logs: list[Path], limit: float) -> None:
    """Until all have ended well; not for those who wait for one that has not."""
    end = time.monotonic() + limit
    while any(process.poll() is None for process in processes) or any(process.returncode for process in processes):
        for rank, process in enumerate(processes):
            if process.poll():
                lines = [line.strip() for line in logs[rank].read_text(errors="replace").splitlines() if line.strip()]
                raise RankFailed(f"rank {rank} ended with {process.returncode}: {lines[-1][:200] if lines else ''}")
        if time.monotonic() > end:
            raise RankFailed(f"no end within {limit:.0f} s")
        time.sleep(0.05)


def show(results: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("ranks", "ZeRO", "", "predicted", "measured", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for one in results:
        expected, measured = one["expected"], one["measured"]
        rows = [(f"held: {name}", expected["held"][name], measured["held"][name]) for name in measured["held"]]
        rows.append(("held in all", sum(expected["held"].values()), sum(measured["held"].values())))
        kinds = sorted({*expected["sent"], *measured["sent"]})
        rows += [(f"sent: {kind}", expected["sent"].get(kind, 0), measured["sent"].get(kind, 0)) for kind in kinds]
        for name, prediction, measurement in rows:
            ratio = f"{prediction / measurement:.4f}" if measurement else "-" if not prediction else "nothing measured"
            table.add_row(str(one["ranks"]), str(one["stage"]), name, f"{prediction:,}", f"{measurement:,}", ratio)
        table.add_section()
    console.print(table)
    speeds = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("ranks", "ZeRO", "samples/s", "peak RSS a rank, MB"):
        speeds.add_column(name, justify="right")
    for one in results:
        speeds.add_row(
            str(one["ranks"]), str(one["stage"]), f"{one['samples_per_s']:.0f}", f"{one['peak_rss'] / 1e6:,.0f}"
        )
    console.print("\nmeasured on this CPU, in order, each once:")
    console.print(speeds)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="albef-emoji")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: a GPU for each rank")
    parser.add_argument("--port", type=int, help="of rank 0; default a free one")
    parser.add_argument("--speed", action="store_true", help=argparse.SUPPRESS)  # of the suite: nothing else is told
    parser.add_argument("--json", type=Path)
    parser.add_argument("--output", help=argparse.SUPPRESS)  # of a rank
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    if options.output:
        one_rank(options)
        return
    results = []
    for ranks in options.ranks:
        for stage in options.stages:
            try:
                results.append({"ranks": ranks, "stage": stage, **start(options, ranks, stage)})
            except RankFailed as error:
                raise SystemExit(str(error)) from None
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    console.print(f"{options.recipe}, batch {options.batch} in all, {options.precision}; bytes on rank 0\n")
    show(results)


if __name__ == "__main__":
    main()
