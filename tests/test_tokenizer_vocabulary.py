"""A vocabulary that is given: BERT's ids and pieces, ALBEF's cleaning, what may be masked, and every mistake."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bert.tokenization_bert import BertTokenizer

from crossmask.engine.data import load_data
from crossmask.engine.data.captions import CaptionTable
from crossmask.engine.data.emoji import read_captions
from crossmask.engine.data.tokenizer import FUNCTION_WORDS, SPECIALS, CaptionTokenizer
from crossmask.engine.errors import DataError
from crossmask.engine.masking import Corpus, Draws, MaskContext, MaskPlanner
from crossmask.engine.masking.entities import Entities
from crossmask.engine.masking.plan import KEEP
from crossmask.engine.masking.word_counts import WordCounts
from crossmask.engine.objectives.masks import corpus
from crossmask.engine.recipe import MaskingSection, Recipe

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[]_{|}’“…字"
WORDS = (
    "cat",
    "dog",
    "red",
    "a",
    "the",
    "of",
    "and",
    "person",
    "play",
    "##ing",
    "##s",
    "sun",
    "##flower",
    "smil",
    "flag",
)


def tokens() -> list[str]:
    """In bert-base-uncased's order: [PAD], free rows, [UNK] [CLS] [SEP] [MASK] at 100 to 103, more free rows, words."""
    free = [f"[unused{i}]" for i in range(105)]
    words = [*PUNCTUATION, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    return ["[PAD]", *free[:99], "[UNK]", "[CLS]", "[SEP]", "[MASK]", *free[99:], *dict.fromkeys(words)]


def save(folder: Path, content: list[str] | str | bytes) -> Path:
    path = folder / "vocab.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else "\n".join(content) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("vocabulary"), tokens())


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> CaptionTokenizer:
    return CaptionTokenizer.from_vocabulary(path)


def cleaned(caption: str, max_words: int) -> str:
    """What ALBEF hands to BERT's tokenizer, step by step."""
    text = "".join(letter for letter in caption.lower() if letter not in ",.'!?\"()*#:;~")
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s\s+", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def captions() -> list[str]:
    draw = random.Random(0)
    pool = LETTERS + "ABZ,.'!?\"()*#:;~-/<>éİıßñ\t\n　中字ひ🙂$%&@[]{}“”’—…٣\u0301\u00a0\u200b\x00\x07     "
    noise = ["".join(draw.choice(pool) for _ in range(draw.randint(1, 60))) for _ in range(300)]
    named = [" ".join((c.name, *c.tags)) for c in read_captions()[:300]]
    return [
        *noise,
        *named,
        "<PERSON> and <person>",
        "cat " * 50,
        "[MASK] [sep]",
        "x" * 101,
        "x" * 100,
        "",
        " ",
        "...",
        "☃",
    ]


def test_equal_to_transformers_after_albefs_cleaning(tokenizer: CaptionTokenizer, path: Path) -> None:
    reference = BertTokenizer(vocab={token: i for i, token in enumerate(tokens())})
    assert reference.cls_token_id == 101
    for caption in captions():
        for count in (3, 30):
            expected = reference(cleaned(caption, count), add_special_tokens=False).input_ids
            found = [i for word in tokenizer.split(caption)[:count] for i in tokenizer.pieces(word)]
            assert found == expected, (caption, count)


@pytest.mark.parametrize("limit", [8, 30])
def test_batches_are_what_transformers_gives(tokenizer: CaptionTokenizer, limit: int) -> None:
    reference = BertTokenizer(vocab={token: i for i, token in enumerate(tokens())})
    texts = captions()
    table = CaptionTable(tokenizer, (tokenizer.split(text) for text in texts), None, 30, limit)
    found = table.assemble(table.whole(np.arange(len(texts))), len(texts))
    kept = [cleaned(text, 30) for text in texts]
    expected = reference(kept, padding="longest", truncation=True, max_length=limit, return_tensors="pt")
    assert torch.equal(found.token_ids, expected.input_ids)
    assert torch.equal(found.token_mask, expected.attention_mask.bool())
    # all words may be masked, "the" as well, and nothing that is none
    special = torch.isin(found.token_ids, torch.tensor(sorted(tokenizer.special_ids)))
    assert torch.equal(found.maskable, ~special)
    cut = np.array([len(reference(text).input_ids) > limit for text in kept])
    longer = np.array([len(tokenizer.split(text)) > 30 for text in texts])
    assert table.is_cut.tolist() == (cut | longer).tolist()
    assert table.is_cut.any()
    assert not table.is_cut.all()


def test_ids_are_those_of_the_file(tokenizer: CaptionTokenizer) -> None:
    ids = (tokenizer.pad_id, tokenizer.unknown_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert ids == (0, 100, 101, 102, 103)
    assert tokenizer.words(range(tokenizer.vocabulary_size)) == tokens()
    assert tokenizer.words(tokenizer.word_ids) == [t for t in tokens() if t not in SPECIALS and "unused" not in t]
    trained = CaptionTokenizer.train(["a cat", "two dogs"], 64)
    assert trained.word_ids.tolist() == list(range(5, trained.vocabulary_size))
    assert not trained.given
    assert trained.function_words == FUNCTION_WORDS


def test_special_tokens_may_stand_anywhere(tmp_path: Path) -> None:
    order = ["cat", "[MASK]", "dog", "[SEP]", "[UNK]", "[CLS]", "##s", "[PAD]"]
    tokenizer = CaptionTokenizer.from_vocabulary(save(tmp_path, order))
    assert (tokenizer.mask_id, tokenizer.sep_id, tokenizer.pad_id) == (1, 3, 7)
    table = CaptionTable(tokenizer, [["cats"], ["dog", "bird", "cat"]], None, 5)
    texts = table.assemble(table.whole(np.arange(2)), 2)
    assert texts.token_ids.tolist() == [[5, 0, 6, 3, 7], [5, 2, 4, 0, 3]]
    assert texts.maskable.tolist() == [[False, True, True, False, False], [False, True, False, True, False]]
    assert tokenizer.text(texts.token_ids[0]) == "cats"


def test_a_run_folder_keeps_it_all(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    assert again.to_json() == tokenizer.to_json()
    assert again.given
    assert (again.pad_id, again.mask_id, again.cls_id) == (0, 103, 101)
    assert again.word_ids.tolist() == tokenizer.word_ids.tolist()
    assert again.function_words == frozenset()
    for caption in captions():
        words = tokenizer.split(caption)
        assert again.split(caption) == words
        ids = [i for word in words for i in tokenizer.pieces(word)]
        assert [i for word in words for i in again.pieces(word)] == ids
        # and whoever reads the file with the tokenizers library alone gets the same
        assert again._tokenizer.encode(caption).ids == [101, *ids, 102]


def test_a_carriage_return_at_line_ends_is_no_part_of_tokens(tmp_path: Path) -> None:
    path = save(tmp_path, "\r\n".join([*SPECIALS, "cat"]).encode() + b"\r\n")
    assert CaptionTokenizer.from_vocabulary(path).words([5]) == ["cat"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read"),
        ("", "is empty"),
        (b"\x80\x02}q\x00", "not UTF-8 at byte 0"),
        (["cat", "dog"], r"has no \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ([*SPECIALS[:4], "cat"], r"has no \[MASK\]"),
        ([*SPECIALS, "cat", "dog", "cat"], "'cat' in line 6 and again in line 8"),
        ([*SPECIALS, "cat", "", "dog"], "line 7 is not one token"),
        ([*SPECIALS, "a cat"], "line 6 is not one token"),
        (json.dumps({"model": {"vocab": {}}}, indent=1), "line 2 is not one token"),
        ([*SPECIALS, "[unused0]"], "has no words"),
        ([*SPECIALS, "The", "Cat", "dog"], "tells capitals apart"),
    ],
)
def test_what_is_no_vocabulary(content: Any, part: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt" if content is None else save(tmp_path, content)
    with pytest.raises(DataError, match=rf"\Adata.vocabulary: [^\n]*{part}[^\n]*\Z") as caught:
        CaptionTokenizer.from_vocabulary(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=r"is a folder; give the vocab\.txt in it"):
        CaptionTokenizer.from_vocabulary(tmp_path)


# In a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pairs", "emoji"])
def test_both_sources_read_with_it(source: str, path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    lines = tmp_path / "p.jsonl"
    lines.write_text(json.dumps({"image": "a.png", "caption": "Of the $5 cat's"}))
    section = {"source": source, "path": lines, "vocabulary": path, "validation_fraction": 0, "max_tokens": 12}
    data = load_data(Recipe.model_validate({"data": section, "model": {"image": {"size": 16, "patch_size": 8}}}))
    batch = data.train_batch(np.arange(1 if source == "pairs" else 50), 0)
    assert data.tokenizer.vocabulary_size == len(tokens())
    assert (batch.token_ids[:, 0] == 101).all()
    assert batch.token_ids.shape[1] <= data.max_tokens == 12
    if source == "pairs":
        assert data.tokenizer.words(batch.token_ids[0])[1:-1] == ["of", "the", "$", "5", "cat", "##s"]
        assert batch.maskable[0].tolist() == [False, *[True] * 6, False]
    assert torch.equal(batch.token_ids == 102, batch.token_mask & ~batch.maskable & (batch.token_ids != 101)
                       & (batch.token_ids != 100))  # fmt: skip


def test_random_words_are_words(tokenizer: CaptionTokenizer) -> None:
    section = MaskingSection.model_validate(
        {"policy": "random", "text_ratio": 1.0, "corruption": {"mask": 0, "random": 1}}
    )
    planner = MaskPlanner(section, tokenizer.mask_id, tokenizer.vocabulary_size, tokenizer.word_ids)
    ids = torch.full((200, 40), int(tokenizer.word_ids[0]))
    real = torch.ones_like(ids, dtype=torch.bool)
    plan = planner(MaskContext(ids, real, real, (2, 2), Draws(0, 0, torch.arange(200))))
    assert plan.replacement is not None
    found = set(plan.replacement.flatten().tolist())
    assert KEEP not in found
    assert found == set(tokenizer.word_ids.tolist())


def test_policies_count_no_special_token(tokenizer: CaptionTokenizer, path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    lines = tmp_path / "p.jsonl"
    lines.write_text(json.dumps({"image": "a.png", "caption": "☃ cat ☃ sunflower"}))
    section = {"source": "pairs", "path": lines, "vocabulary": path, "validation_fraction": 0}
    data = load_data(Recipe.model_validate({"data": section, "model": {"image": {"size": 16, "patch_size": 8}}}))
    found = corpus(data)
    assert [data.tokenizer.words(row) for row in found.captions] == [["[UNK]", "cat", "[UNK]", "sun", "##flower"]]
    counts = WordCounts(found)
    assert counts.words == 3
    assert data.tokenizer.words(np.flatnonzero(counts.containing)) == ["cat", "sun", "##flower"]
    inside, _ = Entities(["☃", "cat"], found, "entity").find(torch.tensor(found.captions))
    assert inside.tolist() == [[False, True, False, False, False]]  # an unknown word stands for no other
    assert isinstance(found, Corpus)
