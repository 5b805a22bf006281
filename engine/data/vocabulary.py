"""A vocabulary that someone else trained: BERT's ``vocab.txt``, and captions as ALBEF prepares them for it."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from ..errors import DataError

MAX_BYTES = 64 * 2**20  # BERT's have a quarter of one MiB, the largest multilingual ones five
UNUSED = re.compile(r"\[unused\d+\]")  # rows that BERT keeps free

# ALBEF leaves these out before BERT's tokenizer sees a caption, and parts words at the others.
_LEFT_OUT, _PARTING = ",.'!?\"()*#:;~", "-/"
_CLEANING = str.maketrans({**dict.fromkeys(_LEFT_OUT), **dict.fromkeys(_PARTING, " ")})


def caption_words(caption: str) -> list[str]:
    """The words that ALBEF counts: lower case, without most punctuation, between spaces (its ``pre_caption``).

    What is left of punctuation, such as the sign of "$5", stays in its word and becomes a token of its own.
    """
    text = caption.lower().translate(_CLEANING).replace("<person>", "person")
    return [word for word in re.sub(r"\s{2,}", " ", text).strip(" \n").split(" ") if word]


def read_vocabulary(path: Path, specials: tuple[str, ...]) -> dict[str, int]:
    """Token -> id, which is its line from 0.

    Raises:
        DataError: no such file, or not one token a line with all of the ``specials``, each once.
    """
    wanted = "give a vocab.txt with one token a line, such as bert-base-uncased's"
    if path.is_dir():
        raise DataError(f"data.vocabulary: {path} is a folder; give the vocab.txt in it")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"data.vocabulary: {path} is no vocabulary, it has more than 64 MiB; {wanted}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"data.vocabulary: cannot read {path}: {error.strerror}; {wanted}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.vocabulary: {path} is not UTF-8 at byte {error.start}; {wanted}") from None
    tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if tokens == [""]:
        raise DataError(f"data.vocabulary: {path} is empty; {wanted}")
    found: dict[str, int] = {}
    for line, token in enumerate(tokens):
        if not token or token.split() != [token]:
            raise DataError(f"data.vocabulary: {path} line {line + 1} is not one token ({token[:40]!r}); {wanted}")
        if found.setdefault(token, line) != line:
            first = found[token] + 1
            raise DataError(f"data.vocabulary: {path} has {token[:40]!r} in line {first} and again in line {line + 1}; "
                            "remove one, if no model was trained with it")  # fmt: skip
    if missing := [token for token in specials if token not in found]:
        raise DataError(f"data.vocabulary: {path} has no {', '.join(missing)}; {wanted}")
    words = [token for token in found if token not in specials and not UNUSED.fullmatch(token)]
    if not words:
        raise DataError(f"data.vocabulary: {path} has no words; {wanted}")
    if sum(token != token.lower() for token in words) > 0.05 * len(words):
        raise DataError(f"data.vocabulary: {path} tells capitals apart, and captions are lower-cased; {wanted}")
    return found


def bert_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """BERT-uncased's tokenizer (Devlin et al. 2019), with ALBEF's cleaning before it."""
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(f"[{re.escape(_LEFT_OUT)}]"), ""),
            normalizers.Replace(Regex(f"[{re.escape(_PARTING)}]"), " "),
            normalizers.Replace("<person>", "person"),
            normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
