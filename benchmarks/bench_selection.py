"""Mask selection on a CPU: ``topk_mask`` against torch.topk and scatter, and the masks' share of a training step.

    python benchmarks/bench_selection.py [--threads 2] [--rounds 60]

Alternatives are timed in turn, in one process; a ratio is the median over rounds of theirs to ours, with quartiles.
A result that is wrong is not timed: each is first held against the other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from crossmask.engine.data import load_data
from crossmask.engine.evaluation import describe_machine
from crossmask.engine.masking import Corpus, Draws, MaskContext, MaskPlanner, policies
from crossmask.engine.models import PretrainingModel
from crossmask.engine.objectives import Keys, RunMasks, look
from crossmask.engine.recipe import MaskingSection, Recipe
from crossmask.engine.recipe_files import load_recipe
from crossmask.engine.training.step import Schedule, compute_losses
from crossmask.kernels import AttentionStatistics, topk_mask

ROWS, RATIO, VOCABULARY = 256, 0.4, 4096


def torch_topk(scores: Tensor, ratio: float) -> Tensor:
    k = int(ratio * scores.shape[1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(k, 1).indices, True)


def times(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in every round, the jobs in turn."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + 3):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_ >= 3:  # the first ones warm up
                found[name].append(time.perf_counter() - start)
    return found


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:7.2f} ({low:.2f} to {high:.2f})"


def selection(rounds: int) -> None:
    print(f"topk_mask against torch.topk + scatter_, {ROWS} rows, ratio {RATIO}, float32")
    print(f"{'N':>6}  {'topk_mask, µs':>14}  {'torch, µs':>10}  torch / topk_mask, median (quartiles)")
    for n in (36, 77, 196, 577, 4096, 16384):
        scores = torch.rand(ROWS, n)
        assert torch.equal(topk_mask(scores, ratio=RATIO), torch_topk(scores, RATIO)), n
        found = times(
            {"ours": lambda s=scores: topk_mask(s, ratio=RATIO), "torch": lambda s=scores: torch_topk(s, RATIO)}, rounds
        )
        ours, theirs = found["ours"], found["torch"]
        ratio = quartiles([t / o for o, t in zip(ours, theirs, strict=True)])
        print(f"{n:>6}  {1e6 * statistics.median(ours):14.0f}  {1e6 * statistics.median(theirs):10.0f}  {ratio}")


def context(batch: int, grid: tuple[int, int], words: int) -> MaskContext:
    """Everything that a policy may read, made up."""
    patches = grid[0] * grid[1]
    mask = torch.ones(batch, words, dtype=torch.bool)
    maskable = mask.clone()
    maskable[:, 0] = maskable[:, -1] = False
    names = ("similarities", "caption_similarity", "image_attention", "priors", "patch_scores")
    return MaskContext(
        torch.randint(5, VOCABULARY, (batch, words)),
        mask,
        maskable,
        grid,
        Draws(0, 1, torch.arange(batch)),
        statistics=AttentionStatistics(
            key_attention=torch.rand(batch, patches), query_attention=torch.rand(batch, words)
        ),
        image_features=torch.randn(batch, patches, 256),
        **{name: torch.rand(batch, patches) for name in names},
    )


def planner(policy: str) -> MaskPlanner:
    """A policy that has counted 15,000 captions of 12 tokens."""
    options = {"words": [str(i) for i in range(100, 200)]} if policy == "entity_words" else {}
    section = MaskingSection(policy=policy, options=options, image_ratio=0.4, text_ratio=0.25)
    built = MaskPlanner(section, 4, VOCABULARY)
    captions = torch.randint(5, VOCABULARY, (15_000, 12)).tolist()
    built.prepare(Corpus(captions, VOCABULARY, lambda word: [int(word)] if word.isdigit() else [5]))
    return built


def training_step(recipe: Recipe) -> Callable[[], object]:
    """Teacher, student, losses and backward of one step of all objectives; the optimizer and the EMA come on top."""
    data = load_data(recipe)
    masks = RunMasks(recipe, data)
    sizes = (data.tokenizer.vocabulary_size, data.max_tokens)
    student = PretrainingModel(recipe.model, recipe.objectives, *sizes, masking=recipe.masking)
    batch = data.train_batch(torch.arange(recipe.training.batch_size).numpy(), 0)
    schedule = Schedule.at(recipe.training.max_steps - 1, recipe)
    rows = recipe.objectives.fusion_rows or len(batch)

    def step() -> None:
        view = look(student.model, batch, masks, schedule.step, rows)
        keys = Keys(view.image_feature, view.text_feature, batch.group_id)
        loss, _ = compute_losses(student, batch, view, keys, recipe, schedule, masks.planner)
        loss.backward()
        student.zero_grad()

    return step


def share(rounds: int) -> None:
    recipe = load_recipe("syncmask-emoji")
    jobs: dict[str, Callable[[], object]] = {"step": training_step(recipe)}
    seen = context(256, (24, 24), 77)
    for policy in sorted(policies()):
        jobs[policy] = partial(planner(policy), seen)
    found = times(jobs, max(5, rounds // 6))
    step = statistics.median(found.pop("step"))
    print(f"\nstatistics to masks, 256 pairs of 576 patches and 77 words, corruption drawn; a step of {recipe.name},")
    print(f"256 pairs, all objectives, without optimizer and EMA, float32: {1e3 * step:.0f} ms")
    for policy, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{policy:>14}: {1e3 * median:6.2f} ms = {100 * median / step:.2f} % of the step")


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--threads", type=int, default=1)
    parse.add_argument("--rounds", type=int, default=60)
    options = parse.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{describe_machine().get('processor', 'CPU')}, {options.threads} thread(s), torch {torch.__version__}\n")
    selection(options.rounds)
    share(options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
