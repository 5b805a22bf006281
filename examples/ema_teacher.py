"""A momentum teacher in a plain loop: a student learns from noisy labels, its average is better than itself.

python examples/ema_teacher.py [--steps 300]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmask.engine.teacher import EmaTeacher, WarmUp


def batch(count: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (count, 2) of two rings, and which ring; ``noise`` of the labels are wrong."""
    ring = torch.randint(2, (count,), generator=generator)
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    radius = 1.0 + ring + 0.25 * torch.randn(count, generator=generator)
    wrong = torch.rand(count, generator=generator) < noise
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), torch.where(wrong, 1 - ring, ring)


def main(steps: int) -> tuple[float, float]:
    """Accuracies of the student and of its teacher on points without noise, each the mean over the last half."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    student = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    teacher = EmaTeacher(student, WarmUp(0.98))
    teacher.attach(optimizer)  # from here on it follows each step that the optimizer takes
    test, ring = batch(2000, 0.0, generator)
    found: list[tuple[float, float]] = []
    for step in range(steps):
        points, labels = batch(32, 0.35, generator)
        loss = F.cross_entropy(student(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps // 2:
            with torch.no_grad():
                right = [float((model(test).argmax(1) == ring).float().mean()) for model in (student, teacher)]
            found.append((right[0], right[1]))
    accuracies = torch.tensor(found).mean(0).tolist()
    print(f"student {accuracies[0]:.1%}, its teacher {accuracies[1]:.1%}, after {teacher.updates} updates")
    return accuracies[0], accuracies[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
