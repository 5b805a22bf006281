"""Image–text matching against numbers worked out by hand, with a stand-in for the match head; draws of negatives."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dispatched import NoWaiting
from torch import Tensor

from crossmask.engine.masking import Draws
from crossmask.engine.models import Encoded
from crossmask.engine.objectives import PRIOR, StudentView, TeacherView, image_text_matching
from crossmask.engine.objectives.itm import draw_negatives


def unit(n: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(n, width), dim=-1)


def encoded(feature: Tensor, tokens: Tensor | None = None) -> Encoded:
    return Encoded(torch.zeros(len(feature), 1, 1) if tokens is None else tokens, feature)


def draws(n: int, step: int = 0) -> Draws:
    return Draws(5, step, torch.arange(100, 100 + n))


def draw(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    groups: Tensor,
    tau: float,
    rows: int,
    hardness: float,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both pairs are (image, text) features."""
    seen, now = StudentView(encoded(student[0]), encoded(student[1])), draws(len(groups), step)
    return draw_negatives(seen, TeacherView(*teacher), groups, torch.tensor(tau), rows, hardness, now)


# ------------------------------------------------------------------------------------------------------- negatives


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_negatives_are_never_a_true_match(hardness: float) -> None:
    """Twins within a group look exactly alike, so that a leak would be drawn at once."""
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 3, 0])
    feature = unit(4)[groups]
    for step in range(300):
        images, texts, legal = draw((feature, feature), (feature, feature), groups, 0.001, 8, hardness, step)
        assert legal.all()
        assert (groups[images] != groups).all()
        assert (groups[texts] != groups).all()


def test_negatives_come_from_the_whole_batch_for_the_first_rows() -> None:
    groups = torch.arange(8)
    seen: set[int] = set()
    for step in range(60):
        images, texts, legal = draw((unit(8), unit(8)), (unit(8), unit(8)), groups, 0.5, 3, 0.0, step)
        assert images.shape == texts.shape == legal.shape == (3,)
        seen |= set(images.tolist()) | set(texts.tolist())
    assert seen == set(range(8))


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_negatives_follow_the_softmax_of_their_similarity(hardness: float) -> None:
    """Texts draw the teacher's images and images the teacher's texts by similarity, true matches taken out first."""
    image, text, teacher_image, teacher_text = (unit(6) for _ in range(4))
    groups = torch.tensor([0, 1, 2, 3, 4, 0])
    n, tau = 1500, 0.4
    drawn = [torch.zeros(6, 6), torch.zeros(6, 6)]
    rows = torch.arange(6)
    for step in range(n):
        images, texts, _ = draw((image, text), (teacher_image, teacher_text), groups, tau, 6, hardness, step)
        drawn[0][rows, images] += 1
        drawn[1][rows, texts] += 1
    same = groups[:, None] == groups
    for count, z in zip(drawn, (text @ teacher_image.T, image @ teacher_text.T), strict=True):
        p = (hardness * z / tau).masked_fill(same, -torch.inf).softmax(1)
        spread = (p * (1 - p) / n).sqrt()
        assert ((count / n - p).abs() <= 4.5 * spread + 1e-9).all()
    if hardness == 0:
        assert p[1].max() == pytest.approx(1 / 5)  # uniform over the five others


def test_both_directions_draw_apart_from_each_other() -> None:
    """The same logits on both sides still give different negatives: P(equal) = 1/7 among seven equal candidates."""
    feature, equal = torch.ones(8, 1), 0
    for step in range(200):
        images, texts, _ = draw((feature, feature), (feature, feature), torch.arange(8), 0.5, 8, 1.0, step)
        equal += int((images == texts).sum())
    assert equal / 1600 == pytest.approx(1 / 7, abs=0.05)


def test_a_draw_is_that_of_seed_step_and_sample() -> None:
    features, groups = (unit(6), unit(6)), torch.arange(6)
    first = draw(features, features, groups, 0.5, 6, 1.0, step=3)
    torch.rand(5)  # the global generator has no part in it
    again, few = draw(features, features, groups, 0.5, 6, 1.0, 3), draw(features, features, groups, 0.5, 2, 1.0, 3)
    for a, b, c in zip(first, again, few, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:2], c)
    seen = StudentView(encoded(features[0]), encoded(features[1]))
    others = [
        draw_negatives(seen, TeacherView(*features), groups, torch.tensor(0.5), 6, 0.0, given)
        for given in (draws(6, 4), Draws(6, 3, torch.arange(100, 106)), Draws(5, 3, torch.arange(6)), draws(6, 3))
    ]
    for other in others[:3]:
        assert not torch.equal(torch.cat(other[:2]), torch.cat(others[3][:2]))


def test_a_row_without_a_legal_negative_is_told() -> None:
    """Of a whole batch of one group, or of features that are not finite, nothing can be drawn."""
    feature = unit(4)
    assert not draw((feature, feature), (feature, feature), torch.zeros(4).long(), 0.1, 4, 1.0)[2].any()
    assert not draw((feature[:1],) * 2, (feature[:1],) * 2, torch.zeros(1).long(), 0.1, 1, 1.0)[2].any()
    broken = feature.clone()
    broken[2] = torch.nan
    for step in range(50):
        images, texts, legal = draw((broken, broken), (broken, broken), torch.arange(4), 0.1, 4, 1.0, step)
        assert legal.tolist() == [True, True, False, True]
        assert not (images[legal] == 2).any()
        assert not (texts[legal] == 2).any()
    # one side alone: the image has no negative text, the text has some image
    legal = draw((broken, feature), (feature, feature), torch.arange(4), 0.1, 4, 1.0)[2]
    assert legal.tolist() == [True, True, False, True]


def test_a_negative_is_of_the_same_kind() -> None:
    """What a look at the layout tells apart teaches matching nothing; a pair alone of its kind has no negative."""
    feature, kind = unit(7), torch.tensor([0, 1, 0, 1, 0, 1, 2])
    seen, view = StudentView(encoded(feature), encoded(feature)), TeacherView(feature, feature)
    drawn = set()
    for step in range(100):
        now = draws(7, step)
        images, texts, legal = draw_negatives(seen, view, torch.arange(7), torch.tensor(0.5), 7, 0.5, now, kind)
        assert legal.tolist() == [True] * 6 + [False]
        assert torch.equal(kind[images[:6]], kind[:6])
        assert torch.equal(kind[texts[:6]], kind[:6])
        drawn |= set(zip(range(6), images[:6].tolist(), strict=True))
    assert len(drawn) == 12  # each of the two others of its kind

    of_one = draw_negatives(seen, view, torch.arange(7), torch.tensor(0.5), 7, 0.5, draws(7, 1), torch.zeros(7).bool())
    plain = draw_negatives(seen, view, torch.arange(7), torch.tensor(0.5), 7, 0.5, draws(7, 1))
    assert all(torch.equal(x, y) for x, y in zip(of_one, plain, strict=True))


def test_drawing_never_waits_for_the_device() -> None:
    feature = unit(8)
    seen, view = StudentView(encoded(feature), encoded(feature)), TeacherView(feature, feature)
    tau, now, groups = torch.tensor(0.1), draws(8), torch.arange(8)
    with NoWaiting():
        draw_negatives(seen, view, groups, tau, 5, 0.5, now)


# -------------------------------------------------------------------------------------------------------- matching


class Matcher:
    """Records what is fused; its match head answers with fixed log-odds. A token holds its sample's number."""

    def __init__(self, answer: Any, pool: str = "cls") -> None:
        self.answer, self.pool = answer, pool

    def fuse(
        self,
        tokens: Tensor,
        token_mask: Tensor,
        image: list[tuple[Tensor, Tensor]],
        *,
        image_index: tuple[Tensor | None, ...],
        rows: Tensor | None,
        head_mask: object = None,
    ) -> SimpleNamespace:
        count = len(tokens) // len(image_index)
        numbers = image[0][0][:, 0, 0, 0]
        self.shared = sum(index is None for index in image_index)
        self.images = torch.cat([numbers[:count] if index is None else numbers[index] for index in image_index])
        self.texts, self.masks, self.rows = tokens[:, 0, 0], token_mask, rows
        return SimpleNamespace(tokens=tokens)

    def match_logits(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        assert torch.equal(token_mask, self.masks)
        return self.answer(self) if callable(self.answer) else self.answer.expand(len(tokens), 2)


def match(model: Matcher, groups: Tensor, rows: int, feature: Tensor | None = None) -> dict[str, Tensor]:
    n = len(groups)
    feature = unit(n) if feature is None else feature
    number = torch.arange(n).float()
    student = StudentView(
        encoded(feature), encoded(feature, number.view(n, 1, 1)), [(number.view(n, 1, 1, 1), number.view(n, 1, 1, 1))]
    )
    masks = torch.arange(4) <= torch.arange(n)[:, None]
    view = TeacherView(feature, feature)
    tau = torch.tensor(0.07)
    return image_text_matching(model, student, view, masks, groups, tau, rows, draws(n))  # type: ignore[arg-type]


def test_itm_that_knows_only_the_prior_costs_the_prior() -> None:
    assert pytest.approx(-(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3, rel=1e-12) == PRIOR
    odds = torch.tensor([math.log(2), 0.0], requires_grad=True)
    found = match(Matcher(odds), torch.arange(6), 6)
    assert found["itm"].item() == pytest.approx(0.6365, abs=1e-4)
    assert found["itm_accuracy"].item() == pytest.approx(2 / 3)
    found["itm"].backward()
    torch.testing.assert_close(odds.grad, torch.zeros(2), atol=1e-6, rtol=0)  # the prior is its minimum


def test_itm_shows_a_pair_a_wrong_image_and_a_wrong_text() -> None:
    groups = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7])
    model = Matcher(torch.zeros(2))
    match(model, groups, 5)
    own = torch.arange(5)
    texts, images = model.texts.long(), model.images.long()
    assert torch.equal(texts[:5], own)
    assert torch.equal(images[:5], own)
    assert torch.equal(texts[5:10], own)
    assert (groups[images[5:10]] != groups[own]).all()
    assert torch.equal(images[10:], own)
    assert (groups[texts[10:]] != groups[own]).all()
    assert len(texts) == len(images) == 15
    masks = torch.arange(4) <= texts[:, None]
    assert torch.equal(model.masks, masks)  # each text with its own padding


def test_itm_computes_no_more_than_it_reads() -> None:
    """Own images are read where they are; where [CLS] speaks for a pair, the last layer computes it alone."""
    model = Matcher(torch.zeros(2))
    match(model, torch.arange(6), 4)
    assert model.shared == 2
    assert torch.equal(model.rows, torch.zeros(12, 1, dtype=torch.int64))
    model = Matcher(torch.zeros(2), pool="mean")
    match(model, torch.arange(6), 4)
    assert model.rows is None


def test_itm_class_one_says_match() -> None:
    def right(m: Matcher) -> Tensor:
        return torch.stack([(m.texts != m.images).float(), (m.texts == m.images).float()], 1) * 30

    found = match(Matcher(right), torch.arange(6), 6)
    assert found["itm"].item() < 1e-6
    assert found["itm_accuracy"].item() == 1
    wrong = match(Matcher(lambda m: -right(m)), torch.arange(6), 6)
    assert wrong["itm"].item() == pytest.approx(30, rel=1e-3)
    assert wrong["itm_accuracy"].item() == 0


def test_itm_leaves_out_rows_without_a_legal_negative() -> None:
    """A batch of one group has no negative at all: matches alone would teach the head to always say yes."""
    odds = torch.tensor([math.log(2), 0.0], requires_grad=True)
    for groups in (torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)):
        found = match(Matcher(odds), groups, len(groups))
        assert math.isfinite(found["itm_accuracy"].item())
        assert found["itm"].item() == 0
        found["itm"].backward()
        assert (odds.grad == 0).all()


def test_itm_leaves_out_the_match_and_both_wrong_pairs_of_such_a_row() -> None:
    """Rows 1 to 3 of 0, 0, 0, 1 draw the fourth pair; the head answers by row, so that any slip moves the mean."""
    groups, answers = torch.tensor([0, 0, 0, 1]), torch.randn(12, 2)
    found = match(Matcher(lambda m: answers), groups, 4)
    target = torch.tensor([1] * 4 + [0] * 8)
    torch.testing.assert_close(found["itm"], F.cross_entropy(answers, target))
    feature = unit(4)
    feature[1] = torch.nan
    kept = torch.tensor([True, False, True, True]).repeat(3)
    found = match(Matcher(lambda m: answers), torch.arange(4), 4, feature)
    torch.testing.assert_close(found["itm"], F.cross_entropy(answers[kept], target[kept]))


def test_itm_of_broken_features_is_not_finite_and_does_not_raise() -> None:
    """A step whose features overflowed is left out by its loss; drawing negatives must not end the run before."""
    feature = unit(4)
    feature[2] = torch.nan
    found = match(Matcher(lambda m: torch.full((12, 2), torch.nan)), torch.arange(4), 4, feature)
    assert not math.isfinite(found["itm"].item())
