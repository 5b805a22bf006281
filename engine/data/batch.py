"""What the data wing hands to the training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
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

    @classmethod
    def joined(cls, batches: Sequence[Batch], pad_id: int) -> Batch:
        """Batches behind one another, captions padded to the longest of all."""
        if len(batches) == 1:
            return batches[0]
        longest = max(batch.token_ids.shape[1] for batch in batches)
        fill: dict[str, int] = {"token_ids": pad_id, "token_mask": 0, "maskable": 0, "words": 0}

        def whole(name: str) -> Tensor | None:
            parts = [getattr(batch, name) for batch in batches]
            if parts[0] is None:
                return None
            if name in fill:
                parts = [F.pad(part, (0, longest - part.shape[1]), value=fill[name]) for part in parts]
            return torch.cat(parts)

        return cls(**{f.name: whole(f.name) for f in fields(cls)})  # type: ignore[arg-type]

    def trimmed(self) -> Batch:
        """Without the columns that are padding in every caption."""
        longest = int(self.token_mask.sum(1).max())
        names = ("token_ids", "token_mask", "maskable", "words")
        cut = {name: getattr(self, name) for name in names}
        return replace(self, **{name: x[:, :longest] for name, x in cut.items() if x is not None})

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from where :meth:`to` copies while the host goes on. Needs a GPU."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in parts.items() if v is not None})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies are asynchronous from pinned memory."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})
