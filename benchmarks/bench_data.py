"""What decoding and augmenting cost, and how long a step waits for its data.

    python benchmarks/bench_data.py [--images 320] [--rounds 5] [--workers 1 2] [--step 150] [--computed 250]
                                    [--json result.json]

Photographs of 500 x 375 pixels are made of the embedded drawings, enlarged, with blurred colours and noise over them,
so that a JPEG of them has as many bytes, and costs as much to decode, as one of a camera. They are read as
``recipes/albef.yaml`` reads them, to 256 pixels, in one layout after the other within a round; batches are of 32, and
PyTorch has one thread. Told are medians over the rounds and the quartiles. "CPU ms" is the processor's time for an
image, which other programs on the machine hardly change; what is said of cores follows from it.

"processes": the same batches of the same files, made in the worker processes of torch's own DataLoader in place of
threads, and the memory that each of them has for itself. They are started by a fork server, as a process that has
threads must not fork; each imports what it needs.

"waits": a step takes its batch from the prefetcher that a run has. Once the step leaves the host idle for ``--step``
milliseconds, as if a GPU had all to do; and once it is computed: transformer layers trained forward and backward by
one thread for ``--computed`` milliseconds, thousands of operations that Python starts one by one, as it starts a GPU's.
"held" is that same step with its batch in memory already, and "step ms" beside it what sharing the machine with the
decoders costs. "lock": how fast Python code runs in one thread while others decode, against alone: on an otherwise idle
core the rest is what the interpreter's lock costs it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from suite import machine

from crossmask.engine.data import PairData, StepSampler, load_data
from crossmask.engine.data.emoji import load_art
from crossmask.engine.data.prefetch import Prefetcher
from crossmask.engine.planning.command import load_unopened
from crossmask.engine.planning.estimate import plan
from crossmask.engine.planning.tally import Rates
from crossmask.engine.recipe_files import load_recipe
from crossmask.kernels.roofline import DEVICES

SIZE, BATCH, QUALITY, SHARDS = (500, 375), 32, 90, 3
AHEAD, STEPS = (0, 1, 2), 12
SMAPS = Path("/proc/self/smaps_rollup")  # where it is missing, nothing is said of processes' own memory
GPUS = 8  # of recipes/albef.yaml


def photographs(count: int) -> Iterator[bytes]:
    """JPEGs of drawings under blurred colours and noise."""
    art, random = load_art(48).rgba, np.random.default_rng(0)
    for _ in range(count):
        drawing = art[int(random.integers(len(art)))].permute(1, 2, 0).numpy().astype(int)
        paper = (drawing[..., :3] + 255 - drawing[..., 3:]).clip(0, 255).astype(np.uint8)
        blurred = random.integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)
        large = [np.asarray(Image.fromarray(x).resize(SIZE, Image.Resampling.BICUBIC), float) for x in (paper, blurred)]
        pixels = 0.6 * large[0] + 0.4 * large[1] + random.normal(0, 9, large[0].shape)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def write(root: Path, count: int) -> tuple[dict[str, Path], float]:
    """The same pairs in several layouts, and the mean number of bytes of an image."""
    pairs, folder, shards = root / "files", root / "folder", root / "shards"
    for place in (pairs, folder, shards):
        place.mkdir()
    rows, sizes = list[str](), list[int]()
    with ExitStack() as stack:
        archives = [stack.enter_context(tarfile.open(shards / f"{number:05d}.tar", "w")) for number in range(SHARDS)]
        fill(archives, pairs, folder, count, rows, sizes)
    (pairs / "pairs.jsonl").write_text("\n".join(rows))
    return {"files": pairs / "pairs.jsonl", "folder": folder, "tar": shards}, statistics.mean(sizes)


def fill(
    archives: list[tarfile.TarFile], pairs: Path, folder: Path, count: int, rows: list[str], sizes: list[int]
) -> None:
    for number, jpeg in enumerate(photographs(count)):
        caption = f"a drawn thing under colours and noise number {number}"
        sizes.append(len(jpeg))
        (pairs / f"{number}.jpg").write_bytes(jpeg)
        rows.append(json.dumps({"image": f"{number}.jpg", "caption": caption}))
        (folder / f"{number}.jpg").write_bytes(jpeg)
        (folder / f"{number}.txt").write_text(caption)
        for ending, contents in (("jpg", jpeg), ("txt", caption.encode())):
            member = tarfile.TarInfo(f"{number:06d}.{ending}")
            member.size = len(contents)
            archives[number * SHARDS // count].addfile(member, io.BytesIO(contents))


def opened(path: Path, workers: int, operations: int) -> PairData:
    values = {
        "data.path": path,
        "data.vocabulary_size": 256,
        "data.validation_fraction": 0.0,
        "data.workers": workers,
        "data.rand_augment.operations": operations,
    }
    return load_data(load_recipe("albef", [f"{name}={value}" for name, value in values.items()]))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def rates(layouts: dict[str, Path], workers: list[int], rounds: int) -> list[dict[str, Any]]:
    """Images a second, everything once untimed and then once in every round."""
    cases = [(name, count, operations) for name in layouts for operations in (2, 0) for count in workers]
    data = {case: opened(layouts[case[0]], *case[1:]) for case in cases}
    seconds: dict[tuple[str, int, int], list[float]] = {case: [] for case in cases}
    busy: dict[tuple[str, int, int], list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case, source in data.items():
            start, before = time.perf_counter(), time.process_time()
            for begin in range(0, source.train_size - BATCH + 1, BATCH):
                source.train_batch(np.arange(begin, begin + BATCH), number)
            if number:
                seconds[case].append(time.perf_counter() - start)
                busy[case].append(time.process_time() - before)
    print(f"\n{'images/s':<10}{'RandAugment':>12}{'workers':>9}{'median':>9}{'quartiles':>16}{'CPU ms an image':>17}")
    rows = []
    for (name, count, operations), times in seconds.items():
        images = data[name, count, operations].train_size // BATCH * BATCH
        low, middle, high = quartiles([images / one for one in times])
        on, spread = "on" if operations else "off", f"{low:.0f} .. {high:.0f}"
        cpu = statistics.median(busy[name, count, operations]) / images * 1e3
        print(f"{name:<10}{on:>12}{count:>9}{middle:>9.0f}{spread:>16}{cpu:>17.2f}")
        case = {"layout": name, "operations": operations, "workers": count}
        rows.append({**case, "images_per_s": [low, middle, high], "cpu_ms": cpu})
    return rows


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    """What DataLoader's processes make: each opens the data for itself and makes whole batches in one thread."""

    def __init__(self, path: Path, operations: int) -> None:
        self.path, self.operations = path, operations
        self.data: PairData | None = None

    def __getitem__(self, wanted: tuple[int, int]) -> torch.Tensor:
        if self.data is None:
            torch.set_num_threads(1)
            self.data = opened(self.path, 1, self.operations)
        begin, epoch = wanted
        return self.data.train_batch(np.arange(begin, begin + BATCH), epoch).images


def processes(path: Path, count: int, workers: list[int], rounds: int) -> list[dict[str, Any]]:
    """Images a second from DataLoader's processes and from our threads, in turn, RandAugment on."""
    wanted: list[Any] = [[] for _ in workers]  # first rows and epochs, read by the loaders when a round begins
    loaders = [
        torch.utils.data.DataLoader(
            Batches(path, 2),
            batch_size=None,
            sampler=orders,
            num_workers=number,
            multiprocessing_context="forkserver",
            persistent_workers=True,
        )
        for number, orders in zip(workers, wanted, strict=True)
    ]
    threads = [opened(path, number, 2) for number in workers]
    begins = range(0, count - BATCH + 1, BATCH)
    found: dict[tuple[str, int], list[float]] = {(how, n): [] for how in ("threads", "processes") for n in workers}
    for number in range(rounds + 1):
        for at, each in enumerate(workers):
            wanted[at][:] = [(begin, number) for begin in begins]
            start = time.perf_counter()
            for _ in loaders[at]:
                pass
            between = time.perf_counter()
            for begin in begins:
                threads[at].train_batch(np.arange(begin, begin + BATCH), number)
            if number:
                found["processes", each].append(between - start)
                found["threads", each].append(time.perf_counter() - between)
    own = [own_memory(child.pid) for child in multiprocessing.active_children() if child.pid and SMAPS.exists()]
    print(f"\n{'made in':<12}{'workers':>9}{'images/s':>10}{'quartiles':>16}")
    rows = []
    for (how, each), times in found.items():
        low, middle, high = quartiles([len(begins) * BATCH / one for one in times])
        print(f"{how:<12}{each:>9}{middle:>10.0f}{f'{low:.0f} .. {high:.0f}':>16}")
        rows.append({"how": how, "workers": each, "images_per_s": [low, middle, high]})
    if not own:
        return rows
    print(f"each process holds {statistics.median(own) / 1e6:.0f} MB that it shares with no other")
    return [*rows, {"how": "processes", "own_bytes": statistics.median(own)}]


def own_memory(process: int) -> int:
    """Bytes that no other process has in memory; Linux alone tells."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024


class Trained:
    """A step that one thread computes: transformer layers forward, backward and AdamW, until its time is over."""

    def __init__(self, seconds: float) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tokens = torch.randn(4, 64, 128)
        self.times = 1
        for _ in range(3):
            begun = time.perf_counter()
            self()
            once = (time.perf_counter() - begun) / self.times
        self.times = max(1, round(seconds / once))

    def __call__(self) -> None:
        for _ in range(self.times):
            self.model(self.tokens).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def waits(data: PairData, workers: int, step: Callable[[], object], rounds: int, title: str) -> list[dict[str, Any]]:
    """Milliseconds that a step waits for its batch, by steps ahead; the first step, which always waits, left out.

    ``None`` ahead is a batch held in memory: the step and nothing beside it.
    """
    sampler = StepSampler(data.train_size, BATCH, 1, 0)
    ways: tuple[int | None, ...] = (None, *AHEAD)
    waited, whole = ({ahead: list[float]() for ahead in ways} for _ in range(2))
    for number in range(rounds * len(ways)):
        ahead = ways[number % len(ways)]
        batches = Prefetcher(data.train_batch, ahead or 0, workers, torch.device("cpu"))
        for at in range(STEPS):
            begun = time.perf_counter()
            if ahead is not None:
                coming = [(sampler.ahead(later, 0), sampler.epoch(later)) for later in range(at, at + ahead + 1)]
                batches.prepare([(indices, epoch) for indices, epoch in coming if indices is not None])
                batches.take(sampler.indices(at, 0), sampler.epoch(at))
            taken = time.perf_counter()
            step()
            if at:
                waited[ahead].append((taken - begun) * 1e3)
                whole[ahead].append((time.perf_counter() - begun) * 1e3)
        batches.close()
        sampler = StepSampler(data.train_size, BATCH, 1, 0)
    print(f"\nwaits, {workers} workers, {title}")
    print(f"{'ahead':>6}{'median ms':>11}{'quartiles':>16}{'step ms':>10}{'quartiles':>18}{'of held':>9}")
    rows, held = [], statistics.median(whole[None])
    for ahead in ways:
        (low, middle, high), (short, length, long) = quartiles(waited[ahead]), quartiles(whole[ahead])
        name = "held" if ahead is None else str(ahead)
        spreads = f"{low:.1f} .. {high:.1f}", f"{short:.1f} .. {long:.1f}"
        print(f"{name:>6}{middle:>11.1f}{spreads[0]:>16}{length:>10.1f}{spreads[1]:>18}{length / held:>9.2f}")
        rows.append({"ahead": name, "waits_ms": [low, middle, high], "step_ms": [short, length, long]})
    return rows


def lock(data: PairData, rounds: int) -> float:
    """Share of its own speed that Python code keeps while one thread decodes."""

    def speed() -> float:
        count, end = 0, time.perf_counter() + 0.5
        while time.perf_counter() < end:
            count += sum(range(100)) > 0
        return float(count)

    def beside(work: Callable[[], object]) -> float:
        done = threading.Event()

        def go_on() -> None:
            while not done.is_set():
                work()

        thread = threading.Thread(target=go_on)
        thread.start()
        found = speed()
        done.set()
        thread.join()
        return found

    shares = [beside(lambda: data.train_batch(np.arange(BATCH), 0)) / speed() for _ in range(rounds)]
    return statistics.median(shares)


def cores(images_per_s: float) -> dict[str, float]:
    """Predicted: what an H100 would take in, and the cores that make as much."""
    found = plan(load_unopened("albef", []), DEVICES["h100"], GPUS, Rates())
    stage = found.recommended
    assert stage is not None
    asked = found.pairs / stage.seconds
    print(
        f"\npredicted, not measured: crossmask plan has recipes/albef.yaml on {GPUS} H100 at {stage.seconds * 1e3:.0f}"
        f" ms a step,\n{asked:.0f} images/s on each; at {images_per_s:.0f} images/s a core of this machine that is"
        f" {asked / images_per_s:.1f} cores for each GPU"
    )
    return {"step_s": stage.seconds, "images_per_s_and_gpu": asked, "cores_per_gpu": asked / images_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--step", type=float, default=150.0, help="milliseconds of a step in which the host is idle")
    parser.add_argument("--computed", type=float, default=250.0, help="milliseconds of a step that one thread computes")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine.line(), flush=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        layouts, size = write(Path(folder), arguments.images)
        print(f"{arguments.images} JPEGs of {SIZE[0]} x {SIZE[1]} pixels, {size / 1e3:.0f} kB on average")
        results["rates"] = rates(layouts, arguments.workers, arguments.rounds)
        most = max(arguments.workers)
        data = opened(layouts["files"], most, 2)
        results["processes"] = processes(layouts["files"], arguments.images, arguments.workers, arguments.rounds)
        idle, computed = f"the host idle for {arguments.step:.0f} ms", f"computed for {arguments.computed:.0f} ms"
        results["waits"] = waits(data, most, lambda: time.sleep(arguments.step / 1e3), arguments.rounds, idle)
        one = opened(layouts["files"], 1, 2)
        results["beside"] = waits(one, 1, Trained(arguments.computed / 1e3), arguments.rounds, computed)
        results["lock"] = lock(one, arguments.rounds)
        print(f"\nlock: Python code keeps {results['lock']:.0%} of its speed beside a thread that decodes")
    results["cores"] = cores(1e3 / results["rates"][0]["cpu_ms"])
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.line(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
