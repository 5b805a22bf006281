"""Contrast of rank-local queries with gathered keys: the average over ranks is the gradient of the whole batch."""

from __future__ import annotations

from distributed import ranks


def test_two_ranks_give_the_gradient_of_one_process() -> None:
    """ZeRO averages; the gather's backward sums over ranks. So no factor is missing, and none is too many."""
    for code, output in ranks.start("contrast_ranks.py"):
        assert code == 0, output
        told = next(line for line in output.splitlines() if line.startswith("error")).split()
        assert float(told[1]) < 1e-12, output
        assert float(told[3]) > 1e-3, output
