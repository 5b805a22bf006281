"""Sampled galleries: who is drawn, what chance reaches, and the figures that come of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_retrieval import Oracle, Split, asked

from crossmask.engine.evaluation import ranking
from crossmask.engine.evaluation.retrieval import evaluate_split
from crossmask.engine.evaluation.sampled import (
    Sample,
    draw_sample,
    sample_chance,
    sample_ranks,
    score_sample,
    summarise,
)

GROUP = np.arange(60) % 30  # two candidates of each group
CATEGORY = GROUP % 3  # ten groups, twenty candidates of each category


def draw(queries: int = 30, negatives: int = 8, key: tuple[int, int] = (0, 0)) -> Sample:
    return draw_sample(np.arange(30), GROUP, np.arange(30) % 3, CATEGORY, queries, negatives, key)


def test_candidates_are_one_right_one_and_wrong_ones_of_the_category() -> None:
    sample = draw()
    query, candidate = sample.query.numpy(), sample.candidate.numpy()
    assert candidate.shape == (30, 9)
    assert sorted(query) == list(range(30))
    assert (GROUP[candidate[:, 0]] == query).all()
    assert (GROUP[candidate[:, 1:]] != query[:, None]).all()
    assert (CATEGORY[candidate] == query[:, None] % 3).all()
    assert sample.alike == 1.0
    assert all(len(set(row)) == 9 for row in candidate.tolist())
    assert len({tuple(sorted(row[1:])) for row in candidate.tolist()}) > 20  # not the same few for all
    assert {row[0] // 30 for row in candidate.tolist()} == {0, 1}  # either right one


def test_others_fill_up_where_the_category_has_fewer() -> None:
    sample = draw(negatives=25)
    candidate, query = sample.candidate.numpy(), sample.query.numpy()
    own = CATEGORY[candidate[:, 1:]] == query[:, None] % 3
    assert (own.sum(1) == 18).all()  # all twenty of the category but the query's own two
    assert (GROUP[candidate[:, 1:]] != query[:, None]).all()
    assert sample.alike == pytest.approx(18 / 25)
    assert (candidate >= 0).all()


def test_a_gallery_with_too_few_wrong_ones_leaves_places_empty() -> None:
    # group 0 is right for five of seven candidates; -3 has none and asks nothing
    sample = draw_sample(np.array([0, 1, -3]), np.array([0, 0, 0, 0, 0, 1, 2]), None, None, 9, 100, (0, 0))
    assert sorted(sample.query.tolist()) == [0, 1]
    count = (sample.candidate >= 0).sum(1)
    by_query = dict(zip(sample.query.tolist(), count.tolist(), strict=True))
    assert by_query == {0: 3, 1: 7}
    scores = torch.full(sample.candidate.shape, math.nan)
    assert sorted(sample_ranks(sample, scores).tolist()) == [3, 7]  # last of those that are there
    assert sample_chance(sample)["r1"] == pytest.approx(100 * (1 / 3 + 1 / 7) / 2)
    assert sample_chance(sample)["r5"] == pytest.approx(100 * (1 + 5 / 7) / 2)
    assert not len(draw_sample(np.zeros(3, int), np.zeros(4, int), None, None, 9, 100, (0, 0)).query)  # all alike


def test_without_categories_all_are_alike() -> None:
    sample = draw_sample(np.arange(30), GROUP, None, None, 30, 40, (0, 0))
    assert sample.alike == 1.0
    assert len(np.unique(CATEGORY[sample.candidate[:, 1:]])) == 3


def test_a_draw_depends_on_its_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(queries=20)
    assert len(first.query) == 20
    monkeypatch.setattr(ranking, "BLOCK", 61)
    again, other, seed = draw(queries=20), draw(queries=20, key=(0, 1)), draw(queries=20, key=(1, 0))
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.candidate.sort(1).values, again.candidate.sort(1).values)
    for different in (other, seed):
        assert not torch.equal(first.query, different.query)


def test_chance_is_exact_and_reached_by_random_scores() -> None:
    sample = draw(negatives=24)
    assert sample_chance(sample) == pytest.approx({"r1": 100 / 25, "r5": 500 / 25, "r10": 1000 / 25})
    generator = torch.Generator().manual_seed(0)
    found = torch.cat([sample_ranks(sample, torch.rand(30, 25, generator=generator)) for _ in range(200)])
    assert (found.min(), found.max()) == (1, 25)
    for cut in (1, 5, 10):
        assert (found <= cut).double().mean() == pytest.approx(cut / 25, abs=0.02)


def test_scores_and_ranks_by_hand() -> None:
    sample = Sample(torch.tensor([1, 0]), torch.tensor([[2, 0, 1], [0, 1, -1]]), 1.0)
    queries, keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 2.0]])
    scores = score_sample(sample, queries, keys)
    assert scores.tolist() == [[2.0, 2.0, 4.0], [1.0, 3.0, -math.inf]]
    assert sample_ranks(sample, scores).tolist() == [3, 2]  # the tie is lost


def test_summary_by_hand() -> None:
    flat = {"r1": 10.0, "r5": 20.0, "r10": 30.0}
    found = summarise([{"i2t": flat, "t2i": flat}, {"i2t": {**flat, "r1": 14.0}, "t2i": flat}])
    assert found["i2t"] == {"r1": 12.0, "r5": 20.0, "r10": 30.0}
    assert found["sum"] == 122.0
    assert found["spread"]["i2t"] == pytest.approx({"r1": 8**0.5, "r5": 0.0, "r10": 0.0})
    assert found["spread"]["sum"] == pytest.approx(8**0.5)
    assert summarise([{"i2t": flat, "t2i": flat}])["spread"]["sum"] == 0.0


class Categories(Split):
    def __init__(self) -> None:
        super().__init__(groups=[i % 40 for i in range(100)], captions=list(range(60)))
        self.image_category, self.gallery_category = self.image_group_id % 2, self.gallery_group_id % 2


def test_evaluation_of_sampled_galleries() -> None:
    wanted = asked(0, sampled={"draws": 3, "queries": 25, "negatives": 10})
    found = evaluate_split(Oracle(0.0), Categories(), "cpu", 0.1, wanted, seed=5)["sampled"]
    assert (found["draws"], found["negatives"], found["queries"]) == (3, 10, {"i2t": 25, "t2i": 25})
    assert found["sum"] == 600.0
    assert found["spread"]["sum"] == 0.0
    assert found["chance"]["i2t"]["r1"] == pytest.approx(100 / 11)
    assert found["same_category"] == {"i2t": 1.0, "t2i": 1.0}
    assert found["reranked"] is None


def test_the_match_head_orders_all_candidates_of_a_sampled_gallery() -> None:
    model, wanted = Oracle(50.0, blur=1.6), asked(4, sampled={"draws": 2, "queries": 60, "negatives": 30})
    whole = evaluate_split(model, Categories(), "cpu", 0.1, wanted)
    found = whole["sampled"]
    assert found["sum"] < 560
    assert found["spread"]["sum"] > 0
    assert found["reranked"]["sum"] == 600.0  # the head knows, and no candidate is left out
    assert found["reranked"]["queries"] == {"i2t": 60, "t2i": 40}
    assert found == evaluate_split(model, Categories(), "cpu", 0.1, wanted)["sampled"]
    other = evaluate_split(model, Categories(), "cpu", 0.1, wanted, seed=1)
    assert other["sampled"]["sum"] != found["sum"]
    assert other["reranked"]["i2t"] == whole["reranked"]["i2t"]
    few = asked(4, rerank_queries=7, sampled={"draws": 2, "queries": 60, "negatives": 30})
    fewer = evaluate_split(model, Categories(), "cpu", 0.1, few)["sampled"]
    assert fewer["reranked"]["queries"] == {"i2t": 7, "t2i": 7}
    assert {name: fewer[name] for name in ("i2t", "t2i")} == {name: found[name] for name in ("i2t", "t2i")}
    assert fewer["reranked"]["sum"] == 600.0
