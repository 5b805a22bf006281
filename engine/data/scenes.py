"""Which drawings make a scene, where they lie, and what its text says: pure functions of (seed, epoch, sample index).

A sample's own drawing is the anchor and is always drawn. Others come from the same pool, of other captions and, where
possible, other designers. Some drawn things stay unnamed and some named things are not drawn, as in catalogue texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..recipe import SceneSection
from .captions import NOT_DRAWN, CaptionTable, Phrases
from .randomness import Draws

_TRIES = 12  # candidates for each further thing, and candidate layouts of a scene


@dataclass(frozen=True)
class ScenePlan:
    """S scenes of at most K drawn things; U further columns are the things named but not drawn."""

    drawing: np.ndarray  # (S, K+U) int64, row of the art
    drawn: np.ndarray  # (S, K+U) bool
    named: np.ndarray  # (S, K+U) bool, at least one a row
    order: np.ndarray  # (S, K+U) int64, reading order of the columns
    centre: np.ndarray  # (S, K, 2) in 0..1
    scale: np.ndarray  # (S, K) in 0..1


def plan_scenes(
    anchors: np.ndarray, pool: np.ndarray, caption: np.ndarray, style: np.ndarray, section: SceneSection, draws: Draws
) -> ScenePlan:
    """Plan a scene for each anchor (S,) from ``pool`` (rows of the art); ``caption`` and ``style`` describe the art."""
    things, count = section.max_things, len(anchors)
    columns = things + section.undrawn_things
    span = section.max_things - section.min_things + 1
    wanted = section.min_things + (draws.uniform("things", 1)[:, 0] * span).astype(np.int64)
    luck = draws.uniform("partners", (columns - 1) * _TRIES).reshape(count, columns - 1, _TRIES)
    drawing = np.tile(anchors[:, None], columns)
    drawn = np.zeros((count, columns), bool)
    drawn[:, 0] = True
    found = drawn.copy()
    for k in range(1, columns):
        candidate = pool[(luck[:, k - 1] * len(pool)).astype(np.int64)]  # (S, tries)
        clash = (caption[candidate][:, :, None] == caption[drawing[:, None, :k]]) & found[:, None, :k]
        same_hand = (style[candidate][:, :, None] == style[drawing[:, None, :k]]) & found[:, None, :k]
        fault = 2 * clash.any(2) + same_hand.any(2)
        best = fault.argmin(1)  # the first candidate without a fault; else one whose only fault is its designer
        drawing[:, k] = candidate[np.arange(count), best]
        found[:, k] = (fault.min(1) < 2) & (k < wanted if k < things else True)
    drawn[:, 1:things] = found[:, 1:things]

    chance = draws.uniform("named", columns)
    named = drawn & (chance >= section.unnamed)
    nameless = ~named.any(1)
    named[nameless, 0] = True
    named[:, things:] = found[:, things:] & (chance[:, things:] < section.undrawn)
    order = draws.uniform("order", columns).argsort(1, kind="stable")
    centre, scale = _layout(drawn[:, :things], draws)
    return ScenePlan(drawing, drawn, named, order, centre, scale)


def _layout(drawn: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Centres and sides of the drawn things: of several random layouts, the one whose boxes overlap least."""
    count, things = drawn.shape
    number = drawn.sum(1)
    luck = draws.uniform("layout", _TRIES * things * 3).reshape(count, _TRIES, things, 3)
    side = np.minimum(0.74 / np.sqrt(number), 0.7)[:, None, None] * (0.82 + 0.36 * luck[..., 2])
    centre = side[..., None] / 2 + luck[..., :2] * (1 - side[..., None])
    gap = np.abs(centre[:, :, :, None] - centre[:, :, None])  # (S, tries, K, K, 2)
    reach = (side[:, :, :, None] + side[:, :, None]) / 2
    overlap = np.clip(reach[..., None] - gap, 0, None).prod(-1)
    pairs = np.triu(drawn[:, :, None] & drawn[:, None], 1)[:, None]
    best = (overlap * pairs).sum((2, 3)).argmin(1)
    return centre[np.arange(count), best], side[np.arange(count), best]


def scene_phrases(
    plan: ScenePlan, sample: np.ndarray, caption: np.ndarray, table: CaptionTable, draws: Draws
) -> Phrases:
    """The scenes' texts: the named things in random order, each by its name and up to two of its tags, "and" between.

    ``sample`` (S,) int64 is the row of each scene in its batch; ``caption`` (N,) the caption of each row of the art.
    """
    scenes, columns = plan.named.shape
    order = plan.order
    said = np.take_along_axis(plan.named, order, 1)  # (S, K+U) in reading order
    which = caption[np.take_along_axis(plan.drawing, order, 1)]
    drawn = np.take_along_axis(plan.drawn, order, 1)
    luck = draws.uniform("tags", 2 * columns).reshape(scenes, columns, 2)
    spare = table.length[which] - table.name_length[which]
    tags = np.minimum((luck[..., 0] * 3).astype(np.int64), spare)
    skip = (luck[..., 1] * (spare - tags + 1)).astype(np.int64)
    first = said.cumsum(1) == 1

    # Each thing is up to three stretches: the conjunction (not before the first), its name, its tags.
    start = np.stack(
        [np.zeros_like(which), table.start[which], table.start[which] + table.name_length[which] + skip], -1
    )
    length = np.stack([np.where(first, 0, 1), table.name_length[which], tags], -1) * said[..., None]
    truth = np.where(drawn, order + 1, NOT_DRAWN)
    thing = np.stack([np.zeros_like(truth), truth, truth], -1)
    number = np.arange(scenes * columns).reshape(scenes, columns)
    mention = np.stack([np.full_like(number, -1), number, number], -1)
    rows = np.broadcast_to(sample[:, None, None], length.shape)
    keep = length > 0
    return Phrases(rows[keep], start[keep], length[keep], thing[keep], mention[keep])
