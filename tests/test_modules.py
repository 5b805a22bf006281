"""Attention modules: equal to nn.MultiheadAttention, and the statistics are those of the weights it materialises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crossmask.kernels import AttentionStatistics
from crossmask.kernels.modules import CrossAttention, MultiheadAttention, record_attention, swap_attention

ALL = ("lse", "max_probability", "entropy", "key_attention", "query_attention", "key_max")
B, S, P, E, H = 3, 5, 7, 32, 4
SELF, CROSS, WIDE = "self", "cross", "kdim"
PADDING = torch.arange(P)[None] >= torch.tensor([7, 4, 2])[:, None]  # (B, P) True = padding, as nn.MultiheadAttention
LINKS = torch.rand(S, P, generator=torch.Generator().manual_seed(3)) < 0.3  # (S, P) True = not allowed
LINKS[:, 0] = False  # no row without a key, for which PyTorch gives NaN


def as_float(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def twins(**options: object) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """PyTorch's, and ours with its state_dict; biases are not zero."""
    theirs = nn.MultiheadAttention(E, H, **options)  # type: ignore[arg-type]
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    ours = MultiheadAttention(E, H, **options)  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


def inputs(kind: str, batch_first: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Leaves that the call is made of: query, key, value; key is None where it is the query."""
    widths = {SELF: (E,), CROSS: (E, E, E), WIDE: (E, 24, 40)}[kind]
    lengths = (P,) if kind == SELF else (S, P, P)
    made = [torch.randn(B, n, w, dtype=dtype) for n, w in zip(lengths, widths, strict=True)]
    return [(x if batch_first else x.transpose(0, 1)).clone().requires_grad_() for x in made]


def call(module: nn.Module, x: list[Tensor], **options: object) -> tuple[Tensor, object]:
    query, key, value = x if len(x) == 3 else (x[0], x[0], x[0])
    return module(query, key, value, **options)  # type: ignore[no-any-return]


def of_weights(weights: Tensor, queries: Tensor) -> dict[str, Tensor]:
    """Statistics of (B, H, S, P) weights without dropout; ``queries`` (B, S) count."""
    counted = weights * queries[:, None, :, None]
    return {
        "max_probability": weights.amax(-1),
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "key_attention": counted.sum((1, 2)) / (H * queries.sum(1, keepdim=True)),
        "key_max": counted.amax((1, 2)),
    }


def column_softmax(logits: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """(B, S): query_attention of (B, H, S, P) logits that are -inf where a link is missing."""
    masked = logits.masked_fill(~queries[:, None, :, None], -torch.inf).masked_fill(~keys[:, None, None], -torch.inf)
    return masked.softmax(2).nan_to_num().sum((1, 3)) / (H * keys.sum(1, keepdim=True))


def logits_of(module: nn.MultiheadAttention, x: list[Tensor], attn_mask: Tensor | None) -> Tensor:
    """(B, H, S, P), by the weights' definition; batch first."""
    query, key = (x[0], x[1]) if len(x) == 3 else (x[0], x[0])
    if module.in_proj_weight is None:
        w_q, w_k = module.q_proj_weight, module.k_proj_weight
    else:
        w_q, w_k, _ = module.in_proj_weight.chunk(3)
    b_q, b_k, _ = module.in_proj_bias.chunk(3)
    q, k = (
        nn.functional.linear(y, w, b).unflatten(-1, (H, -1)).transpose(1, 2)
        for y, w, b in ((query, w_q, b_q), (key, w_k, b_k))
    )
    logits = q @ k.transpose(-1, -2) * (E // H) ** -0.5
    if attn_mask is None:
        return logits
    added = as_float(attn_mask) if attn_mask.dtype == torch.bool else attn_mask
    return logits + (added if added.ndim == 2 else added.view(B, H, *added.shape[1:]))


# -- the drop-in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("kind", [SELF, CROSS, WIDE])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_statistics_it_is_pytorchs_own(
    need_weights: bool, average: bool, kind: str, batch_first: bool, dtype: torch.dtype
) -> None:
    sizes = {"kdim": 24, "vdim": 40} if kind == WIDE else {}
    theirs, ours = twins(batch_first=batch_first, dtype=dtype, **sizes)
    x = inputs(kind, batch_first, dtype)
    options = {"need_weights": need_weights, "average_attn_weights": average, "key_padding_mask": PADDING}
    for found, wanted in zip(call(ours, x, **options), call(theirs, x, **options), strict=True):
        assert found is None if wanted is None else torch.equal(found, wanted)  # type: ignore[arg-type]


MASKS = {
    "none": (None, None),
    "padding": (PADDING, None),
    "padding, float": (as_float(PADDING), None),
    "links": (None, LINKS),
    "links, float": (None, as_float(LINKS)),
    "both": (PADDING, LINKS),
    "both, float": (as_float(PADDING), as_float(LINKS)),
    "links of each head": (PADDING, LINKS.expand(B * H, -1, -1) & (torch.arange(B * H) % 3 > 0)[:, None, None]),
    "biases": (None, torch.randn(S, P, generator=torch.Generator().manual_seed(4))),
    "biases of each head": (
        None,
        as_float(LINKS) + torch.randn(B * H, S, P, generator=torch.Generator().manual_seed(5)),
    ),
    "biases of keys": (as_float(PADDING) + torch.arange(float(P)) / 4, as_float(LINKS)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", [CROSS, WIDE])
@pytest.mark.parametrize("batch_first", [True, False])
def test_statistics_are_those_of_the_weights(name: str, kind: str, batch_first: bool) -> None:
    theirs, ours = twins(batch_first=batch_first, **({"kdim": 24, "vdim": 40} if kind == WIDE else {}))
    x = inputs(kind, batch_first)
    padding, links = MASKS[name]
    masks = {"key_padding_mask": padding, "attn_mask": links}
    queries = torch.rand(B, S) < 0.7
    queries[:, 0] = True
    wanted, weights = call(theirs, x, average_attn_weights=False, **masks)
    found, told = call(ours, x, statistics=ALL, query_mask=queries, **masks)
    assert isinstance(weights, Tensor)
    assert isinstance(told, AttentionStatistics)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

    keys = ~PADDING if padding is not None else torch.ones(B, P, dtype=torch.bool)
    batched = x if batch_first else [y.transpose(0, 1) for y in x]
    added = None if padding is None or padding.dtype == torch.bool else padding.masked_fill(PADDING, 0.0)
    logits = logits_of(theirs, batched, links)
    logits = logits if added is None else logits + added[:, None, None]
    expected = of_weights(weights, queries) | {"query_attention": column_softmax(logits, queries, keys)}
    expected["lse"] = logits.masked_fill(~keys[:, None, None], -torch.inf).logsumexp(-1)
    for statistic, value in expected.items():
        torch.testing.assert_close(getattr(told, statistic), value, rtol=1e-4, atol=1e-6, msg=statistic)


@pytest.mark.parametrize("name", ["none", "both", "both, float", "links of each head", "biases"])
@pytest.mark.parametrize("kind", [SELF, CROSS, WIDE])
def test_gradients_are_pytorchs(name: str, kind: str) -> None:
    theirs, ours = twins(batch_first=True, **({"kdim": 24, "vdim": 40} if kind == WIDE else {}))
    x = inputs(kind)
    padding, links = MASKS[name]
    if kind == SELF:
        links = None
    masks = {"key_padding_mask": padding, "attn_mask": links}
    looked = torch.randn(B, P)
    found: list[list[Tensor]] = []
    for module in (theirs, ours):
        statistics = {"statistics": ("key_attention",), "query_mask": torch.ones(B, len(x[0][0]), dtype=torch.bool)}
        options = {"average_attn_weights": True} if module is theirs else statistics
        output, told = call(module, x, **masks, **options)
        mean = told.mean(1) if isinstance(told, Tensor) else told.key_attention  # type: ignore[attr-defined]
        loss = output.square().mean() + (mean * looked).sum()  # a loss on where it looks, too
        found.append(list(torch.autograd.grad(loss, [*x, *module.parameters()])))
    for ours_, theirs_ in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_as_near_to_float32_as_pytorchs() -> None:
    theirs, ours = twins(batch_first=True)
    x = inputs(CROSS)
    wanted, weights = call(theirs, x, key_padding_mask=PADDING)
    assert isinstance(weights, Tensor)
    half = [y.detach().bfloat16() for y in x]
    plain = call(theirs.bfloat16(), half, key_padding_mask=PADDING)[0]
    found, told = call(ours.bfloat16(), half, key_padding_mask=PADDING, statistics=("key_attention",))
    assert isinstance(told, AttentionStatistics)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-3
    assert told.key_attention is not None
    assert told.key_attention.dtype == torch.float32
    torch.testing.assert_close(told.key_attention, weights.mean(1), rtol=0.03, atol=2e-3)


def test_autocast() -> None:
    theirs, ours = twins(batch_first=True)
    x = inputs(CROSS)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = call(theirs, x)
        found, _ = call(ours, x, statistics=("entropy",))
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_an_unbatched_call() -> None:
    theirs, ours = twins()
    query, key = torch.randn(S, E), torch.randn(P, E)
    wanted, weights = theirs(query, key, key, key_padding_mask=PADDING[1])
    found, told = ours(query, key, key, key_padding_mask=PADDING[1], statistics=("key_attention", "lse"))
    torch.testing.assert_close(found, wanted)
    assert told.lse.shape == (H, S)
    torch.testing.assert_close(told.key_attention, weights.mean(0))


def test_padding_counts_for_no_query_of_self_attention() -> None:
    theirs, ours = twins(batch_first=True)
    x = inputs(SELF)
    _, weights = call(theirs, x, key_padding_mask=PADDING)
    _, told = call(ours, x, key_padding_mask=PADDING, statistics=("key_attention",))
    real = (~PADDING).float()
    assert isinstance(weights, Tensor)
    assert isinstance(told, AttentionStatistics)
    torch.testing.assert_close(told.key_attention, (weights * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def test_a_query_without_keys_gives_the_projection_of_zeros_where_pytorch_gives_nan() -> None:
    theirs, ours = twins(batch_first=True)
    x = inputs(CROSS)
    nothing = torch.ones(B, P, dtype=torch.bool)
    assert call(theirs, x, key_padding_mask=nothing)[0].isnan().all()
    found, _ = call(ours, x, key_padding_mask=nothing, statistics=("lse",))
    torch.testing.assert_close(found, ours.out_proj.bias.expand_as(found))


def test_dropout_drops_in_training_alone() -> None:
    _, ours = twins(batch_first=True, dropout=0.5)
    x = inputs(CROSS)
    first, told = call(ours, x, statistics=("key_attention",))
    second, again = call(ours, x, statistics=("key_attention",))
    assert not torch.equal(first, second)
    assert torch.equal(told.key_attention, again.key_attention)  # type: ignore[attr-defined]  # of weights before dropout
    ours.eval()
    assert torch.equal(call(ours, x, statistics=("lse",))[0], call(ours, x, statistics=("lse",))[0])


def test_causal_attention_tells_of_queries_alone() -> None:
    theirs, ours = twins(batch_first=True)
    x = inputs(SELF)
    mask = nn.Transformer.generate_square_subsequent_mask(P)
    options = {"attn_mask": mask, "is_causal": True}
    wanted, weights = call(theirs, x, average_attn_weights=False, **options)
    found, told = call(ours, x, statistics=("entropy", "max_probability"), **options)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(told.max_probability, weights.amax(-1))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"key_attention of a causal self-attention.*ask for lse"):
        call(ours, x, statistics=("key_attention",), **options)
    with (
        pytest.raises(ValueError, match=r"layer: key_max of a causal self-attention"),
        record_attention(nn.ModuleDict({"layer": ours}), statistics=("key_max",)),
    ):
        call(ours, x, **options)
    with record_attention(ours, statistics=("key_attention",), causal=True) as record:
        call(ours, x, **options)
    assert isinstance(weights, Tensor)
    torch.testing.assert_close(record[""].key_attention, weights.mean((1, 2)))


@pytest.mark.parametrize("added", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_nothing_stands_for_have_no_statistics(added: str) -> None:
    theirs, ours = twins(batch_first=True, **{added: True})
    x = inputs(CROSS)
    assert torch.equal(call(ours, x)[0], call(theirs, x)[0])
    with pytest.raises(ValueError, match=r"no statistics with add_bias_kv or add_zero_attn"):
        call(ours, x, statistics=("lse",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_padding_mask": PADDING[:, 1:]}, r"key_padding_mask must be \(3, 7\), got \(3, 6\)"),
        ({"attn_mask": LINKS[1:]}, r"attn_mask must be \(5, 7\) or \(12, 5, 7\), got \(4, 7\)"),
        ({"is_causal": True}, r"give attn_mask"),
        ({"statistics": ("where",)}, r"unknown statistics \['where'\]"),
        ({"query_mask": torch.ones(B, P, dtype=torch.bool)}, r"query_mask must be bool \(3, 5\)"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, object], message: str) -> None:
    _, ours = twins(batch_first=True)
    with pytest.raises(ValueError, match=message) as caught:
        call(ours, inputs(CROSS), **({"statistics": ("lse",)} | options))
    assert "\n" not in str(caught.value)


# -- our own module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention_is_multihead_attention_with_names_of_its_own(dtype: torch.dtype) -> None:
    theirs, _ = twins(batch_first=True, kdim=24, vdim=24, dtype=dtype)
    ours = CrossAttention(E, 24, H, dtype=dtype)
    biases = theirs.in_proj_bias.chunk(3)
    state = {f"{name}.bias": b for name, b in zip(("query", "key", "value"), biases, strict=True)}
    state |= {"query.weight": theirs.q_proj_weight, "key.weight": theirs.k_proj_weight}
    state |= {"value.weight": theirs.v_proj_weight, "output.weight": theirs.out_proj.weight}
    ours.load_state_dict(state | {"output.bias": theirs.out_proj.bias})
    x, context = torch.randn(B, S, E, dtype=dtype), torch.randn(B, P, 24, dtype=dtype)
    wanted, weights = theirs(x, context, context, key_padding_mask=PADDING)
    found = ours(x, context, ~PADDING, statistics=("key_attention",))
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.output, wanted, **tolerance)
    torch.testing.assert_close(found.statistics.key_attention, weights.mean(1).float(), **tolerance)
    assert found.statistics.lse is None
    assert ours(x, context, ~PADDING).statistics.key_attention is None


def test_qk_norm_compares_directions() -> None:
    module = CrossAttention(E, heads=H, qk_norm=True, bias=False)
    assert set(module.state_dict()) == {
        *(f"{name}.weight" for name in ("query", "key", "value", "output")),
        "sharpness",
    }
    x, context = torch.randn(B, S, E), torch.randn(B, P, E)
    before = module(x, context, statistics=("entropy",))
    longer = module(5 * x, context, statistics=("entropy",))
    torch.testing.assert_close(longer.statistics.entropy, before.statistics.entropy, rtol=1e-4, atol=1e-5)
    q, k = (
        nn.functional.normalize(layer(y).unflatten(-1, (H, -1)), dim=-1)
        for layer, y in ((module.query, x), (module.key, context))
    )
    logits = torch.einsum("bshd,bphd->bhsp", q, k) * module.sharpness[:, None, None]
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(before.statistics.entropy, wanted, rtol=1e-4, atol=1e-5)
    before.output.sum().backward()
    assert module.sharpness is not None
    assert module.sharpness.grad is not None


def test_links_and_self_attention_of_our_module() -> None:
    module = CrossAttention(E, heads=H, head_dim=16)
    x = torch.randn(B, P, E)
    alone = module(x, link_mask=torch.eye(P, dtype=torch.bool)[None]).output
    torch.testing.assert_close(alone, module.output(module.value(x)))
    told = module(x, key_mask=~PADDING, statistics=("key_attention",)).statistics
    counted = module(x, key_mask=~PADDING, query_mask=~PADDING, statistics=("key_attention",)).statistics
    assert torch.equal(told.key_attention, counted.key_attention)
    with pytest.raises(ValueError, match="query_dim 30 does not divide into 4 heads; give head_dim"):
        CrossAttention(30, heads=4)


# -- in a model --------------------------------------------------------------------------------------------------------


def test_swapping_changes_the_class_and_nothing_else() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 64, batch_first=True), 2).eval()
    x, memory = torch.randn(B, S, E), torch.randn(B, P, E)
    wanted, names, before = model(x, memory), list(model.state_dict()), list(model.parameters())
    told = swap_attention(model, "*.multihead_attn")
    assert told == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    assert type(model.layers[0].multihead_attn) is MultiheadAttention
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(model(x, memory), wanted)
    assert swap_attention(model, "*.multihead_attn") == told  # again: nothing left to do
    assert len(swap_attention(model)) == 4


def test_a_users_own_subclass_is_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": Own(E, H), "plain": nn.MultiheadAttention(E, H)})
    model["again"] = model["plain"]  # one module under two names
    assert swap_attention(model) == ["plain"]
    assert type(model["own"]) is Own


def test_a_name_that_matches_nothing_lists_the_nearest() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 64, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"matches 'layers.0.multi_attn': the closest names are layers.0.multihead_a"):
        swap_attention(model, "layers.0.multi_attn")
    with pytest.raises(ValueError, match=r"Linear has no attention that can tell \(it has no attention module"):
        swap_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers is empty"), record_attention(model, ()):
        pass
    with pytest.raises(ValueError, match="statistics is empty"), record_attention(model, statistics=()):
        pass


def test_recording_leaves_the_model_as_it_was() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 64, batch_first=True), 2).eval()
    x = torch.randn(B, P, E)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=PADDING)
        with record_attention(model, "layers.1", ("key_attention", "entropy")) as record:
            found = model(x, src_key_padding_mask=PADDING)  # PyTorch turns the mask into a floating one
        _, weights = call(model.layers[1].self_attn, [x])
    assert torch.backends.mha.get_fastpath_enabled()
    assert isinstance(weights, Tensor)
    assert type(model.layers[1].self_attn) is nn.MultiheadAttention
    assert not [name for name in vars(model.layers[1].self_attn) if "slot" in name]
    assert list(record) == ["layers.1.self_attn"]
    assert record["layers.1.self_attn"].entropy.shape == (B, H, P)  # type: ignore[union-attr]
    assert (record["layers.1.self_attn"].key_attention[PADDING] == 0).all()  # type: ignore[index]
    torch.testing.assert_close(found[~PADDING], wanted[~PADDING], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_asked_for_weights_gives_them_while_it_is_recorded() -> None:
    _, ours = twins(batch_first=True)
    x = inputs(CROSS)
    wanted = call(ours, x)
    with record_attention(ours, statistics=("key_attention",)) as record:
        found = call(ours, x)
        explicit = call(ours, x, statistics=("lse",))[1]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))  # type: ignore[arg-type]
    assert explicit.key_attention is None  # type: ignore[attr-defined]
    torch.testing.assert_close(record[""].key_attention, wanted[1].mean(1))  # type: ignore[attr-defined]
    with record_attention(ours), pytest.raises(ValueError, match="recorded already"), record_attention(ours):
        pass


def test_recording_our_own_module_with_a_mask_of_queries() -> None:
    model = nn.ModuleDict({"read": CrossAttention(E, 24, H)})
    x, context = torch.randn(B, S, E), torch.randn(B, P, 24)
    words = torch.arange(S)[None] < torch.tensor([5, 2, 1])[:, None]
    with record_attention(model, "read", query_mask=words, calls="all") as record:
        first = model["read"](x, context)
        model["read"](2 * x, context, statistics=("entropy",))
    wanted = model["read"](x, context, query_mask=words, statistics=("key_attention",))
    assert first.statistics.key_attention is None
    assert torch.equal(record.all_calls("read")[0].key_attention, wanted.statistics.key_attention)  # type: ignore[arg-type]
    assert len(record.all_calls("read")) == 2
    assert torch.equal(model["read"](x, context).output, first.output) or torch.allclose(
        model["read"](x, context).output, first.output, atol=1e-6
    )
