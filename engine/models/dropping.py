"""Leaving tokens out of an encoder and putting placeholders back: its cost then falls with the mask ratio.

MAE (He et al. 2022) encodes visible patches only; FLIP (Li et al. 2023) does so for the contrast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visible:
    """Which of P positions of each row are kept. Rows that keep fewer than V end in places that do not count; these
    name some of the row's hidden positions, so that no row names a position twice."""

    index: Tensor  # (B, V) int64: the positions, those that count ascending
    valid: Tensor | None = None  # (B, V) bool: places that count; None where every row keeps exactly V

    def after(self, prefix: int) -> Visible:
        """The same behind ``prefix`` positions that are always kept, such as [CLS]."""
        rows = len(self.index)
        first = torch.arange(prefix, device=self.index.device).expand(rows, -1)
        valid = None if self.valid is None else torch.cat([torch.ones_like(first, dtype=torch.bool), self.valid], 1)
        return Visible(torch.cat([first, self.index + prefix], 1), valid)

    def rows(self, which: slice) -> Visible:
        return Visible(self.index[which], None if self.valid is None else self.valid[which])


def keep_visible(hidden: Tensor, count: int | None = None) -> Visible:
    """The positions of (B, P) bool ``hidden`` that are False.

    Args:
        count: how many that is in every row, where the caller knows: nothing then waits for the device. None: rows may
            differ and are padded to the longest, which the host has to know, so this synchronises once.

    Raises:
        ValueError: a row keeps another number than ``count``; on a GPU an assertion on the device.
    """
    order = torch.argsort(hidden, dim=1, stable=True)  # kept positions first, each part ascending
    kept = hidden.shape[1] - hidden.sum(1)
    if count is not None:
        _check_count(kept, count)
        return Visible(order[:, :count])
    if not len(hidden):
        return Visible(order)
    shortest, longest = torch.stack(torch.aminmax(kept)).tolist()
    if shortest == longest:
        return Visible(order[:, :longest])
    return Visible(order[:, :longest], torch.arange(longest, device=hidden.device) < kept[:, None])


def _check_count(kept: Tensor, count: int) -> None:
    """A wrong count would show hidden positions to the encoder, and nobody would notice."""
    agrees = kept == count
    if kept.device.type != "cpu":
        torch._assert_async(agrees.all())
    elif not bool(agrees.all()):
        raise ValueError(f"a row keeps {int(kept[~agrees][0])} positions, not {count}: pass no count where rows differ")


def gather(tokens: Tensor, visible: Visible) -> Tensor:
    """(B, P, width) -> (B, V, width): the tokens at the visible positions."""
    places = _places(visible, tokens.shape[1])
    return tokens.flatten(0, 1).index_select(0, places).unflatten(0, visible.index.shape)


def restore(tokens: Tensor, visible: Visible, fill: Tensor, positions: int) -> Tensor:
    """(B, V, width) -> (B, ``positions``, width): ``tokens`` where they were taken from, ``fill`` everywhere else.

    Args:
        fill: (width,), (positions, width) or (B, positions, width).
    """
    fill = fill.to(tokens.dtype).expand(len(tokens), positions, -1)
    if visible.valid is not None:
        tokens = torch.where(visible.valid[..., None], tokens, gather(fill, visible))
    places = _places(visible, positions)
    return fill.flatten(0, 1).index_copy(0, places, tokens.flatten(0, 1)).unflatten(0, (len(tokens), positions))


def _places(visible: Visible, positions: int) -> Tensor:
    """(B * V,) rows of a (B * positions, width) tensor."""
    first = torch.arange(len(visible.index), device=visible.index.device)[:, None] * positions
    return (visible.index + first).flatten()
