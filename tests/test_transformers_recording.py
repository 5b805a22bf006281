"""Which layers a name selects, what a record keeps, and every refusal of ``record_attention``."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers_models import BATCH, CASES, WIDTH, WORDS, draw, eager, padding, text

from crossmask.kernels.integrations.layers import attention_layers, select
from crossmask.kernels.integrations.transformers import record_attention, register, use_crossmask

CROSS = "BERT decoder with cross-attention"
BERT_LAYERS = ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def ours(name: str) -> nn.Module:
    return use_crossmask(copy.deepcopy(eager(name)))


def attempt(arguments: Any, named: dict[str, Any], call: dict[str, Any] | None) -> None:
    with record_attention(*arguments, **named):
        if call is not None:
            arguments[0](**call)


def refusal(expected: str, *arguments: Any, call: dict[str, Any] | None = None, **named: Any) -> str:
    with pytest.raises((ValueError, TypeError), match=expected) as told:
        attempt(arguments, named, call)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("name", "wanted", "found"),
    [
        ("BERT", "encoder.layer.1.attention.self", BERT_LAYERS[1:]),
        ("BERT", "encoder.layer.1", BERT_LAYERS[1:]),
        ("BERT", "encoder", BERT_LAYERS),
        ("BERT", "*.0.attention.self", BERT_LAYERS[:1]),
        ("BERT", "*.layer.[01]", BERT_LAYERS),
        ("BERT", ["encoder.layer.1", "*.0.*"], BERT_LAYERS),
        ("BERT", "self", BERT_LAYERS),
        (CROSS, "cross", [f"bert.encoder.layer.{i}.crossattention.self" for i in (0, 1)]),
        (CROSS, "*1.crossattention", ["bert.encoder.layer.1.crossattention.self"]),
        ("BART", "cross", [f"model.decoder.layers.{i}.encoder_attn" for i in (0, 1)]),
        ("T5", "cross", [f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)]),
        ("Whisper", "cross", [f"model.decoder.layers.{i}.encoder_attn" for i in (0, 1)]),
        ("BLIP captioner", "cross", [f"text_decoder.bert.encoder.layer.{i}.crossattention.self" for i in (0, 1)]),
        ("BLIP captioner", "vision_model", [f"vision_model.encoder.layers.{i}.self_attn" for i in (0, 1)]),
        ("BLIP-2 Q-Former", "cross", ["encoder.layer.0.crossattention.attention"]),
    ],
)
def test_names_parents_patterns_and_selectors(name: str, wanted: str | list[str], found: list[str]) -> None:
    assert list(select(ours(name), wanted)) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [("BERT", "self"), ("BART", "cross"), ("BLIP captioner", "cross"), ("CLIP", ("vision_model", "text_model"))],
)
def test_without_layers_it_is_the_cross_attention_or_all_there_is(name: str, found: str | tuple[str, ...]) -> None:
    mine = ours(name)
    with record_attention(mine) as record:
        assert list(record._slots) == list(select(mine, found))


def test_a_name_that_matches_nothing_lists_the_closest() -> None:
    told = refusal(
        "no attention layer matches 'encoder.layer.1.atention.self'", ours("BERT"), "encoder.layer.1.atention.self"
    )
    assert "encoder.layer.1.attention.self" in told
    told = refusal("no attention layer matches 'crossatention'", ours(CROSS), "crossatention")
    assert "bert.encoder.layer.0.crossattention" in told
    assert BERT_LAYERS[0] in refusal("no attention layer matches 'xyz'", ours("BERT"), "xyz")
    assert BERT_LAYERS[0] in refusal("no cross-attention layer", ours("BERT"), "cross")
    assert BERT_LAYERS[0] in refusal("no attention layer in 'pooler'", ours("BERT"), "pooler")
    # the second of two names is as wrong as the first
    refusal("matches 'encoder.layer.7'", ours("BERT"), ["encoder.layer.0", "encoder.layer.7"])


def test_bad_arguments() -> None:
    mine = ours("BERT")
    refusal("unknown statistics \\['attention'\\]", mine, "self", ("attention",))
    refusal("write \\('entropy',\\)", mine, "self", "entropy")
    refusal("statistics is empty", mine, "self", ())
    refusal("layers is empty", mine, [])
    refusal("names or patterns, got 3", mine, [3])
    refusal("calls must be 'latest' or 'all'", mine, "self", calls="every")
    refusal("query_mask is \\(3, 4\\).*has queries \\(3, 7\\)", mine, "self", query_mask=torch.ones(3, 4), call=text())
    with record_attention(mine, BERT_LAYERS[0]):
        refusal(f"{re.escape(BERT_LAYERS[0])} is recorded already", mine, "self")
        with record_attention(mine, BERT_LAYERS[1], ("lse",)) as other:  # another layer may
            mine(**text())
        assert other[BERT_LAYERS[1]].lse is not None
    assert not any("_crossmask_slot" in vars(module) for module in mine.modules())


def test_a_model_that_does_not_run_it() -> None:
    register()
    refusal("runs 'eager' attention: call use_crossmask\\(model\\)", copy.deepcopy(eager("BERT")), "self")


def test_a_model_off_the_shared_interface() -> None:
    config = hf.GPTJConfig(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    model = hf.GPTJModel(config)
    told = refusal("GPTJModel is not on Transformers' shared attention interface", model, "self")
    assert "GPTJAttention" in told
    with pytest.raises(ValueError, match="not on Transformers' shared attention interface"):
        use_crossmask(model)
    with pytest.raises(ValueError, match="Linear is no Transformers model"):
        use_crossmask(nn.Linear(2, 2))


def test_attention_that_is_more_than_softmax_is_refused() -> None:
    """Gemma 2 caps its logits: no output at all rather than a wrong one."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma2Config(vocab_size=50, num_key_value_heads=1, head_dim=8, pad_token_id=0, **sizes)
    with pytest.raises(ValueError, match=r"Gemma2Attention asks for softcap.*eager"):
        use_crossmask(hf.Gemma2Model(config))(**text())


def test_a_record_is_a_mapping_that_outlives_its_context() -> None:
    mine = ours("BERT")
    with record_attention(mine, "self", ("key_attention", "lse"), per_head=True) as record:
        assert len(record) == 0
        assert BERT_LAYERS[0] not in record
        with pytest.raises(KeyError, match="has not run"):
            record[BERT_LAYERS[0]]
        first = mine(**text()) and record[BERT_LAYERS[0]]
        mine(**text())
    assert list(record) == BERT_LAYERS
    assert record[BERT_LAYERS[0]] is not first  # the latest
    assert record[BERT_LAYERS[0]].key_attention.shape == (BATCH, 4, WORDS)
    assert record[BERT_LAYERS[0]].entropy is None  # not asked
    with pytest.raises(ValueError, match=r"calls='all'\) keeps all"):
        record.all_calls(BERT_LAYERS[0])
    with pytest.raises(KeyError, match="nothing is not recorded; recorded are encoder"):
        record["nothing"]
    mine(**text())  # outside nothing is recorded
    with record_attention(mine, "self", calls="all") as every:
        mine(**text())
        mine(**text())
    assert len(every.all_calls(BERT_LAYERS[0])) == 2


def test_the_query_mask_can_change_between_forwards() -> None:
    mine = ours("BERT")
    with record_attention(mine, "self") as record:
        found = []
        for mask in (None, padding(), padding().bool()):
            record.query_mask = mask
            mine(**text())
            found.append(record[BERT_LAYERS[0]].key_attention)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("keys_only", [True, False])
def test_additive_masks_have_statistics_and_biases_do_not(keys_only: bool) -> None:
    """Models that prepare masks themselves, and callers, pass (B, 1, 1 or S, P) of 0 and very negative numbers."""
    mine = ours("BERT")
    mask = (1.0 - padding()[:, None, None].float()) * torch.finfo(torch.float32).min
    mask = mask if keys_only else mask.expand(-1, 1, WORDS, -1).contiguous()
    with record_attention(mine, "self", ("key_attention", "query_attention")) as record:
        mine(**text())
        wanted = record[BERT_LAYERS[1]]
        plain = mine(**{**text(), "attention_mask": mask}).last_hidden_state
        found = record[BERT_LAYERS[1]]
    torch.testing.assert_close(found.key_attention, wanted.key_attention)
    torch.testing.assert_close(found.query_attention, wanted.query_attention)
    biased = {**text(), "attention_mask": mask + torch.rand(mask.shape, generator=draw())}
    refusal("adds a bias to its logits", mine, "self", call=biased)
    theirs = copy.deepcopy(eager("BERT"))
    torch.testing.assert_close(plain[:1], theirs(**text()).last_hidden_state[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        mine(**biased).last_hidden_state, theirs(**biased).last_hidden_state, rtol=1e-5, atol=1e-5
    )


def test_a_mask_for_every_head_gives_the_output_alone() -> None:
    mine, theirs = ours("BERT"), copy.deepcopy(eager("BERT"))
    mask = torch.rand(BATCH, 4, WORDS, WORDS, generator=draw()) > 0.4
    mask |= torch.eye(WORDS, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    given = {"input_ids": text()["input_ids"], "attention_mask": mask}
    expected = theirs(**{**given, "attention_mask": additive}).last_hidden_state
    torch.testing.assert_close(mine(**given).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    refusal("not one for all heads", mine, "self", call=given)


def test_a_padding_mask_stays_as_small_as_it_is() -> None:
    mine = ours("BERT")
    seen = []
    layer = next(iter(attention_layers(mine).values()))
    layer.register_forward_pre_hook(lambda _m, _a, named: seen.append(named["attention_mask"]), with_kwargs=True)
    mine(**text())
    assert seen[0].shape == (BATCH, 1, WORDS, WORDS)
    assert seen[0].untyped_storage().nbytes() == BATCH * WORDS
    mine(input_ids=text()["input_ids"], attention_mask=torch.ones(BATCH, WORDS))
    assert seen[1] is None


def test_the_backward_of_checkpointed_layers_leaves_the_record_alone() -> None:
    """What the recomputation finds is not recorded again, and the gradients are those without checkpointing."""
    feed, gradients = CASES[CROSS].feed(), []
    for checkpointed in (False, True):
        mine = ours(CROSS).train()
        for module in mine.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            mine.activation_checkpointing_enable()
        with record_attention(mine, "cross", ("entropy",), calls="all") as record:
            mine(**feed)
            sum(told.entropy.mean() for told in record.values()).backward()
        assert all(len(record.all_calls(name)) == 1 for name in record)
        gradients.append({key: p.grad for key, p in mine.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_blip_under_another_implementation_is_as_before() -> None:
    name = "BLIP captioner"
    mine, feed = copy.deepcopy(eager(name)), CASES[name].feed()
    register()
    register()  # twice is once
    again = mine(**feed, output_attentions=True)
    assert all(w is not None for w in again.attentions)  # eager's weights are there
    mine.set_attn_implementation("crossmask")  # without use_crossmask
    torch.testing.assert_close(mine(**feed).logits, again.logits, rtol=1e-5, atol=2e-5)
    with record_attention(mine) as record:
        mine(**feed)
    assert len(record) == 2
    mine.set_attn_implementation("eager")
    assert torch.equal(mine(**feed).logits, again.logits)


def test_a_model_can_be_made_with_it() -> None:
    register()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.AutoModel.from_config(
        hf.ViTConfig(image_size=16, patch_size=8, **sizes), attn_implementation="crossmask"
    )
    with record_attention(model.eval()) as record:
        model(pixel_values=torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(next(iter(record.values())).key_attention.sum(), torch.tensor(1.0))


def test_heads_of_two_widths_or_too_wide_have_the_output_alone() -> None:
    """As in multi-head latent attention; called as a model would call it."""
    use_crossmask(copy.deepcopy(eager("BERT")))
    attend = hf.AttentionInterface()["crossmask"]
    layer = nn.Module()
    for width, values in ((8, 4), (264, 264)):
        q, k = (torch.randn(2, 3, n, width, generator=draw(n)) for n in (5, 6))
        v = torch.randn(2, 3, 6, values, generator=draw(7))
        output, weights = attend(layer, q, k, v, None, is_causal=False)
        wanted = ((q @ k.mT) * width**-0.5).softmax(3) @ v
        torch.testing.assert_close(output, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)
        assert weights is None


def test_wrapped_models_have_the_names_of_what_is_in_them() -> None:
    mine = ours("BERT")
    with record_attention(nn.DataParallel(mine), "encoder") as record:
        mine(**text())
    assert list(record) == BERT_LAYERS


def test_autocast_gives_float32_statistics() -> None:
    mine = ours("BERT")
    with torch.no_grad(), record_attention(mine, "self", ("key_attention", "entropy")) as record:
        mine(**text())
        exact = [record[name].entropy for name in BERT_LAYERS]
        with torch.autocast("cpu", torch.bfloat16):
            mine(**text())
    for name, wanted in zip(BERT_LAYERS, exact, strict=True):
        assert record[name].entropy.dtype == record[name].key_attention.dtype == torch.float32
        torch.testing.assert_close(record[name].entropy, wanted, rtol=0.1, atol=0.1)


def test_blips_cross_attention_reads_the_mask_that_its_eager_attention_reads() -> None:
    """Transformers 5.23 hands the encoder's mask on under the other name, so that BLIP attends to all patches."""
    name = "BLIP captioner"
    feed = {**CASES[CROSS].feed(), "return_dict": True}
    feed.pop("use_cache")
    expected = copy.deepcopy(eager(name)).text_decoder(**feed).logits
    torch.testing.assert_close(ours(name).text_decoder(**feed).logits, expected, rtol=1e-5, atol=2e-5)
