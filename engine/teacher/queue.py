"""The momentum queue: the teacher's features of the latest pairs, as further negatives for ITC."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

NOBODY = -1  # the group of rows that belong to no pair


class FeatureQueue:
    """A ring of Q rows: image and text features (Q, E) and their group ids (Q,) int64.

    Starts empty and offers only what was written; a batch of any size wraps around, so Q need not be a multiple of
    it. Every rank enqueues the same gathered rows and so holds the same queue: nothing is ever broadcast. Where the
    next row goes is known to the device alone, and nothing waits for it.

    :attr:`image`, :attr:`text` and :attr:`group_id` are views, never copies: autograd keeps them for the backward
    pass, so call :meth:`enqueue` **after** ``backward`` (torch raises otherwise).
    """

    def __init__(
        self,
        length: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        random_seed: int | None = None,
    ) -> None:
        """``length`` Q rows (0 = no queue) of ``width`` E features.

        ``random_seed``: start full of random directions of group -1, which are nobody's match, as ALBEF (Li et al.
        2021) does; the same ones for the same seed on every device, so on every rank.
        """
        if length < 0 or width < 1:
            raise ValueError(f"a queue of {length} rows x {width} features cannot be built")
        self.length, self.width = length, width
        self._image = torch.zeros(length, width, device=device, dtype=dtype)
        self._text = torch.zeros_like(self._image)
        self._group_id = torch.full((length,), NOBODY, device=device, dtype=torch.int64)
        self.pointer = torch.zeros(1, device=device, dtype=torch.int64)  # row that is written next
        self.count = 0  # rows that are offered, at most Q: known without asking the device
        if random_seed is not None:
            generator = torch.Generator().manual_seed(random_seed)
            for ring in (self._image, self._text):
                ring.copy_(F.normalize(torch.randn(length, width, generator=generator), dim=1))
            self.count = length

    def __len__(self) -> int:
        return self.count

    @property
    def image(self) -> Tensor:
        """(count, E) image features; a view."""
        return self._image[: self.count]

    @property
    def text(self) -> Tensor:
        """(count, E) text features; a view."""
        return self._text[: self.count]

    @property
    def group_id(self) -> Tensor:
        """(count,) int64, -1 where the row is nobody's; a view."""
        return self._group_id[: self.count]

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor, group_ids: Tensor) -> None:
        """Writes N rows (N, E), (N, E), (N,) over the oldest ones. N may exceed Q: the last Q rows stay."""
        rows = len(group_ids)
        if image_features.shape != (rows, self.width) or text_features.shape != (rows, self.width):
            raise ValueError(
                f"features {tuple(image_features.shape)} and {tuple(text_features.shape)} do not match "
                f"{rows} group ids and a queue of width {self.width}"
            )
        if not self.length or not rows:
            return
        dropped = max(rows - self.length, 0)
        places = (self.pointer + torch.arange(dropped, rows, device=self.pointer.device)) % self.length
        for ring, new in ((self._image, image_features), (self._text, text_features), (self._group_id, group_ids)):
            ring.index_copy_(0, places, new[dropped:].to(ring.dtype))
        self.pointer.add_(rows).remainder_(self.length)
        self.count = min(self.count + rows, self.length)

    def state_dict(self) -> dict[str, Tensor]:
        """The filled rows and the position (length, pointer) as tensors on the CPU; waits for the device."""
        return {
            "image": self.image.cpu().contiguous(),
            "text": self.text.cpu().contiguous(),
            "group_id": self.group_id.cpu().contiguous(),
            "position": torch.cat([torch.tensor([self.length]), self.pointer.cpu()]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the rows and the position back; ValueError where length or width differ from this queue's."""
        length, pointer = (int(x) for x in state["position"])
        count, width = state["image"].shape
        if (length, width) != (self.length, self.width):
            raise ValueError(f"the saved queue is {length} x {width}, this one is {self.length} x {self.width}")
        if count > length or (length and not 0 <= pointer < length):
            raise ValueError(f"the saved queue has {count} of {length} rows and goes on at row {pointer}")
        self.pointer.fill_(pointer)
        self.count = count
        self.image.copy_(state["image"])
        self.text.copy_(state["text"])
        self.group_id.copy_(state["group_id"])
