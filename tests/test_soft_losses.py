"""Soft-target losses: contrastive over keys and cross-entropy over a vocabulary, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.kernels import soft_contrastive, soft_cross_entropy


def log_softmax(z: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in z))
    return [x - total for x in z]


def softmax(z: list[float]) -> list[float]:
    return [math.exp(x) for x in log_softmax(z)]


def features(n: int, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n, width, dtype=dtype), dim=-1)


def test_contrastive_by_hand() -> None:
    """Two queries, three keys, tau 0.5, alpha 0.4; the first query has two true matches."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    teacher = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    groups, key_groups = torch.tensor([7, 8]), torch.tensor([7, 8, 7])
    loss = soft_contrastive(queries, keys, teacher, groups, key_groups, torch.tensor(0.5), 0.4)
    q0, q1 = softmax([1.2, 1.6, 2.0]), softmax([0.0, 2.0, 1.6])
    targets = [
        [0.4 * q0[0] + 0.3, 0.4 * q0[1], 0.4 * q0[2] + 0.3],
        [0.4 * q1[0], 0.4 * q1[1] + 0.6, 0.4 * q1[2]],
    ]
    wanted = [
        -sum(t * x for t, x in zip(row, log_softmax(z), strict=True))
        for row, z in zip(targets, ([2.0, 0.0, 1.2], [0.0, 2.0, 1.6]), strict=True)
    ]
    assert loss.tolist() == pytest.approx(wanted, rel=1e-6)
    assert loss.tolist() == pytest.approx([1.10433, 0.71028], abs=1e-5)


def test_contrastive_without_teacher_is_cross_entropy() -> None:
    queries, keys, teacher = features(4), features(9), features(4)
    groups = torch.arange(4)
    loss = soft_contrastive(queries, keys, teacher, groups, torch.arange(9), torch.tensor(0.07), 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(queries @ keys.T / 0.07, groups, reduction="none"))


def test_contrastive_with_only_the_teacher_ignores_the_groups() -> None:
    queries, keys, teacher = features(4), features(9), features(4)
    tau = torch.tensor(0.2)
    first = soft_contrastive(queries, keys, teacher, torch.arange(4), torch.arange(9), tau, 1.0)
    other = soft_contrastive(queries, keys, teacher, torch.arange(4), torch.arange(9).flip(0), tau, 1.0)
    target = (teacher @ keys.T / 0.2).softmax(1)
    torch.testing.assert_close(first, F.cross_entropy(queries @ keys.T / 0.2, target, reduction="none"))
    torch.testing.assert_close(first, other)


def test_contrastive_spreads_evenly_over_a_group() -> None:
    queries, keys, teacher = features(3), features(6), features(3)
    groups, key_groups = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0, 2, 0, 1])
    target = torch.zeros(3, 6, dtype=torch.float64)
    target[0, [0, 2, 4]], target[1, [1, 5]], target[2, 3] = 1 / 3, 1 / 2, 1.0
    loss = soft_contrastive(queries, keys, teacher, groups, key_groups, torch.tensor(0.1), 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(queries @ keys.T / 0.1, target, reduction="none"))


def test_contrastive_gradient_identity() -> None:
    """dL/dz_j = softmax(z)_j - alpha q_j - (1 - alpha) delta_j, with delta spread over the group."""
    # With keys = identity and tau = 1 the logits are the queries themselves.
    queries, teacher = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    queries.requires_grad_()
    groups, key_groups = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 3, 9])
    one = torch.tensor(1.0, dtype=torch.float64)
    soft_contrastive(queries, torch.eye(5).double(), teacher, groups, key_groups, one, 0.3).sum().backward()
    delta = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0.5, 0.5, 0]]).double()
    wanted = queries.detach().softmax(1) - 0.3 * teacher.softmax(1) - 0.7 * delta
    torch.testing.assert_close(queries.grad, wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_contrastive_gradcheck(alpha: float) -> None:
    """The temperature gets the gradient through the student's logits alone: the target is a constant."""
    queries, keys, teacher = features(3).requires_grad_(), features(5), features(3)
    groups, key_groups = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2, 1, 0])
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    frozen = tau.detach().clone()

    def loss(q: Tensor, t: Tensor) -> Tensor:
        positive = (groups[:, None] == key_groups).double()
        target = (1 - alpha) * positive / positive.sum(1, keepdim=True)
        target = target + alpha * (teacher @ keys.T / frozen).softmax(1)
        return -(target * (q @ keys.T / t).log_softmax(1)).sum(1)

    found = soft_contrastive(queries, keys, teacher, groups, key_groups, tau, alpha)
    gradients = torch.autograd.grad(found.sum(), (queries, tau))
    torch.testing.assert_close(found, loss(queries, tau))
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(queries, tau).sum(), (queries, tau)))
    assert torch.autograd.gradcheck(loss, (queries, tau))
    if alpha == 0:  # the target does not move with the temperature, so finite differences see the same function
        both = (queries, tau)
        assert torch.autograd.gradcheck(
            lambda q, t: soft_contrastive(q, keys, teacher, groups, key_groups, t, alpha), both
        )


def test_contrastive_sends_no_gradient_to_teacher_or_keys() -> None:
    queries, keys, teacher = (features(n).requires_grad_() for n in (2, 3, 2))
    groups = torch.arange(2)
    soft_contrastive(queries, keys, teacher, groups, torch.arange(3), torch.tensor(0.1), 0.5).sum().backward()
    assert queries.grad is not None
    assert keys.grad is None
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_contrastive_computes_in_float32(dtype: torch.dtype) -> None:
    queries, keys, teacher = (features(n, 16).to(dtype) for n in (4, 40, 4))
    args = (torch.arange(4), torch.arange(40))
    loss = soft_contrastive(queries, keys, teacher, *args, torch.tensor(0.01), 0.4)
    assert loss.dtype == torch.float32
    wanted = soft_contrastive(
        queries.double(), keys.double(), teacher.double(), *args, torch.tensor(0.01).double(), 0.4
    )
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-4)


def test_contrastive_errors() -> None:
    q, k, g, h, tau = torch.zeros(2, 4), torch.zeros(3, 4), torch.arange(2), torch.arange(3), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"queries \(2, 4\) and keys \(3, 5\) must be"):
        soft_contrastive(q, torch.zeros(3, 5), q, g, h, tau, 0.0)
    with pytest.raises(ValueError, match=r"teacher_queries \(3, 4\) must match queries \(2, 4\)"):
        soft_contrastive(q, k, k, g, h, tau, 0.0)
    with pytest.raises(ValueError, match=r"groups must be \(2,\) and \(3,\)"):
        soft_contrastive(q, k, q, h, h, tau, 0.0)


def test_cross_entropy_by_hand() -> None:
    logits, teacher = [[0.0, math.log(2), math.log(5)]], [[0.0, 0.0, math.log(2)]]
    loss = soft_cross_entropy(torch.tensor(logits), torch.tensor([1]), torch.tensor(teacher), 0.4)
    hard = math.log(8 / 2)
    soft = 0.25 * math.log(8) + 0.25 * math.log(4) + 0.5 * math.log(8 / 5)
    assert loss.tolist() == pytest.approx([0.6 * hard + 0.4 * soft], rel=1e-6)


def test_cross_entropy_at_the_ends_of_alpha() -> None:
    logits, teacher, labels = torch.randn(6, 11), torch.randn(6, 11), torch.randint(11, (6,))
    hard = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, labels, None, 0.0), hard)
    torch.testing.assert_close(soft_cross_entropy(logits, labels, teacher, 0.0), hard)
    soft = F.cross_entropy(logits, teacher.softmax(1), reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, labels, teacher, 1.0), soft)


def test_cross_entropy_gradient_identity() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3])
    soft_cross_entropy(logits, labels, teacher, 0.25).sum().backward()
    wanted = logits.detach().softmax(1) - 0.25 * teacher.detach().softmax(1) - 0.75 * F.one_hot(labels, 7)
    torch.testing.assert_close(logits.grad, wanted)
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, labels, teacher.detach(), 0.25), (logits,))


def test_cross_entropy_of_no_rows_keeps_the_graph() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 7), 0.4)
    assert loss.shape == (0,)
    assert loss.sum().item() == 0
    loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy_computes_in_float32(dtype: torch.dtype) -> None:
    logits, teacher, labels = (10 * torch.randn(5, 300)).to(dtype), torch.randn(5, 300).to(dtype), torch.arange(5)
    loss = soft_cross_entropy(logits, labels, teacher, 0.4)
    assert loss.dtype == torch.float32
    wanted = soft_cross_entropy(logits.double(), labels, teacher.double(), 0.4)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)


def test_cross_entropy_errors() -> None:
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits \(2, 5\) and labels \(3,\) must be"):
        soft_cross_entropy(logits, torch.zeros(3, dtype=torch.int64), None, 0.0)
    with pytest.raises(ValueError, match=r"distillation 0.4 needs teacher_logits of shape \(2, 5\)"):
        soft_cross_entropy(logits, labels, None, 0.4)
    with pytest.raises(ValueError, match=r"needs teacher_logits"):
        soft_cross_entropy(logits, labels, torch.zeros(2, 4), 0.4)
