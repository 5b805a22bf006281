"""A step of ALBEF-base (Li et al. 2021) by this package and as it is commonly written: see ``bench_albef_step.py``.

ViT-B/16 at 256 pixels, BERT-base cut in two, a full queue of 65,536, dropout on, batch 8 whose longest caption has 25
tokens, random weights. ``turns.variants`` says what else of ours is measured. That both compute the same losses and
gradients is a test (``tests/test_bench_albef.py``) and not done here. On a CPU autocast alone: a round of float32 takes
40 seconds on two cores of a Zen 4, and ``bench_albef_step.py`` measures that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from albef_step.common import CommonStep
from albef_step.products import give_back
from albef_step.sizes import BASE, random_batch

from ..results import Job, Row
from .planned import Options, Planned
from .trace import labelled, part
from .turns import OURS, Built, Side, in_turns, of_pytorchs_products, variants

LONGEST = 25  # tokens
ROUNDS = {"cpu": {"bf16": 3}, "cuda": {"fp32": 3, "bf16": 3}}  # by device and precision
COMMON = "common way"


class AlbefBase:
    def planned(self, options: Options) -> list[Planned]:
        return [
            Planned(job(dtype), name, name != COMMON, BASE.batch)
            for dtype in ROUNDS[options.device]
            for name in (COMMON, OURS, *variants(options.device, dtype))
        ]

    def measure(self, options: Options) -> Iterator[Row]:
        device = torch.device(options.device)
        first: Side | None = None  # of the common way: both precisions move the same weights
        for dtype, most in ROUNDS[options.device].items():
            rounds = min(options.rounds, 1 if options.quick else most)
            theirs, mine, *more = (each for each in self.planned(options) if each.job.dtype == dtype)
            sides = [common(theirs, device, first), ours(mine)]
            first = sides[0]
            yield from in_turns([*sides, *(of_pytorchs_products(sides[1], each) for each in more)], device, rounds)
            del sides
            give_back()


def job(dtype: str) -> Job:
    autocast = ", autocast" if dtype == "bf16" else ""
    return Job("step", "ALBEF-base", f"batch {BASE.batch}, captions to {LONGEST} tokens{autocast}", dtype, "", "step")


def ours(planned: Planned) -> Side:
    def build() -> Built:
        from albef_step.ours import OurStep

        step, batch = OurStep(BASE, "autocast" if planned.job.dtype == "bf16" else "fp32"), random_batch(BASE, LONGEST)
        return (lambda: step(batch)), lambda: labelled(step.pretrainer)

    return Side(planned, build)


def common(planned: Planned, device: torch.device, first: Side | None) -> Side:
    """``first``: a side whose weights this one moves."""
    bf16, batch = planned.job.dtype == "bf16", random_batch(BASE, LONGEST).to(device)

    def build() -> Built:
        step = CommonStep(BASE, device=device) if first is None or first.model is None else first.model
        found.model = step
        return (lambda: step(batch, bf16=bf16)), lambda: labelled_common(step)

    found = Side(planned, build, shares=first)
    return found


@contextmanager
def labelled_common(step: CommonStep) -> Iterator[None]:
    """Inside, the parts of the common step have the names of ours, as far as it has such parts."""
    model = step.model
    with ExitStack() as stack:
        for whose, image, text in (
            ("", model.visual_encoder, model.text_encoder),
            ("teacher's ", model.visual_encoder_m, model.text_encoder_m),
        ):
            for owner, name, label in (
                (image, "forward", "image tower"),
                (text, "predict", "vocabulary"),
                (text.bert, "read", "text tower"),
                (text.bert, "fuse", "fusion"),
            ):
                stack.enter_context(part(owner, name, whose + label))
        for owner, name, label in (
            (model, "_momentum_update", "average"),
            (model, "_enqueue", "queue"),
            (step.optimizer, "step", "optimizer"),
        ):
            stack.enter_context(part(owner, name, label))
        yield
