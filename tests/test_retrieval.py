"""Recall with groups and ties, re-ranking and matching, against hand-computed values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossmask.engine.data.base import CaptionBatch, EvaluationSplit
from crossmask.engine.data.batch import Batch
from crossmask.engine.evaluation import retrieval
from crossmask.engine.evaluation.matching import ITM_PRIOR, area_under_roc, draw_hard_negatives, match_measures
from crossmask.engine.evaluation.retrieval import chance, evaluate_split, ranks, recalls, reranked_ranks

WIDTH = 16


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def test_ranks_with_groups_and_ties() -> None:
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3],  # right first
            [0.5, 0.4, 0.5, 0.1],  # right candidate 1 (0.4) behind two
            [0.7, 0.2, 0.7, 0.6],  # right candidate 2 ties with a wrong one: it counts as second
            [0.1, 0.2, 0.3, 0.4],  # two right ones, 0 and 3: the better counts
            [0.1, 0.2, 0.3, 0.4],  # no right one
        ]
    )
    found = torch.cat(
        [
            ranks(scores[:3], ids(0, 1, 2), ids(0, 1, 2, 3)),
            ranks(scores[3:4], ids(9), ids(9, 1, 2, 9)),
            ranks(scores[4:], ids(7), ids(0, 1, 2, 3)),
        ]
    )
    assert found.tolist() == [1, 3, 2, 1, 0]
    assert recalls(found) == {"r1": 50.0, "r5": 100.0, "r10": 100.0}
    assert recalls(ids(1, 6, 11, 0)) == pytest.approx({"r1": 100 / 3, "r5": 100 / 3, "r10": 200 / 3})


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_collapsed_model_scores_nothing(value: float) -> None:
    found = ranks(torch.full((4, 20), value), torch.arange(4), torch.arange(20))
    assert recalls(found) == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_ranks_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, groups = torch.randn(37, 23, generator=torch.Generator().manual_seed(0)), torch.arange(37) % 23
    whole = ranks(scores, groups, torch.arange(23))
    monkeypatch.setattr(retrieval, "CHUNK", 5)
    assert torch.equal(ranks(scores, groups, torch.arange(23)), whole)


def test_chance_is_exact() -> None:
    found = chance(ids(0, 1), ids(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19))
    assert found == pytest.approx({"r1": 5.0, "r5": 25.0, "r10": 50.0})
    # two right of four: at least one among the first is 1/2; a fifth place holds everything
    assert chance(ids(0), ids(0, 0, 1, 2)) == pytest.approx({"r1": 50.0, "r5": 100.0, "r10": 100.0})
    generator = torch.Generator().manual_seed(0)
    asked, given = torch.arange(30).repeat(40) % 30, torch.arange(30).repeat_interleave(2)
    drawn = recalls(ranks(torch.rand(1200, 60, generator=generator), asked, given))
    assert drawn == pytest.approx(chance(asked, given), abs=3.5)


def test_reranked_ranks() -> None:
    rank = ids(2, 4, 1, 0)
    right = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    scores = torch.tensor([[0.0, 1.0, 0.5], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    # moved up; not among the candidates, so unmoved; a tie lost; nothing to find
    assert reranked_ranks(rank, scores, right).tolist() == [1, 4, 2, 0]


def test_area_under_roc_and_prior() -> None:
    positive = torch.tensor([True, True, False, False])
    assert area_under_roc(torch.tensor([3.0, 2.0, 1.0, 0.0]), positive) == 1.0
    assert area_under_roc(torch.tensor([3.0, 0.5, 1.0, 0.0]), positive) == 0.75
    assert area_under_roc(torch.zeros(4), positive) == 0.5
    assert pytest.approx(0.6365, abs=1e-4) == ITM_PRIOR


def test_hard_negatives_never_share_a_group() -> None:
    group = ids(0, 0, 1, 2)
    similarity = torch.tensor([[0.0, 9.0, 1.0, 50.0]] * 4)
    generator = torch.Generator().manual_seed(0)
    drawn, possible = draw_hard_negatives(similarity, group, generator)
    assert possible.all()
    assert (group[drawn] != group).all()
    assert drawn[:3].tolist() == [3, 3, 3]  # by far the most similar
    assert not draw_hard_negatives(similarity, ids(5, 5, 5, 5), generator)[1].any()


# A world where the truth is in the pixels: pixel [0, 0] of an image and the second token of a caption name its group.


@dataclass(frozen=True)
class Encoded:
    tokens: Tensor
    feature: Tensor


@dataclass(frozen=True)
class Fused:
    tokens: Tensor
    statistics: Any = None


class Oracle(nn.Module):
    """Features that confuse neighbouring groups, and a match head that knows (``sure`` > 0) or knows nothing (0)."""

    patch_grid = (2, 2)

    def __init__(self, sure: float, blur: float = 0.0) -> None:
        super().__init__()
        self.sure, self.blur = sure, blur
        self.codes = nn.functional.normalize(
            torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1
        )

    def _features(self, group: Tensor, noise: float) -> Tensor:
        x = self.codes[group] + noise * self.codes[(group * 7 + 3) % 200]
        return nn.functional.normalize(x, dim=-1)

    def encode_image(self, images: Tensor) -> Encoded:
        group = images[:, 0, 0, 0].round().long()
        return Encoded(group[:, None, None].expand(-1, 5, WIDTH).float(), self._features(group, self.blur))

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Encoded:
        group = token_ids[:, 1]
        return Encoded(group[:, None, None].expand(-1, token_ids.shape[1], WIDTH).float(), self._features(group, 0.0))

    def project_image(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(tokens[:, None], tokens[:, None])]

    def fuse(self, text: Tensor, mask: Tensor, image: list[tuple[Tensor, Tensor]], *_: Any, **__: Any) -> Fused:
        return Fused(text[..., :1] - image[0][0][:, 0, :1, :1])

    def match_logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        match = (tokens[:, 0, 0] == 0).float()
        return torch.stack([torch.zeros_like(match), self.sure * (2 * match - 1)], 1)


class Split(EvaluationSplit):
    title = "toy"

    def __init__(self, groups: list[int], captions: list[int], flags: tuple[int, ...] = ()) -> None:
        self.image_group_id, self.gallery_group_id = np.array(groups), np.array(captions)
        self.image_is_flag, self.gallery_is_flag = (
            np.isin(g, flags) for g in (self.image_group_id, self.gallery_group_id)
        )

    def _text(self, group: Tensor, start: int) -> CaptionBatch:
        length = 3 + start % 3  # batches differ in length, as real ones do
        token_ids = torch.zeros(len(group), length, dtype=torch.long)
        token_ids[:, 1] = group
        mask = torch.arange(length).expand(len(group), -1) < 3
        return CaptionBatch(token_ids, mask, mask, group, torch.arange(start, start + len(group)))

    def take(self, rows: np.ndarray) -> Batch:
        group = torch.from_numpy(self.image_group_id[rows])
        text = self._text(group, int(rows[0]))
        images = group.float()[:, None, None, None].expand(-1, 3, 4, 4)
        return Batch(images, text.token_ids, text.token_mask, text.maskable, group, torch.from_numpy(rows))

    def gallery(self, batch_size: int) -> Iterator[CaptionBatch]:
        for start in range(0, self.caption_count, batch_size):
            yield self._text(torch.from_numpy(self.gallery_group_id[start : start + batch_size]), start)


def split() -> Split:
    return Split(groups=[i % 40 for i in range(100)], captions=list(range(60)), flags=(3, 5))


def test_a_model_without_blur_is_perfect() -> None:
    found = evaluate_split(Oracle(0.0), split(), "cpu", 0.1)
    assert found["i2t"] == found["t2i"] == {"r1": 100.0, "r5": 100.0, "r10": 100.0}
    assert (found["images"], found["captions"], found["reranked"]) == (100, 60, None)
    assert found["chance_r1"] == pytest.approx(100 / 60)
    assert found["without_flags"]["images"] == 100 - 6
    assert found["without_flags"]["captions"] == 58


def test_reranking_with_an_oracle_repairs_what_features_confuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", 16)  # several batches, so that positions are carried across them
    found = evaluate_split(Oracle(50.0, blur=1.6), split(), "cpu", 0.1, rerank=8)
    for direction in ("i2t", "t2i"):
        assert found[direction]["r1"] < 60
        assert found["reranked"][direction]["r1"] == pytest.approx(found[direction]["r5"], abs=40)
        assert found["reranked"][direction]["r1"] > found[direction]["r1"] + 20
        assert found["reranked"]["before"][direction] == pytest.approx(found[direction])


def test_reranking_by_a_head_that_knows_nothing_changes_nothing() -> None:
    found = evaluate_split(Oracle(0.0, blur=0.8), split(), "cpu", 0.1, rerank=8)
    for direction in ("i2t", "t2i"):
        assert {k: v for k, v in found["reranked"][direction].items() if k != "queries"} == pytest.approx(
            found[direction]
        )


def test_reranking_a_sample_compares_with_the_same_queries() -> None:
    found = evaluate_split(Oracle(50.0, blur=1.6), split(), "cpu", 0.1, rerank=4, rerank_queries=10)["reranked"]
    assert found["i2t"]["queries"] == found["t2i"]["queries"] == 10
    assert found["i2t"]["r1"] > found["before"]["i2t"]["r1"]
    assert found["pairs"] <= 80


def test_matching_of_an_oracle_and_of_a_head_that_knows_nothing() -> None:
    batches = list(split().images(50))
    knows = match_measures(Oracle(20.0), batches, 0.1, "cpu")
    assert knows["loss"] < 1e-6
    assert knows["accuracy"] == knows["auc"] == 1.0
    assert knows["pairs"] == 300
    blind = match_measures(Oracle(0.0), batches, 0.1, "cpu")
    assert blind["auc"] == 0.5
    assert blind["loss"] == pytest.approx(math.log(2))
    assert match_measures(Oracle(1.0), list(Split([1, 1], [1]).images(2)), 0.1, "cpu")["pairs"] == 0
