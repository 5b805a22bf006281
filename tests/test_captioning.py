"""Generated captions: the searches against plain ones, and what the captions and classes are scored with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.data import CaptionTokenizer
from crossmask.engine.errors import RecipeError
from crossmask.engine.evaluation import captioning as captioning_module
from crossmask.engine.evaluation.captioning import score
from crossmask.engine.evaluation.generation import Generated, generate
from crossmask.engine.evaluation.zero_shot import Prompts, class_embeddings, class_scores, read_prompts, zero_shot
from crossmask.engine.models.captioner import CaptioningModel, Context
from crossmask.engine.recipe import ModelSection
from crossmask.engine.recipe_sections_evaluation import CaptioningSection

TOKENIZER = CaptionTokenizer.train(["red green blue square circle a the of big small"], 64)
WORDS, LENGTH = TOKENIZER.vocabulary_size, 9
END = TOKENIZER.sep_id


class WholeReader:
    """Reads every caption from its beginning at each step, by the model's own forward: nothing is kept."""

    def __init__(self, model: CaptioningModel, context: Context, captions: int, longest: int) -> None:
        mask = None if context.mask is None else context.mask.repeat_interleave(captions, 0)
        self.model, self.context = model, Context(context.tokens.repeat_interleave(captions, 0), mask)
        self.read = torch.empty(len(self.context.tokens), 0, dtype=torch.long)

    def step(self, last: Tensor) -> Tensor:
        self.read = torch.cat([self.read, last[:, None]], 1)
        all_words = torch.ones_like(self.read, dtype=torch.bool)
        tokens = self.model.encode_text(self.read, all_words).tokens
        return self.model.caption_logits(tokens, all_words, self.context)[:, -1]

    def choose(self, rows: Tensor) -> None:
        self.read = self.read[rows]


def build(pooler: bool = False, **more: Any) -> CaptioningModel:
    section = ModelSection.model_validate(
        {
            "image": {"size": 16, "patch_size": 8, "width": 24, "depth": 1, "heads": 2},
            "text": {"width": 16, "depth": 2, "heads": 2, "dropout": 0.0},
            "projection_width": 16,
            "captioner": {"depth": 2, "heads": 2, "pooler": {"queries": 3, "heads": 2} if pooler else None},
            **more,
        }
    )
    torch.manual_seed(3)
    model = CaptioningModel(section, WORDS, LENGTH).eval()
    with torch.no_grad():  # words that are not all alike
        for name, value in model.named_parameters():
            own = {"norm": 0.1, "embeddings": 1.0, "vocabulary": 0.5, "cross_blocks": 0.5, "image": 0.5}
            value.normal_(std=next((std for part, std in own.items() if part in name), 0.3))
            if "norm" in name and name.endswith("weight"):
                value.add_(1.0)
        model.vocabulary.weight[END] *= 2.5  # captions of several lengths
    return model


@pytest.fixture(scope="module")
def model() -> CaptioningModel:
    return build()


@pytest.fixture(scope="module")
def context(model: CaptioningModel) -> Context:
    with torch.no_grad():
        return model.context(model.encode_image(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))))


def settings(**fields: Any) -> CaptioningSection:
    return CaptioningSection.model_validate({"min_tokens": 1, **fields})


def same(one: Generated, other: Generated) -> None:
    assert torch.equal(one.token_ids, other.token_ids)
    assert torch.equal(one.length, other.length)
    assert torch.equal(one.ended, other.ended)
    torch.testing.assert_close(one.log_probability, other.log_probability, atol=1e-5, rtol=1e-5)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"beams": 1},
    "beams": {"beams": 4},
    "drawn": {"top_p": 0.9, "temperature": 1.3},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", ["patches", "pooler", "masked", "mean"])
def test_what_is_kept_changes_nothing(search: str, kind: str) -> None:
    model = build(pooler=kind == "pooler", pool="mean" if kind == "mean" else "cls")
    with torch.no_grad():
        context = model.context(model.encode_image(torch.randn(5, 3, 16, 16)))
    if kind == "masked":
        context = Context(context.tokens, torch.rand(context.tokens.shape[:2]) < 0.6)
        context.mask[:, 0] = True
    section = settings(**SEARCHES[search] | {"min_tokens": 3})
    found = generate(model, context, section, TOKENIZER, seed=2)
    same(found, generate(model, context, section, TOKENIZER, seed=2, reader=WholeReader))
    assert len(found.token_ids.unique(dim=0)) > 2, "captions that are all alike would prove nothing"


def test_log_probabilities_are_the_models_own(model: CaptioningModel, context: Context) -> None:
    """Read back in one pass: what was written has the probability that was told."""
    for fields in SEARCHES.values():
        found = generate(model, context, settings(min_tokens=4, **fields), TOKENIZER)
        ids = F.pad(found.token_ids, (1, 0), value=TOKENIZER.cls_id)
        mask = torch.arange(ids.shape[1]) < found.length[:, None]
        with torch.no_grad():
            logits = model.caption_logits(model.encode_text(ids, mask | True).tokens, None, context)
        own = logits[:, :-1].log_softmax(-1).gather(2, found.token_ids[..., None])[..., 0]
        torch.testing.assert_close(found.log_probability, own.where(mask[:, : own.shape[1]], 0.0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.score, found.log_probability.sum(1))


def next_log_p(model: CaptioningModel, context: Context, prefix: list[int]) -> Tensor:
    """(V,) of what may be chosen, plainly."""
    ids = torch.tensor([[TOKENIZER.cls_id, *prefix]])
    with torch.no_grad():
        tokens = model.encode_text(ids, ids >= 0).tokens
        found = model.caption_logits(tokens, ids >= 0, context)[0, -1].log_softmax(-1)
    found[sorted(TOKENIZER.special_ids - {END})] = -torch.inf
    return found


def test_one_beam_is_greedy(model: CaptioningModel, context: Context) -> None:
    found = generate(model, context, settings(beams=1), TOKENIZER)
    for row in range(len(context.tokens)):
        alone, caption = Context(context.tokens[row : row + 1]), list[int]()
        while len(caption) < LENGTH - 1 and END not in caption:
            caption.append(int(next_log_p(model, alone, caption).argmax()))
        assert found.token_ids[row, : found.length[row]].tolist() == caption
        assert bool(found.ended[row]) == (END in caption)
        assert (found.token_ids[row, found.length[row] :] == TOKENIZER.pad_id).all()


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_captions(model: CaptioningModel, context: Context, penalty: float) -> None:
    words = [n for n in range(WORDS) if n not in TOKENIZER.special_ids]
    section = settings(beams=1 + len(words) + len(words) ** 2, max_tokens=2, length_penalty=penalty)
    found = generate(model, Context(context.tokens[:2]), section, TOKENIZER)
    for row in range(2):
        alone = Context(context.tokens[row : row + 1])
        best: list[tuple[float, list[int]]] = []
        first = next_log_p(model, alone, [])
        best.append((float(first[END]), [END]))
        for word in words:
            second = next_log_p(model, alone, [word])
            best += [(float(first[word] + second[n]) / 2**penalty, [word, n]) for n in [*words, END]]
        value, caption = max(best)
        assert found.token_ids[row, : found.length[row]].tolist() == caption
        assert float(found.score[row]) / len(caption) ** penalty == pytest.approx(value, abs=1e-4)


def test_more_beams_find_likelier_captions(model: CaptioningModel, context: Context) -> None:
    few, many = (
        generate(model, context, settings(beams=beams, length_penalty=0.0), TOKENIZER).score for beams in (1, 24)
    )
    assert (many >= few - 1e-5).float().mean() > 0.8
    assert many.mean() > few.mean() + 0.1


def test_shortest_and_longest(model: CaptioningModel, context: Context) -> None:
    for fields in SEARCHES.values():
        short = generate(model, context, settings(max_tokens=3, **fields), TOKENIZER)
        assert short.token_ids.shape[1] <= 3
        assert (short.length <= 3).all()
        long = generate(model, context, settings(min_tokens=6, **fields), TOKENIZER)
        assert (long.length >= 6).all()
        assert not (long.token_ids[:, :5] == END).any()
        whole = generate(model, context, settings(max_tokens=100, **fields), TOKENIZER)
        assert whole.token_ids.shape[1] <= LENGTH - 1, "[CLS] has a position of its own"
        for found in (short, long, whole):
            last = found.token_ids.gather(1, found.length[:, None] - 1)[:, 0]
            assert torch.equal(last == END, found.ended)
            inside = torch.arange(found.token_ids.shape[1]) < found.length[:, None]
            specials = torch.tensor(sorted(TOKENIZER.special_ids - {END}))
            assert not torch.isin(found.token_ids[inside], specials).any()


def test_it_stops_when_all_have_ended() -> None:
    model, steps = build(), list[int]()
    with torch.no_grad():
        model.vocabulary.weight.zero_()
        model.text_decoder.norm.weight.zero_()
        model.text_decoder.norm.bias.fill_(1.0)
        model.vocabulary.weight[END] = 1.0  # whatever is read, the end is likeliest by far

    class Counting(WholeReader):
        def step(self, last: Tensor) -> Tensor:
            steps.append(len(steps))
            return super().step(last)

    context = Context(torch.randn(3, 4, 24))
    for fields in ({"beams": 1}, {"top_p": 0.5}):
        steps.clear()
        found = generate(model, context, settings(**fields), TOKENIZER, reader=Counting)
        assert len(steps) == 1
        assert found.token_ids.tolist() == [[END]] * 3


def test_what_is_drawn_depends_on_seed_and_image_alone(model: CaptioningModel, context: Context) -> None:
    section = settings(top_p=0.95, temperature=2.0)
    index = torch.tensor([7, 3, 5, 0, 1, 2])
    first = generate(model, context, section, TOKENIZER, 5, index)
    same(first, generate(model, context, section, TOKENIZER, 5, index))
    other = generate(model, context, section, TOKENIZER, 6, index)
    assert first.token_ids.tolist() != other.token_ids.tolist()
    alone = generate(model, Context(context.tokens[2:3]), section, TOKENIZER, 5, index[2:3])
    assert torch.equal(alone.token_ids[0], first.token_ids[2, : alone.length[0]])
    state = torch.get_rng_state()
    generate(model, context, section, TOKENIZER, 5, index)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_p_draws_from_the_fewest_that_reach_it(model: CaptioningModel, context: Context) -> None:
    """First tokens of many draws are as frequent as their shares of what is kept, and nothing else ever comes."""
    one = Context(context.tokens[:1].expand(4000, -1, -1))
    found = generate(model, one, settings(top_p=0.7, max_tokens=1), TOKENIZER).token_ids[:, 0]
    p = next_log_p(model, Context(context.tokens[:1]), []).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.7).sum()) + 1]
    wanted = torch.zeros(WORDS).index_copy(0, kept, p[kept] / p[kept].sum())
    seen = torch.bincount(found, minlength=WORDS) / 4000
    assert len(kept) > 2
    assert not seen[wanted == 0].any()
    assert (seen - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert generate(model, context, settings(top_p=1e-6), TOKENIZER).token_ids.equal(
        generate(model, context, settings(beams=1), TOKENIZER).token_ids
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens \(5\) is more than max_tokens \(4\)"),
        ({"temperature": 0.5}, r"temperature \(0.5\) is of top_p"),
        ({"top_p": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**fields)


# ---- scores


def test_bleu_and_cider_of_captions_in_words() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")
    references = [
        ["a red square on the left side", "the square"],
        ["two blue circles in a row"],
        ["one cat sits there"],
    ]
    perfect = score([own[0] for own in references], references)
    assert perfect["bleu4"] == pytest.approx(100.0)
    assert perfect["cider"] > 400
    # by hand: of the first caption 6 of 7 words, 4 of 6 pairs, 2 of 5 triples and 1 of 4 fours; the others are a word
    written = ["a red square on my left side", "blue", "cat"]
    found = score(written, references)
    grams = [(6 + 1 + 1, 9), (4, 6), (2, 5), (1, 4)]
    precision = np.exp(np.mean([np.log(right / all_) for right, all_ in grams]))
    brevity = np.exp(1 - (7 + 6 + 4) / 9)  # the closest references have 7, 6 and 4 words
    assert found["bleu4"] == pytest.approx(100 * precision * brevity)
    worse = score(["x", "y", "z"], references)
    assert (worse["bleu4"], worse["cider"]) == (0.0, 0.0)
    assert score(["a cat"], [["a cat"]])["cider"] == 0.0, "of one image no word is rare"


def test_further_references_can_only_help() -> None:
    pytest.importorskip("sacrebleu")
    written = ["a small green circle of the square", "the big red square"]
    one = score(written, [["the circle is green and small"], ["a square"]])
    more = score(written, [["the circle is green and small", written[0]], ["a square", written[1]]])
    assert more["bleu4"] == pytest.approx(100.0)
    assert one["bleu4"] < more["bleu4"]


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning_module.importlib.util, "find_spec", lambda name: None)
    found = score(["a"], [["a"]])
    assert found["bleu4"] is None
    assert found["missing"] == "sacrebleu and pycocoevalcap not installed: pip install 'crossmask[captioning]'"


# ---- zero-shot classification


def test_class_embeddings_are_means_of_normalised_features(model: CaptioningModel) -> None:
    prompts = Prompts("category", {"r": ("red",), "g": ("green", "big green")}, ("{}", "a {} square"))
    found = class_embeddings(model, prompts, TOKENIZER, LENGTH, "cpu")
    texts = [["red", "a red square"], ["green", "a green square", "big green", "a big green square"]]
    with torch.no_grad():
        for row, own in zip(found, texts, strict=True):
            features = [model.encode_text(*TOKENIZER.batch([text], LENGTH)).feature[0] for text in own]
            torch.testing.assert_close(row, F.normalize(torch.stack(features).mean(0), dim=0), atol=1e-5, rtol=1e-5)


def test_class_scores() -> None:
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.0, 0.0, 0.0, 0.0],  # right
            [0.5, 0.5, 0.2, 0.0, 0.0, 0.0, 0.0],  # a tie is lost, among the first five
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.0],  # of class 6: last of seven
            [torch.nan] * 7,
        ]
    )
    found = class_scores(similarity, torch.tensor([0, 0, 6, 2]))
    assert (found["top1"], found["top5"]) == (25.0, 50.0)
    # taken for 0, 1, 0, 0: class 0 is right once, of 3 that were taken for it and 2 that are; the other three never
    assert found["macro_f1"] == pytest.approx(100 * (2 / 5) / 4)


def test_macro_f1_is_scikit_learns() -> None:
    luck = np.random.default_rng(0)
    true, similarity = luck.integers(0, 6, 200), luck.normal(size=(200, 6))
    predicted = similarity.argmax(1)
    f1 = []
    for k in range(6):
        right = ((predicted == k) & (true == k)).sum()
        precision, recall = right / max(1, (predicted == k).sum()), right / max(1, (true == k).sum())
        f1.append(2 * precision * recall / max(1e-12, precision + recall))
    found = class_scores(torch.from_numpy(similarity), torch.from_numpy(true))
    assert found["macro_f1"] == pytest.approx(100 * float(np.mean(f1)))
    assert found["top1"] == pytest.approx(100 * float((predicted == true).mean()))


class Split:
    """Images of one grey value each, with a class."""

    def __init__(self, count: int = 8) -> None:
        self.title, self.image_count, self.count = "split", count, count
        self.labels = {"category": np.array([("a", "b", "")[n % 3] for n in range(count)], object)}
        self.names = np.array([f"name {n}" for n in range(count)], object)

    def images(self, size: int) -> Any:
        for start in range(0, self.count, size):
            yield type("Batch", (), {"images": torch.arange(start, min(start + size, self.count)).float()})


class Pointing:
    """Features that say what they are of: an image of class a (b) points along the text "red" ("green")."""

    def encode_image(self, images: Tensor) -> Any:
        feature = F.one_hot((images.long() % 3 == 1).long(), 2).float()
        return type("Encoded", (), {"feature": feature})

    def encode_text(self, ids: Tensor, mask: Tensor) -> Any:
        red = torch.tensor([TOKENIZER.text(row) == "red" for row in ids])
        return type("Encoded", (), {"feature": F.one_hot((~red).long(), 2).float()})


def test_zero_shot_by_prompts_and_by_what_the_data_say() -> None:
    prompts = Prompts("category", {"a": ("red",), "b": ("green",), "c": ("blue",)})
    found = zero_shot(Pointing(), Split(), TOKENIZER, LENGTH, "cpu", prompts)["category"]  # type: ignore[arg-type]
    assert (found["classes"], found["images"], found["unlabelled"]) == (3, 6, 2)
    assert found["top1"] == 50.0, "b and c are asked for in the same direction: a tie is lost"
    assert found["chance"] == pytest.approx(100 / 3)
    levels = zero_shot(Pointing(), Split(), TOKENIZER, LENGTH, "cpu")  # type: ignore[arg-type]
    assert {level: own["classes"] for level, own in levels.items()} == {"category": 2, "name": 8}
    assert zero_shot(Pointing(), Split(), TOKENIZER, LENGTH, "cpu", Prompts("x", prompts.classes)) == {}  # type: ignore[arg-type]


def test_prompts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(
        json.dumps({"templates": ["a photo of a {}"], "classes": {"TOPS": ["top", "shirt"], "SHOES": "shoe"}})
    )
    found = read_prompts(file)
    assert found == Prompts("category", {"TOPS": ("top", "shirt"), "SHOES": ("shoe",)}, ("a photo of a {}",))
    file.write_text(json.dumps({"classes": ["a", "b"], "level": "subcategory"}))
    assert read_prompts(file) == Prompts("subcategory", {"a": ("a",), "b": ("b",)}, ("{}",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "has no classes"),
        ('{"classes": 3}', "neither a list of names nor a mapping"),
        ('{"classes": {"a": "x", "b": []}}', "class 'b' has no name"),
        ('{"classes": ["a"]}', "has 1 class, which leaves nothing"),
        ('{"classes": ["a", "b"], "templates": ["a photo"]}', "must have {} once"),
        ('{"classes": ["a", "b"], "template": ["{}"]}', "unknown key 'template'"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_prompts(tmp_path / "prompts.json")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
