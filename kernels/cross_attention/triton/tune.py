"""Times tiles on the GPU that is here, and writes the best to a table that goes before the one in ``configs.py``.

    python -m crossmask.kernels.cross_attention.triton.tune [--shape 30x577 ...] [--width 64] [--dtype bfloat16]

Every kernel is timed where it is used: a whole forward or backward through the host functions, with this kernel's tile
replaced: once plain, once with every statistic, once with masks and dropout too. Half an hour and more, most of it
compiling. The table holds for GPUs of exactly this name, and for lengths with the same next power of two as those
timed. It goes to ~/.cache/crossmask/, or where CROSSMASK_ATTENTION_CONFIGS or --output says; launches look in the first
two places.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.testing import do_bench

from ... import launch
from ..request import Forward, Gradients, Masks, Request
from . import configs, launch_backward, launch_forward, tuned
from .configs import Config

SHAPES = ((30, 257), (30, 577), (577, 30), (77, 257), (256, 4096))  # ALBEF's texts and images, CLIP's texts, long keys
Clock = Callable[[Callable[[], object]], float]  # milliseconds that a call takes
Tiles = dict[str, "Config | None"]

# A kernel that holds an axis in one block is weighed last, against the tuned kernels that would run in its place.
STEPS: dict[str, tuple[tuple[str, Tiles], ...]] = {
    "forward": (
        ("forward_online", {"forward_single": None}),
        ("column_lse", {"forward_single": None}),
        ("key_statistics", {"forward_single": None}),
        ("forward_single", {}),
    ),
    "backward": (
        ("backward_rows", {}),
        ("backward_columns", {"backward_fused": None}),
        ("backward_queries", {"backward_fused": None}),
        ("backward_keys", {"backward_fused": None}),
        ("backward_fused", {}),
    ),
}


def candidates(kernel: str, dtype: torch.dtype) -> Iterator[Config]:
    """Tiles worth trying; larger ones spill."""
    sizes = (16, 32, 64) if dtype == torch.float32 else (16, 32, 64, 128)
    keys = (*sizes, 256) if kernel == "forward_single" else sizes
    for block_s, block_p, warps, transposed in itertools.product(sizes, keys, (4, 8), (False, True)):
        most = 2048 if dtype == torch.float32 else 8192
        if block_s * block_p <= most and (warps == 4 or block_s * block_p >= 2048):
            yield Config(block_s, block_p, warps, 2, transposed)


class Call:
    """A forward and its backward at one shape: plain, with every statistic, and with masks and dropout too."""

    def __init__(
        self, queries: int, keys: int, width: int, dtype: torch.dtype, batch: int, heads: int, device: torch.device
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.queries, self.keys, self.width, self.dtype = queries, keys, width, dtype
        self.q = draw(batch, heads, queries, width)
        self.k, self.v = draw(batch, heads, keys, width), draw(batch, heads, keys, width)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        scale = width**-0.5
        everything = Request(scale, 0.0, False, True, True, True, True, True)
        lengths = (keys, queries, heads)
        masks = Masks(*(torch.ones(batch, length, dtype=torch.bool, device=device) for length in lengths))
        # the last needs the most registers and memory: a tile that it does not fit must not be chosen
        self.requests = (
            (Request(scale), Masks()),
            (everything, Masks()),
            (dataclasses.replace(everything, dropout_p=0.1), masks),
        )
        self.found = [self._forward(request, masks) for request, masks in self.requests]

    def _forward(self, request: Request, masks: Masks) -> Forward:
        return launch_forward.forward(self.q, self.k, self.v, masks, self.seed, request)

    def forward(self) -> None:
        for request, masks in self.requests:
            self._forward(request, masks)

    def backward(self) -> None:
        for (request, masks), found in zip(self.requests, self.found, strict=True):
            # what the forward gave has the shapes of its gradients, and takes as long
            statistics = {name: getattr(found, name) for name in Gradients._fields[1:]} if request.entropy else {}
            gradients = Gradients(found.output, **statistics)
            launch_backward.backward(gradients, self.q, self.k, self.v, found, masks, self.seed, request)

    def launches(self, way: str) -> dict[str, Config]:
        """The kernels that one way starts and their tiles, without starting them."""
        with launch.recording() as recorded:
            getattr(self, way)()
        return {one.kernel.__name__: one.config for one in recorded}


def tune(call: Call, clock: Clock, say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """The best tile of every kernel that ``call`` uses, as entries of the table."""
    best: Tiles = {}
    for way, steps in STEPS.items():
        for kernel, without in steps:
            times = measure(call, way, kernel, {**best, **without}, clock)
            if not times:
                continue
            shipped, tile = next(iter(times)), min(times, key=times.__getitem__)
            best[kernel] = tile
            say(
                f"{call.queries}x{call.keys} {kernel:17s} {times[shipped]:.3f} ms as shipped ({shipped}), "
                f"{times[tile]:.3f} ms with {tile or 'the kernels for longer axes'}"
            )
            yield tuned.entry(kernel, call.dtype, call.width, call.queries, call.keys, tile, times[tile])


def measure(call: Call, way: str, kernel: str, forced: Tiles, clock: Clock) -> dict[Config | None, float]:
    """Milliseconds by tile, the shipped one first; empty where the kernel has no part in this call."""
    optional = kernel in configs.ONE_BLOCK
    with configs.assuming(forced=forced):
        used = call.launches(way)
        if kernel not in used and not optional:
            return {}
        times = {used.get(kernel): clock(getattr(call, way))}
    for tile in [*candidates(kernel, call.dtype), *([None] if optional else [])]:
        with configs.assuming(forced={**forced, kernel: tile}):
            if tile in times or (tile and call.launches(way).get(kernel) != tile):
                continue  # timed already, or it does not serve these lengths
            with contextlib.suppress(
                Exception
            ):  # what does not compile or fit is no candidate; the shipped tile has to
                times[tile] = clock(getattr(call, way))
    return times


def write(path: Path, gpu: str, entries: Sequence[dict[str, Any]]) -> None:
    """Replace what the file has for ``gpu``, atomically; other GPUs' entries stay."""
    gpus = tuned.read(path) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": tuned.VERSION, "gpus": {**gpus, gpu: list(entries)}}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".partial", delete=False) as file:
        file.write(text + "\n")
    os.replace(file.name, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--shape", action="append", type=_shape, help="queries x keys, such as 30x577; may be repeated")
    parse.add_argument("--width", action="append", type=int, help="of a head; default 64; may be repeated")
    parse.add_argument("--dtype", action="append", choices=["bfloat16", "float16", "float32"], help="default bfloat16")
    parse.add_argument("--batch", type=int, default=64, help="samples at 577 keys; fewer where there are more keys")
    parse.add_argument("--heads", type=int, default=12)
    parse.add_argument("--output", type=Path, default=None)
    options = parse.parse_args(arguments)
    if not torch.cuda.is_available() or knobs.runtime.interpret:
        why = "no GPU is here" if not torch.cuda.is_available() else "TRITON_INTERPRET is set"
        print(f"Tiles are timed on a GPU, and {why}; the table in configs.py serves without", file=sys.stderr)
        return 2
    path = options.output or tuned.path() or tuned.DEFAULT
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    if path.exists():
        tuned.read(path)  # better malformed now than after half an hour
    entries: list[dict[str, Any]] = []
    todo = itertools.product(options.dtype or ["bfloat16"], options.width or [64], options.shape or SHAPES)
    with configs.assuming(configs.architecture(device).partition("/")[0]):  # whatever an earlier table says
        for dtype, width, (queries, keys) in todo:
            batch = max(1, options.batch * 577 // max(577, queries, keys))
            call = Call(queries, keys, width, getattr(torch, dtype), batch, options.heads, device)
            entries += tune(call, lambda run: do_bench(run, return_mode="median"))
    write(path, gpu, entries)
    print(f"{path}: {len(entries)} tiles for {gpu}")
    return 0


def _shape(text: str) -> tuple[int, int]:
    queries, _, keys = text.partition("x")
    if not (queries.isdigit() and keys.isdigit() and int(queries) and int(keys)):
        raise argparse.ArgumentTypeError(f"{text!r} is not QUERIESxKEYS, such as 30x577")
    return int(queries), int(keys)


if __name__ == "__main__":
    sys.exit(main())
