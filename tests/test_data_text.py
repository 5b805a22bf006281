"""Tokenizer and caption table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossmask.engine.data.captions import CaptionTable, Phrases, ragged
from crossmask.engine.data.tokenizer import SPECIALS, CaptionTokenizer, split_words
from crossmask.engine.errors import CheckpointError

CAPTIONS = ["A red apple, with a leaf!", "the cat’s café", "an apple and a pear", "two cats in the rain: wet, wet, wet"]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, 256)


def test_words_lose_case_accents_and_punctuation() -> None:
    assert split_words("The cat’s Café -- o'clock; [MASK] 11:00") == [
        "the",
        "cats",
        "cafe",
        "oclock",
        "mask",
        "11",
        "00",
    ]
    assert split_words("红苹果 ok") == ["红", "苹", "果", "ok"]
    assert split_words(" !?… ") == []


def test_specials_have_their_ids_and_text_cannot_make_them(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.words(range(5)) == list(SPECIALS)
    ids = (tokenizer.pad_id, tokenizer.unknown_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 3, 4)
    assert not {0, 2, 3, 4} & {i for w in split_words("[MASK] [PAD] [CLS] [SEP]") for i in tokenizer.pieces(w)}


def test_round_trip_through_the_run_folder(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = CaptionTokenizer.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert again.vocabulary_size == tokenizer.vocabulary_size
    for caption in CAPTIONS:
        words = split_words(caption)
        assert [again.pieces(w) for w in words] == [tokenizer.pieces(w) for w in words]
        assert tokenizer.text([i for w in words for i in tokenizer.pieces(w)]) == " ".join(words)


def test_training_does_not_depend_on_the_order_of_captions(tokenizer: CaptionTokenizer) -> None:
    other = CaptionTokenizer.train(CAPTIONS[::-1], 256)
    assert other.words(range(other.vocabulary_size)) == tokenizer.words(range(tokenizer.vocabulary_size))


@pytest.mark.parametrize("size", [64, 100, 300])
def test_vocabulary_never_exceeds_its_size(size: int) -> None:
    letters = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 200))
    assert CaptionTokenizer.train([*CAPTIONS, letters], size).vocabulary_size <= size


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": "1.0"}'])
def test_unreadable_tokenizer_is_one_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        CaptionTokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ragged() -> None:
    assert ragged(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
    assert ragged(np.array([], int)).tolist() == []


def table(tokenizer: CaptionTokenizer, max_words: int = 10) -> CaptionTable:
    names = [["red", "apple"], ["cat"], ["apple", "and", "pear"]]
    return CaptionTable(tokenizer, names, [["apple", "leaf", "leaf"], ["rain", "wet"], []], max_words)


def test_repeated_tags_are_left_out(tokenizer: CaptionTokenizer) -> None:
    captions = table(tokenizer)
    texts = captions.assemble(captions.whole(np.arange(3)), 3)
    assert [tokenizer.text(row) for row in texts.token_ids] == ["red apple leaf", "cat rain wet", "apple and pear"]
    assert captions.maskable_words().tolist() == [3, 3, 2]


def test_texts_are_framed_and_padded(tokenizer: CaptionTokenizer) -> None:
    captions = table(tokenizer)
    texts = captions.assemble(captions.whole(np.array([2, 0])), 2)
    for ids, mask, maskable, words in zip(texts.token_ids, texts.token_mask, texts.maskable, texts.words, strict=True):
        shown = tokenizer.words(ids[mask])
        assert shown[0] == "[CLS]"
        assert shown[-1] == "[SEP]"
        assert (ids[~mask] == tokenizer.pad_id).all()
        assert not maskable[~mask].any()
        assert not (maskable[0] | maskable[mask.sum() - 1])
        assert ((words == 1) == maskable).all()
    conjunction = tokenizer.words(texts.token_ids[0]).index("and")
    assert not texts.maskable[0, conjunction]


def test_captions_are_cut_by_words_and_tokens(tokenizer: CaptionTokenizer) -> None:
    captions = table(tokenizer, max_words=2)
    texts = captions.assemble(captions.whole(np.arange(3)), 3)
    assert [tokenizer.text(row) for row in texts.token_ids] == ["red apple", "cat rain", "apple and"]
    long = CaptionTable(tokenizer, [["qzxqzxqzxqzxqzxqzx"] * 2], [[]], max_words=2)
    assert long.assemble(long.whole(np.array([0])), 1).token_ids.shape[1] <= long.max_tokens == 6


def test_word_drop_leaves_each_mention_a_content_word(tokenizer: CaptionTokenizer) -> None:
    captions = table(tokenizer)
    start, length = captions.start, captions.length
    zero = np.zeros(1, np.int64)
    phrases = Phrases(  # "apple and pear | and | cat rain wet"
        np.zeros(3, np.int64),
        np.concatenate([start[[2]], zero, start[[1]]]),
        np.concatenate([length[[2]], zero + 1, length[[1]]]),
        np.array([1, 0, 2]),
        np.array([0, -1, 1]),
    )
    for seed in range(20):
        luck = np.random.default_rng(seed).random((1, 7)) * 0.98
        texts = captions.assemble(phrases, 1, 0.99, lambda n, luck=luck: luck[:, :n])
        kept = tokenizer.text(texts.token_ids[0]).split()
        assert len(kept) == 3
        assert kept[0] in ("apple", "pear")
        assert kept[1] == "and"
        assert kept[2] in ("cat", "rain", "wet")
        assert sorted(set(texts.words[0].tolist())) == [0, 1, 2]


def test_words_outside_the_vocabulary_are_not_maskable(tokenizer: CaptionTokenizer) -> None:
    captions = CaptionTable(tokenizer, [["жар", "cat"]], [[]], 5)
    texts = captions.assemble(captions.whole(np.array([0])), 1)
    assert tokenizer.words(texts.token_ids[0])[1] == "[UNK]"
    assert texts.maskable[0].tolist()[1] is False
    assert captions.maskable_words().tolist() == [1]
