"""Grouped epochs on two ranks, of which the first alone makes orders; prints each rank's samples, and what it was told.

Arguments: RUN_FOLDER.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import ranks
import torch

from crossmask.engine.data.grouping_sampler import GroupedSampler
from crossmask.engine.errors import DataError, UserError
from crossmask.engine.recipe_sections_grouping import GroupingSection
from crossmask.engine.teacher import gather_features
from crossmask.engine.training.sampling import made_by_first_rank

SIZE = 50


def main() -> None:
    rank, world = ranks.join()
    section = GroupingSection(search_space=24, similar=2, lead=0.2)
    sampler = GroupedSampler(
        SIZE, 8, world, 0, section=section, groups=np.arange(SIZE) // 2, width=4, folder=Path(sys.argv[1]),
        max_steps=18, rank=rank, share=partial(made_by_first_rank, SIZE),
    )  # fmt: skip
    sampler.begin(0)
    table = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(18):
        rows = sampler.indices(step, rank)
        mine = table[rows]
        sampler.collect(step, 0, gather_features(mine), gather_features(-mine))
        seen += rows.tolist()
    sampler.close()
    print("seen", *seen)

    def refuse() -> np.ndarray:
        assert rank == 0, "made by the first rank alone"
        raise DataError("the order cannot be made: mend it")

    try:
        made_by_first_rank(SIZE, refuse)
    except UserError as error:
        print("told", type(error).__name__, error)
    ranks.leave()


if __name__ == "__main__":
    main()
