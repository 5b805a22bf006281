"""Image–text contrast over two ranks, whose students' features are the keys too, against the same batch in one process.

Prints the largest error of the gradients that the ranks' average gives, as ZeRO averages them, and their size.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.teacher.gather import all_gather_with_grad, gather_features
from crossmask.kernels import soft_contrastive

LOCAL, WIDTH, QUEUE = 5, 8, 30


class Student(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (torch.nn.Linear(6, WIDTH, bias=False, dtype=torch.float64) for _ in range(2))
        self.tau = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def contrast(
        self, images: Tensor, words: Tensor, groups: Tensor, queue: tuple[Tensor, Tensor], whole: bool
    ) -> Tensor:
        """Mean over the rows that are given. ``whole``: they are all; else keys of other ranks are gathered."""
        image, text = F.normalize(self.image(images), dim=1), F.normalize(self.text(words), dim=1)
        gather = (lambda x: x) if whole else all_gather_with_grad
        of_keys = groups if whole else gather_features(groups)
        losses = [
            soft_contrastive(
                query, gather(key), teacher, groups, of_keys, self.tau, 0.4, queue=queue[0], queue_groups=queue[1]
            ).mean()
            for query, key, teacher in ((image, text, image.flip(1)), (text, image, text.flip(1)))
        ]
        return sum(losses) / 2


def main() -> None:
    rank, world = ranks.join()
    torch.manual_seed(0)  # the same student, batch and queue everywhere
    student, total = Student(), LOCAL * world
    images, words = (torch.randn(total, 6, dtype=torch.float64) for _ in range(2))
    groups = torch.randint(0, 6, (total,))  # some pairs of different ranks match
    queue = F.normalize(torch.randn(QUEUE, WIDTH, dtype=torch.float64), dim=1), torch.randint(-1, 6, (QUEUE,))
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)

    loss = student.contrast(images[mine], words[mine], groups[mine], queue, whole=False)
    found = torch.autograd.grad(loss, tuple(student.parameters()))
    for gradient in (loss := loss.detach(), *found):
        dist.all_reduce(gradient)
        gradient /= world
    alone = student.contrast(images, words, groups, queue, whole=True)
    wanted = torch.autograd.grad(alone, tuple(student.parameters()))
    errors = [(x - y).abs().max() / y.abs().max() for x, y in zip((loss, *found), (alone, *wanted), strict=True)]
    print("error", float(max(errors)), "size", float(min(x.abs().max() for x in wanted)))
    ranks.leave()


if __name__ == "__main__":
    main()
