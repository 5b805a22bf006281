"""What leaving tokens out of an encoder saves, against hiding them behind a mask token: forward and backward on a CPU.

    python benchmarks/bench_dropping.py [--threads 1] [--rounds 7] [--batch 16] [--json result.json]

ViT-S/16 at 224 pixels: MAE leaves hidden patches out before the first block, deferred masking after two. Mask-later:
a text tower of 6 layers and width 384 reads captions of 77 tokens without the hidden words. Every variant runs once
untimed, then once in every round; ratios are taken within a round, against the same tower reading mask tokens. "tokens"
is the mean that a block reads, "flops" the share of the mask-token pass's floating-point operations in products. The
decoder or the fusion encoder behind the tower reads the restored rows and costs what it cost before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from suite import machine
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossmask.engine.models.text import TextTower
from crossmask.engine.models.vision import ImageTower
from crossmask.engine.recipe import ImageTowerSection, TextTowerSection
from crossmask.kernels import topk_mask

VIT_S = ImageTowerSection(size=224, patch_size=16, width=384, depth=12, heads=6)
TEXT = TextTowerSection(width=384, depth=6, heads=6, dropout=0.0)
PATCHES, LENGTH, VOCABULARY, MASK_ID = 196, 77, 4096, 4
Step = Callable[[], None]


def train(tower: nn.Module, forward: Callable[[], Tensor]) -> None:
    tower.zero_grad(set_to_none=True)
    forward().square().mean().backward()


def image_steps(batch: int, ratios: Iterable[float]) -> tuple[nn.Module, dict[str, Step]]:
    tower, images = ImageTower(VIT_S), torch.randn(batch, 3, 224, 224)
    half = topk_mask(torch.rand(batch, PATCHES), ratio=0.5)
    steps: dict[str, Step] = {"mask token": partial(train, tower, partial(image_tokens, tower, images, half))}
    for ratio in ratios:
        hidden = topk_mask(torch.rand(batch, PATCHES), ratio=ratio)
        forward = partial(image_tokens, tower, images, hidden, drop=True, visible_count=PATCHES - int(hidden[0].sum()))
        steps[f"MAE, {ratio:.0%}"] = partial(train, tower, forward)
        steps[f"deferred by 2, {ratio:.0%}"] = partial(train, tower, partial(forward, drop_after=2))
    return tower, steps


def image_tokens(tower: ImageTower, images: Tensor, hidden: Tensor, **options: Any) -> Tensor:
    return tower(images, hidden, **options).tokens


def text_steps(batch: int, rates: Iterable[float]) -> tuple[nn.Module, dict[str, Step]]:
    """Whole rows: [CLS], words, [SEP]."""
    tower = TextTower(TEXT, VOCABULARY, LENGTH, 0, MASK_ID)
    ids = torch.randint(5, VOCABULARY, (batch, LENGTH))
    mask, words = torch.ones_like(ids).bool(), torch.ones_like(ids).bool()
    words[:, 0] = words[:, -1] = False
    steps: dict[str, Step] = {"mask token": partial(train, tower, partial(tower, ids, mask))}
    for rate in rates:
        hidden = topk_mask(torch.rand(batch, LENGTH), ratio=rate, valid=words)
        steps[f"mask-later, {rate:.0%}"] = partial(train, tower, partial(tower, ids, mask, hidden))
    return tower, steps


def tokens_and_flops(blocks: Iterable[nn.Module], step: Step) -> tuple[float, int]:
    """Mean length that a block reads, and floating-point operations of forward and backward."""
    lengths: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1])) for block in blocks]
    with FlopCounterMode(display=False) as counter:
        step()
    for hook in hooks:
        hook.remove()
    return statistics.mean(lengths), counter.get_total_flops()


def measure(title: str, blocks: Iterable[nn.Module], steps: dict[str, Step], rounds: int) -> list[dict[str, Any]]:
    blocks = list(blocks)
    counted = {name: tokens_and_flops(blocks, step) for name, step in steps.items()}  # the untimed run
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    rows = []
    print(f"\n{title}\n  {'':<26}{'tokens':>8}{'flops':>8}{'median ms':>11}{'x mask token':>14}{'quartiles':>15}")
    for name, (tokens, flops) in counted.items():
        ratios = [mine / theirs for mine, theirs in zip(times[name], times["mask token"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        share, median = flops / counted["mask token"][1], statistics.median(times[name])
        print(f"  {name:<26}{tokens:>8.1f}{share:>8.2f}{median:>11.0f}{middle:>14.2f}{f'{low:.2f} .. {high:.2f}':>15}")
        rows.append({"variant": name, "tokens": tokens, "flops": share, "milliseconds": median, "ratio": middle})
        rows[-1]["ratio_quartiles"] = [low, high]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: what PyTorch takes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.15, 0.4, 0.5])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(machine.line(), flush=True)
    results = {}
    image, steps = image_steps(arguments.batch, arguments.ratios)
    title = f"ViT-S/16 at 224, depth {VIT_S.depth}, batch {arguments.batch}, float32"
    results["image"] = measure(title, image.vit.blocks, steps, arguments.rounds)
    text, steps = text_steps(arguments.batch, arguments.rates)
    title = f"text tower, {TEXT.depth} layers, width {TEXT.width}, length {LENGTH}, batch {arguments.batch}, float32"
    results["text"] = measure(title, text.bert.encoder.layer, steps, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.line(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
