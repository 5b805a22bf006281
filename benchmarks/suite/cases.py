"""Every case of the suite, cheap to list: inputs are made when one is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .problem import Problem

MODULES = ("attention", "selection", "similarity", "contrastive", "cross_entropy", "grouping", "linear", "ema")


@dataclass(frozen=True)
class Case:
    """A problem that can be built on a device, and the names that will be in its rows."""

    op: str
    shape: str
    what: str
    dtype: str
    ways: tuple[str, ...]
    implementations: tuple[str, ...]
    build: Callable[[torch.device], Problem]

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.op, self.what, self.shape, self.dtype)))

    @property
    def name(self) -> str:
        """As pytest selects it with -k."""
        return self.title.replace(", ", "-").replace(" ", "_")


def cases(device: str) -> Iterator[Case]:
    """All of them, op by op. Sizes and dtypes are those that make sense on a ``device`` of that type."""
    for name in MODULES:
        yield from importlib.import_module(f"suite.jobs.{name}").cases(device)
