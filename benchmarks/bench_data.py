"""What decoding and augmenting cost, and how long a step waits for its data.

    python benchmarks/bench_data.py [--images 300] [--rounds 5] [--workers 1 2] [--json result.json]

Photographs of 500 x 375 pixels are made of the embedded drawings, enlarged, with blurred colours and noise over them,
so that a JPEG of them has as many bytes, and costs as much to decode, as one of a camera. They are read as
``recipes/albef.yaml`` reads them, to 256 pixels, in one layout after the other within a round; batches are of 32, and
PyTorch has one thread. Told are medians over the rounds and the quartiles. "CPU ms" is the processor's time for an
image, which other programs on the machine hardly change; what is said of cores follows from it.

"waits": a step in which the host has nothing to do for ``--step`` milliseconds, as beside a GPU, takes its batch from
the prefetcher that a run has. "lock": how fast Python code runs in one thread while others decode, against alone: on an
otherwise idle core the rest is what the interpreter's lock costs it.
"""

from __future__ import annotations

import argparse
import io
import json
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
AHEAD = (0, 1, 2)
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


def waits(data: PairData, workers: int, step: float, rounds: int, steps: int = 12) -> list[dict[str, Any]]:
    """Milliseconds that a step waits for its batch, by steps ahead; the first step, which always waits, left out."""
    sampler, waited = StepSampler(data.train_size, BATCH, 1, 0), {ahead: list[float]() for ahead in AHEAD}
    whole: dict[int, list[float]] = {ahead: [] for ahead in AHEAD}
    for _ in range(rounds):
        for ahead in AHEAD:
            batches = Prefetcher(data.train_batch, ahead, workers, torch.device("cpu"))
            for at in range(steps):
                begun = time.perf_counter()
                coming = [(sampler.ahead(later, 0), sampler.epoch(later)) for later in range(at, at + ahead + 1)]
                batches.prepare([(indices, epoch) for indices, epoch in coming if indices is not None])
                batches.take(sampler.indices(at, 0), sampler.epoch(at))
                taken = time.perf_counter()
                time.sleep(step)
                if at:
                    waited[ahead].append((taken - begun) * 1e3)
                    whole[ahead].append((time.perf_counter() - begun) * 1e3)
            batches.close()
            sampler = StepSampler(data.train_size, BATCH, 1, 0)
    print(f"\nwaits, {workers} workers, steps of {step * 1e3:.0f} ms")
    print(f"{'ahead':>6}{'median ms':>11}{'quartiles':>16}{'step ms':>10}")
    rows = []
    for ahead, values in waited.items():
        low, middle, high = quartiles(values)
        length = statistics.median(whole[ahead])
        print(f"{ahead:>6}{middle:>11.1f}{f'{low:.1f} .. {high:.1f}':>16}{length:>10.1f}")
        rows.append({"ahead": ahead, "waits_ms": [low, middle, high], "step_ms": length})
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
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--step", type=float, default=150.0, help="milliseconds of a step in which the host is idle")
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
        results["waits"] = waits(data, most, arguments.step / 1e3, arguments.rounds)
        results["lock"] = lock(opened(layouts["files"], 1, 2), arguments.rounds)
        print(f"\nlock: Python code keeps {results['lock']:.0%} of its speed beside a thread that decodes")
    results["cores"] = cores(1e3 / results["rates"][0]["cpu_ms"])
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.line(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
