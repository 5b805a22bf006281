"""A vocabulary that someone else trained: BERT's ``vocab.txt``, with captions as ALBEF prepares them for it, and CLIP's
``bpe_simple_vocab_16e6.txt.gz``."""

from __future__ import annotations

import gzip
import html
import re
import zlib
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.processors import TemplateProcessing

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


CLIP_START, CLIP_END = "<start_of_text>", "<end_of_text>"
CLIP_PAD = 0  # which is also the piece "!" of a longer one, as in CLIP
CLIP_ENDING = "</w>"  # of a word's last piece
CLIP_ENDINGS = (".gz",)
_CLIP_MERGES = 49152 - 256 - 2  # of the file's, that many
_CLIP_WORDS = pre_tokenizers.Split(
    Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
)


def clip_words(caption: str) -> list[str]:
    """Words, digits and runs of punctuation as CLIP (Radford et al. 2021) parts them, lower case. Captions in a wrong
    encoding, which it mends first with ftfy, stay as they are."""
    text = html.unescape(html.unescape(caption)).lower()
    return [word for word, _ in _CLIP_WORDS.pre_tokenize_str(" ".join(text.split()))]


def clip_tokenizer(path: Path) -> Tokenizer:
    """CLIP's byte pairs, from the file that its packages carry.

    Raises:
        DataError: no such file, or another one.
    """
    wanted = "give bpe_simple_vocab_16e6.txt.gz, which open_clip_torch carries"
    try:
        with gzip.open(path) as file:
            lines = file.read(MAX_BYTES).decode("utf-8").split("\n")
    except OSError as error:
        raise DataError(f"data.vocabulary: cannot read {path}: {error.strerror or error}; {wanted}") from None
    except (EOFError, zlib.error, UnicodeDecodeError):
        raise DataError(f"data.vocabulary: {path} is cut off or no text; {wanted}") from None
    merges = [tuple(line.split()) for line in lines[1 : _CLIP_MERGES + 1]]
    if len(merges) < _CLIP_MERGES or any(len(merge) != 2 for merge in merges):
        raise DataError(f"data.vocabulary: {path} is not CLIP's list of byte pairs; {wanted}")
    letters = _clip_letters()
    tokens = [*letters, *(letter + CLIP_ENDING for letter in letters), *(a + b for a, b in merges)]
    tokens += [CLIP_START, CLIP_END]
    model = BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[(a, b) for a, b in merges],
        end_of_word_suffix=CLIP_ENDING,
        continuing_subword_prefix="",
        unk_token=CLIP_END,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_CLIP_WORDS, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    ends = [(CLIP_START, len(tokens) - 2), (CLIP_END, len(tokens) - 1)]
    tokenizer.post_processor = TemplateProcessing(f"{CLIP_START} $A {CLIP_END}", special_tokens=ends)
    return tokenizer


def clip_text(tokens: list[str]) -> str:
    """Tokens of :func:`clip_tokenizer` as a line of words."""
    decoded: str = decoders.ByteLevel().decode(["".join(tokens)])
    return " ".join(decoded.replace(CLIP_ENDING, " ").split())


def _clip_letters() -> list[str]:
    """A visible letter for each byte, in CLIP's order: those that are visible themselves first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
