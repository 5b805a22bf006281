"""Policies with a network of their own: what they hide, and that what they learn is what their papers say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmask.engine.masking import Draws, MaskContext, MaskPlan, Policy, build_policy
from crossmask.engine.recipe import MaskingSection


def context_of(rows: int, grid: tuple[int, int] = (5, 8), step: int = 0, **given: Any) -> MaskContext:
    tokens = torch.ones(rows, 6, dtype=torch.int64)
    maskable = torch.tensor([False, True, True, True, True, False]).expand(rows, 6)
    return MaskContext(tokens, tokens > 0, maskable, grid, Draws(0, step, torch.arange(rows)), **given)


def policy_of(name: str, **options: Any) -> Policy:
    return build_policy(MaskingSection(policy=name, options=options))


def plan_of(policy: str, context: MaskContext, **options: Any) -> MaskPlan:
    return policy_of(policy, **options)(context)


def near(shares: Tensor, expected: float | Tensor, rows: int) -> bool:
    """Within five standard errors of shares that were counted over so many rows."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (expected * (1 - expected) / rows).sqrt()
    return bool(((shares.double() - expected).abs() <= 5 * error + 1e-9).all())


# ── hard_patches ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("progress", "hardest"), [(0.0, 0), (0.2, 2), (0.5, 6), (1.0, 12)])
def test_share_of_hardest_patches_grows_over_the_run(progress: float, hardest: int) -> None:
    """24 of 40 patches are hidden; alpha rises from 0 to a half of them."""
    rows, P = 4000, 40
    scores = torch.randn(P)
    rank = scores.argsort(descending=True)
    context = context_of(rows, patch_scores=scores.expand(rows, P), image_ratio=0.6, progress=progress)
    hidden = plan_of("hard_patches", context).image
    assert (hidden.sum(1) == 24).all()
    share = hidden.double().mean(0)[rank]
    assert (share[:hardest] == 1).all()
    assert near(share[hardest:], (24 - hardest) / (40 - hardest), rows)


def test_schedule_of_hardest_patches_can_be_set() -> None:
    rows, P = 50, 40
    scores = torch.randn(rows, P)
    context = context_of(rows, patch_scores=scores, image_ratio=0.6, progress=0.5)
    top = torch.zeros(rows, P, dtype=torch.bool).scatter_(1, scores.topk(24).indices, True)
    hidden = plan_of("hard_patches", context, start=1.0, end=1.0).image
    assert torch.equal(hidden, top)


def test_measured_losses_come_before_predicted_ones() -> None:
    losses, scores = torch.rand(2, 3, 40)
    hidden = plan_of("hard_patches", context_of(3, patch_losses=losses, patch_scores=scores), start=1.0, end=1.0).image
    wanted = plan_of("hard_patches", context_of(3, patch_scores=losses), start=1.0, end=1.0).image
    assert torch.equal(hidden, wanted)
    assert torch.equal(plan_of("hard_patches", context_of(3, patch_losses=losses), start=1.0, end=1.0).image, wanted)


def relative_loss(scores: Tensor, hidden: Tensor, losses: Tensor) -> float:
    """Wang et al. 2023 as loops: binary cross-entropy of sigmoid(s_i - s_j) against L_i > L_j, each pair both ways."""
    of_samples = []
    for s, h, loss in zip(scores.tolist(), hidden.tolist(), losses.tolist(), strict=True):
        terms = []
        for i in range(len(s)):
            for j in range(len(s)):
                if h[i] and h[j] and loss[i] != loss[j]:
                    p = 1 / (1 + math.exp(s[j] - s[i]))
                    terms.append(-math.log(p) if loss[i] > loss[j] else -math.log(1 - p))
        if terms:
            of_samples.append(sum(terms) / len(terms))
    return sum(of_samples) / len(of_samples)


def test_relative_loss_is_that_of_a_double_loop() -> None:
    scores, losses = torch.randn(4, 13) * 3, torch.rand(4, 13)
    losses[:, 5] = losses[:, 6]  # a tie is no pair
    hidden = torch.rand(4, 13) < 0.6
    hidden[3] = False
    losses = losses * hidden
    found = policy_of("hard_patches").network_loss(scores, hidden, losses)
    assert float(found) == pytest.approx(relative_loss(scores, hidden, losses), rel=1e-5)
    assert float(policy_of("hard_patches").network_loss(300 * scores, hidden, losses)) < math.inf


def test_predictor_learns_which_patches_are_hard() -> None:
    """The loss is a direction of the features; what was never hidden is ranked right too."""
    policy = policy_of("hard_patches")
    network = policy.network(16)
    assert network is not None
    features, direction = torch.randn(32, 20, 16), torch.randn(16)
    losses = (features @ direction).exp()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(150):
        context = context_of(32, (4, 5), step, patch_scores=network(features).detach(), progress=0.5)
        hidden = policy(context).image
        loss = policy.network_loss(network(features), hidden, losses * hidden)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    fresh = torch.randn(50, 20, 16)
    truth, found = fresh @ direction, network(fresh).detach()
    agree = ((truth[:, :, None] > truth[:, None]) == (found[:, :, None] > found[:, None])).double().mean()
    assert agree > 0.9  # a half by chance


# ── adamae ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_visible_patches_are_drawn_in_proportion_to_softmax() -> None:
    rows, scores = 8000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0])
    context = context_of(rows, (2, 3), patch_scores=scores.expand(rows, 6), image_ratio=5 / 6)
    visible = ~plan_of("adamae", context).image
    assert (visible.sum(1) == 1).all()
    p = scores.double().softmax(0)
    assert near(visible.double().mean(0), p, rows)
    # two without replacement: p_i + sum over other first draws j of p_j p_i / (1 - p_j)
    two = ~plan_of("adamae", context_of(rows, (2, 3), patch_scores=scores.expand(rows, 6), image_ratio=4 / 6)).image
    second = torch.stack([sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)])
    assert (two.sum(1) == 2).all()
    assert near(two.double().mean(0), p + second, rows)


def test_policy_gradient_is_that_of_a_loop() -> None:
    scores, losses = torch.randn(4, 13), torch.rand(4, 13)
    hidden = torch.rand(4, 13) < 0.6
    log_p = scores.double().log_softmax(1)
    of_samples = []
    for row in range(4):
        terms = [float(log_p[row, i] * losses[row, i]) for i in range(13) if hidden[row, i]]
        of_samples.append(-sum(terms) / len(terms))
    found = policy_of("adamae").network_loss(scores, hidden, losses * hidden)
    assert float(found) == pytest.approx(sum(of_samples) / 4, rel=1e-5)


def test_probability_moves_to_the_patches_of_high_loss() -> None:
    """Every fifth patch, told by its features, is ten times as hard: few steps of plain SGD, on the policy's draws."""
    policy = policy_of("adamae")
    network = policy.network(16)
    assert network is not None
    hard = torch.rand(16, 20).argsort(1) < 4
    features = 0.3 * torch.randn(16, 20, 16)
    features[:, :, 0] += torch.where(hard, 2.0, -2.0)
    losses = torch.where(hard, 1.0, 0.1)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.2)

    def draw(step: int) -> Tensor:
        scores = network(features).detach()
        return policy(context_of(16, (4, 5), step, patch_scores=scores, image_ratio=0.75)).image

    def on_hard() -> Tensor:
        return (network(features).detach().softmax(1) * hard).sum(1)

    before = on_hard()
    for step in range(300):
        hidden = draw(step)
        loss = policy.network_loss(network(features), hidden, losses * hidden)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert before.mean() < 0.35
    assert (on_hard() > 0.5).all()
    # It settles where p is in proportion to the loss times the chance to be hidden.
    share = torch.stack([draw(step) for step in range(1000, 1100)]).double().mean(0) * losses
    settled = (share * hard).sum(1) / share.sum(1)
    assert (on_hard() - settled).abs().mean() < 0.1
