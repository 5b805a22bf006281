"""Policies that choose words by what the captions say about them, on captions made by hand."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossmask.engine.errors import RecipeError
from crossmask.engine.masking import Corpus, Draws, MaskContext, Policy, build_policy
from crossmask.engine.masking.policies.random import random_patches
from crossmask.engine.masking.word_counts import QUANTUM, PairPmi, WordCounts
from crossmask.engine.recipe import MaskingSection
from crossmask.kernels import AttentionStatistics

CLS, SEP, UNKNOWN, FIRST = 2, 3, 1, 5


class Language:
    """Captions as strings: a vocabulary of the pieces in them, where ``cat-fish`` is the word catfish of two pieces."""

    def __init__(self, *captions: str, more: str = "") -> None:
        self.ids: dict[str, int] = {}
        self.words: dict[str, list[int]] = {}
        self.captions = [self.encode(caption) for caption in captions]
        self.encode(more)
        self.size = FIRST + len(self.ids)

    def encode(self, text: str) -> list[int]:
        found = []
        for word in text.split():
            names = [part if i == 0 else f"##{part}" for i, part in enumerate(word.split("-"))]
            ids = [self.ids.setdefault(name, FIRST + len(self.ids)) for name in names]
            self.words.setdefault(word.replace("-", ""), ids)
            found.extend(ids)
        return found

    def corpus(self) -> Corpus:
        later = frozenset(i for name, i in self.ids.items() if name.startswith("##"))
        return Corpus(self.captions, self.size, lambda word: self.words.get(word, [UNKNOWN]), later)

    def policy(self, name: str, **options: Any) -> Policy:
        policy = build_policy(MaskingSection(policy=name, options=options))
        policy.prepare(self.corpus())
        return policy

    def context(self, *captions: str, times: int = 1, kept: Sequence[str] = (), **given: Any) -> MaskContext:
        """Each caption ``times`` over, padded; the pieces of ``kept`` may not be masked."""
        rows = [self.encode(caption) for caption in captions for _ in range(times)]
        L = max(map(len, rows)) + 3
        ids = torch.zeros(len(rows), L, dtype=torch.int64)
        for row, words in zip(ids, rows, strict=True):
            row[: len(words) + 2] = torch.tensor([CLS, *words, SEP])
        banned = torch.tensor([self.ids[piece] for piece in kept], dtype=torch.int64)
        maskable = (ids >= FIRST) & ~torch.isin(ids, banned)
        defaults: dict[str, Any] = {"draws": Draws(1, 0, torch.arange(len(rows)))}
        return MaskContext(ids, ids > 0, maskable, (3, 3), **(defaults | given))

    def hidden(self, plan_text: Tensor, context: MaskContext) -> list[list[str]]:
        names = {i: name for name, i in self.ids.items()}
        return [[names[int(i)] for i in ids[text]] for ids, text in zip(context.token_ids, plan_text, strict=True)]


# Counting


def brute_force(captions: list[list[int]]) -> dict[tuple[int, int], float]:
    sets = [{i for i in caption if i >= FIRST} for caption in captions]
    alone = Counter(i for found in sets for i in found)
    pairs = Counter(pair for found in sets for pair in itertools.combinations(sorted(found), 2))
    return {(a, b): math.log(n * len(captions) / (alone[a] * alone[b])) for (a, b), n in pairs.items()}


def random_corpus(captions: int, vocabulary: int, length: int, seed: int = 0) -> Corpus:
    """Words by Zipf's law, lengths from 0 to twice ``length``."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 2 * length + 1, captions)
    words = FIRST + (random.zipf(1.3, lengths.sum()) - 1) % (vocabulary - FIRST)
    parts = np.split(words, lengths.cumsum()[:-1])
    return Corpus([part.tolist() for part in parts], vocabulary, lambda word: [UNKNOWN])


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_pairs_have_the_pmi_of_their_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmask.engine.masking.word_counts._TOKENS_AT_ONCE", chunk)
    corpus = random_corpus(200, 40, 5)
    corpus.captions[3].extend([UNKNOWN, SEP])  # type: ignore[attr-defined]
    expected = brute_force([list(caption) for caption in corpus.captions])
    ids = torch.arange(40)[None]
    found = PairPmi(corpus, 100, 1)(ids)[0]
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    for a, b in itertools.combinations_with_replacement(range(40), 2):
        assert float(found[a, b]) == pytest.approx(expected.get((a, b), 0.0), abs=QUANTUM), (a, b)
    counts = WordCounts(corpus)
    assert counts.words == sum(i >= FIRST for caption in corpus.captions for i in caption)
    assert counts.containing[UNKNOWN] == counts.occurrences[SEP] == 0


def test_only_the_most_frequent_and_often_enough_shared_count() -> None:
    corpus = random_corpus(300, 60, 6)
    counts = WordCounts(corpus)
    kept = counts.most_frequent(10)
    assert kept.sum() == 10
    assert counts.containing[kept].min() >= counts.containing[~kept].max()
    found = PairPmi(corpus, 10, 1)(torch.arange(60)[None])[0]
    assert not found[~torch.from_numpy(kept)].any()
    sets = [set(caption) for caption in corpus.captions]
    often = PairPmi(corpus, 60, 8)(torch.arange(60)[None])[0]
    for a, b in itertools.combinations(range(FIRST, 60), 2):
        if sum(a in words and b in words for words in sets) < 8:
            assert often[a, b] == 0


@pytest.mark.parametrize("captions", [[], [[]], [[9]], [[], [9, 9], [UNKNOWN]]])
def test_captions_without_pairs(captions: list[list[int]]) -> None:
    found = PairPmi(Corpus(captions, 20, lambda word: [UNKNOWN]), 8, 1)(torch.arange(20)[None])
    assert not found.any()


@pytest.mark.parametrize("name", ["pmi", "informask", "term_weight", "difference", "time_variant"])
def test_counting_takes_seconds_for_many_captions_and_words(name: str) -> None:
    """15,000 captions of 12 words of BERT's vocabulary."""
    corpus = random_corpus(15_000, 30_522, 12)
    policy = build_policy(MaskingSection(policy=name))
    start = time.perf_counter()
    policy.prepare(corpus)
    assert time.perf_counter() - start < 20  # about one on a quiet machine


@pytest.mark.parametrize("name", ["pmi", "informask", "term_weight", "difference", "time_variant", "entity_words"])
def test_policy_that_counted_nothing_says_what_to_call(name: str) -> None:
    context = Language("a b c").context("a b c")
    with pytest.raises(RuntimeError, match=rf"'{name}' has counted no captions: call prepare\(corpus\)"):
        build_policy(MaskingSection(policy=name))(context)


@pytest.mark.parametrize("name", ["pmi", "informask", "term_weight", "difference", "time_variant"])
def test_captions_of_unknown_words_are_masked_at_random(name: str) -> None:
    """Nothing is known of any of them, so no place in the caption comes before another."""
    language = Language(*["a b", "a c", "b c"] * 5, more="u v w x y z")
    context = language.context("u v w x y z", times=3000, text_ratio=0.34, progress=1.0)
    text = language.policy(name)(context).text
    assert (text.sum(1) == 2).all()
    assert (text[:, 1:7].float().mean(0) - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 3000)


@pytest.mark.parametrize("name", ["pmi", "informask", "term_weight", "difference", "time_variant"])
def test_patches_are_random(name: str) -> None:
    language = Language("a b c", "c d")
    context = language.context("a b c", times=4)
    assert torch.equal(language.policy(name)(context).image, random_patches(context))


# InforMask and PMI

# salt and pepper come together and nowhere else; the rest of the words mix at random.
MIXED = [" ".join(words) for words in itertools.permutations(["one", "two", "three", "four", "five"], 3)]
SPICED = [*MIXED, *["salt pepper one", "salt pepper two", "three salt pepper", "four five salt pepper"] * 2]


def test_pmi_hides_the_words_that_tell_each_other() -> None:
    language = Language(*SPICED)
    context = language.context("salt one two pepper three", "two salt four one pepper", text_ratio=0.4)
    hidden = language.hidden(language.policy("pmi")(context).text, context)
    assert [sorted(words) for words in hidden] == [["pepper", "salt"]] * 2


def test_pmi_follows_the_sum_over_the_other_words() -> None:
    language = Language(*SPICED)
    pmi = brute_force(language.captions)
    context = language.context("salt one four pepper five two", "one two five three", text_ratio=0.5)
    text = language.policy("pmi")(context).text
    for ids, chosen in zip(context.token_ids.tolist(), text.tolist(), strict=True):
        words = [i for i in ids if i >= FIRST]
        score = {a: sum(pmi.get((min(a, b), max(a, b)), 0.0) for b in words if b != a) for a in words}
        best = sorted(words, key=lambda a: -score[a])[: len(words) // 2]
        assert {i for i, taken in zip(ids, chosen, strict=True) if taken} == set(best)


def score_of(language: Language, context: MaskContext, text: Tensor) -> list[float]:
    pmi = brute_force(language.captions)
    found = []
    for ids, chosen in zip(context.token_ids.tolist(), text.tolist(), strict=True):
        hidden = [i for i, taken in zip(ids, chosen, strict=True) if taken]
        visible = [i for i, taken in zip(ids, chosen, strict=True) if not taken]
        found.append(sum(pmi.get((min(a, b), max(a, b)), 0.0) for a in hidden for b in visible))
    return found


def test_informask_hides_one_of_a_pair_and_shows_the_other() -> None:
    """With two hidden of five words, the best mask hides salt or pepper, never both."""
    language = Language(*SPICED)
    context = language.context("salt one two pepper three", times=200, text_ratio=0.4)
    text = language.policy("informask", candidates=100)(context).text
    for words in language.hidden(text, context):
        assert len({"salt", "pepper"} & set(words)) == 1, words


def test_informask_takes_the_best_of_its_candidates() -> None:
    """With enough candidates, the best of all masks; with one, a random one."""
    language = Language(*SPICED)
    context = language.context("salt one four pepper five two", times=100, text_ratio=0.34)
    one_row = language.context("salt one four pepper five two")
    all_masks = []
    for places in itertools.combinations(range(1, 7), 2):
        text = torch.zeros_like(one_row.maskable)
        text[0, list(places)] = True
        all_masks.append(score_of(language, one_row, text)[0])
    best = score_of(language, context, language.policy("informask", candidates=300)(context).text)
    assert best == pytest.approx([max(all_masks)] * 100, abs=1e-3)
    some = score_of(language, context, language.policy("informask", candidates=4)(context).text)
    one = score_of(language, context, language.policy("informask", candidates=1)(context).text)
    assert np.mean(one) == pytest.approx(np.mean(all_masks), abs=5 * np.std(all_masks) / 10)
    assert np.mean(one) < np.mean(some) < np.mean(best)
    # the mean of the best of four random masks, by their distribution
    ordered, n = sorted(all_masks), len(all_masks)
    expected = sum(x * (((i + 1) / n) ** 4 - (i / n) ** 4) for i, x in enumerate(ordered))
    assert np.mean(some) == pytest.approx(expected, abs=5 * np.std(all_masks) / 10)


def test_informask_counts_words_that_may_not_be_masked_as_visible() -> None:
    language = Language(*SPICED)
    context = language.context("salt one two pepper three", times=50, text_ratio=0.25, kept=["pepper"])
    text = language.policy("informask", candidates=60)(context).text
    assert language.hidden(text, context) == [["salt"]] * 50


def test_informask_candidates_do_not_depend_on_the_longest_caption() -> None:
    language = Language(*SPICED)
    policy = language.policy("informask", candidates=3)
    alone = language.context("salt one two pepper three", times=40, text_ratio=0.4)
    longer = [torch.nn.functional.pad(x, (0, 7)) for x in (alone.token_ids, alone.token_mask, alone.maskable)]
    beside = MaskContext(*longer, (3, 3), alone.draws, text_ratio=0.4)
    assert torch.equal(policy(beside).text[:, :8], policy(alone).text)


def test_rates_of_informask_are_those_of_its_candidates() -> None:
    language = Language(*SPICED * 40)
    policy = language.policy("informask", rule="rates")
    (odds,) = policy.odds.on(torch.device("cpu"))  # type: ignore[attr-defined]
    rate = {name: float(odds[i] / (1 + odds[i])) for name, i in language.ids.items()}
    assert min(rate["salt"], rate["pepper"]) > 1.15 * max(
        rate[name] for name in ("one", "two", "three", "four", "five")
    )
    # Where one word is hidden, its chance is in proportion to rate / (1 - rate).
    context = language.context("salt one two", times=6000, text_ratio=0.34)
    share = language.policy("informask", rule="rates")(context).text[:, 1:4].float().mean(0)
    weight = torch.tensor([rate[name] / (1 - rate[name]) for name in ("salt", "one", "two")])
    assert (share - weight / weight.sum()).abs().max() < 5 * math.sqrt(0.25 / 6000)


# Term weights


def bm25(language: Language, caption: str, k1: float, b: float) -> dict[str, float]:
    words, N = caption.split(), len(language.captions)
    mean = sum(map(len, language.captions)) / N
    found = {}
    for word, tf in Counter(words).items():
        n = sum(language.ids[word] in ids for ids in language.captions)
        idf = math.log(1 + (N - n + 0.5) / (n + 0.5))
        found[word] = idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(words) / mean))
    return found


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (0.0, 0.0), (2.0, 1.0)])
def test_term_weight_draws_in_proportion_to_bm25(k1: float, b: float) -> None:
    language = Language(*["common rare", *["common usual"] * 6, *["common"] * 12, "odd common usual"])
    caption = "common usual rare odd rare rare"  # much longer than most, which takes from words that occur once
    weight = bm25(language, caption, k1, b)
    context = language.context(caption, times=8000, text_ratio=0.17)  # one of six
    share = language.policy("term_weight", k1=k1, b=b)(context).text[:, 1:7].float().mean(0)
    expected = torch.tensor([weight[word] for word in caption.split()])
    expected /= expected.sum()
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / 8000)
    assert expected.max() > 3 * expected.min()  # else any draw would pass


def test_term_weight_of_several_words_is_without_replacement() -> None:
    """Chances of pairs: draw one in proportion to the weights, then one of the rest."""
    language = Language(*["a b", *["a c"] * 4, *["a d"] * 9])
    caption = "a b c d"
    weight = bm25(language, caption, 0.9, 0.4)
    total = sum(weight.values())
    context = language.context(caption, times=8000, text_ratio=0.5)
    hidden = Counter(tuple(words) for words in language.hidden(language.policy("term_weight")(context).text, context))
    for one, other in itertools.combinations("abcd", 2):
        first, second = weight[one], weight[other]
        expected = first / total * second / (total - first) + second / total * first / (total - second)
        assert hidden[one, other] / 8000 == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 8000))


# Difference masking

KITCHEN = [
    f"the {thing} {verb} in the {place}"
    for thing, verb in (("dough", "proves"), ("yeast", "rises"), ("flour", "sifts"))
    for place in ("oven", "bowl")
]
NEWS = [
    "the people went home in the night",
    "in the day we could see the world",
    "where is the school that people like",
    "a bowl in the world",
]


def test_difference_anchors_are_frequent_here_and_rare_there(tmp_path: Path) -> None:
    reference = tmp_path / "news.txt"
    reference.write_text("\n".join(NEWS) + "\n\n")
    language = Language(*KITCHEN * 4, "people people people", more="world night school home day " * 2)
    policy = language.policy("difference", reference=reference, anchors=3)
    # of f = 12 there are bowl and oven, the three things of f = 8 and their verbs; bowl stands in the reference
    anchors = [next(name for name, i in language.ids.items() if i == anchor) for anchor in policy.anchors]  # type: ignore[attr-defined]
    assert anchors[0] == "oven"
    assert not {"the", "in", "people", "bowl"} & set(anchors)


@pytest.mark.parametrize("with_reference", [True, False])
def test_difference_prefers_words_of_the_domain(with_reference: bool, tmp_path: Path) -> None:
    (tmp_path / "news.txt").write_text("\n".join(NEWS * 20))
    language = Language(*KITCHEN * 4, *["the people in the world"] * 4)
    options = {"reference": tmp_path / "news.txt"} if with_reference else {}
    context = language.context("the people in the oven", "the dough in the world", times=2000, text_ratio=0.2)
    text = language.policy("difference", anchors=4, **options)(context).text
    hidden = Counter(words[0] for words in language.hidden(text, context)[:2000])
    # Five words weigh 5, 4, 3, 2, 1 by closeness; an anchor is closest to itself.
    assert max(hidden, key=lambda word: hidden[word]) == "oven"
    assert hidden["oven"] / 2000 == pytest.approx(5 / 15, abs=5 * math.sqrt(0.25 / 2000))
    hidden = Counter(words[0] for words in language.hidden(text, context)[2000:])
    assert hidden["dough"] > 1.2 * max(hidden[word] for word in ("in", "world"))


def test_closeness_is_the_largest_cosine_with_an_anchor() -> None:
    corpus = random_corpus(300, 60, 6)
    policy = build_policy(MaskingSection(policy="difference", options={"anchors": 5}))
    policy.prepare(corpus)
    assert len(policy.anchors) == 5  # type: ignore[attr-defined]
    (closeness,) = policy.closeness.on(torch.device("cpu"))  # type: ignore[attr-defined]
    alone = Counter(i for caption in corpus.captions for i in set(caption))
    vectors = np.zeros((60, 60))
    for (a, b), value in brute_force([list(caption) for caption in corpus.captions]).items():
        vectors[a, b] = vectors[b, a] = max(value, 0.0)
    for i, n in alone.items():
        vectors[i, i] = math.log(300 / n)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
    expected = (vectors @ vectors[list(policy.anchors)].T).max(1)  # type: ignore[attr-defined]
    assert closeness.numpy() == pytest.approx(expected, abs=1e-3)
    assert closeness[list(policy.anchors)].tolist() == pytest.approx([1.0] * 5)  # type: ignore[attr-defined]


def test_endings_are_no_anchors() -> None:
    language = Language(*["run-ning", "swim-ning", "sing-ning"] * 5)
    policy = language.policy("difference", anchors=1)
    assert policy.anchors != (language.ids["##ning"],)  # type: ignore[attr-defined]


def test_difference_refuses_a_reference_it_cannot_use(tmp_path: Path) -> None:
    language = Language("a b")
    with pytest.raises(RecipeError, match=r"masking.options.reference: no such file .*missing.txt; check the path"):
        language.policy("difference", reference=tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(RecipeError, match=r"empty.txt has no words; give a file of other text"):
        language.policy("difference", reference=tmp_path / "empty.txt")


# Entities

ANIMALS = Language(
    "a big zeb-ra and a cat",
    "the cat-fish swims",
    "a gol-den ret-rie-ver runs",
    "one big cat on a mat",
    "zeb-ra cross-ing",
)


def groups(text: Tensor, context: MaskContext) -> set[str]:
    return {" ".join(words) for words in ANIMALS.hidden(text, context)}


def test_entities_come_first_and_others_fill_up() -> None:
    policy = ANIMALS.policy("entity_words", words=["Cat", "mat"])
    context = ANIMALS.context("one big cat on a mat", times=300, text_ratio=0.5)
    text = policy(context).text
    assert (text.sum(1) == 3).all()
    assert text[:, [3, 6]].all()
    assert (text[:, [1, 2, 4, 5]].float().mean(0) - 0.25).abs().max() < 5 * math.sqrt(3 / 16 / 300)
    fewer = policy(ANIMALS.context("one big cat on a mat", times=300, text_ratio=0.17))
    assert groups(fewer.text, context) == {"cat", "mat"}


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 1.0])
def test_entity_words_are_hidden_wholly_or_not_at_all(ratio: float) -> None:
    policy = ANIMALS.policy("entity_words", words=["zebra", "golden retriever", "crossing", "cat"])
    caption = "a big gol-den ret-rie-ver and zeb-ra cross-ing a mat cat"
    context = ANIMALS.context(caption, times=200, text_ratio=ratio)
    text = policy(context).text[:, 1:-2]
    pieces = caption.replace("-", " ").split()
    assert text.shape[1] == len(pieces) == 15
    retriever, zebra = text[:, 2:7], text[:, 8:10]
    assert (retriever.all(1) == retriever.any(1)).all()
    # zebra and crossing stand side by side and are still two
    crossing = text[:, 10:12]
    for entity in (zebra, crossing):
        assert (entity.all(1) == entity.any(1)).all()
    if ratio < 0.5:
        assert (zebra.all(1) != crossing.all(1)).any()
    k = max(1, math.floor(ratio * 15))
    assert (text.sum(1) >= k).all()
    assert (text.sum(1) <= min(15, k + 4)).all()
    others = text[:, [0, 1, 7, 12, 13]]
    assert not (others.any(1) & ~(retriever.all(1) & zebra.all(1) & crossing.all(1) & text[:, 14])).any()


def test_part_of_a_longer_word_is_not_the_word() -> None:
    policy = ANIMALS.policy("entity_words", words=["cat", "catfish swims"])
    inside, goes_on = policy.entities.find(ANIMALS.context("the cat-fish swims", "the cat-fish cat").token_ids)  # type: ignore[attr-defined]
    assert inside.int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0]]
    assert goes_on.int().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0] * 7]


def test_overlapping_entities_count_as_one() -> None:
    policy = ANIMALS.policy("entity_words", words=["big zebra", "zebra crossing", "zebra"])
    inside, goes_on = policy.entities.find(ANIMALS.context("big zeb-ra cross-ing cat").token_ids)  # type: ignore[attr-defined]
    assert inside[0].int().tolist() == [0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert goes_on[0].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_entities_keep_words_that_may_not_be_masked() -> None:
    policy = ANIMALS.policy("entity_words", words=["one big cat"])
    context = ANIMALS.context("one big cat on a mat", times=20, text_ratio=0.2, kept=["big"])
    assert groups(policy(context).text, context) == {"one cat"}


def test_entity_words_from_a_file_and_the_list(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\ufeffzebra\n\n  Golden-Retriever \nnobody\n", encoding="utf-8")
    policy = ANIMALS.policy("entity_words", file=tmp_path / "words.txt", words=["mat"])
    context = ANIMALS.context("a zeb-ra gol-den ret-rie-ver mat", times=100, text_ratio=0.1)
    assert groups(policy(context).text, context) == {"zeb ##ra", "gol ##den ret ##rie ##ver", "mat"}


def test_many_entities_are_found_like_few() -> None:
    words = [" ".join(pair) for pair in itertools.product(["a", "big", "cat", "mat", "on", "one", "the"], repeat=2)]
    policy = ANIMALS.policy("entity_words", words=words)
    context = ANIMALS.context("one zeb-ra a cat runs on", "zeb-ra swims a runs")
    inside, _ = policy.entities.find(context.token_ids)  # type: ignore[attr-defined]
    assert inside.int().tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0, 0], [0] * 10]


def test_entity_words_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'entity_words' has no words: give options.words.*or options.file"):
        ANIMALS.policy("entity_words")
    with pytest.raises(RecipeError, match=r"none of its 4 words \('dog', 'bird', '!', ...\) occurs"):
        ANIMALS.policy("entity_words", words=["dog", "bird", "!", "zebra mat"])
    with pytest.raises(RecipeError, match=r"masking.options.file: no such file .*gone.txt; check the path"):
        ANIMALS.policy("entity_words", file=tmp_path / "gone.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        ANIMALS.policy("entity_words", file=tmp_path / "binary")


# MMCLIP


def attended(context: MaskContext) -> AttentionStatistics:
    rows = len(context.token_ids)
    patches = torch.tensor([0.1, 0.0, 0.3, 0.05, 0.25, 0.1, 0.0, 0.15, 0.05]).expand(rows, -1)
    words = torch.linspace(0, 1, context.token_ids.shape[1]).flip(0).expand(rows, -1)
    return AttentionStatistics(key_attention=patches, query_attention=words)


def test_mmclip_hides_responsive_patches_and_entities() -> None:
    context = ANIMALS.context("one big cat on a mat", times=3, image_ratio=0.34, text_ratio=0.17)
    context = MaskContext(**{**vars(context), "statistics": attended(context)})
    plan = ANIMALS.policy("mmclip", words=["mat"])(context)
    assert plan.image[0].nonzero()[:, 0].tolist() == [2, 4, 7]
    assert groups(plan.text, context) == {"mat"}
    without = ANIMALS.policy("mmclip")(context)
    assert torch.equal(without.image, plan.image)
    assert groups(without.text, context) == {"one"}  # the word that is attended to most, [CLS] aside
    with pytest.raises(RecipeError, match="'mmclip': none of its 1 words"):
        ANIMALS.policy("mmclip", words=["dog"])


# From uniform to hard words


def shares_at(progress: float, **options: Any) -> dict[str, float]:
    language = Language(*["plain"] * 40, *["plain usual"] * 10, "plain odd usual")
    context = language.context("plain usual odd", times=6000, text_ratio=0.34, progress=progress)
    hidden = language.hidden(language.policy("time_variant", **options)(context).text, context)
    return {word: count / 6000 for word, count in Counter(words[0] for words in hidden).items()}


def test_time_variant_goes_from_uniform_to_rare_words() -> None:
    bound = 5 * math.sqrt(0.25 / 6000)
    first, middle, last = shares_at(0.0), shares_at(0.5), shares_at(1.0)
    assert all(abs(share - 1 / 3) < bound for share in first.values())
    assert last["plain"] < middle["plain"] < first["plain"]
    assert first["odd"] < middle["odd"] < last["odd"]
    counts = {"plain": 51, "usual": 11, "odd": 1}
    surprisal = {word: -math.log(n / 63) for word, n in counts.items()}
    mean, deviation = np.mean(list(surprisal.values())), np.std(list(surprisal.values()))
    weight = {word: 1 / (1 + math.exp(-2 * (s - mean) / deviation)) for word, s in surprisal.items()}
    for word, share in last.items():
        assert share == pytest.approx(weight[word] / sum(weight.values()), abs=bound)
    assert shares_at(0.5, until=0.5) == last


def test_words_that_are_equally_frequent_stay_equally_likely() -> None:
    language = Language("a b c", "a b c")
    context = language.context("a b c", times=3000, text_ratio=0.34, progress=1.0)
    share = language.policy("time_variant")(context).text[:, 1:4].float().mean(0)
    assert (share - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 3000)
