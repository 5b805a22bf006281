"""The benchmark of ALBEF's step compares like with like: both sides compute the same losses and the same update."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crossmask.engine.models.albef_layout import AlbefFile, AlbefLayout, Ours
from crossmask.engine.objectives import RunMasks, itm
from crossmask.kernels.linear import api as linear

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_albef_step as bench  # noqa: E402
from albef_step import common, flops, memory, ours, sizes  # noqa: E402

sys.path.remove(str(BENCHMARKS))

TINY = replace(sizes.TINY, dropout=0.0)
LONGEST = 12


class Together:
    """One step by each side, from the same weights, queue, negatives, masks and learning rate."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(common, "WEIGHT_DECAY", 0.0)  # biases and position embeddings are exempted differently
        self.theirs, self.batch = common.CommonStep(TINY, seed=3), sizes.random_batch(TINY, LONGEST)
        for name, parameter in self.theirs.model.named_parameters():
            if not parameter.requires_grad:  # a teacher of its own, biases that say something
                parameter.data += 0.02 * torch.randn_like(parameter)
            elif parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            assert parameter.isfinite().all(), name
        overrides = ["optimizer.weight_decay=0", "optimizer.warmup_steps=0", f"optimizer.lr={common.LR}"]
        self.mine = ours.OurStep(TINY, overrides=overrides)
        run = self.mine.pretrainer
        self.layout = AlbefLayout(
            run.recipe.model, AlbefFile(), TINY.vocabulary, TINY.positions, queue_length=TINY.queue
        )
        self.layout_keys = self.layout.official_shapes()
        self.load(self.layout.to_ours(self.theirs.model.state_dict()))

        negatives: list[tuple[Tensor, ...]] = []
        plans: list[Any] = []
        draw, plan = itm.draw_negatives, RunMasks.plan

        def drawing(*given: Any, **named: Any) -> Any:
            negatives.append(draw(*given, **named))
            return negatives[-1]

        def planning(*given: Any, **named: Any) -> Any:
            plans.append(plan(*given, **named))
            return plans[-1]

        patch.setattr(itm, "draw_negatives", drawing)
        patch.setattr(RunMasks, "plan", planning)
        self.my_losses = self.mine(self.batch)
        (images, texts, _), chosen = negatives[0], plans[0]
        self.drawn = common.Drawn(images, texts, chosen.read(self.batch.token_ids), chosen.text)
        self.their_losses = self.theirs(self.batch, drawn=self.drawn)

    def load(self, state: Ours) -> None:
        run = self.mine.pretrainer
        missing, unknown = run.engine.module.load_state_dict(state.student, strict=False)
        assert not unknown
        assert all(name.startswith("patch_decoder") or name.endswith("mask_token") for name in missing)
        assert state.teacher is not None
        assert state.queue is not None
        run.teacher.load_state_dict({**run.teacher.state_dict(), **state.teacher})
        run.queue.load_state_dict(state.queue)

    def of_both(self, pick: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What ``pick`` finds of every trained parameter and its optimizer, by the official names, of both sides."""
        theirs = dict(self.theirs.model.named_parameters())
        mine = self.mine.pretrainer.engine.module
        state = self.mine.pretrainer.engine.optimizer.state
        shared = {name.removeprefix("model."): parameter for name, parameter in mine.named_parameters()}
        for name, parameter in shared.items():
            if official := self.layout.official(name) or ({"temperature": ("temp",)}.get(name, ())):
                found = pick(parameter, state).reshape(-1)
                wanted = [pick(theirs[part], self.theirs.optimizer.state).reshape(-1) for part in official]
                yield name, found, torch.cat(wanted)


@pytest.fixture(scope="module")
def together() -> Iterator[Together]:
    with pytest.MonkeyPatch.context() as patch:
        yield Together(patch)


def test_something_is_masked_and_drawn(together: Together) -> None:
    assert together.drawn.predicted.any()
    assert (together.drawn.corrupted != together.batch.token_ids).any()
    own = torch.arange(TINY.batch)
    assert (together.drawn.image_negatives != own).all()
    assert (together.drawn.text_negatives != own).all()


@pytest.mark.parametrize("name", ["itc", "itm", "mlm"])
def test_same_losses(together: Together, name: str) -> None:
    assert together.my_losses[name] == pytest.approx(together.their_losses[name], rel=1e-5)


def test_same_gradients(together: Together) -> None:
    """After one step Adam's first moment is a tenth of the gradient."""
    seen = 0
    for name, mine, theirs in together.of_both(lambda parameter, state: state[parameter]["exp_avg"]):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6 + 1e-4 * float(theirs.abs().max()), msg=name)
        assert theirs.any() or name.endswith(("key.bias", "key_value.bias")), name
        seen += 1
    assert seen > 100


def test_same_weights_after_the_step(together: Together) -> None:
    """The first step of Adam is the gradient's sign: compared where that is not rounding's."""
    for name, mine, theirs in together.of_both(lambda parameter, state: parameter.detach()):
        assert (mine - theirs).abs().max() <= 2.1 * common.LR, name
    moments = together.of_both(lambda parameter, state: state[parameter]["exp_avg"])
    weights = together.of_both(lambda parameter, state: parameter.detach())
    for (name, _, moment), (_, mine, theirs) in zip(moments, weights, strict=True):
        clear = moment.abs() > 1e-6 + 1e-3 * moment.abs().max()
        torch.testing.assert_close(mine[clear], theirs[clear], rtol=1e-5, atol=0.02 * common.LR, msg=name)


def test_same_queues(together: Together) -> None:
    queue = together.mine.pretrainer.queue
    torch.testing.assert_close(queue.image, together.theirs.model.image_queue.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(queue.text, together.theirs.model.text_queue.T, rtol=1e-4, atol=1e-5)
    assert queue.pointer == int(together.theirs.model.queue_ptr) == TINY.batch


def test_one_rank_leaves_its_gradients_where_they_are(together: Together) -> None:
    engine = together.mine.pretrainer.engine
    parameters = list(engine.module.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters[3].grad = None
    before = [None if p.grad is None else (p.grad.data_ptr(), p.grad._version) for p in parameters]
    engine.allreduce_gradients()
    for number, (parameter, was) in enumerate(zip(parameters, before, strict=True)):
        if number == 3:
            assert not parameter.grad.any()
        else:
            assert (parameter.grad.data_ptr(), parameter.grad._version) == was


def test_the_baseline_has_the_official_names(together: Together) -> None:
    found = together.theirs.model.state_dict()
    wanted = set(together.layout_keys)
    assert set(found) == wanted
    assert all(tuple(found[name].shape) == tuple(shape) for name, shape in together.layout_keys.items())


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = common.Albef(sizes.BASE)
    averaged = [p for _, teacher in model.pairs for p in teacher.parameters()]
    assert len(averaged) == 416
    assert sum(p.numel() for p in averaged) == 209_936_186


@pytest.mark.parametrize("longest", [25, 75])
def test_a_quarter_of_the_words_is_padding(longest: int) -> None:
    batch = sizes.random_batch(sizes.BASE, longest)
    assert batch.token_ids.shape == (8, longest)
    assert float(batch.token_mask.float().mean()) == pytest.approx(0.75)
    assert batch.token_mask.sum(1).max() == longest
    assert not (batch.maskable & ~batch.token_mask).any()


def test_the_flops_of_the_common_step_are_counted_right() -> None:
    step, batch = common.CommonStep(sizes.TINY), sizes.random_batch(sizes.TINY, LONGEST)
    work = flops.Work.expected(sizes.TINY, LONGEST)
    with FlopCounterMode(display=False) as counter:
        step(batch)
    assert counter.get_total_flops() == pytest.approx(sum(flops.common(sizes.TINY, work).values()), rel=1e-9)


def pairs(queries: Sequence[int], keys: Sequence[int]) -> int:
    """FLOP of one product of (B, H, S, D) with (B, H, P, D)."""
    return 2 * math.prod(queries) * keys[2]


def test_the_flops_of_our_step_are_the_least(together: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the two fused losses, whose insides the counter does not see."""
    monkeypatch.setattr(linear, "applies", lambda: False)  # nor those of oneDNN's products
    drawn: dict[str, Any] = {}
    for owner, name in ((itm, "draw_negatives"), (RunMasks, "plan")):
        called = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, n=name, call=called, **named: drawn.setdefault(n, call(*given, **named))
        )
    aten = torch.ops.aten
    fused = {  # which the counter does not know; a backward's second computation of the weights is not the least
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 2 * pairs(q, k),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 4 * pairs(q, k),
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        together.mine(together.batch)
    words, predicted = together.batch.token_mask.sum(1), drawn["plan"].text.sum(1)
    work = flops.Work(
        TINY.batch,
        LONGEST,
        int(words.sum()),
        int(2 * words.sum() + words[drawn["draw_negatives"][1]].sum()),
        int(predicted.sum()),
        int(predicted.max()),
    )
    least = flops.least(TINY, work)
    similarities = 2 * flops.linear(TINY.batch, TINY.projection, TINY.batch)  # from which negatives are drawn
    wanted = sum(least.values()) - least["contrast"] - least["vocabulary"] + similarities
    # features of the masked captions, of the student with their backward
    unread = (flops.TRAINED + flops.FORWARD) * flops.linear(TINY.batch, TINY.width, TINY.projection)
    assert counter.get_total_flops() == pytest.approx(wanted + unread, rel=1e-9)


@pytest.mark.parametrize(("longest", "shipped", "needed"), [(25, 2308.4, 1886.1), (75, 3212.5, 2468.2)])
def test_the_flops_at_the_published_size(longest: int, shipped: float, needed: float) -> None:
    work = flops.Work.expected(sizes.BASE, longest)
    assert sum(flops.common(sizes.BASE, work).values()) / 1e9 == pytest.approx(shipped, rel=1e-4)
    assert sum(flops.least(sizes.BASE, work).values()) / 1e9 == pytest.approx(needed, rel=1e-4)


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench, memory):
        monkeypatch.setattr(module, "BASE", sizes.TINY)
    monkeypatch.setattr(memory, "in_own_process", memory.measure)
    monkeypatch.setattr(linear, "applies", lambda: True)
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "2", "--lengths", "10", "13", "--json", str(file)])
    bench.main()
    found = json.loads(file.read_text())
    assert {(row["row"], row["length"]) for row in found["times"]} == {
        (name, longest)
        for name in (
            *(bench.BASELINE, bench.OURS, bench.BASELINE_BF16, bench.OURS_BF16, bench.OURS_AUTOCAST),
            *(bench.BASELINE + bench.ONEDNN, bench.OURS + bench.ONEDNN),
        )
        for longest in (10, 13)
    }
    assert len(found["ratios"]) == 11  # bf16 against fp32 at the first length alone
    assert all(row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] for row in found["ratios"])
    assert [row["target"] for row in found["ratios"][:6]] == [1.3, None, None, 1.2, None, 2.4]
    for told in found["parts"]:
        seconds = sum(row["forward"] + row["backward"] + row["teacher"] for row in told["parts"])
        assert seconds == pytest.approx(told["seconds"])
        named = {row["part"]: row for row in told["parts"]}
        for part in ("image towers", "text towers", "images' keys and values", "fusion for MLM"):
            assert named[part]["forward"] > 0, part
            assert named[part]["backward"] > 0, part
            assert named[part]["teacher"] > 0, part
        assert named["fusion for ITM"]["backward"] > 0
        assert named["everything else"]["backward"] < 0.3 * seconds, "gradients have owners"
    for side in found["memory"]:
        assert 0 < side["10"]["tensors"] <= side["13"]["tensors"]
