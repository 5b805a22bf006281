"""Masked language and image modelling and the teacher's look, against numbers worked out by hand.

Stand-ins answer for the model where its answer must be known.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmask.engine.data.batch import Batch
from crossmask.engine.masking import KEEP, MaskPlan
from crossmask.engine.models import Encoded, VisionLanguageModel
from crossmask.engine.objectives import (
    MaskedWords,
    RunMasks,
    StudentView,
    TeacherView,
    look,
    masked_image_modelling,
    masked_language_modelling,
)
from crossmask.engine.recipe import MlmSection, Recipe


def unit(n: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(n, width), dim=-1)


def encoded(feature: Tensor, tokens: Tensor | None = None) -> Encoded:
    return Encoded(torch.zeros(len(feature), 1, 1) if tokens is None else tokens, feature)


# ------------------------------------------------------------------------------------------------------------- MLM


class Reader:
    """Stands in for the model: fused tokens are their row and position, word logits are given for each."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # (B, L, V)
        self.word_decoder = (torch.eye(logits.shape[-1]), torch.zeros(logits.shape[-1]))

    def encode_text(self, ids: Tensor, token_mask: Tensor, **options: object) -> Encoded:
        self.ids, self.token_mask = ids, token_mask
        rows = torch.arange(ids.shape[0])[:, None].expand_as(ids)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return encoded(torch.zeros(len(ids), 2), torch.stack([rows, positions], -1))

    def fuse(
        self, tokens: Tensor, mask: Tensor, image: list[tuple[Tensor, Tensor]], *, rows: Tensor, **more: object
    ) -> SimpleNamespace:
        self.images, self.rows = image[0][0], rows
        return SimpleNamespace(tokens=tokens.take_along_dim(rows[:, :, None], 1))

    def word_hidden(self, rows: Tensor) -> Tensor:
        return self.logits[rows[:, 0], rows[:, 1]]


IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
TEXT_MASK = torch.tensor([[False, True, True, False], [False, True, False, False]])


def read(
    logits: Tensor, masked: Tensor, alpha: float, teacher: Tensor | None = None
) -> tuple[dict[str, Tensor], Reader]:
    model = Reader(logits)
    student = StudentView(encoded(unit(3)), encoded(unit(3)), [(torch.arange(3), torch.arange(3))])
    chosen = logits.detach()[masked] if teacher is None else teacher
    replacement = torch.where(masked, 4, KEEP)
    plan = MaskPlan(torch.zeros(2, 4, dtype=torch.bool), masked, replacement=replacement)
    decoder = {"word_weight": torch.eye(logits.shape[-1]), "word_bias": torch.zeros(logits.shape[-1])}
    words = MaskedWords.of(masked)
    view = TeacherView(unit(3), unit(3), plan=plan, words=words, word_hidden=chosen, **decoder)
    terms = masked_language_modelling(model, student, view, IDS, IDS != 0, alpha)  # type: ignore[arg-type]
    return terms, model


def test_mlm_by_hand() -> None:
    """Eight words. At the three masked places the right one has odds 3:7, 1:7 and 9:7 against the other seven."""
    logits = torch.zeros(2, 4, 8)
    logits[0, 1, 5], logits[1, 1, 7] = math.log(3), math.log(9)
    logits[0, 0], logits[1, 3] = 50.0, torch.linspace(0, 90, 8)  # places that are not masked do not count
    terms, model = read(logits, TEXT_MASK, 0.0)
    wanted = (math.log(10 / 3) + math.log(8) + math.log(16 / 9)) / 3
    assert terms["mlm"].item() == pytest.approx(wanted, rel=1e-6)
    assert terms["mlm_accuracy"].item() == pytest.approx(2 / 3)
    assert torch.equal(model.ids[~TEXT_MASK], IDS[~TEXT_MASK])
    assert torch.equal(model.images, torch.arange(2))  # the first rows' images, intact
    assert torch.equal(model.token_mask, IDS != 0)


def test_mlm_distils_from_the_teacher_row_by_row() -> None:
    logits, teacher = torch.randn(2, 4, 8), torch.randn(3, 8)
    terms, _ = read(logits, TEXT_MASK, 0.4, teacher)
    z, labels = logits[TEXT_MASK], torch.tensor([5, 6, 7])
    wanted = 0.6 * F.cross_entropy(z, labels) + 0.4 * F.cross_entropy(z, teacher.softmax(1))
    torch.testing.assert_close(terms["mlm"], wanted)


def test_mlm_hides_the_words_from_the_student() -> None:
    """What the student reads is the plan's replacement, the word itself elsewhere."""
    ids = read(torch.zeros(2, 4, 8), TEXT_MASK, 0.0)[1].ids
    assert torch.equal(ids, torch.where(TEXT_MASK, 4, IDS))


def test_mlm_without_masked_words_is_zero_with_a_live_graph() -> None:
    logits = torch.randn(2, 4, 8, requires_grad=True)
    terms, _ = read(logits, torch.zeros_like(TEXT_MASK), 0.4)
    assert terms["mlm"].item() == 0
    assert terms["mlm_accuracy"].item() == 0
    terms["mlm"].backward()
    assert (logits.grad == 0).all()


# ------------------------------------------------------------------------------------------------------------- MIM


class Painter:
    """A student whose patch decoder answers with given values (R, 1 + P, T); records what it was shown."""

    def __init__(self, answer: Tensor, patch_size: int = 2) -> None:
        self.answer = answer
        self.model = SimpleNamespace(patch_size=patch_size, encode_image=self.encode_image)

    def encode_image(self, images: Tensor, patch_mask: Tensor, drop: bool, drop_after: int) -> Encoded:
        self.images, self.mask = images, patch_mask
        return encoded(torch.zeros(len(images), 2))

    def decode_patches(self, image: Encoded, text_tokens: Tensor, token_mask: Tensor) -> Tensor:
        self.words = text_tokens
        return self.answer


def paint(
    answer: Tensor, masked: Tensor, target: str, images: Tensor | None = None, teacher: Tensor | None = None
) -> tuple[Tensor, Painter]:
    rows = len(masked)
    painter = Painter(answer)
    student = StudentView(encoded(unit(3)), encoded(unit(3), torch.arange(3).float().view(3, 1, 1)))
    plan = MaskPlan(masked, torch.zeros(rows, 4, dtype=torch.bool))
    tokens = torch.zeros(rows, 5, 3) if teacher is None else teacher
    view = TeacherView(unit(3), unit(3), image_tokens=tokens, plan=plan)
    pixels = torch.zeros(rows, 3, 4, 4) if images is None else images
    found = masked_image_modelling(painter, student, view, pixels, torch.ones(rows, 1).bool(), target)  # type: ignore[arg-type]
    return found["mim"], painter


ONE = torch.tensor([[False, False, True, False], [False, False, False, False]])


def test_mim_of_teacher_features_by_hand() -> None:
    """Patch 2 of the first image: teacher (1, 2, 3) becomes (-a, 0, a) with a = sqrt(3/2) after the layer norm."""
    teacher = torch.randn(2, 5, 3)
    teacher[0, 3] = torch.tensor([1.0, 2.0, 3.0])
    answer = torch.randn(2, 5, 3)
    answer[0, 3] = torch.tensor([0.0, 0.5, 0.0])
    found, painter = paint(answer, ONE, "teacher_feature", teacher=teacher)
    a = math.sqrt(1.5)
    assert found.item() == pytest.approx(((a - 0.5) + 0.5 * 0.25 + (a - 0.5)) / 3, rel=1e-4)
    assert torch.equal(painter.mask, ONE)
    assert torch.equal(painter.words.flatten(), torch.tensor([0.0, 1.0]))  # the intact captions of the same rows


def test_mim_is_the_mean_over_masked_patches() -> None:
    teacher = torch.tensor([1.0, 2.0, 3.0]).expand(2, 5, 3)
    masked = torch.tensor([[True, False, True, False], [False, True, False, False]])
    one, _ = paint(torch.zeros(2, 5, 3), ONE, "teacher_feature", teacher=teacher)
    three, _ = paint(torch.zeros(2, 5, 3), masked, "teacher_feature", teacher=teacher)
    assert three.item() == pytest.approx(one.item(), rel=1e-6)


def test_mim_of_pixels_by_hand_and_in_order() -> None:
    """Four patches of 2 x 2 in a 4 x 4 image; the one at row 1, column 0 is number 2. Channels come first."""
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, 2:, :2] = torch.arange(12.0).view(3, 2, 2)
    answer = torch.zeros(2, 5, 12)
    answer[0, 3] = torch.arange(12.0)
    found, _ = paint(answer, ONE, "pixel", images)
    assert found.item() == 0
    answer[0, 3, 4] += 3.0  # off by 3: 2.5 by smooth L1
    assert paint(answer, ONE, "pixel", images)[0].item() == pytest.approx(2.5 / 12)
    answer[0, 3, 4] -= 2.5  # off by 0.5: 0.125
    assert paint(answer, ONE, "pixel", images)[0].item() == pytest.approx(0.125 / 12)
    other = ONE.roll(1, 1)
    assert paint(torch.zeros(2, 5, 12), other, "pixel", images)[0].item() == 0  # the neighbour is empty


def test_mim_of_normalised_pixels_by_hand() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, 2:, :2] = 5 + 7 * torch.arange(12.0).view(3, 2, 2)
    answer = torch.zeros(2, 5, 12)
    answer[0, 3] = (torch.arange(12.0) - 5.5) / math.sqrt(13)  # variance of 0..11 over n - 1
    found, _ = paint(answer, ONE, "normalised_pixel", images)
    assert found.item() == pytest.approx(0, abs=1e-9)
    flat, _ = paint(torch.zeros(2, 5, 12), ONE, "normalised_pixel", torch.ones(2, 3, 4, 4))
    assert flat.item() == 0  # a patch of one colour


@pytest.mark.parametrize("target", ["teacher_feature", "pixel", "normalised_pixel"])
def test_mim_without_masked_patches_is_zero_with_a_live_graph(target: str) -> None:
    answer = torch.randn(2, 5, 3 if target == "teacher_feature" else 12, requires_grad=True)
    found, _ = paint(answer, torch.zeros_like(ONE), target)
    assert found.item() == 0
    found.backward()
    assert (answer.grad == 0).all()


def test_mim_sends_gradients_to_masked_patches_alone() -> None:
    answer = torch.randn(2, 5, 3, requires_grad=True)
    teacher = torch.randn(2, 5, 3, requires_grad=True)
    paint(answer, ONE, "teacher_feature", teacher=teacher)[0].backward()
    assert teacher.grad is None
    touched = (answer.grad != 0).any(-1)
    assert touched.nonzero().tolist() == [[0, 3]]


# ------------------------------------------------------------------------------------------------------------- look


def batch(n: int = 4) -> Batch:
    ids = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 3, 0], [2, 30, 3, 0, 0], [2, 31, 32, 3, 0]])[:n]
    return Batch(torch.randn(n, 3, 16, 16), ids, ids != 0, ids > 4, torch.arange(n), torch.arange(n))


def recipe(**masking: object) -> Recipe:
    tower = {"width": 16, "depth": 1, "heads": 2}
    model = {
        "image": {**tower, "size": 16, "patch_size": 4},
        "text": {**tower, "dropout": 0.0},
        "fusion": {"depth": 2, "heads": 2, "dropout": 0.0},
        "projection_width": 8,
    }
    return Recipe.model_validate({"model": model, "masking": masking})


def teacher() -> VisionLanguageModel:
    return VisionLanguageModel(recipe().model, 40, 8).eval()


def run_masks(**masking: object) -> RunMasks:
    data = SimpleNamespace(tokenizer=SimpleNamespace(mask_id=4, vocabulary_size=40, word_ids=None), train_size=4)
    return RunMasks(recipe(**masking), data)  # type: ignore[arg-type]


def test_look_gives_the_first_rows_everything_and_the_rest_features() -> None:
    model, data = teacher(), batch()
    view = look(model, data, run_masks(image_ratio=0.25, text_ratio=0.67), 0, 3)
    assert view.image_feature.shape == view.text_feature.shape == (4, 8)
    assert view.image_tokens.shape == (3, 17, 16)
    assert view.plan.image.shape == (3, 16)
    assert view.plan.image.sum(1).tolist() == [4, 4, 4]
    assert view.plan.text.sum(1).tolist() == [2, 1, 1]
    assert not (view.plan.text & ~data.maskable[:3]).any()
    assert torch.equal(view.plan.replacement != KEEP, (view.plan.replacement != KEEP) & view.plan.text)
    assert not any(x.requires_grad for x in (view.image_feature, view.text_feature, view.word_hidden, view.word_weight))
    # The words' soft labels, in the order of the plan, from the fused features of the intact pair.
    text = model.encode_text(data.token_ids[:3], data.token_mask[:3]).tokens
    image = model.project_image(model.encode_image(data.images[:3]).tokens)
    fused = model.fuse(text, data.token_mask[:3], image).tokens
    found = F.linear(view.word_hidden, view.word_weight, view.word_bias)
    torch.testing.assert_close(found, model.word_logits(fused[view.plan.text]).detach())


def test_look_weighs_maskable_words_only() -> None:
    model, data = teacher(), batch()
    view = look(model, data, run_masks(), 0, 4)
    assert (view.statistics.query_attention[~data.maskable] == 0).all()
    torch.testing.assert_close(view.statistics.query_attention.sum(1), torch.ones(4))


def test_look_without_fusion_rows() -> None:
    view = look(teacher(), batch(), run_masks(), 0, 0)
    assert view.image_feature.shape == (4, 8)
    assert view.plan is None
    assert view.word_hidden is None
    assert view.words is None


def looked(monkeypatch: pytest.MonkeyPatch, mlm: dict[str, object], policy: str) -> tuple[TeacherView, list[object]]:
    """What the teacher saw of three pairs, and the rows that each pass through its fusion encoder was asked for."""
    model, asked = teacher(), []
    usual = model.fuse

    def fuse(*given: object, **options: object) -> object:
        asked.append(options.get("rows"))
        return usual(*given, **options)

    monkeypatch.setattr(model, "fuse", fuse)
    masks = run_masks(policy=policy, text_ratio=0.67)
    object.__setattr__(masks.recipe.objectives, "mlm", MlmSection.model_validate(mlm))
    return look(model, batch(), masks, 0, 3), asked


@pytest.mark.parametrize(
    ("mlm", "policy", "passes"),
    [
        ({}, "syncmask", ["chosen"]),  # statistics and labels in one: of the words that the statistics choose
        ({}, "random", ["words"]),
        ({"teacher_reads": "masked"}, "syncmask", ["chosen", "words"]),
        ({"teacher_reads": "masked"}, "random", ["words"]),
        ({"distillation": 0.0}, "syncmask", ["chosen"]),
        ({"distillation": 0.0, "teacher_reads": "masked"}, "random", []),
        ({"weight": 0.0}, "syncmask", ["chosen"]),
        ({"weight": 0.0}, "random", []),
    ],
)
def test_look_fuses_no_more_than_is_read(
    monkeypatch: pytest.MonkeyPatch, mlm: dict[str, object], policy: str, passes: list[str]
) -> None:
    view, asked = looked(monkeypatch, mlm, policy)
    assert ["words" if isinstance(rows, Tensor) else "chosen" for rows in asked] == passes
    assert all(rows is not None for rows in asked), "nothing computes all words to the end"
    assert (view.statistics is not None) == (policy == "syncmask")
    on = mlm.get("weight", 1) != 0
    assert (view.words is not None) == on
    assert (view.word_hidden is not None) == (on and mlm.get("distillation", 1) != 0)
    assert view.image_tokens is not None
    assert view.plan is not None
    if on:
        assert all(torch.equal(rows, view.words.places) for rows in asked if isinstance(rows, Tensor))


@pytest.mark.parametrize("policy", ["syncmask", "random"])
@pytest.mark.parametrize("reads", ["intact", "masked"])
def test_look_takes_soft_labels_from_the_caption_that_the_recipe_names(
    monkeypatch: pytest.MonkeyPatch, reads: str, policy: str
) -> None:
    torch.manual_seed(0)
    view, _ = looked(monkeypatch, {"teacher_reads": reads}, policy)
    torch.manual_seed(0)
    model, data = teacher(), batch()
    ids = data.token_ids[:3] if reads == "intact" else view.plan.read(data.token_ids[:3])
    assert (ids != data.token_ids[:3]).any() == (reads == "masked")
    image = model.project_image(model.encode_image(data.images[:3]).tokens)
    mask = data.token_mask[:3]
    fused = model.fuse(model.encode_text(ids, mask).tokens, mask, image).tokens[view.plan.text]
    torch.testing.assert_close(view.word_hidden, model.word_hidden(fused).detach())


# ---------------------------------------------------------------------------------------------------- masked words


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_masked_words_are_those_of_the_mask_in_its_order(share: float) -> None:
    masked = torch.rand(5, 7) < share
    masked[2] = False
    words, tokens = MaskedWords.of(masked), torch.randn(5, 7, 3)
    assert words.places.shape == (5, max(1, int(masked.sum(1).max())))
    assert all(len(set(row.tolist())) == len(row) for row in words.places), "no position twice"
    here = tokens.gather(1, words.places[:, :, None].expand(-1, -1, 3))
    assert torch.equal(words.take(here), tokens[masked])


def test_mlm_of_masked_words_alone_is_that_of_whole_captions() -> None:
    """Loss, accuracy and every gradient, against logits of all words of which the masked are picked."""
    model, data = teacher().train(), batch()
    masks = run_masks(policy="random", text_ratio=0.67)
    view = look(teacher(), data, masks, 0, 3)
    ids, mask, masked = data.token_ids[:3], data.token_mask[:3], view.plan.text
    image = model.encode_image(data.images)
    student = StudentView(image, image, model.project_image(image.tokens))
    found = masked_language_modelling(model, student, view, ids, mask, 0.4)
    found["mlm"].backward(retain_graph=True)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    fused = model.fuse(
        model.encode_text(view.plan.read(ids), mask).tokens, mask, [(k[:3], v[:3]) for k, v in student.image_keys]
    )
    z, labels = model.word_logits(fused.tokens)[masked], ids[masked]
    soft = F.linear(view.word_hidden, view.word_weight, view.word_bias).softmax(1)
    wanted = 0.6 * F.cross_entropy(z, labels) + 0.4 * F.cross_entropy(z, soft)
    torch.testing.assert_close(found["mlm"], wanted)
    assert found["mlm_accuracy"].item() == pytest.approx((z.argmax(1) == labels).float().mean().item())
    wanted.backward()
    assert len(gradients) > 30
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
