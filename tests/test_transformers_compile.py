"""torch.compile(fullgraph=True) of whole models, with and without recording: one graph each, no graph break."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers_models import CASES, eager, padding, text

from crossmask.kernels.integrations.transformers import record_attention, use_crossmask

STATISTICS = ("key_attention", "entropy")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    trace = logging.getLogger("torch.__trace")  # pytest's log capture turns it on, which takes longer than compiling
    level, _ = trace.level, trace.setLevel(logging.ERROR)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    trace.setLevel(level)


def compiled(name: str) -> tuple[nn.Module, Any, CompileCounterWithBackend]:
    mine = use_crossmask(copy.deepcopy(eager(name)))
    counter = CompileCounterWithBackend("aot_eager")
    return mine, torch.compile(mine, fullgraph=True, backend=counter), counter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT decoder with cross-attention", "BLIP captioner", "T5", "BLIP-2 Q-Former"])
def test_one_graph_without_and_one_with_recording(name: str) -> None:
    case, feed = CASES[name], CASES[name].feed()
    mine, fast, counter = compiled(name)
    torch.testing.assert_close(fast(**feed).to_tuple()[0], mine(**feed).to_tuple()[0], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    for _ in range(2):  # a new context is no new graph
        with record_attention(fast, case.told, STATISTICS) as record:
            fast(**feed)
            fast(**feed)
    fast(**feed)
    assert counter.frame_count == 2
    with record_attention(mine, case.told, STATISTICS) as plain:
        mine(**feed)
    assert list(record) == list(plain)
    for layer, found in plain.items():
        torch.testing.assert_close(record[layer].key_attention, found.key_attention, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(record[layer].entropy, found.entropy, rtol=1e-5, atol=1e-5)


def test_gradients_through_recorded_statistics() -> None:
    mine, fast, _ = compiled("BERT")
    found = []
    for model in (mine, fast):
        mine.zero_grad()
        with record_attention(model, "self", STATISTICS, query_mask=padding()) as record:
            output = model(**text()).last_hidden_state
        told = sum(s.entropy.mean() + s.key_attention.square().sum() for s in record.values())
        (output.square().mean() + told).backward()
        # of the pooler, which nothing depends on, a compiled model has a gradient of zeros
        found.append({key: 0 * p if p.grad is None else p.grad.clone() for key, p in mine.named_parameters()})
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_another_query_mask_is_no_other_graph() -> None:
    _, fast, counter = compiled("BERT")
    found = []
    with record_attention(fast, "self", query_mask=padding()) as record:
        for mask in (padding(), torch.ones_like(padding()), padding()):
            record.query_mask = mask
            fast(**text())
            found.append(next(iter(record.values())).key_attention)
    assert counter.frame_count == 1
    torch.testing.assert_close(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


def test_additive_masks_and_biases() -> None:
    mine, fast, _ = compiled("BERT")
    mask = (1.0 - padding()[:, None, None].float()) * -1e9
    with record_attention(fast, "self") as record:
        fast(**{**text(), "attention_mask": mask})
        found = [s.key_attention for s in record.values()]
        with pytest.raises(RuntimeError, match="adds a bias to its logits"):
            fast(**{**text(), "attention_mask": mask + 0.5})
    with record_attention(mine, "self") as plain:
        mine(**text())
    for a, b in zip(found, plain.values(), strict=True):
        torch.testing.assert_close(a, b.key_attention, rtol=1e-5, atol=1e-6)


def test_refusals_say_their_line_in_compiled_code_too() -> None:
    _, fast, _ = compiled("BERT")
    with pytest.raises(Exception, match="calls='all' is not for compiled models"), record_attention(fast, calls="all"):
        fast(**text())
    with (
        pytest.raises(Exception, match="query_mask is"),
        record_attention(fast, query_mask=torch.ones(3, 4)),
    ):
        fast(**text())


@pytest.mark.slow
def test_inductor_compiles_it_too() -> None:
    mine = use_crossmask(copy.deepcopy(eager("ViT")))
    feed, fast = CASES["ViT"].feed(), torch.compile(mine, fullgraph=True)
    with record_attention(fast, "self", STATISTICS) as record:
        output = fast(**feed).last_hidden_state
    with record_attention(mine, "self", STATISTICS) as plain:
        torch.testing.assert_close(output, mine(**feed).last_hidden_state, rtol=1e-5, atol=1e-5)
    for layer, found in plain.items():
        torch.testing.assert_close(record[layer].entropy, found.entropy, rtol=1e-5, atol=1e-5)
