"""The implementation "crossmask" against Transformers' eager attention, on small models of its real classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers_models import CASES, LAYERS, draw, eager, text, words

from crossmask.kernels.integrations.layers import IMPLEMENTATION, attention_layers, select
from crossmask.kernels.integrations.transformers import record_attention, register, use_crossmask

STATISTICS = ("lse", "max_probability", "entropy", "key_attention", "query_attention", "key_max")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def ours(name: str) -> nn.Module:
    return use_crossmask(copy.deepcopy(eager(name)))


def floats(output: Any, valid: Tensor | None) -> list[Tensor]:
    """Every floating result of a forward; of padded places nothing is asked."""
    found = [x for x in output.to_tuple() if isinstance(x, Tensor) and x.is_floating_point()]
    if valid is None:
        return found
    return [x[valid.bool()] if x.shape[:2] == valid.shape else x for x in found]


def loss(outputs: list[Tensor]) -> Tensor:
    terms = [(x * torch.randn(x.shape, generator=draw(i))).sum() for i, x in enumerate(outputs)]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_the_gradient_of_every_parameter_are_eagers(name: str) -> None:
    case, feed = CASES[name], CASES[name].feed()
    valid = feed[case.valid] if case.valid else None
    theirs, mine = copy.deepcopy(eager(name)), ours(name)
    assert list(theirs.state_dict()) == list(mine.state_dict())
    expected, found = floats(theirs(**feed), valid), floats(mine(**feed), valid)
    assert len(expected) == len(found) > 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5)
    loss(expected).backward()
    loss(found).backward()
    for (key, a), b in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=2e-5 * (1 + a.grad.abs().max().item()), msg=key)


def weights_of(model: nn.Module, feed: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """Eager's own weights (B, H, S, P) of the named layers, which return them last."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: found.update({name: call[2][-1]}))
        for name in names
    ]
    model(**feed)
    for hook in hooks:
        hook.remove()
    return found


def told_by(weights: Tensor, lse: Tensor, queries: Tensor, link: Tensor) -> dict[str, Tensor]:
    """What the six statistics are, from eager's weights; the logits come back as log w + lse."""
    valid = queries[:, None, :, None]
    count = weights.shape[1] * queries.sum(1)[:, None]
    logits = (weights.double().log() + lse.double()[..., None]).masked_fill(~(valid & link), -torch.inf)
    columns = logits.softmax(2).nan_to_num(0.0)
    keys = link.any(2)[:, 0].sum(1)[:, None] * weights.shape[1]
    return {
        "max_probability": weights.amax(3),
        "entropy": -(weights * weights.clamp_min(1e-30).log()).sum(3),
        "key_attention": (weights * valid).sum((1, 2)) / count,
        "query_attention": (columns.sum((1, 3)) / keys).float(),
        "key_max": (weights * valid).amax((1, 2)),
    }


LAYERS_TOLD = [(name, pattern) for name, case in CASES.items() for pattern in case.told]


@pytest.mark.parametrize(("name", "pattern"), LAYERS_TOLD)
def test_statistics_are_those_of_eagers_weights(name: str, pattern: str) -> None:
    case, feed = CASES[name], CASES[name].feed()
    mine = ours(name)
    names = list(select(mine, pattern))
    mask = feed[case.queries[pattern]] if pattern in case.queries else None
    expected = weights_of(copy.deepcopy(eager(name)), feed, names)
    with record_attention(mine, pattern, STATISTICS, query_mask=mask) as record:
        output = mine(**feed)
    assert list(record) == names
    for layer, found in record.items():
        weights = expected[layer]
        queries = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool) if mask is None else mask.bool()
        for statistic, x in told_by(weights, found.lse, queries, weights.detach() > 0).items():
            torch.testing.assert_close(getattr(found, statistic), x, rtol=1e-4, atol=1e-5, msg=f"{layer} {statistic}")
    plain = mine(**feed)
    for a, b in zip(floats(plain, None), floats(output, None), strict=True):  # recording changes nothing
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "pattern"), [(n, p) for n, case in CASES.items() for p in case.refused])
def test_what_has_no_statistics_says_so_in_one_line(name: str, pattern: str) -> None:
    mine, feed = ours(name), CASES[name].feed()
    with pytest.raises(ValueError, match=CASES[name].refused[pattern]) as refusal, record_attention(mine, pattern):
        mine(**feed)
    assert "\n" not in str(refusal.value)
    mine(**feed)  # and the model runs on


def test_causal_attention_is_told_when_asked_for() -> None:
    """GQA, padding and a causal mask together; what a query does not see has no weight."""
    mine, feed = ours("Llama"), CASES["Llama"].feed()
    names = list(attention_layers(mine))
    valid = feed["attention_mask"]
    for given in (feed, {k: v for k, v in feed.items() if k != "attention_mask"}):
        expected = weights_of(copy.deepcopy(eager("Llama")), given, names)
        with record_attention(mine, "self", ("key_attention",), causal=True, query_mask=valid) as record:
            mine(**given)
        for layer, found in record.items():
            kept = expected[layer] * valid[:, None, :, None]
            wanted = kept.sum((1, 2)) / (4 * valid.sum(1)[:, None])
            torch.testing.assert_close(found.key_attention, wanted, rtol=1e-4, atol=1e-5)
        with record_attention(mine, "self", ("entropy",)) as record:  # of a row: needs no permission
            mine(**given)
        for layer, found in record.items():
            wanted = -(expected[layer] * expected[layer].clamp_min(1e-30).log()).sum(3)
            torch.testing.assert_close(found.entropy, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BART", "T5", "BLIP captioner"])
def test_generation_with_a_cache_gives_the_same_tokens(name: str) -> None:
    feed = CASES[name].feed()
    given = {k: v for k, v in feed.items() if k not in ("decoder_input_ids", "use_cache")}
    if name == "BLIP captioner":
        given = {"pixel_values": feed["pixel_values"], "input_ids": words(3)}  # a prompt for every image
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    expected = copy.deepcopy(eager(name)).generate(**given, **settings)
    mine = ours(name)
    with record_attention(mine, "cross", ("key_attention",), calls="all") as record:
        found = mine.generate(**given, **settings)
    assert torch.equal(found, expected)
    assert len(record) == LAYERS
    for layer in record:
        steps = record.all_calls(layer)
        assert len(steps) == 6
        assert all(abs(step.key_attention.sum(1) - 1).max() < 1e-5 for step in steps)
        if "attention_mask" in given:
            assert all(step.key_attention[given["attention_mask"] == 0].abs().max() == 0 for step in steps)


def test_beam_search_gives_the_same_tokens() -> None:
    given = text()
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    expected = copy.deepcopy(eager("BART")).generate(**given, **settings)
    assert torch.equal(ours("BART").generate(**given, **settings), expected)


def test_a_loss_on_the_statistics_has_eagers_gradients() -> None:
    case = CASES["BERT decoder with cross-attention"]
    feed = case.feed()
    theirs, mine = copy.deepcopy(eager(case.name)), ours(case.name)
    names = list(select(mine, "cross"))
    target = torch.rand(3, 9, generator=draw(8))
    expected = sum((w.mean((1, 2)) - target).square().sum() for w in weights_of(theirs, feed, names).values())
    with record_attention(mine, "cross", ("key_attention",)) as record:
        mine(**feed)
    found = sum((told.key_attention - target).square().sum() for told in record.values())
    expected.backward()
    found.backward()
    moved = 0
    for (key, a), b in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        for x, y in ((a.grad, b.grad),):
            x, y = (torch.zeros_like(a) if g is None else g for g in (x, y))
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6, msg=key)
            moved += int(x.abs().max() > 1e-6)
    assert moved > 10


def test_dropout_in_training_drops_weights_as_eager_does() -> None:
    """No two implementations draw alike, so the mean of many passes is held to the pass without dropout."""
    mine, feed = ours("ViT"), CASES["ViT"].feed()
    layer = next(iter(attention_layers(mine).values()))
    states = torch.randn(3, 10, 32, generator=draw(9))
    wanted = layer(states)[0]
    layer.train()
    layer.config.attention_probs_dropout_prob = 0.5
    for name in ("dropout_prob", "attention_dropout"):
        if hasattr(layer, name):
            setattr(layer, name, 0.5)
    torch.manual_seed(0)
    for recorded in (False, True):
        context = record_attention(mine, "*.0.attention*", ("entropy",)) if recorded else None
        if context:
            context.__enter__()
        passes = torch.stack([layer(states)[0].detach() for _ in range(400)])
        if context:
            context.__exit__(None, None, None)
        assert passes.std(0).mean() > 0.05
        assert ((passes.mean(0) - wanted).abs() / (passes.std(0) / 20 + 1e-6)).mean() < 1.3  # E|normal| is 0.8
    del feed


def test_the_range_of_versions_is_pyprojects() -> None:
    from crossmask.kernels.integrations import transformers as ours

    written = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    assert f'"transformers>={ours.OLDEST[0]}.{ours.OLDEST[1]},<{ours.TOO_NEW[0]}"' in written


@pytest.mark.parametrize("version", ["4.57.3", "5.19.0", "6.0.0.dev0", "7.1"])
def test_another_version_is_refused_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossmask.kernels.integrations import transformers as ours

    monkeypatch.setattr(ours.importlib.metadata, "version", lambda _name: version)
    with pytest.raises(ImportError, match=rf"transformers {version} is outside .*pip install 'transformers>=5") as told:
        ours.register()
    assert "\n" not in str(told.value)


def test_a_missing_library_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossmask.kernels.integrations import transformers as ours

    def missing(name: str) -> str:
        raise ours.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ours.importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="transformers is not installed: pip install"):
        ours.register()


def test_the_engines_own_text_tower_keeps_its_attention() -> None:
    """Both live in Transformers' one registry: neither may take the other's name."""
    register()
    from crossmask.engine.models import text as tower  # only now: whichever comes later must not win

    assert AttentionInterface()[tower.ATTENTION] is tower.attend
    assert AttentionInterface()[IMPLEMENTATION] is not tower.attend
