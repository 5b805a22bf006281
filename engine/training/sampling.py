"""The recipe's sampler, and how an order that one rank makes comes to all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ..data import PairData, StepSampler
from ..data.grouping_sampler import GroupedSampler
from ..errors import CheckpointError, UserError
from ..recipe import Recipe
from ..teacher.gather import world_size as ranks_now
from .agreement import collective_device, first_error, rank_of_process


def build_sampler(
    recipe: Recipe, data: PairData, rank: int, world_size: int, device: torch.device, run_dir: Path | None
) -> StepSampler:
    """``run_dir``: where grouped epochs keep their files; plain ones need none.

    Raises RecipeError and DataError as the samplers do.
    """
    training, grouping = recipe.training, recipe.data.grouping
    if not grouping.search_space:
        return StepSampler(data.train_size, training.batch_size, world_size, recipe.seed, training.accumulation_steps)
    if run_dir is None:
        raise ValueError("data.grouping needs a run folder: give Pretrainer its run_dir")
    return GroupedSampler(
        data.train_size,
        training.batch_size,
        world_size,
        recipe.seed,
        training.accumulation_steps,
        section=grouping,
        groups=data.train_group_id,
        width=recipe.model.projection_width,
        folder=run_dir,
        max_steps=training.max_steps,
        rank=rank,
        device=device,
        share=partial(made_by_first_rank, data.train_size),
    )


def made_by_first_rank(size: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """(size,) int64 that ``make`` returns on rank 0, on every rank. Collective.

    It is sent and not read from the run's folder: another machine may see a file there a while later.

    Raises:
        CheckpointError: on the other ranks, where ``make`` raised a UserError on rank 0, which raises that one itself.
    """
    if ranks_now() == 1:
        return make()
    made, error = np.empty(size, np.int64), None
    if rank_of_process() == 0:
        try:
            made = make()
        except UserError as problem:
            error = problem
    told = first_error(None if error is None else str(error))
    if error is not None:
        raise error
    if told is not None:
        raise CheckpointError(told)
    sent = torch.from_numpy(made).to(collective_device())
    dist.broadcast(sent, src=0)
    return sent.cpu().numpy()
