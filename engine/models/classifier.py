"""A linear classifier of an image and its text, fused."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from ..data.classes import Classes


class Classifier(nn.Module):
    """What is fine-tuned for category and sub-category recognition.

    ``names``, a buffer, is the JSON of its classes in bytes: weights without the names of their classes are worth
    nothing, so wherever one goes the other does.
    """

    names: Tensor

    def __init__(self, width: int, classes: Classes) -> None:
        super().__init__()
        self.head = nn.Linear(width, len(classes.names))
        text = json.dumps([classes.column, *classes.names], separators=(",", ":"))
        self.register_buffer("names", torch.tensor(list(text.encode("ascii")), dtype=torch.uint8))

    def forward(self, fused: Tensor) -> Tensor:
        """(B, width), :meth:`VisionLanguageModel.pool_fused` of pairs -> (B, K) float32 logits of the classes."""
        logits: Tensor = self.head(fused)
        return logits.float()

    @property
    def classes(self) -> Classes:
        """Those of the weights, which may have been loaded."""
        return read_classes(self.names)


def read_classes(names: Tensor) -> Classes:
    """The classes in a classifier's buffer. ValueError where it holds something else."""
    if names.dtype is not torch.uint8 or names.ndim != 1:
        raise ValueError(f"{names.dtype} of shape {tuple(names.shape)} is not text")
    column, *classes = json.loads(bytes(names.tolist()))
    return Classes(column=column, names=tuple(classes))
