"""What a plan advises where a recipe fits nowhere is followed here, and has to fit."""

from __future__ import annotations

import dataclasses
import re

import pytest

from crossmask.engine.planning.advice import help_for, smallest
from crossmask.engine.planning.command import load_unopened
from crossmask.engine.planning.estimate import Plan, plan
from crossmask.engine.planning.tally import Rates
from crossmask.kernels.roofline import DEVICES

ZERO = "deepspeed.zero_optimization"
# a model that is soon traced, by contrast alone, and a bucket that is no gigabyte
FEW = ["objectives.itm.weight=0", "objectives.mlm.weight=0", f"{ZERO}.reduce_bucket_size=500000"]
FEW += [f"model.{tower}.depth=1" for tower in ("image", "text", "fusion")]
WIDE = ["model.image.width=384", "model.image.heads=4"]
BATCH = 4800


def planned(megabytes: float, gpus: int, overrides: list[str]) -> Plan:
    device = dataclasses.replace(DEVICES["h100"], memory=megabytes * 1e6)
    given = [*FEW, f"training.batch_size={BATCH}", *overrides]
    return plan(load_unopened("albef-emoji", given), device, gpus, Rates())


@pytest.mark.parametrize(
    ("megabytes", "gpus", "overrides", "ways"),
    [
        (60, 2, [], 2),  # the 96 pairs that fit at stage 2 do not once gradients are accumulated
        (40, 2, [f"{ZERO}.stage=0"], 2),  # stage 0 takes fewer pairs than the others do
        (30, 2, [f"{ZERO}.stage=0"], 2),  # not at stage 0 at all
        (40, 2, WIDE, 1),  # not one pair on two GPUs, whatever the accumulation
    ],
)
def test_advice_fits_when_it_is_followed(megabytes: float, gpus: int, overrides: list[str], ways: int) -> None:
    found = planned(megabytes, gpus, overrides)
    assert found.recommended is None
    told = help_for(found)
    stage = re.findall(rf"with {ZERO}\.stage=(\d) ", told)
    micros = re.findall(r"set training\.accumulation_steps to (\d+)", told)
    more = re.findall(r"take (\d+) GPUs", told)
    assert len(micros) + len(more) == ways, told
    overrides = [*overrides, *(f"{ZERO}.stage={one}" for one in stage)]
    for followed in (
        *(planned(megabytes, gpus, [*overrides, f"training.accumulation_steps={k}"]) for k in micros),
        *(planned(megabytes, int(n), overrides) for n in more),
    ):
        own = followed.stages[followed.own]
        assert followed.fits(own), f"{told}: {own.total / 1e6:.1f} MB at stage {own.stage} on {followed.gpus} GPUs"
    for n in map(int, more):
        assert n <= 8 or n % 8 == 0, "whole nodes"


def test_advice_asks_for_no_more_than_it_takes() -> None:
    """The last accumulation and the last whole nodes before those that are named do not fit."""
    assert help_for(planned(60, 2, [])) == "set training.accumulation_steps to 30, or take 48 GPUs"
    for followed in (planned(60, 2, ["training.accumulation_steps=25"]), planned(60, 40, [])):
        assert not followed.fits(followed.stages[followed.own])


def test_a_batch_beyond_all_measure_is_advised_on_at_once() -> None:
    huge = ["training.batch_size=1000000000000"]
    told = help_for(planned(80000, 8, huge))
    micros = re.findall(r"accumulation_steps to (\d+)", told)
    assert len(micros) == 1, told
    followed = planned(80000, 8, [*huge, f"training.accumulation_steps={micros[0]}"])
    assert followed.fits(followed.stages[followed.own])


def test_where_nothing_helps_none_is_named() -> None:
    told = help_for(planned(8, 2, WIDE))
    assert told.startswith("neither training.accumulation_steps nor more GPUs help")
    assert not re.search(r"\d", told)


def test_itm_keeps_the_two_pairs_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one pair alone ITM has no negative: advice does not end there."""
    from crossmask.engine.planning import advice

    monkeypatch.setattr(advice, "smallest", lambda numbers, fits: numbers[-1])
    without, itm = planned(8, 2, []), planned(8, 2, ["objectives.itm.weight=1"])
    assert help_for(without) == "set training.accumulation_steps to 2400, or take 4800 GPUs"
    assert help_for(itm) == "set training.accumulation_steps to 1200, or take 2400 GPUs"


def test_the_smallest_that_fits_has_been_looked_at() -> None:
    for first in range(1, 9):
        looked: list[int] = []

        def fits(n: int, first: int = first, looked: list[int] = looked) -> bool:
            looked.append(n)
            return n >= first

        found = smallest([1, 2, 3, 5, 8], fits)
        assert found == min(n for n in (1, 2, 3, 5, 8) if n >= first)
        assert found in looked
    assert smallest([1, 2], lambda n: False) is None
    assert smallest([], lambda n: True) is None
