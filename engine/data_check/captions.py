"""What is wrong with captions themselves: characters, encodings, file names, words that cannot be masked, length."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ..beats import beat
from ..data.captions import CaptionTable, token_limit
from ..data.pair_files import PairTable
from ..data.tokenizer import FUNCTION_WORDS, CaptionTokenizer
from ..recipe import Recipe
from .findings import Finding

SHOWN = 60  # characters of a caption in a line
MANY = 10  # images of one caption, and ...
MANY_SHARE = 0.01  # ... of all images: beyond both it is told of
_BEAT_EVERY = 4096  # captions

# Control characters but for tabs and line breaks, zero-width spaces and marks that turn the reading direction round.
# The zero-width joiner is none of them: emoji and several scripts are written with it.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]")
_ENDINGS = r"\.(?:jpe?g|png|webp|bmp|gif|tiff?|heic|avif|svg)"
_FILE_NAME = re.compile(r"\S+" + _ENDINGS + r"|\w[^\n]*[\\/][^\n]*" + _ENDINGS, re.IGNORECASE)
_LINK = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d{2,6});", re.IGNORECASE)
_SWALLOWED = re.compile(r"\n[^\n,]+" + _ENDINGS + '"?,', re.IGNORECASE)
# Characters that bytes from 0x80 become where UTF-8 is read as Windows' Western code page, or as Latin-1.
_HIGH = "".join(dict.fromkeys(bytes(range(0x80, 0x100)).decode(code, "ignore") for code in ("cp1252", "latin-1")))
_HIGHS = re.compile(f"[{re.escape(_HIGH)}]{{2,}}")


def broken_encoding(text: str) -> str | None:
    """The first stretch that was UTF-8 and was read as something else, as it should be; ``""`` where it is lost."""
    if text.isascii():
        return None
    if "\ufffd" in text:
        return ""
    for match in _HIGHS.finditer(text):
        run = match.group()
        for start in range(len(run) - 1):
            lead = _byte(run[start])
            # two bytes: only Latin-1's letters, or "É»" and the like, which somebody may have written, would count
            size = 2 if lead in (0xC2, 0xC3) else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 0
            if size and start + size <= len(run):
                try:
                    return bytes(_byte(letter) for letter in run[start : start + size]).decode()
                except UnicodeDecodeError:
                    continue
    return None


def _byte(letter: str) -> int:
    try:
        return letter.encode("cp1252")[0]
    except UnicodeEncodeError:
        return ord(letter) if ord(letter) < 0x100 else 0


def judge(caption: str) -> list[tuple[str, str]]:
    """Kinds that a caption is of, each with a few words on it."""
    found = []
    if control := _CONTROL.search(caption):
        found.append(("control characters", f"has U+{ord(control.group()):04X} as character {control.start() + 1}"))
    if (meant := broken_encoding(caption)) is not None:
        what = f"was read in a wrong encoding: there should be {meant!r}" if meant else "has lost a character, U+FFFD"
        found.append(("broken encoding", what))
    if _LINK.fullmatch(caption):
        found.append(("link as caption", "is a link"))
    elif _FILE_NAME.fullmatch(caption):
        found.append(("file name as caption", "is a file's name"))
    if "\n" in caption and _SWALLOWED.search(caption):
        found.append(("swallowed lines", f"runs over {caption.count(chr(10)) + 1} lines, which look like others' rows"))
    if markup := _MARKUP.search(caption):
        found.append(("markup in a caption", f"has markup, {markup.group()[:20]!r}"))
    return found


def shortened(caption: str) -> str:
    return repr(caption if len(caption) <= SHOWN else caption[: SHOWN - 1] + "…")


def check_captions(pairs: PairTable, texts: list[str], train: np.ndarray, given: CaptionTokenizer | None,
                   recipe: Recipe, add: Callable[[Finding], None]) -> CaptionTable | None:  # fmt: skip
    """Tells of every caption that is not as it should be; the captions as a run would read them.

    Args:
        texts: N, each caption's words with a space between.
        train: rows that a run would train on, and take its vocabulary from where none is ``given``.
    """
    own = [source.editable for source in pairs.sources]
    for row, caption in enumerate(pairs.captions):
        if row % _BEAT_EVERY == 0:
            beat("looking at the captions")
        for kind, what in judge(caption):
            add(_finding(kind, pairs, row, what))
    learned = sorted({texts[row] for row in train.tolist()} - {""})
    if given is None and not learned:
        return None
    tokenizer = given or CaptionTokenizer.train(learned, recipe.data.vocabulary_size)
    words = (text.split(" ") if text else [] for text in texts)
    table = CaptionTable(tokenizer, words, None, recipe.data.max_words, token_limit(recipe))
    functions = FUNCTION_WORDS if given is None else given.function_words
    count = recipe.data.max_words
    wordless = np.array([not text or functions.issuperset(text.split(" ", count)[:count]) for text in texts])
    unknown = np.zeros(len(texts), bool)  # of what is evaluated alone, all words may be unknown
    unknown[train] = table.maskable_words()[train] == 0
    for row in np.flatnonzero(wordless | unknown | table.is_cut).tolist():
        if wordless[row] or unknown[row]:
            kind = "wordless caption" if own[pairs.source[row]] else "wordless caption, left out"
            what = "has no word that can be masked"
            add(_finding(kind, pairs, row, what if wordless[row] else f"{what} and is in the vocabulary"))
        if table.is_cut[row]:
            size = f"{texts[row].count(' ') + 1} words"
            limits = f"{recipe.data.max_words} words and {table.max_tokens} tokens"
            add(_finding("long caption", pairs, row, f"has {size} and is cut: the limit is {limits}"))
    return table


def common_captions(pairs: PairTable, texts: list[str], add: Callable[[Finding], None]) -> None:
    """Tells of captions that very many images have, as placeholders do."""
    number: dict[str, int] = {}
    caption = np.array([number.setdefault(text, len(number)) for text in texts], np.int64)
    if not len(caption):
        return
    both = np.unique(caption * len(pairs.images) + pairs.image)  # a caption and an image, each once
    images = np.bincount(both // len(pairs.images))
    common = np.flatnonzero(images > max(MANY, MANY_SHARE * len(pairs.images)))
    for text in common[np.argsort(-images[common], kind="stable")].tolist():
        share = images[text] / len(pairs.images)
        what = f"is that of {images[text]:,} images, {share:.1%} of them"
        add(_finding("common caption", pairs, int(np.argmax(caption == text)), what))


def captions_of(pairs: PairTable, images: list[int]) -> dict[int, set[str]]:
    """The captions of some images."""
    wanted = np.zeros(len(pairs.images), bool)
    wanted[images] = True
    found: dict[int, set[str]] = {}
    for row in np.flatnonzero(wanted[pairs.image]).tolist():
        found.setdefault(int(pairs.image[row]), set()).add(pairs.captions[row])
    return found


def _finding(kind: str, pairs: PairTable, row: int, what: str) -> Finding:
    where = pairs.where(row)
    return Finding(kind, where, f"{where}: the caption {shortened(pairs.captions[row])} {what}")
