"""Where the words of a given list stand in captions, each with all of its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from crossmask.kernels import topk_mask

from ..errors import RecipeError
from ..recipe import Section
from .plan import MaskContext
from .registry import Corpus
from .word_counts import Resident

_BASE = 0x2545F4914F6CDD1D  # odd, so that no token's contribution to a hash vanishes modulo 2**64
_AT_ONCE = 1024


class EntityOptions(Section):
    words: list[str] = Field([], description="words or phrases that are hidden first")
    file: Path | None = Field(None, description="a text file of further ones, one a line")

    @property
    def given(self) -> bool:
        return bool(self.words) or self.file is not None

    def read(self, policy: str) -> list[str]:
        """All that were given, without empty lines.

        Raises:
            RecipeError: the file cannot be read.
        """
        lines: list[str] = []
        if self.file is not None:
            try:
                lines = self.file.expanduser().read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
                raise RecipeError(
                    f"mask policy {policy!r} cannot read {self.file} ({why}): file takes a text file with a word a line"
                ) from None
        return [word for word in (*self.words, *lines) if word.strip()]


class Entities:
    """Phrases as token ids, found by hash: the cost does not grow with how many there are, but for a logarithm.

    Raises:
        RecipeError: none of the words occurs in the captions.
    """

    def __init__(self, words: Sequence[str], corpus: Corpus, policy: str) -> None:
        by_length: dict[int, set[tuple[int, ...]]] = {}
        for word in words:
            ids = tuple(i for part in corpus.split(word) for i in corpus.pieces(part))
            if ids and corpus.specials.isdisjoint(ids):  # [UNK] would stand for every unknown word
                by_length.setdefault(len(ids), set()).add(ids)
        self._phrases: list[Resident] = []  # of one length each: (E,) int64 hashes, ascending, and (E, length) ids
        for length in sorted(by_length):
            phrases = torch.tensor(sorted(by_length[length]), dtype=torch.int64)
            hashes, order = _hash(phrases[:, None], length)[:, 0].sort()
            self._phrases.append(Resident(hashes, phrases[order]))
        # A word that goes on with a further piece is another word: "cat" does not occur in "cat ##fish".
        later = torch.zeros(corpus.vocabulary_size, dtype=torch.bool)
        later[list(corpus.continuations)] = True
        self._continuations = Resident(later)
        if not self._occurs(corpus.captions):
            shown = ", ".join(repr(word) for word in words[:3]) + (", ..." if len(words) > 3 else "")
            raise RecipeError(
                f"mask policy {policy!r}: none of its {len(words)} words ({shown}) occurs in the training captions; "
                "correct words or file in its options"
            )

    def find(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) int64 ids -> two (B, L) bool: is part of an entity; goes on with the entity that stands before it.

        Entities that overlap count as one.
        """
        L = token_ids.shape[1]
        inside, goes_on = torch.zeros_like(token_ids, dtype=torch.bool), torch.zeros_like(token_ids, dtype=torch.bool)
        (later,) = self._continuations.on(token_ids.device)
        follows = torch.nn.functional.pad(later[token_ids], (0, 1))  # (B, L + 1): behind the end there is no piece
        for phrases in self._phrases:
            hashes, ids = phrases.on(token_ids.device)
            M = ids.shape[1]
            if M > L:
                break
            windows = token_ids.unfold(1, M, 1)  # (B, L - M + 1, M)
            place = torch.searchsorted(hashes, _hash(windows, M).contiguous()).clamp(max=len(hashes) - 1)
            found = (ids[place] == windows).all(2) & ~follows[:, M:]
            for offset in range(M):
                inside[:, offset : offset + found.shape[1]] |= found
                if offset:
                    goes_on[:, offset : offset + found.shape[1]] |= found
        return inside, goes_on

    def choose(self, context: MaskContext) -> Tensor:
        """(B, L) bool: ``text_ratio`` of the maskable words, those of entities first and by whole entities.

        Entities come in random order, and so do the words that fill up. The last entity that finds a place is hidden
        to its end, even where that is a piece or two more than the ratio allows.
        """
        inside, goes_on = self.find(context.token_ids)
        draw = context.draws.uniform("entities", inside.shape[1])
        place = torch.arange(inside.shape[1], device=draw.device)
        start = torch.where(goes_on, 0, place).cummax(1).values  # (B, L) where the entity begins; other words alone
        order = draw.gather(1, start) + inside.float()
        chosen = topk_mask(order, ratio=context.text_ratio, valid=context.maskable)
        together = start[:, :, None] == start[:, None, :]
        return (together & chosen[:, None, :]).any(2) & context.maskable

    def _occurs(self, captions: Sequence[Sequence[int]]) -> bool:
        for at in range(0, len(captions), _AT_ONCE):
            some = [torch.tensor(caption, dtype=torch.int64) for caption in captions[at : at + _AT_ONCE]]
            if bool(self.find(torch.nn.utils.rnn.pad_sequence(some, batch_first=True))[0].any()):
                return True
        return False


def _hash(windows: Tensor, length: int) -> Tensor:
    """(B, W, length) int64 ids -> (B, W) int64, a polynomial modulo 2**64; finds are compared id by id afterwards."""
    value = windows[..., 0].clone()
    for i in range(1, length):
        value = value * _BASE + windows[..., i]
    return value
