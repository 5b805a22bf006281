"""Image–text contrast against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.models import Encoded
from crossmask.engine.objectives import (
    Keys,
    StudentView,
    TeacherView,
    image_text_contrast,
)
from crossmask.engine.teacher import FeatureQueue

TAU = torch.tensor(0.5)


def encoded(feature: Tensor, tokens: Tensor | None = None) -> Encoded:
    return Encoded(torch.zeros(len(feature), 1, 1) if tokens is None else tokens, feature)


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
    queue = Keys(keys.image.flip(0), keys.text.flip(0), torch.tensor([8, 9]))
    more = Keys(keys.image, keys.text, keys.group_id, queue)
    queued = image_text_contrast(student, teacher, more, torch.tensor([4, 5]), TAU, 0.0)["itc"]
    alone = image_text_contrast(student, teacher, keys, torch.tensor([4, 5]), TAU, 0.0)["itc"]
    assert queued.item() == pytest.approx(alone.item() + math.log(2), rel=1e-6)  # every logit stands there twice


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_itc_of_a_queue_is_that_of_its_rows_among_the_keys(alpha: float) -> None:
    """Images meet the queue's texts and texts its images; a queued pair of the same group is a true match."""
    student, teacher, keys = views()
    image, text = (F.normalize(torch.randn(5, 2), dim=1) for _ in range(2))
    groups = torch.tensor([7, 4, -1, 5, 5])
    apart = Keys(keys.image, keys.text, keys.group_id, Keys(image, text, groups))
    whole = Keys(torch.cat([keys.image, image]), torch.cat([keys.text, text]), torch.cat([keys.group_id, groups]))
    found, wanted = (
        image_text_contrast(student, teacher, given, torch.tensor([4, 5]), TAU, alpha)["itc"]
        for given in (apart, whole)
    )
    torch.testing.assert_close(found, wanted)


def test_itc_sends_a_gradient_to_keys_of_the_batch_that_carry_one() -> None:
    """As they do where a student is its own teacher: fine-tuning without momentum."""
    student, teacher, keys = views()
    carried = keys.text.clone().requires_grad_()
    given = Keys(keys.image, carried, keys.group_id, Keys(keys.image, keys.text, torch.tensor([8, 9])))
    image_text_contrast(student, teacher, given, torch.tensor([4, 5]), TAU, 0.0)["itc"].backward()
    assert (carried.grad != 0).any()


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


def test_itc_reads_the_queue_where_it_lies() -> None:
    """Nothing of the queue is copied, so writing to it before the backward is noticed."""
    student, teacher, keys = views(requires_grad=True)
    queue = FeatureQueue(4, 2)
    queue.enqueue(keys.image, keys.text, torch.tensor([8, 9]))
    given = Keys(keys.image, keys.text, keys.group_id, Keys(queue.image, queue.text, queue.group_id))
    loss = image_text_contrast(student, teacher, given, torch.tensor([4, 5]), TAU, 0.4)["itc"]
    queue.enqueue(keys.image, keys.text, torch.tensor([8, 9]))
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
