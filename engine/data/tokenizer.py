"""Captions as word pieces, of a vocabulary trained on the captions at hand or of one that is given.

Nothing is downloaded, and a run folder holds whichever it is.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import BertProcessing
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import CheckpointError
from ..recipe import DataSection
from .vocabulary import (
    CLIP_END,
    CLIP_ENDING,
    CLIP_ENDINGS,
    CLIP_PAD,
    CLIP_START,
    UNUSED,
    bert_tokenizer,
    caption_words,
    clip_text,
    clip_tokenizer,
    clip_words,
    read_vocabulary,
)

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Words that say nothing about a picture: readable, but never masked. Without this they are the commonest target. A
# given vocabulary comes with a model that was trained to predict all words, so there they are masked like the others.
FUNCTION_WORDS = frozenset(
    ("a", "an", "and", "the", "of", "in", "on", "at", "to", "for", "with", "by", "or", "from", "as", "is", "it", "its")
)

_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex("['\u2019\u2018`\u00b4]"), ""),  # "o'clock" and "child's" stay one word
    ]
)
_PRE_TOKENIZER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}\p{M}]+"), "removed"),
        pre_tokenizers.Split(Regex(r"[\p{Han}\p{Hiragana}\p{Katakana}]"), "isolated"),
    ]
)


def split_words(text: str) -> list[str]:
    """A caption as lower-case words without accents and punctuation; there may be none."""
    return [word for word, _ in _PRE_TOKENIZER.pre_tokenize_str(_NORMALIZER.normalize_str(text))]


class CaptionTokenizer:
    """Captions in lower-case words without accents, and words in pieces.

    Attributes:
        pad_id, unknown_id, cls_id, sep_id, mask_id: ids of :data:`SPECIALS`; 0 to 4 in a trained vocabulary.
        word_ids: (words,) int64 ascending, the ids of all other tokens but BERT's ``[unused0]`` and so on.
        special_ids: the ids of :data:`SPECIALS`.
        given: whether the vocabulary was given. Captions are then split as ALBEF does (:func:`caption_words`) and
            their words in turn by BERT; else by :func:`split_words`.
        clip: whether that is CLIP's, whose captions are split by :func:`clip_words`. It has no unknown words, so
            ``unknown_id`` is -1, and nothing to mask words by: ``mask_id`` is ``sep_id``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.get_vocab()
        self.clip = {CLIP_START, CLIP_END} <= vocabulary.keys()
        if self.clip:  # it has neither [UNK] nor [MASK]
            start, end = vocabulary[CLIP_START], vocabulary[CLIP_END]
            self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.mask_id = CLIP_PAD, -1, start, end, end
            ids = [CLIP_PAD, start, end]
        else:
            if missing := [token for token in SPECIALS if token not in vocabulary]:
                raise CheckpointError(f"not a caption tokenizer, it has no {', '.join(missing)}")
            ids = [vocabulary[token] for token in SPECIALS]
            self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special_ids = frozenset(ids)
        self.given = self.clip or isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        words = (i for token, i in vocabulary.items() if i not in ids and not UNUSED.fullmatch(token))
        self.word_ids = np.array(sorted(words), np.int64)
        self._tokenizer = tokenizer
        self._pieces: dict[str, tuple[int, ...]] = {}

    @classmethod
    def from_vocabulary(cls, path: Path) -> CaptionTokenizer:
        """BERT's uncased tokenizer with the ids of a ``vocab.txt``, wherever its special tokens stand, or CLIP's of
        ``bpe_simple_vocab_16e6.txt.gz``.

        Raises:
            DataError: the file is not such a vocabulary.
        """
        if path.suffix in CLIP_ENDINGS:
            return cls(clip_tokenizer(path))
        return cls._framed(bert_tokenizer(read_vocabulary(path, SPECIALS)))

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary_size: int) -> CaptionTokenizer:
        """The same captions in any order give the same vocabulary; well under a second for a few thousand captions."""
        words = Counter(word for caption in captions for word in split_words(caption))
        letters: Counter[str] = Counter()
        for word, times in words.items():
            for letter in word:
                letters[letter] += times
        room = (vocabulary_size - len(SPECIALS)) // 2  # a letter costs two tokens, x and ##x
        alphabet = sorted(sorted(letters, key=lambda x: (-letters[x], x))[:room])
        # The trainer numbers ##x in the order of a hash map and breaks ties between merges by number, so every run, and
        # every rank, would get another vocabulary. Numbered before it starts, its work is deterministic.
        first = [*SPECIALS, *alphabet, *(f"##{letter}" for letter in alphabet)]
        trained = Tokenizer(WordPiece(unk_token="[UNK]"))
        trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = WordPieceTrainer(
            vocab_size=vocabulary_size,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        trained.train_from_iterator((f"{word} " * times for word, times in sorted(words.items())), trainer)

        tokenizer = Tokenizer(WordPiece(trained.get_vocab(), unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = _NORMALIZER, _PRE_TOKENIZER
        tokenizer.decoder = decoders.WordPiece()
        return cls._framed(tokenizer)

    @classmethod
    def _framed(cls, tokenizer: Tokenizer) -> CaptionTokenizer:
        """Whoever reads ``tokenizer.json`` elsewhere gets [CLS] and [SEP] too."""
        framed = cls(tokenizer)
        tokenizer.post_processor = BertProcessing(("[SEP]", framed.sep_id), ("[CLS]", framed.cls_id))
        return framed

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def function_words(self) -> frozenset[str]:
        """Words that are never masked."""
        return frozenset() if self.given else FUNCTION_WORDS

    def split(self, caption: str) -> list[str]:
        """A caption as words, which ``data.max_words`` counts and :meth:`pieces` encodes; there may be none."""
        return clip_words(caption) if self.clip else caption_words(caption) if self.given else split_words(caption)

    def pieces(self, word: str) -> tuple[int, ...]:
        """Token ids of one word of :meth:`split`; each distinct word is encoded once."""
        found = self._pieces.get(word)
        if found is None:
            found = self._pieces[word] = tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        return found

    def batch(self, captions: Sequence[str], longest: int, max_words: int | None = None) -> tuple[Tensor, Tensor]:
        """Captions -> (B, L) int64 token ids and (B, L) bool, True where there is a token; cut at ``longest`` tokens,
        [CLS] and [SEP] included, and at ``max_words`` words."""
        rows = []
        for caption in captions:
            pieces = [piece for word in self.split(caption)[:max_words] for piece in self.pieces(word)]
            rows.append(torch.tensor([self.cls_id, *pieces[: longest - 2], self.sep_id]))
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    def words(self, token_ids: Tensor | np.ndarray | Sequence[int]) -> list[str]:
        """One string per token, in place: specials as ``[CLS]``, a word's later pieces as ``##ing``."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor | np.ndarray) else list(token_ids)
        if self.clip:
            return self._clip_words(ids)
        return [self._tokenizer.id_to_token(int(i)) or "[UNK]" for i in ids]

    def _clip_words(self, ids: list[int]) -> list[str]:
        names = {self.pad_id: "[PAD]", self.cls_id: "[CLS]", self.sep_id: "[SEP]"}
        found, inside = [], False
        for i in ids:
            token = str(self._tokenizer.id_to_token(int(i)))
            found.append(names.get(i) or ("##" if inside else "") + clip_text([token]))
            inside = i not in names and not token.endswith(CLIP_ENDING)
        return found

    def text(self, token_ids: Tensor | np.ndarray | Sequence[int]) -> str:
        """The tokens as a readable line without [CLS], [SEP] and [PAD]."""
        if self.clip:
            ids = token_ids.tolist() if isinstance(token_ids, Tensor | np.ndarray) else list(token_ids)
            return clip_text([str(self._tokenizer.id_to_token(int(i))) for i in ids if int(i) not in self.special_ids])
        kept = [w for w in self.words(token_ids) if w not in ("[PAD]", "[CLS]", "[SEP]")]
        return re.sub(r" ##", "", " ".join(kept))

    def to_json(self) -> str:
        """The whole tokenizer in the `tokenizers` format."""
        return str(self._tokenizer.to_str())

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json`` in the `tokenizers` format: whole or not at all."""
        part = path.with_name(path.name + ".part")
        self._tokenizer.save(str(part))
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> CaptionTokenizer:
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises a bare Exception for a missing or broken file
            raise CheckpointError(
                f"cannot read tokenizer {path}: {error}; copy it from the run it belongs to"
            ) from None


def open_tokenizer(section: DataSection, captions: Iterable[str]) -> CaptionTokenizer:
    """The recipe's: of ``data.vocabulary``, or else trained on ``captions``."""
    if section.vocabulary is not None:
        return CaptionTokenizer.from_vocabulary(section.vocabulary)
    return CaptionTokenizer.train(captions, section.vocabulary_size)
