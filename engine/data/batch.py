"""What the data wing hands to the training step."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's image–text pairs. B pairs, L tokens (padded to the longest caption of the batch), H = W pixels.

    ``words`` and ``things`` carry the known truth of composed scenes and of single drawings; they are only read
    by evaluation and never by an objective. A data source without such truth leaves them ``None``.
    """

    images: Tensor  # (B, 3, H, W) float32, normalised
    token_ids: Tensor  # (B, L) int64, [CLS] first, [SEP] last, [PAD] behind
    token_mask: Tensor  # (B, L) bool, True = a real token, [CLS] and [SEP] included
    maskable: Tensor  # (B, L) bool, True = a word that may be masked (never [CLS], [SEP], [PAD])
    group_id: Tensor  # (B,) int64, equal ids are all true matches of one another
    index: Tensor  # (B,) int64, position in the data source
    things: Tensor | None = None  # (B, H, W) uint8, 0 = background, k = the k-th drawn thing
    words: Tensor | None = None  # (B, L) uint8, 0 = names no thing, k = names the k-th thing, 255 = a thing not drawn
    priors: Tensor | None = None  # (B, P) float32, weights of patches for mask policies that read them
    # (B,) bool or int; between pairs of two kinds a look at the layout tells that they do not match: ITM's negatives
    # are of the same kind. None: all are of one
    kind: Tensor | None = None
    reference: Tensor | None = None  # (B, 3, H, W) float32: of triplets, whose text says how ``images`` differ from it
    label: Tensor | None = None  # (B,) int64, each pair's class where a classifier is trained; -1 = unknown

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: slice) -> Batch:
        """Some of the pairs."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: whole[rows] for name, whole in parts.items() if whole is not None})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies are asynchronous from pinned memory."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})
