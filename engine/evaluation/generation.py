"""Captions from a captioner: greedy, beam search, or drawn from the likeliest words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..beats import beat
from ..data.randomness import Draws
from ..data.tokenizer import CaptionTokenizer
from ..models.captioner import CaptioningModel, Context
from ..models.captioner_reader import CaptionReader
from ..recipe_sections_evaluation import CaptioningSection

_SAMPLING = 1 << 41  # in place of an epoch: no other random number is drawn there


@dataclass(frozen=True)
class Generated:
    """Captions of B images, padded to the longest of T tokens."""

    token_ids: Tensor  # (B, T) int64, without the start token; the end token is the last of a caption that ended
    length: Tensor  # (B,) int64 tokens, the end token included
    ended: Tensor  # (B,) bool; False = cut at the greatest length
    log_probability: Tensor  # (B, T) float32 of each token given those before it, natural, 0 at padding

    @property
    def score(self) -> Tensor:
        """(B,) float32: log-probability of the whole caption."""
        return self.log_probability.sum(1)


class Reader(Protocol):
    """A model that reads R captions of the same length, and says what may come next."""

    def step(self, last: Tensor) -> Tensor: ...

    def choose(self, rows: Tensor) -> None: ...


@torch.no_grad()
def generate(
    model: CaptioningModel,
    context: Context,
    section: CaptioningSection,
    tokenizer: CaptionTokenizer,
    seed: int = 0,
    index: Tensor | None = None,
    *,
    reader: Callable[[CaptioningModel, Context, int, int], Reader] = CaptionReader,
) -> Generated:
    """Caption B images, of which ``model.context`` said what is to be read, all at once.

    A caption begins at [CLS] and ends with [SEP], which is token number ``section.min_tokens`` or a later one; after
    ``section.max_tokens``, or the model's longest, it is cut. No other special token is ever chosen. Log-probabilities
    are the model's own, whatever was forbidden, at temperature 1.

    Without ``section.top_p`` the captions are searched for with ``section.beams``: at each token so many of the
    likeliest beginnings are kept, an ended one among them as it is, until all have ended; then the one with the highest
    log-probability / length ** ``length_penalty`` is taken. One beam is greedy search. With ``top_p`` each token is
    drawn, at ``section.temperature``, from the fewest that have this probability together (Holtzman et al. 2020).

    Args:
        index: (B,) int64, numbers of the images: with ``seed`` they fix what is drawn, whatever else is in the batch.
            Default: 0, 1, 2 …
        reader: how the captions are read.
    """
    longest = min(section.max_tokens or model.text.max_length, model.text.max_length - 1)  # [CLS] has a place as well
    captions = section.beams if section.top_p is None else 1
    images, device = len(context.tokens), context.tokens.device
    search = _Search(reader(model, context, captions, longest), section, tokenizer, longest, images, device)
    if section.top_p is None:
        return search.beams()
    where = torch.arange(images) if index is None else index.cpu()
    luck = Draws(seed, _SAMPLING, where.numpy().astype(np.int64)).uniform("caption", longest)
    return search.sample(torch.from_numpy(luck).float().to(device))


class _Search:
    def __init__(
        self,
        reader: Reader,
        section: CaptioningSection,
        tokenizer: CaptionTokenizer,
        longest: int,
        images: int,
        device: torch.device,
    ) -> None:
        self.reader, self.section, self.longest = reader, section, longest
        self.images, self.device = images, device
        self.start, self.end, self.pad = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id
        self.forbidden = torch.tensor(sorted(tokenizer.special_ids - {self.end}), device=device)

    def _next(self, last: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(R,) last tokens -> the model's log-probabilities (R, V) float32, and those of what may be chosen."""
        beat("captioning")
        own = self.reader.step(last).float().log_softmax(-1)
        allowed = own.index_fill(1, self.forbidden, -torch.inf)
        if step + 1 < min(self.section.min_tokens, self.longest):  # [SEP] would be token number step + 1
            allowed[:, self.end] = -torch.inf
        return own, allowed

    def beams(self) -> Generated:
        images, k = self.images, self.section.beams
        rows = images * k
        last = torch.full((rows,), self.start, device=self.device)
        ids = torch.full((images, k, self.longest), self.pad, device=self.device)
        log_p = torch.zeros(images, k, self.longest, device=self.device)
        # of each beam: the first alone counts until they differ
        total = torch.full((images, k), -torch.inf, device=self.device)
        total[:, 0] = 0.0
        ended = torch.zeros(images, k, dtype=torch.bool, device=self.device)
        length = torch.zeros(images, k, dtype=torch.long, device=self.device)
        first = torch.arange(images, device=self.device)[:, None] * k
        for step in range(self.longest):
            own, allowed = (x.view(images, k, -1) for x in self._next(last, step))
            # what has ended goes on in one way alone, which changes nothing
            allowed = allowed.masked_fill(ended[..., None], -torch.inf)
            allowed[..., self.pad] = torch.where(ended, 0.0, allowed[..., self.pad])
            kept = (total[..., None] + allowed).flatten(1).topk(k)
            total, beam, token = kept.values, kept.indices // allowed.shape[2], kept.indices % allowed.shape[2]
            before = ended.gather(1, beam)
            gained = own.flatten(1).gather(1, kept.indices)
            ids, log_p = (x.gather(1, beam[..., None].expand(-1, -1, self.longest)) for x in (ids, log_p))
            ids[..., step], log_p[..., step] = token, gained.masked_fill(before, 0.0)
            length = length.gather(1, beam) + ~before
            ended = before | (token == self.end)
            if bool(ended.all()) or step + 1 == self.longest:
                break
            if k > 1:
                self.reader.choose((first + beam).flatten())
            last = token.flatten()
        best = (total / length.clamp(min=1) ** self.section.length_penalty).argmax(1)
        return self._found(*(x[torch.arange(images, device=self.device), best] for x in (ids, length, ended, log_p)))

    def sample(self, luck: Tensor) -> Generated:
        """``luck`` (B, T) in [0, 1)."""
        images, top_p = self.images, self.section.top_p
        assert top_p is not None
        ids = torch.full((images, self.longest), self.pad, device=self.device)
        log_p = torch.zeros(images, self.longest, device=self.device)
        ended = torch.zeros(images, dtype=torch.bool, device=self.device)
        length = torch.zeros(images, dtype=torch.long, device=self.device)
        last = torch.full((images,), self.start, device=self.device)
        for step in range(self.longest):
            own, allowed = self._next(last, step)
            p, order = (allowed / self.section.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
            reached = p.cumsum(-1)
            reached = reached.masked_fill(reached - p >= top_p, 0.0)  # the one that crosses top_p is still in
            # the first place at which so much of what is kept has been passed
            passed = (reached <= luck[:, step, None] * reached.amax(-1, keepdim=True)) & (reached > 0)
            place = torch.minimum(passed.sum(1), (reached > 0).sum(1) - 1)  # luck may have been rounded up to 1
            token = order.gather(1, place[:, None])[:, 0]
            ids[:, step] = token.where(~ended, self.pad)
            log_p[:, step] = own.gather(1, token[:, None])[:, 0].where(~ended, 0.0)
            length += ~ended
            ended = ended | (token == self.end)
            if bool(ended.all()):
                break
            last = token
        return self._found(ids, length, ended, log_p)

    def _found(self, ids: Tensor, length: Tensor, ended: Tensor, log_p: Tensor) -> Generated:
        longest = int(length.max()) if len(length) else 0
        return Generated(ids[:, :longest], length, ended, log_p[:, :longest])
