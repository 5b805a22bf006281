"""Recall with groups and ties, re-ranking and matching, against hand-computed values."""

from __future__ import annotations

import dataclasses
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
from crossmask.engine.evaluation import embedding, ranking
from crossmask.engine.evaluation.embedding import embed, match_logits
from crossmask.engine.evaluation.matching import ITM_PRIOR, area_under_roc, draw_hard_negatives, match_measures
from crossmask.engine.evaluation.ranking import chance, rank_all, ranks, recalls, reranked_ranks, rsum
from crossmask.engine.evaluation.retrieval import evaluate_split, order_by
from crossmask.engine.models import VisionLanguageModel
from crossmask.engine.recipe import EvaluationSection, ModelSection

WIDTH = 16


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def matches(query_group: Tensor, key_group: Tensor) -> Tensor:
    return query_group[:, None] == key_group


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
            ranks(scores[:3], matches(ids(0, 1, 2), ids(0, 1, 2, 3))),
            ranks(scores[3:4], matches(ids(9), ids(9, 1, 2, 9))),
            ranks(scores[4:], matches(ids(7), ids(0, 1, 2, 3))),
        ]
    )
    assert found.tolist() == [1, 3, 2, 1, 0]
    assert recalls(found) == {"r1": 50.0, "r5": 100.0, "r10": 100.0}
    assert recalls(ids(1, 6, 11, 0)) == pytest.approx({"r1": 100 / 3, "r5": 100 / 3, "r10": 200 / 3})


def test_the_sum_is_of_both_directions() -> None:
    found = {"i2t": {"r1": 1.0, "r5": 2.0, "r10": 4.0}, "t2i": {"r1": 8.0, "r5": 16.0, "r10": 32.0, "queries": 64}}
    assert rsum(found) == 63.0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_collapsed_model_scores_nothing(value: float) -> None:
    found = ranks(torch.full((4, 20), value), matches(torch.arange(4), torch.arange(20)))
    assert recalls(found) == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_equal_features_tie_and_the_right_one_is_not_among_the_first() -> None:
    """Whatever a matrix product does at the edges of its blocks: all of these are one and the same vector."""
    feature = nn.functional.normalize(torch.randn(256, generator=torch.Generator().manual_seed(0)), dim=0)
    keys = feature.expand(1000, -1)
    found = rank_all(keys[:7], keys, torch.arange(7), torch.arange(1000), k=10)
    assert found.rank.tolist() == [1000] * 7
    assert not (found.top == torch.arange(7)[:, None]).any()
    nan = rank_all(keys[:2], torch.full((5, 256), math.nan), ids(0, 1), torch.arange(5), k=2)
    assert nan.rank.tolist() == [5, 5]


@pytest.mark.parametrize("block", [1, 23 * 5, 2**22])
def test_blocks_give_what_the_whole_matrix_gives(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(37, 8, generator=generator), torch.randn(23, 8, generator=generator)
    groups, given = torch.arange(37) % 25, torch.arange(23) % 20  # some have two right ones, some none
    monkeypatch.setattr(ranking, "BLOCK", block)
    found = rank_all(queries, keys, groups, given, k=6)
    whole = (queries.double() @ keys.double().T).float()
    best = whole.topk(6, dim=1)
    assert torch.equal(found.rank, ranks(whole, matches(groups, given)))
    assert torch.equal(found.top, best.indices)
    assert torch.equal(found.score, best.values)
    assert rank_all(queries, keys, groups, given, k=99).top.shape == (37, 23)


def test_chance_is_exact() -> None:
    found = chance(ids(0, 1), ids(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19))
    assert found == pytest.approx({"r1": 5.0, "r5": 25.0, "r10": 50.0})
    # two right of four: at least one among the first is 1/2; a fifth place holds everything
    assert chance(ids(0), ids(0, 0, 1, 2)) == pytest.approx({"r1": 50.0, "r5": 100.0, "r10": 100.0})
    # five right of twenty at one, and a query without a right one, which asks nothing
    assert chance(ids(1, 9, -3), ids(*([1] * 5 + [0] * 15)))["r1"] == pytest.approx(25.0)
    assert chance(ids(9), ids(0, 1)) == {"r1": 0.0, "r5": 0.0, "r10": 0.0}
    generator = torch.Generator().manual_seed(0)
    asked, given = torch.arange(30).repeat(40) % 30, torch.arange(30).repeat_interleave(2)
    drawn = recalls(ranks(torch.rand(1200, 60, generator=generator), matches(asked, given)))
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
    pool = "cls"

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

    def fuse(
        self, text: Tensor, mask: Tensor, image: list[tuple[Tensor, Tensor]], image_index: Any = None, rows: Any = None
    ) -> Fused:
        parts = 1 if image_index is None else len(image_index)
        of_images = image[0][0][: len(text) // parts, 0, :1, :1].repeat(parts, 1, 1)
        return Fused((text[..., :1] - of_images)[:, :1])

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


def asked(rerank: int = 0, **more: Any) -> EvaluationSection:
    return EvaluationSection.model_validate({"rerank": rerank, **more})


def plain(found: dict[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in ("r1", "r5", "r10")}


def test_a_model_without_blur_is_perfect() -> None:
    found = evaluate_split(Oracle(0.0), split(), "cpu", 0.1, asked())
    assert found["i2t"] == found["t2i"] == {"r1": 100.0, "r5": 100.0, "r10": 100.0}
    assert found["sum"] == found["without_flags"]["sum"] == 600.0
    assert (found["images"], found["captions"], found["reranked"], found["sampled"]) == (100, 60, None, None)
    assert found["chance_r1"] == pytest.approx(100 / 60)
    assert found["without_flags"]["images"] == 100 - 6
    assert found["without_flags"]["captions"] == 58


def test_an_image_is_answered_by_any_of_its_captions() -> None:
    """Five captions each, as in COCO: the image asks once, each caption asks for itself."""
    groups = list(range(12))
    found = evaluate_split(Oracle(0.0), Split(groups, [g for g in groups for _ in range(5)]), "cpu", 0.1, asked(8))
    assert (found["images"], found["captions"], found["sum"]) == (12, 60, 600.0)
    assert found["chance"]["i2t"]["r1"] == pytest.approx(100 * 5 / 60)
    assert found["chance"]["t2i"]["r1"] == pytest.approx(100 / 12)
    assert (found["reranked"]["i2t"]["queries"], found["reranked"]["t2i"]["queries"]) == (12, 60)


def test_reranking_with_an_oracle_repairs_what_features_confuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BATCH", 16)  # several batches, so that places are carried across them
    monkeypatch.setattr(embedding, "PAIRS", 16)
    found = evaluate_split(Oracle(50.0, blur=1.6), split(), "cpu", 0.1, asked(8))
    for direction in ("i2t", "t2i"):
        assert found[direction]["r1"] < 60
        assert found["reranked"][direction]["r1"] == pytest.approx(found[direction]["r5"], abs=40)
        assert found["reranked"][direction]["r1"] > found[direction]["r1"] + 20
        assert found["reranked"]["before"][direction] == pytest.approx(found[direction])
    assert found["reranked"]["sum"] == pytest.approx(rsum(found["reranked"]))
    assert found["reranked"]["sum"] > found["sum"] == found["reranked"]["before"]["sum"]


def test_reranking_by_a_head_that_knows_nothing_changes_nothing() -> None:
    found = evaluate_split(Oracle(0.0, blur=0.8), split(), "cpu", 0.1, asked(8))
    for direction in ("i2t", "t2i"):
        assert plain(found["reranked"][direction]) == pytest.approx(found[direction])


def test_reranking_a_sample_compares_with_the_same_queries() -> None:
    found = evaluate_split(Oracle(50.0, blur=1.6), split(), "cpu", 0.1, asked(4, rerank_queries=10))["reranked"]
    assert found["i2t"]["queries"] == found["t2i"]["queries"] == 10
    assert found["i2t"]["r1"] > found["before"]["i2t"]["r1"]
    assert found["pairs"] <= 80
    every = evaluate_split(Oracle(50.0, blur=1.6), split(), "cpu", 0.1, asked(4, rerank_queries=0))["reranked"]
    assert (every["i2t"]["queries"], every["t2i"]["queries"]) == (100, 40)  # 20 captions belong to no image


def test_what_candidates_are_ordered_by() -> None:
    logits = torch.tensor([[0.0, 2.0], [-5.0, 1.0], [3.0, 2.5]])  # (no match, match)
    similarity = torch.tensor([0.1, 0.5, 0.9])
    assert order_by("itm", logits, similarity, 0.1).tolist() == [2.0, 6.0, -0.5]
    assert order_by("sum", logits, similarity, 0.1).tolist() == pytest.approx([3.0, 11.0, 8.5])
    # ALBEF's evaluation reads the second logit and nothing else: here it orders as none of the others does
    assert order_by("match_logit", logits, similarity, 0.1).tolist() == [2.0, 1.0, 2.5]


@pytest.mark.parametrize("score", ["sum", "itm", "match_logit"])
def test_the_recipe_chooses_what_orders_them(score: str) -> None:
    class Biased(Oracle):
        """Right by its log-odds, wrong by the logit of the match alone."""

        def match_logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
            match = (tokens[:, 0, 0] == 0).float()
            return torch.stack([-30 * match, -20 * match], 1)

    found = evaluate_split(Biased(0.0, blur=1.2), split(), "cpu", 10.0, asked(8, rerank_score=score))["reranked"]
    assert found["score"] == score
    better = found["i2t"]["r1"] > found["before"]["i2t"]["r1"]
    assert better == (score != "match_logit")
    assert found["itm"]["i2t"]["r1"] > found["before"]["i2t"]["r1"]


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_pairs_are_scored_in_any_order_and_number(kept: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images with 1 to 9 captions, in batches that do not divide them; tokens kept or encoded again."""
    monkeypatch.setattr(embedding, "KEPT_BYTES", kept)
    monkeypatch.setattr(embedding, "PAIRS", at_once)
    monkeypatch.setattr(embedding, "BATCH", 7)

    class Labels(Oracle):
        def match_logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return torch.stack([tokens[:, 0, 0], mask.sum(1).float()], 1)

    world = split()
    found = embed(Labels(0.0), world, "cpu")
    assert (found.image_tokens is None) == (kept == 0)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cat([torch.stack([torch.full((n,), i), torch.randperm(60, generator=generator)[:n]], 1)
                       for n, i in zip((9, 1, 4, 4, 2), (99, 0, 41, 5, 3), strict=True)])  # fmt: skip
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    logits = match_logits(Labels(0.0), world, found, pairs, "cpu")
    difference = pairs[:, 1] - torch.from_numpy(world.image_group_id)[pairs[:, 0]]
    assert logits[:, 0].tolist() == difference.tolist()
    assert set(logits[:, 1].tolist()) == {3.0}  # each caption's own words, no padding
    assert match_logits(Labels(0.0), world, found, pairs[:0], "cpu").shape == (0, 2)


@pytest.mark.parametrize(("norm", "pool"), [("post", "cls"), ("pre", "mean")])
def test_scores_are_those_of_each_pair_by_itself(norm: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionLanguageModel(
        ModelSection.model_validate(
            {
                "image": {"size": 8, "patch_size": 4, "width": 16, "depth": 1, "heads": 2},
                "text": {"width": 16, "depth": 1, "heads": 2},
                "fusion": {"depth": 2, "heads": 2, "norm": norm},
                "projection_width": 8,
                "pool": pool,
            }
        ),
        200,
        12,
    ).eval()

    class Real(Split):
        def take(self, rows: np.ndarray) -> Batch:
            batch = super().take(rows)
            noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(i))) for i in rows]
            return dataclasses.replace(batch, images=torch.stack(noise))

        def _text(self, group: Tensor, start: int) -> CaptionBatch:
            lengths = 3 + (start + torch.arange(len(group))) % 7
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            token_ids = (torch.arange(mask.shape[1]) * 7 + group[:, None] + 5).masked_fill(~mask, 0)
            return CaptionBatch(token_ids, mask, mask, group, torch.arange(start, start + len(group)))

    world = Real(list(range(6)), list(range(10)))
    found = embed(model, world, "cpu")
    pairs = torch.tensor([[i, j] for i in range(6) for j in range(10) if (i * j + i) % 3 and i + j < 11])
    told: list[str] = []
    monkeypatch.setattr(embedding, "PAIRS", 7)  # so that parts are filled up with pairs that come twice
    logits = match_logits(model, world, found, pairs, "cpu", embedding.Progress(told.append, every=0.0))
    plan = [chosen for _, group in embedding._plan(pairs, found.length, 7) for _, chosen in group]
    assert sum(map(len, plan)) > len(pairs)
    done = [int(line.removeprefix("pairs re-ranked, ").split()[0]) for line in told]
    assert {line.split(" of ")[1] for line in told} == {str(len(pairs))}
    assert done == [len(torch.cat(plan[:n]).unique()) if n else 0 for n in range(len(plan))]
    assert len(pairs) == len(torch.cat(plan).unique())
    with torch.no_grad():
        for (i, j), mine in zip(pairs.tolist(), logits, strict=True):
            image = model.encode_image(world.take(np.array([i])).images)
            text = world._text(torch.tensor([j]), j)
            words = model.encode_text(text.token_ids, text.token_mask).tokens
            fused = model.fuse(words, text.token_mask, model.project_image(image.tokens))
            assert torch.allclose(mine, model.match_logits(fused.tokens, text.token_mask)[0], atol=1e-5)


def test_progress_is_told_at_most_so_often() -> None:
    said: list[str] = []
    progress = embedding.Progress(said.append, every=0.0)
    found = embed(Oracle(0.0), split(), "cpu", progress=progress)
    match_logits(Oracle(0.0), split(), found, torch.zeros(3, 2, dtype=torch.long), "cpu", progress)
    assert said == ["images encoded, 0 of 100", "captions encoded, 0 of 60", "pairs re-ranked, 0 of 3"]
    embed(Oracle(0.0), split(), "cpu", progress=embedding.Progress(said.append))
    assert len(said) == 3


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
