"""Image–text contrast and matching against numbers worked out by hand, with a stand-in for the match head."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.models import Encoded
from crossmask.engine.objectives import (
    PRIOR,
    Keys,
    StudentView,
    TeacherView,
    image_text_contrast,
    image_text_matching,
)
from crossmask.engine.objectives.itm import draw_negatives

TAU = torch.tensor(0.5)


def encoded(feature: Tensor, tokens: Tensor | None = None) -> Encoded:
    return Encoded(torch.zeros(len(feature), 1, 1) if tokens is None else tokens, feature)


# ------------------------------------------------------------------------------------------------------------- ITC


def views(requires_grad: bool = False) -> tuple[StudentView, TeacherView, Keys]:
    """Two pairs. Logits at tau 0.5: image to text (2, 0), (1.2, 1.6); text to image (1.6, 0), (1.2, 2)."""
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=requires_grad)
    text = torch.tensor([[0.8, 0.6], [0.0, 1.0]], requires_grad=requires_grad)
    teacher_image, teacher_text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    student = StudentView(encoded(image), encoded(text))
    keys = Keys(teacher_image, teacher_text, torch.tensor([4, 5]))
    return student, TeacherView(teacher_image, teacher_text), keys


def test_itc_of_two_pairs() -> None:
    student, teacher, keys = views()
    found = image_text_contrast(student, teacher, keys, torch.tensor([4, 5]), TAU, 0.0)
    assert set(found) == {"itc"}
    # log(1 + e^(other - own)) of each row
    i2t = (math.log1p(math.exp(0.0 - 2.0)) + math.log1p(math.exp(1.2 - 1.6))) / 2
    t2i = (math.log1p(math.exp(1.2 - 1.6)) + math.log1p(math.exp(0.0 - 2.0))) / 2
    assert found["itc"].item() == pytest.approx((i2t + t2i) / 2, rel=1e-6)


def test_itc_contrasts_images_with_texts() -> None:
    """Image features meet text keys and the other way round: keys of one kind made different from the other."""
    student, teacher, _ = views()
    keys = Keys(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([4, 5]))
    found = image_text_contrast(student, teacher, keys, torch.tensor([4, 5]), TAU, 0.0)["itc"]
    i2t = [math.log1p(math.exp(0.0 - 2.0)), math.log1p(math.exp(1.2 - 1.6))]
    t2i = [math.log1p(math.exp(1.6 - 1.2)), math.log1p(math.exp(2.0 - 0.0))]
    assert found.item() == pytest.approx((sum(i2t) + sum(t2i)) / 4, rel=1e-6)


def test_itc_distils_each_direction_from_its_own_teacher_feature() -> None:
    student, _, keys = views()
    teacher = TeacherView(torch.tensor([[0.6, 0.8], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    found = image_text_contrast(student, teacher, keys, torch.tensor([4, 5]), TAU, 1.0)["itc"]
    z_image, z_text = student.image.feature @ keys.text.T / 0.5, student.text.feature @ keys.image.T / 0.5
    i2t = F.cross_entropy(z_image, (teacher.image_feature @ keys.text.T / 0.5).softmax(1))
    t2i = F.cross_entropy(z_text, (teacher.text_feature @ keys.image.T / 0.5).softmax(1))
    torch.testing.assert_close(found, 0.5 * (i2t + t2i))


def test_itc_of_one_group_is_a_match_everywhere() -> None:
    student, teacher, keys = views()
    same = Keys(keys.image, keys.text, torch.tensor([4, 4]))
    found = image_text_contrast(student, teacher, same, torch.tensor([4, 4]), TAU, 0.0)["itc"]
    rows = [(2.0, 0.0), (1.2, 1.6), (1.6, 1.2), (0.0, 2.0)]
    wanted = sum(math.log(math.exp(a) + math.exp(b)) - (a + b) / 2 for a, b in rows) / 4
    assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_itc_reads_the_queue() -> None:
    student, teacher, keys = views()
    more = Keys(*(torch.cat([x, x.flip(0)]) for x in (keys.image, keys.text)), torch.tensor([4, 5, 8, 9]))
    queued = image_text_contrast(student, teacher, more, torch.tensor([4, 5]), TAU, 0.0)["itc"]
    alone = image_text_contrast(student, teacher, keys, torch.tensor([4, 5]), TAU, 0.0)["itc"]
    assert queued.item() == pytest.approx(alone.item() + math.log(2), rel=1e-6)  # every logit stands there twice


@pytest.mark.parametrize(("given", "used"), [(1e-5, 0.001), (0.9, 0.5), (0.2, 0.2)])
def test_itc_clamps_the_temperature(given: float, used: float) -> None:
    student, teacher, keys = views()
    groups = torch.tensor([4, 5])
    found = image_text_contrast(student, teacher, keys, groups, torch.tensor(given), 0.4)["itc"]
    wanted = image_text_contrast(student, teacher, keys, groups, torch.tensor(used), 0.4)["itc"]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("given", [0.9, 0.2, 1e-4])
def test_itc_temperature_can_come_back(given: float) -> None:
    """Clamping the parameter, as ALBEF does, leaves it a gradient; a clamp in the graph alone would strand it."""
    student, teacher, keys = views()
    tau = torch.tensor(given, requires_grad=True)
    image_text_contrast(student, teacher, keys, torch.tensor([5, 4]), tau, 0.0)["itc"].backward()
    assert tau.grad.item() != 0


def test_itc_gradients_reach_the_student_alone() -> None:
    student, teacher, keys = views(requires_grad=True)
    image_text_contrast(student, teacher, keys, torch.tensor([4, 5]), TAU, 0.4)["itc"].backward()
    assert (student.image.feature.grad != 0).any()
    assert (student.text.feature.grad != 0).any()


# ------------------------------------------------------------------------------------------------------------- ITM


def unit(n: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(n, width), dim=-1)


def draw(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    groups: Tensor,
    tau: float,
    rows: int,
    hardness: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both pairs are (image, text) features."""
    seen = StudentView(encoded(student[0]), encoded(student[1]))
    return draw_negatives(seen, TeacherView(*teacher), groups, torch.tensor(tau), rows, hardness)


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_negatives_are_never_a_true_match(hardness: float) -> None:
    """Twins within a group look exactly alike, so that a leak would be drawn at once."""
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 3, 0])
    feature = unit(4)[groups]
    for _ in range(300):
        images, texts, legal = draw((feature, feature), (feature, feature), groups, 0.01, 8, hardness)
        assert legal.all()
        assert (groups[images] != groups).all()
        assert (groups[texts] != groups).all()


def test_negatives_come_from_the_whole_batch_for_the_first_rows() -> None:
    groups = torch.arange(8)
    seen: set[int] = set()
    for _ in range(60):
        images, texts, legal = draw((unit(8), unit(8)), (unit(8), unit(8)), groups, 0.5, 3, 0.0)
        assert images.shape == texts.shape == legal.shape == (3,)
        seen |= set(images.tolist()) | set(texts.tolist())
    assert seen == set(range(8))


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_negatives_follow_the_softmax_of_their_similarity(hardness: float) -> None:
    """Texts draw the teacher's images and images the teacher's texts by similarity, true matches taken out first."""
    image, text, teacher_image, teacher_text = (unit(6) for _ in range(4))
    groups = torch.tensor([0, 1, 2, 3, 4, 0])
    n, tau = 3000, 0.4
    drawn = [torch.zeros(6, 6), torch.zeros(6, 6)]
    rows = torch.arange(6)
    for _ in range(n):
        images, texts, _ = draw((image, text), (teacher_image, teacher_text), groups, tau, 6, hardness)
        drawn[0][rows, images] += 1
        drawn[1][rows, texts] += 1
    same = groups[:, None] == groups
    for count, z in zip(drawn, (text @ teacher_image.T, image @ teacher_text.T), strict=True):
        p = (hardness * z / tau).masked_fill(same, -torch.inf).softmax(1)
        spread = (p * (1 - p) / n).sqrt()
        assert ((count / n - p).abs() <= 4.5 * spread + 1e-9).all()
    if hardness == 0:
        assert p[1].max() == pytest.approx(1 / 5)  # uniform over the five others


class Matcher:
    """Records what is fused; its match head answers with fixed log-odds. A token holds its sample's number."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def fuse(
        self, tokens: Tensor, token_mask: Tensor, image: list[tuple[Tensor, Tensor]], head_mask: object = None
    ) -> SimpleNamespace:
        self.texts, self.images, self.masks = tokens[:, 0, 0], image[0][0][:, 0, 0, 0], token_mask
        assert torch.equal(image[0][0], image[0][1])
        return SimpleNamespace(tokens=tokens)

    def match_logits(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
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
    return image_text_matching(model, student, view, masks, groups, torch.tensor(0.07), rows, 1.0)  # type: ignore[arg-type]


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


def test_itm_of_broken_features_is_not_finite_and_does_not_raise() -> None:
    """A step whose features overflowed is left out by its loss; drawing negatives must not end the run before."""
    feature = unit(4)
    feature[2] = torch.nan
    found = match(Matcher(lambda m: torch.full((12, 2), torch.nan)), torch.arange(4), 4, feature)
    assert not math.isfinite(found["itm"].item())
