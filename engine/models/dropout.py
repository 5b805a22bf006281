"""Dropout of activations, by draws that cost little on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from crossmask.kernels.unseeded import drop


class Dropout(nn.Dropout):
    """``nn.Dropout``, with the draws of :func:`crossmask.kernels.unseeded.drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training and self.p > 0 else x


def use_own_dropout(module: nn.Module) -> None:
    """Puts a :class:`Dropout` in the place of every ``nn.Dropout`` under ``module``."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Dropout:
            setattr(module, name, Dropout(child.p))
        else:
            use_own_dropout(child)
