"""Link masks and head masks: who may look at whom, and that attention obeys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmask.engine.masking import Draws
from crossmask.engine.masking.heads import head_importance, head_masks, important_heads, random_heads
from crossmask.engine.masking.links import (
    build_links,
    causal,
    everything,
    segments,
    sequence_to_sequence,
    token_level,
)
from crossmask.engine.recipe import HeadsSection, LinksSection
from crossmask.kernels import cross_attention

LENGTHS = (7, 1, 4, 2, 6)
L = max(LENGTHS)
REAL = torch.arange(L) < torch.tensor(LENGTHS)[:, None]


def draws(count: int = len(LENGTHS), step: int = 0, first: int = 0) -> Draws:
    return Draws(3, step, torch.arange(first, first + count))


def attend(tokens: Tensor, links: Tensor, token_mask: Tensor) -> Tensor:
    """(B, L, D) self-attention of one head through the kernel, with residual so that a token always knows itself."""
    x = tokens[:, None]
    return cross_attention(x, x, x, token_mask, link_mask=links).output[:, 0] + tokens


def reads(links: Tensor, token_mask: Tensor) -> Tensor:
    """(B, L, L) bool: which output changes with which input, found by changing one input after the other."""
    tokens = torch.randn(*token_mask.shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = attend(tokens, links, token_mask)
    found = torch.zeros_like(links)
    for key in range(links.shape[1]):
        changed = tokens.clone()
        changed[:, key] += 1.0
        found[:, :, key] = (attend(changed, links, token_mask) != before).any(2)
    return found


SECTIONS = [
    LinksSection(kind="token_level", rate=0.3),
    LinksSection(kind="token_level", rate=1.0),
    LinksSection(kind="sequence_to_sequence", share=0.5),
    LinksSection(kind="sequence_to_sequence", share=1.0),
    LinksSection(kind="segment", segment_words=2),
    LinksSection(kind="segment", segment_words=1),
]
every_kind = pytest.mark.parametrize("section", SECTIONS, ids=str)


def built(section: LinksSection, token_mask: Tensor = REAL, at: Draws | None = None) -> Tensor:
    links = build_links(section, token_mask, at or draws(len(token_mask)))
    assert links is not None
    return links


def test_no_links_where_all_see_all() -> None:
    assert build_links(LinksSection(), REAL, draws()) is None


@every_kind
def test_no_padding_is_read_and_no_token_is_left_with_nothing(section: LinksSection) -> None:
    for step in range(20):
        links = built(section, at=draws(step=step))
        assert links.shape == (len(LENGTHS), L, L)
        assert links.dtype == torch.bool
        assert not (links & ~REAL[:, None, :]).any()
        assert links.any(2)[REAL].all()


@every_kind
def test_attention_reads_what_the_links_allow_and_nothing_else(section: LinksSection) -> None:
    links = built(section)
    itself = torch.eye(L, dtype=torch.bool)
    real = REAL[:, :, None]
    assert torch.equal(reads(links, REAL) & real, (links | itself) & real)


@every_kind
def test_links_are_of_the_sample_alone(section: LinksSection) -> None:
    whole = built(section)
    rows = torch.tensor([4, 0, 0, 2])
    assert torch.equal(built(section, REAL[rows], Draws(3, 0, rows)), whole[rows])
    longer = torch.nn.functional.pad(REAL, (0, 5))
    assert torch.equal(built(section, longer)[:, :L, :L], whole)
    assert torch.equal(built(section), whole)


# Bidirectional or one after the other


def test_causal_by_hand() -> None:
    assert causal(torch.tensor([[True, True, True, False]])).int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    ]


def test_sequence_to_sequence_by_hand() -> None:
    prefix = torch.tensor([[True, True, False, False, False]])
    found = sequence_to_sequence(torch.tensor([[True] * 4 + [False]]), prefix)[0]
    assert found[:4].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    # a prefix need not stand first
    found = sequence_to_sequence(torch.ones(1, 4, dtype=torch.bool), torch.tensor([[False, True, True, False]]))[0]
    assert found.int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]


def test_later_words_change_nothing_before_them_through_several_layers() -> None:
    token_mask = torch.ones(2, 9, dtype=torch.bool)
    links = built(LinksSection(kind="sequence_to_sequence", share=1.0), token_mask)
    tokens = torch.randn(2, 9, 16)
    changed = tokens.clone()
    changed[:, 5] *= -3.0

    def layers(x: Tensor, allowed: Tensor) -> Tensor:
        for _ in range(3):
            x = attend(x, allowed, token_mask)
        return x

    before, after = layers(tokens, links), layers(changed, links)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(2).all()
    both = everything(token_mask)
    assert (layers(tokens, both) != layers(changed, both)).any(2).all()


def test_share_of_samples_that_read_one_after_the_other() -> None:
    token_mask = torch.ones(4000, 5, dtype=torch.bool)
    links = built(LinksSection(kind="sequence_to_sequence"), token_mask)  # 75 %, as in Unified VLP
    one_by_one = (links == causal(token_mask)).flatten(1).all(1)
    both = (links == everything(token_mask)).flatten(1).all(1)
    assert (one_by_one ^ both).all()
    assert abs(float(one_by_one.float().mean()) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)
    none = built(LinksSection(kind="sequence_to_sequence", share=0.0), token_mask)
    assert torch.equal(none, everything(token_mask))


# Segments


def test_segments_by_hand() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 2]])
    found = segments(torch.ones(1, 5, dtype=torch.bool), segment)[0]
    assert found.int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0]] * 2 + [[1] * 5]


def test_answer_is_read_token_by_token() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 1]])
    answer = torch.tensor([[False, False, True, True, True]])
    found = segments(torch.ones(1, 5, dtype=torch.bool), segment, answer)[0]
    expected = [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert found.int().tolist() == expected
    # nor does the prompt see an answer that was counted to its segment
    one = segments(torch.ones(1, 5, dtype=torch.bool), torch.zeros_like(segment), answer)[0]
    assert one.int().tolist() == expected


def test_one_segment_is_bidirectional_and_segments_of_one_are_causal() -> None:
    places = torch.arange(L).expand(REAL.shape)
    assert torch.equal(segments(REAL, torch.zeros_like(places)), everything(REAL))
    assert torch.equal(segments(REAL, places), causal(REAL))


def test_segments_of_a_recipe_begin_with_cls() -> None:
    """[CLS] a b | c d | e [SEP]"""
    found = built(LinksSection(kind="segment", segment_words=2), torch.ones(1, 7, dtype=torch.bool))[0]
    assert found.sum(1).tolist() == [3, 3, 3, 5, 5, 7, 7]


# Token-level masking


def kinds(links: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L) bool each: cut from its siblings, cut from itself, not cut; of captions without padding."""
    itself = links.diagonal(dim1=1, dim2=2)
    siblings = itself & (links.sum(2) == 1)
    cut = ~itself | siblings
    return siblings, ~itself, ~cut


def test_token_level_rows_are_what_the_two_kinds_say() -> None:
    links = token_level(torch.ones(300, 12, dtype=torch.bool), 0.3, draws(300))
    siblings, self_masked, whole = kinds(links)
    itself = torch.eye(12, dtype=torch.bool)
    for row in range(300):
        for token in range(12):
            if siblings[row, token]:
                expected = itself[token]
            elif self_masked[row, token]:
                expected = ~itself[token]
            else:
                expected = whole[row]
            assert torch.equal(links[row, token], expected), (row, token)
    # those that are not cut do without those that are
    assert not (links & whole[:, :, None] & ~whole[:, None, :]).any()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_token_level_rates(rate: float) -> None:
    count = 4000
    siblings, self_masked, whole = kinds(token_level(torch.ones(count, 20, dtype=torch.bool), rate, draws(count)))
    for share, expected in ((siblings, rate / 2), (self_masked, rate / 2), (whole, 1 - rate)):
        assert abs(float(share.float().mean()) - expected) <= 5 * math.sqrt(expected * (1 - expected) / (count * 20))
        by_place = share.float().mean(0)
        assert (by_place - expected).abs().max() <= 5 * math.sqrt(expected * (1 - expected) / count)


def test_token_level_layers_differ_by_purpose() -> None:
    token_mask = torch.ones(8, 10, dtype=torch.bool)
    section = LinksSection(kind="token_level", rate=0.3)
    one, other = (build_links(section, token_mask, draws(8), f"links of layer {layer}") for layer in (0, 1))
    assert one is not None
    assert other is not None
    assert not torch.equal(one, other)


# Heads


def test_random_heads_lose_exactly_so_many_all_equally_often() -> None:
    on = random_heads(8, 3, draws(5000))
    assert on.shape == (5000, 8)
    assert (on.sum(1) == 5).all()
    assert ((~on).float().mean(0) - 3 / 8).abs().max() < 5 * math.sqrt(3 / 8 * 5 / 8 / 5000)


def test_most_important_heads_go() -> None:
    importance = torch.tensor([0.1, 3.0, 0.2, 2.0, 2.0])
    assert important_heads(importance, 2).tolist() == [True, False, True, False, True]
    layers = torch.stack([importance, importance.flip(0)])
    assert important_heads(layers, 1).tolist() == [[True, False, True, True, True], [True, True, True, False, True]]
    assert important_heads(importance, 0).all()


@pytest.mark.parametrize("count", [4, 5, -1])
def test_one_head_stays(count: int) -> None:
    for off in (lambda: random_heads(4, count, draws()), lambda: important_heads(torch.rand(4), count)):
        with pytest.raises(ValueError, match=r"must leave one of the 4 heads on: pass 0 to 3"):
            off()


def test_importance_is_what_the_loss_loses_with_the_head() -> None:
    """Of a loss that is linear in the heads' outputs, |output . gradient| is exactly the change without the head."""
    output = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 5, 6, dtype=torch.float64) * torch.tensor([0.1, 5.0, 1.0, 0.0])[:, None, None]
    loss_of_sample = (output * weight).sum((1, 2, 3))
    (gradient,) = torch.autograd.grad(loss_of_sample.sum(), output)
    found = head_importance(output.detach(), gradient)
    for head in range(4):
        without = output.detach().clone()
        without[:, head] = 0.0
        change = (without * weight).sum((1, 2, 3)) - loss_of_sample.detach()
        assert float(found[head]) == pytest.approx(float(change.abs().mean()), rel=1e-5)
    assert found.dtype == torch.float32
    assert int(found.argmax()) == 1
    assert important_heads(found, 1).tolist() == [True, False, True, True]


def test_samples_that_pull_in_opposite_directions_do_not_cancel() -> None:
    output = torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 1, 3, 2)
    assert head_importance(output, torch.ones_like(output)).tolist() == [6.0]


def test_heads_that_are_off_give_nothing() -> None:
    q, k = torch.randn(4, 6, 3, 8), torch.randn(4, 6, 5, 8)
    on = random_heads(6, 2, draws(4))
    output = cross_attention(q, k, k, head_mask=on).output
    assert torch.equal(output.flatten(2).any(2), on)


def masks(layers: int, heads: int, at: Draws, importance: Tensor | None = None, **section: Any) -> Tensor:
    found = head_masks(HeadsSection(**section), layers, heads, at, importance)
    assert found is not None
    return found


def test_head_masks_of_a_recipe() -> None:
    assert head_masks(HeadsSection(), 3, 8, draws(1)) is None
    random = masks(3, 8, draws(1), kind="random", count=2)
    assert random.shape == (3, 8)
    assert (random.sum(1) == 6).all()
    assert torch.equal(random, masks(3, 8, draws(1), kind="random", count=2))
    assert not torch.equal(random, masks(3, 8, draws(1, step=1), kind="random", count=2))
    many = masks(3, 8, draws(50), kind="random", count=2)
    assert many.shape == (3, 50, 8)
    assert torch.equal(many[:, 0], random)
    assert (many[0] != many[1]).any()  # layers are drawn apart

    importance = torch.rand(3, 8)
    important = masks(3, 8, draws(1), importance, kind="importance", count=3)
    assert torch.equal(important, important_heads(importance, 3))


def test_heads_without_any_importance_yet_are_drawn() -> None:
    nothing = torch.zeros(2, 8)
    found = torch.stack([masks(2, 8, draws(1, step), nothing, kind="importance", count=2) for step in range(200)])
    assert (found.sum(2) == 6).all()
    assert ((~found).float().mean((0, 1)) - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 400)
    some = torch.tensor([[0.0, 0.0, 0.0, 1e-6]]).repeat(2, 1)
    assert not masks(2, 4, draws(1), some, kind="importance", count=1)[:, 3].any()


@pytest.mark.parametrize("given", [None, torch.ones(8), torch.ones(3, 7)])
def test_importance_has_to_be_of_every_head(given: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"need an importance of shape \(3, 8\)"):
        masks(3, 8, draws(1), given, kind="importance")
