"""Multinomial logistic regression on frozen features, and how well it predicts: accuracy and macro-F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..beats import beat

STRENGTHS = (1.0, 0.1, 0.01, 0.001, 0.0001)  # of the penalty, from which one is chosen
HELD_OUT = 0.2  # share of a class's groups on which it is chosen
ITERATIONS = 100


@dataclass(frozen=True)
class Probe:
    """Predicts class ``argmax((x - mean) / deviation @ weight + bias)``."""

    mean: Tensor  # (D,)
    deviation: Tensor  # (D,)
    weight: Tensor  # (D, K)
    bias: Tensor  # (K,)

    def predict(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,) int64."""
        return (self.standardised(features) @ self.weight + self.bias).argmax(1)

    def standardised(self, features: Tensor) -> Tensor:
        return (features.to(self.mean) - self.mean) / self.deviation


def fit_probe(
    features: Tensor, target: Tensor, classes: int, strength: float, start: Probe | None = None,
    iterations: int = ITERATIONS,
) -> Probe:  # fmt: skip
    """Minimise mean cross-entropy + strength / 2 * |weight|^2, bias free, by L-BFGS (Liu and Nocedal 1989).

    Deterministic: from 0, or from ``start``, on all samples at once. Features are standardised with their own mean and
    deviation; one that never changes counts nothing.

    Args:
        features: (N, D), in whose dtype everything is computed. target: (N,) int64 below ``classes``.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    alive = deviation > 1e-6 * mean.abs().clamp(min=1.0)
    probe = Probe(
        mean,
        torch.where(alive, deviation, torch.inf),
        features.new_zeros(features.shape[1], classes) if start is None else start.weight.clone(),
        features.new_zeros(classes) if start is None else start.bias.clone(),
    )
    x = probe.standardised(features)
    parameters = [probe.weight.requires_grad_(), probe.bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters, max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        beat("evaluation: fitting a linear probe")
        solver.zero_grad()
        value = F.cross_entropy(x @ probe.weight + probe.bias, target) + strength / 2 * probe.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)  # which switches gradients on
    for parameter in parameters:
        parameter.requires_grad_(False)
    return probe


def choose_probe(
    features: Tensor, target: Tensor, group: Tensor, classes: int, seed: int, strengths: Sequence[float] = STRENGTHS
) -> tuple[Probe, float, int]:
    """A probe of all samples under the penalty that does best, by accuracy, on a part that was held out; of equals the
    strongest. Returns it, its strength and how many samples it was chosen on: 0 where no class has two groups, which
    takes the middle one.

    ``group`` (N,) int64: samples of a group are never on both sides.
    """
    out = held_out_rows(target, group, seed)
    if not out.any():
        strength = strengths[len(strengths) // 2]
        return fit_probe(features, target, classes, strength), strength, 0
    best, chosen, probe = -1.0, strengths[0], None
    for strength in sorted(strengths, reverse=True):  # each starts from the stronger one's solution
        probe = fit_probe(features[~out], target[~out], classes, strength, probe)
        right = float((probe.predict(features[out]) == target[out]).double().mean())
        if right > best:
            best, chosen = right, strength
    return fit_probe(features, target, classes, chosen), chosen, int(out.sum())


def held_out_rows(target: Tensor, group: Tensor, seed: int) -> Tensor:
    """(N,) bool: of each class a fifth of its groups, rounded down, so one remains; where classes share a group it is
    the first one's."""
    luck = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed)).tolist()
    owner: dict[int, int] = {}
    rank: dict[int, int] = {}
    for row, (number, kind) in enumerate(zip(group.tolist(), target.tolist(), strict=True)):
        if number not in owner:
            owner[number], rank[number] = kind, luck[row]
    members: dict[int, list[int]] = {}
    for number in sorted(owner, key=lambda number: rank[number]):
        members.setdefault(owner[number], []).append(number)
    out = {number for numbers in members.values() for number in numbers[: int(HELD_OUT * len(numbers))]}
    return torch.tensor([number in out for number in group.tolist()], dtype=torch.bool, device=target.device)


def scores(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Percent: accuracy, and macro-F1 as scikit-learn defines it: the mean over the classes that occur in ``predicted``
    or ``target`` (N,) of 2 TP / (2 TP + FP + FN), which is 0 for a class that is never right. Without samples both are
    0."""
    if not len(target):
        return {"accuracy": 0.0, "macro_f1": 0.0}
    right = predicted == target
    present, place = torch.cat([predicted, target]).unique(return_inverse=True)
    given, true = place.split(len(target))
    count = len(present)
    hits = torch.bincount(true[right], minlength=count).double()
    total = torch.bincount(given, minlength=count) + torch.bincount(true, minlength=count)
    return {"accuracy": 100.0 * float(right.double().mean()), "macro_f1": 100.0 * float((2 * hits / total).mean())}
