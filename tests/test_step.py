"""A training step at toy size: schedules, parameter groups, which terms appear, and how they are weighed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crossmask.engine.data.batch import Batch
from crossmask.engine.models import PretrainingModel
from crossmask.engine.objectives import Keys, RunMasks, TeacherView, look
from crossmask.engine.recipe import ModelSection, ObjectivesSection, OptimizerSection, Recipe
from crossmask.engine.training import step
from crossmask.engine.training.optimizer import build_optimizer, learning_rate, parameter_groups
from crossmask.engine.training.pretrainer import Pretrainer
from crossmask.engine.training.step import Schedule, compute_losses, fusion_rows

VOCABULARY, MASK_ID = 40, 4
NOW = Schedule(distillation=1.0, fusion=True, hardness=1.0, queue=True)


def section(**objectives: Any) -> ObjectivesSection:
    return ObjectivesSection.model_validate(objectives)


def student(objectives: ObjectivesSection | None = None, stem: str = "patch") -> PretrainingModel:
    torch.manual_seed(1)
    model = {
        "image": {"size": 16, "patch_size": 4, "width": 32, "depth": 1, "heads": 2, "stem": stem},
        "text": {"width": 24, "depth": 1, "heads": 2, "dropout": 0.0},
        "fusion": {"depth": 2, "heads": 3, "dropout": 0.0},
        "projection_width": 8,
    }
    return PretrainingModel(ModelSection.model_validate(model), objectives or section(), VOCABULARY, 8)


def run_masks(recipe: Recipe) -> RunMasks:
    data = SimpleNamespace(
        tokenizer=SimpleNamespace(mask_id=MASK_ID, vocabulary_size=VOCABULARY, word_ids=None), train_size=6
    )
    return RunMasks(recipe, data)  # type: ignore[arg-type]


def batch(n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (n, 7), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3
    ids[0, 5:] = torch.tensor([3, 0])
    images = torch.randn(n, 3, 16, 16, generator=generator)
    return Batch(images, ids, ids != 0, ids > 4, torch.arange(n), torch.arange(n), kind=torch.arange(n) % 2)


def seen(model: PretrainingModel, data: Batch, objectives: ObjectivesSection, schedule: Schedule) -> TeacherView:
    return look(model.model, data, run_masks(Recipe()), 0, fusion_rows(len(data), objectives, schedule))


def losses(
    objectives: ObjectivesSection, schedule: Schedule = NOW, model: PretrainingModel | None = None, n: int = 6
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = model or student(objectives)
    data = batch(n)
    view = seen(model, data, objectives, schedule)
    keys = Keys(view.image_feature, view.text_feature, data.group_id)
    torch.manual_seed(9)
    recipe = Recipe(objectives=objectives)
    return compute_losses(model, data, view, keys, recipe, schedule, run_masks(recipe).planner)


ALWAYS = {"loss", "temperature"}
TERMS = {"itc": {"itc"}, "itm": {"itm", "itm_accuracy"}, "mlm": {"mlm", "mlm_accuracy"}, "mim": {"mim"}}


@pytest.mark.parametrize("off", [(), ("itc",), ("itm",), ("mlm",), ("mim",), ("itm", "mlm", "mim"), ("itc", "itm")])
def test_a_term_appears_where_its_weight_is_positive(off: tuple[str, ...]) -> None:
    _, terms = losses(section(**{name: {"weight": 0.0} for name in off}))
    assert set(terms) == ALWAYS.union(*(names for kind, names in TERMS.items() if kind not in off))
    assert all(not value.requires_grad and value.shape == () for value in terms.values())


def test_the_loss_is_the_weighted_sum() -> None:
    weights = {"itc": 0.5, "itm": 2.0, "mlm": 0.1, "mim": 3.0}
    loss, terms = losses(section(**{name: {"weight": w} for name, w in weights.items()}))
    wanted = sum(w * terms[name].item() for name, w in weights.items())
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert terms["loss"].item() == loss.item()
    assert loss.requires_grad
    _, unweighted = losses(section())
    for name in weights:  # terms are reported before their weight
        assert terms[name].item() == pytest.approx(unweighted[name].item(), rel=1e-5)


def test_fusion_waits_for_its_schedule() -> None:
    _, terms = losses(section(), Schedule(1.0, fusion=False, hardness=0.0, queue=True))
    assert set(terms) == ALWAYS | {"itc"}


def test_nothing_but_fusion_before_its_start_is_a_loss_of_zero() -> None:
    """A recipe without ITC may still delay the others; the step must not fall over an empty sum."""
    loss, terms = losses(section(itc={"weight": 0.0}), Schedule(1.0, fusion=False, hardness=0.0, queue=True))
    assert loss.item() == 0
    assert set(terms) == ALWAYS


def test_distillation_is_scaled_by_the_schedule() -> None:
    objectives = section(itc={"distillation": 0.6}, mlm={"distillation": 0.8})
    half = Schedule(0.5, fusion=True, hardness=1.0, queue=True)
    _, found = losses(objectives, half)
    _, wanted = losses(section(itc={"distillation": 0.3}, mlm={"distillation": 0.4}))
    for name in ("itc", "mlm"):
        assert found[name].item() == pytest.approx(wanted[name].item(), rel=1e-6)
    _, none = losses(objectives, Schedule(0.0, fusion=True, hardness=1.0, queue=True))
    assert none["itc"].item() != pytest.approx(found["itc"].item(), rel=1e-4)


def test_hardness_of_the_negatives_is_the_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def record(*args: Any, **more: Any) -> dict[str, torch.Tensor]:
        given.append(args[-1])
        return {"itm": torch.zeros(())}

    monkeypatch.setattr(step, "image_text_matching", record)
    losses(section(), Schedule(1.0, fusion=True, hardness=0.25, queue=True))
    assert given == [0.25]


def test_matching_is_told_of_what_kind_a_pair_is() -> None:
    """Of six pairs of six kinds none has a negative; of two kinds each has."""
    objectives, model = section(mlm={"weight": 0.0}, mim={"weight": 0.0}), student()
    data, found = batch(), []
    for kind in (data.kind, torch.arange(6)):
        of_kind = replace(data, kind=kind)
        view, recipe = seen(model, of_kind, objectives, NOW), Recipe(objectives=objectives)
        keys = Keys(view.image_feature, view.text_feature, data.group_id)
        _, terms = compute_losses(model, of_kind, view, keys, recipe, NOW, run_masks(recipe).planner)
        found.append(terms["itm"].item())
    assert found[0] > 0 == found[1]


def test_a_batch_of_one_leaves_matching_out() -> None:
    loss, terms = losses(section(), n=1)
    assert set(terms) == ALWAYS.union(*(names for kind, names in TERMS.items() if kind != "itm"))
    assert math.isfinite(loss.item())
    loss.backward()


def test_a_run_says_once_that_batches_of_one_leave_matching_out() -> None:
    def notices(batch_size: int, ranks: int = 2, **more: Any) -> list[str]:
        given = {"training": {"batch_size": batch_size, "accumulation_steps": 2}, **more}
        run = SimpleNamespace(
            recipe=Recipe.model_validate(given),
            sampler=SimpleNamespace(world_size=ranks, notices=list),
            data=SimpleNamespace(notices=list),
            _notices=[],
        )
        return Pretrainer.notices(run)  # type: ignore[arg-type]

    assert notices(8) == []
    assert notices(4, objectives={"itm": {"weight": 0.0}}) == []
    (line,) = notices(4)
    assert line.startswith("ITM is left out: a rank's batch is one pair")
    assert notices(4, ranks=1) == []


def test_fusion_rows_is_a_cap() -> None:
    assert fusion_rows(10, section(), NOW) == 10
    assert fusion_rows(10, section(fusion_rows=4), NOW) == 4
    assert fusion_rows(3, section(fusion_rows=4), NOW) == 3
    assert fusion_rows(10, section(fusion_rows=4), Schedule(1.0, False, 1.0, True)) == 0


def test_fewer_fusion_rows_leave_itc_alone() -> None:
    _, some = losses(section(fusion_rows=2))
    _, all_rows = losses(section())
    assert some["itc"].item() == pytest.approx(all_rows["itc"].item(), rel=1e-6)
    assert some["mim"].item() != pytest.approx(all_rows["mim"].item(), rel=1e-4)
    assert math.isfinite(some["loss"].item())


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_every_trained_parameter_gets_a_gradient(stem: str) -> None:
    objectives = section(itc={"distillation": 0.4})
    model = student(objectives, stem).train()
    loss, _ = losses(objectives, model=model)
    loss.backward()
    without = {
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    }
    assert without == set()
    assert model.temperature.grad.shape == (1,)


@pytest.mark.parametrize("target", ["teacher_feature", "pixel", "normalised_pixel"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_bfloat16_stays_finite(stem: str, target: str) -> None:
    objectives = section(mim={"target": target})
    model = student(objectives, stem).bfloat16()
    loss, terms = losses(objectives, model=model)
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(value) for value in terms.values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.temperature.grad.abs().item() > 0
    _, exact = losses(objectives, model=student(objectives, stem))
    # The masks may differ by a patch and a negative by a draw; the terms stay near.
    for name in ("itc", "itm", "mlm", "mim"):
        assert terms[name].item() == pytest.approx(exact[name].item(), rel=0.2), name


def test_reported_temperature_is_a_scalar() -> None:
    _, terms = losses(section(itc={"temperature": 0.2}))
    assert terms["temperature"].item() == pytest.approx(0.2)


def test_an_untrained_model_starts_near_chance() -> None:
    """Head weights are small: ITM near ln 2, MLM near log V, ITC below the log of the number of keys plus a little."""
    _, terms = losses(section(itc={"temperature": 0.5, "distillation": 0.0}))
    assert terms["itm"].item() == pytest.approx(math.log(2), abs=0.35)
    assert terms["mlm"].item() == pytest.approx(math.log(VOCABULARY), abs=1.0)
    assert terms["itc"].item() == pytest.approx(math.log(6), abs=0.8)


def test_the_step_trains() -> None:
    objectives = section(itc={"distillation": 0.0})
    model = student(objectives)
    optimizer = build_optimizer(model, OptimizerSection(lr=3e-3))
    first = losses(objectives, model=model)[1]
    for _ in range(40):
        optimizer.zero_grad()
        losses(objectives, model=model)[0].backward()
        optimizer.step()
    last = losses(objectives, model=model)[1]
    for name in ("itc", "mlm", "mim"):
        assert last[name] < 0.8 * first[name], name


# -------------------------------------------------------------------------------------------------------- schedules


def recipe(**objectives: Any) -> Recipe:
    return Recipe.model_validate({"objectives": objectives, "training": {"max_steps": 100}})


def test_schedule_at_its_turns() -> None:
    r = recipe(
        distillation_ramp=0.2,
        fusion_start=0.3,
        itm={"hardness": 0.5, "hardness_ramp": 0.5},
        itc={"queue_start": 0.6},
    )
    seen = [Schedule.at(step, r) for step in (0, 10, 20, 29, 30, 55, 59, 60, 80, 99)]
    assert [s.distillation for s in seen] == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1])
    assert [s.fusion for s in seen] == [False] * 4 + [True] * 6
    assert [s.hardness for s in seen] == pytest.approx([0, 0, 0, 0, 0, 0.25, 0.29, 0.3, 0.5, 0.5])
    assert [s.queue for s in seen] == [False] * 7 + [True] * 3


def test_schedule_without_ramps_is_on_at_once() -> None:
    first = Schedule.at(0, recipe(distillation_ramp=0.0))
    assert first == Schedule(distillation=1.0, fusion=True, hardness=1.0, queue=True)


def test_no_fusion_where_no_objective_needs_it() -> None:
    off = {name: {"weight": 0.0} for name in ("itm", "mlm", "mim")}
    assert not Schedule.at(99, recipe(**off)).fusion
    for name in off:
        assert Schedule.at(0, recipe(**{k: v for k, v in off.items() if k != name})).fusion


def run_of(max_steps: int, **optimizer: float) -> Recipe:
    return Recipe.model_validate({"optimizer": optimizer, "training": {"max_steps": max_steps}})


def test_learning_rate_rises_and_falls_by_a_cosine() -> None:
    recipe = run_of(110, lr=1.0, final_lr=0.2, warmup_steps=10)
    rates = [learning_rate(step, recipe) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.6)  # half-way: the mean of both ends
    assert rates[35] == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert rates[110] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_learning_rate_can_rise_from_above_zero() -> None:
    recipe = run_of(110, lr=1.0, final_lr=0.2, warmup_steps=10, warmup_lr=0.1)
    rates = [learning_rate(step, recipe) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 + 0.09 * (i + 1) for i in range(10)])
    assert rates[10:] == [
        learning_rate(step, run_of(110, lr=1.0, final_lr=0.2, warmup_steps=10)) for step in range(10, 111)
    ]
    plain = run_of(1000, lr=7e-4, warmup_steps=60)
    assert [learning_rate(step, plain) for step in range(60)] == [
        7e-4 * (step + 1) / 60 for step in range(60)
    ]  # bitwise


def test_learning_rate_of_short_runs() -> None:
    long_warmup = {"lr": 1.0, "final_lr": 0.0, "warmup_steps": 1000}
    rates = [learning_rate(step, run_of(4, **long_warmup)) for step in range(4)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert learning_rate(0, run_of(1, **long_warmup)) == 1.0
    assert learning_rate(0, run_of(10, lr=1.0, warmup_steps=0)) == 1.0


def test_parameter_groups() -> None:
    model = student(stem="conv")
    groups = parameter_groups(model, OptimizerSection(weight_decay=0.05, temperature_lr_scale=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain, temperature = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.0]
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 1.0, 0.1]
    assert temperature == {"temperature"}
    assert decayed | plain | temperature == set(names.values())
    assert len(decayed) + len(plain) + len(temperature) == len(names)  # each once, tied ones too
    embeddings = "model.text.bert.embeddings."
    assert plain >= {
        "model.image.mask_token",
        "model.image.vit.cls_token",
        "model.image.vit.pos_embed",
        "model.word_bias",
        f"{embeddings}position_embeddings.weight",
        f"{embeddings}token_type_embeddings.weight",
        f"{embeddings}LayerNorm.weight",
        "model.fusion.layers.0.cross_attention.key_value.bias",
    }
    assert decayed >= {
        f"{embeddings}word_embeddings.weight",
        "model.fusion.layers.0.cross_attention.key_value.weight",
        "model.match_head.weight",
        "patch_decoder.head.weight",
    }
    assert not any(name.endswith(".bias") or "norm" in name.lower() for name in decayed)
    model.extra = torch.nn.ParameterDict({"mask_token": torch.zeros(1, 1, 8), "weight": torch.zeros(8, 8)})
    decayed, plain = ({id(p) for p in group["params"]} for group in parameter_groups(model, OptimizerSection())[:2])
    assert id(model.extra["mask_token"]) in plain
    assert id(model.extra["weight"]) in decayed
    model.model.image.vit.patch_embed.requires_grad_(False)
    frozen = {id(p) for group in parameter_groups(model, OptimizerSection()) for p in group["params"]}
    assert not any(id(p) in frozen for p in model.model.image.vit.patch_embed.parameters())
