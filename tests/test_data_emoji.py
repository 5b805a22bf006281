"""The embedded set: splits, determinism, scenes and their truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from crossmask.engine.data import Batch, StepSampler, load_data
from crossmask.engine.data.canvas import Placements, paint
from crossmask.engine.data.emoji import SET, background, read_captions
from crossmask.engine.data.emoji_pairs import _EVALUATION, EmojiPairs
from crossmask.engine.data.randomness import Draws, uniform
from crossmask.engine.data.scenes import plan_scenes
from crossmask.engine.data.tokenizer import FUNCTION_WORDS, split_words
from crossmask.engine.errors import DataError
from crossmask.engine.recipe import Recipe

CAPTIONS = read_captions()
BY_NAME = {c.name: c for c in CAPTIONS}


def recipe(**data: Any) -> Recipe:
    settings = {"scenes": {"fraction": 0.5}, "word_drop": 0.2, **data}
    return Recipe.model_validate({"seed": 7, "data": settings, "model": {"image": {"size": 32, "patch_size": 8}}})


@pytest.fixture(scope="module")
def data() -> EmojiPairs:
    loaded = load_data(recipe())
    assert isinstance(loaded, EmojiPairs)
    return loaded


def changed(data: EmojiPairs, **settings: Any) -> EmojiPairs:
    """The same data under another data section, without loading it again."""
    other = object.__new__(EmojiPairs)
    other.__dict__.update(data.__dict__, section=recipe(**settings).data)
    return other


def same(left: Batch, i: int, right: Batch, j: int) -> bool:
    lengths = int(left.token_mask[i].sum()), int(right.token_mask[j].sum())
    names = ("token_ids", "maskable", *(["words"] if left.words is not None and right.words is not None else []))
    return (
        torch.equal(left.images[i], right.images[j])
        and lengths[0] == lengths[1]
        and all(torch.equal(getattr(left, n)[i, : lengths[0]], getattr(right, n)[j, : lengths[0]]) for n in names)
        and bool(left.group_id[i] == right.group_id[j])
    )


def test_split_sizes(data: EmojiPairs) -> None:
    sizes = {name: (split.image_count, split.caption_count) for name, split in data.splits.items()}
    assert sizes == {"a": (1718, 1718), "b": (894, 196), "c": (196, 196)}
    assert data.train_size == 7804
    assert data.train_size + sum(n for n, _ in sizes.values()) == 10612
    assert (
        sum(c.is_flag for c in CAPTIONS)
        == data.splits["a"].gallery_is_flag.sum() + data.splits["b"].gallery_is_flag.sum()
    )


def test_nothing_leaks_between_splits(data: EmojiPairs) -> None:
    art, rows = data.art, {name: set(split.drawings.tolist()) for name, split in data.splits.items()}
    rows["train"] = set(data.train.tolist())
    assert len(set().union(*rows.values())) == sum(map(len, rows.values())) == 10612
    held = {i for i, c in enumerate(art.captions) if c.held_out}
    foreign = art.styles.index("twemoji")
    assert not held & set(data.train_group_id.tolist())
    assert foreign not in art.style[data.train]
    assert set(art.style[data.splits["a"].drawings]) == set(art.style[data.splits["c"].drawings]) == {foreign}
    assert foreign not in art.style[data.splits["b"].drawings]
    for name in "bc":
        assert set(data.splits[name].image_group_id) == set(data.splits[name].gallery_group_id) == held
    # near-copies of one another must be on one side
    assert {art.styles.index(s) for s in ("fluent", "fluentflat")} <= set(art.style[data.train])


def test_drawings_that_nothing_tells_apart_are_as_few_as_the_readme_says(data: EmojiPairs) -> None:
    """Pixel for pixel the same under two captions, within a split or as one that was trained on."""
    art, rows = data.art, {name: split.drawings for name, split in data.splits.items()}
    rows["train"] = data.train
    captions: dict[str, dict[bytes, set[int]]] = {name: {} for name in rows}
    for name, of in rows.items():
        for row in of:
            captions[name].setdefault(art.rgba[row].numpy().tobytes(), set()).add(int(art.caption[row]))
    known, found = captions["train"], {}
    for name, of in rows.items():
        drawn = [(art.rgba[row].numpy().tobytes(), int(art.caption[row])) for row in of]
        inside = sum(len(captions[name][pixels]) > 1 for pixels, _ in drawn)
        found[name] = inside, sum(bool(known.get(pixels, set()) - {caption}) for pixels, caption in drawn)
    assert found == {"a": (34, 0), "b": (0, 9), "c": (2, 0), "train": (75, 75)}


def test_vocabulary_comes_from_training_captions_only(data: EmojiPairs) -> None:
    seen = {
        w
        for i in set(data.train_group_id.tolist())
        for w in split_words(" ".join((CAPTIONS[i].name, *CAPTIONS[i].tags)))
    }
    whole = set(data.tokenizer.words(range(5, data.tokenizer.vocabulary_size)))
    new = {w for c in CAPTIONS if c.held_out for w in split_words(c.name)} - seen
    assert len(new) > 20
    assert not {w for w in new & whole if not any(s.startswith(w) for s in seen)}


def test_split_batches_follow_the_order_of_their_ids(data: EmojiPairs) -> None:
    split = data.splits["c"]
    batches = list(split.images(64))
    assert [len(b) for b in batches] == [64, 64, 64, 4]
    assert torch.cat([b.group_id for b in batches]).tolist() == split.image_group_id.tolist()
    assert torch.cat([b.index for b in batches]).tolist() == list(range(196))
    gallery = list(split.gallery(100))
    assert torch.cat([g.group_id for g in gallery]).tolist() == split.gallery_group_id.tolist()
    text = data.tokenizer.text(gallery[0].token_ids[0])
    assert text.startswith(" ".join(split_words(CAPTIONS[int(split.gallery_group_id[0])].name)))
    assert all(int(b.token_mask.sum(1).max()) <= data.max_tokens for b in batches)


def test_captions_carry_no_boilerplate(data: EmojiPairs) -> None:
    texts = [data.tokenizer.text(row) for g in data.splits["a"].gallery(500) for row in g.token_ids]
    assert not any("emoji" in t.split()[-2:] or t[-1] in ".,:" for t in texts)
    assert sum("smileys" in t for t in texts) == 0
    assert all(len(t.split()) <= data.section.max_words for t in texts)


def test_a_sample_is_the_same_in_any_batch(data: EmojiPairs) -> None:
    indices = np.array([5, 7000, 123, 44, 2222, 901, 17, 3003, 65, 4096, 31])
    together = data.train_batch(indices, epoch=2)
    backwards = data.train_batch(indices[::-1], epoch=2)
    for i, index in enumerate(indices):
        alone = data.train_batch(np.array([index]), epoch=2, truth=True)
        assert same(together, i, alone, 0), index
        assert same(together, i, backwards, len(indices) - 1 - i), index
    assert together.things is None
    assert together.words is None


def test_a_sample_is_the_same_on_any_rank(data: EmojiPairs) -> None:
    whole = data.train_batch(StepSampler(data.train_size, 12, 1, 7).indices(3, 0), 0)
    for rank in range(3):
        share = data.train_batch(StepSampler(data.train_size, 12, 3, 7).indices(3, rank), 0)
        assert all(same(whole, 4 * rank + i, share, i) for i in range(4))


def test_epochs_and_seeds_change_samples(data: EmojiPairs) -> None:
    indices = np.arange(0, 7800, 300)
    first = data.train_batch(indices, 0)
    other = object.__new__(EmojiPairs)
    other.__dict__.update(data.__dict__, seed=8)
    for changed_batch in (data.train_batch(indices, 1), other.train_batch(indices, 0)):
        assert sum(torch.equal(a, b) for a, b in zip(first.images, changed_batch.images, strict=True)) == 0


def test_a_second_load_gives_the_same_samples(data: EmojiPairs) -> None:
    again = load_data(recipe())
    indices = np.arange(10, 7800, 700)
    left, right = data.train_batch(indices, 4), again.train_batch(indices, 4)
    assert all(same(left, i, right, i) for i in range(len(indices)))


def test_random_numbers_are_uniform_and_independent() -> None:
    u = uniform(0, 0, np.arange(20000), "x", 4)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01
    corners = np.corrcoef(
        np.column_stack([u, uniform(0, 1, np.arange(20000), "x", 1), uniform(0, 0, np.arange(20000), "y", 1)]).T
    )
    assert np.abs(corners - np.eye(6)).max() < 0.03
    assert np.abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


def test_batches_have_the_promised_shapes(data: EmojiPairs) -> None:
    batch = data.train_batch(np.arange(40), 0, truth=True)
    assert batch.images.shape == (40, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1
    assert batch.things is not None
    assert batch.things.shape == (40, 32, 32)
    assert batch.things.dtype == torch.uint8
    assert batch.token_ids.shape == batch.token_mask.shape == batch.maskable.shape
    assert batch.maskable.any(1).all()
    assert batch.index.tolist() == list(range(40))


def test_background_is_what_the_border_reaches() -> None:
    art = np.array(
        [
            "..........",
            ".########.",
            ".#......#.",
            ".#.####.#.",
            ".#.#..#.#.",
            ".#.#.##.#.",
            ".#.#....#.",
            ".#.######.",
            ".#........",
            "..........",
        ]
    )
    spiral = np.array([[c == "." for c in row] for row in art])
    ring = spiral.copy()
    ring[7, 2] = False  # the way into the spiral ends
    images = np.stack([spiral, ring, np.ones_like(spiral), np.zeros_like(spiral)])
    out = background(images)
    assert (out[0] == spiral).all()
    assert not out[1][2:7, 2].any()
    assert out[1][0].all()
    assert out[2].all()
    assert not out[3].any()


def test_one_drawing_is_where_it_was_put(data: EmojiPairs) -> None:
    drawing = int(data.splits["a"].drawings[0])  # a round yellow face
    at = Placements.plain(
        np.zeros(1, int), np.zeros(1, int), np.array([drawing]), np.array([[0.25, 0.75]]), np.array([0.4])
    )
    images, things = paint(data.art.rgba, at, 32, torch.full((1, 3), 0.9), truth=True)
    assert things is not None
    y, x = np.nonzero(things[0].numpy())
    assert x.min() >= 1
    assert x.max() <= 14
    assert y.min() >= 17
    assert y.max() <= 30
    assert len(x) > 100
    untouched = (images[0] - 0.9).abs().amax(0) < 1e-6
    assert untouched[:16].all()
    assert not untouched[things[0] == 1].any()


def test_mirroring_mirrors(data: EmojiPairs) -> None:
    face = [CAPTIONS[g].name for g in data.splits["a"].image_group_id].index("winking face")
    drawing = data.splits["a"].drawings[[face]]
    at = Placements.plain(np.zeros(1, int), np.zeros(1, int), drawing, np.array([[0.5, 0.5]]), np.array([0.9]))
    white = torch.ones(1, 3)
    plain, _ = paint(data.art.rgba, at, 32, white, truth=False)
    mirrored, _ = paint(data.art.rgba, replace(at, mirror=np.array([True])), 32, white, truth=False)
    assert (plain - mirrored).abs().max() > 0.2
    torch.testing.assert_close(mirrored, plain.flip(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["flag: Japan", "right arrow", "ten o’clock", "keycap: 3", "leftwards hand", "newspaper", "A button (blood type)"],
)
def test_meaning_forbids_mirroring(name: str) -> None:
    assert not BY_NAME[name].may_mirror


@pytest.mark.parametrize("name", ["cat", "red apple", "grinning face", "bicycle"])
def test_most_things_may_be_mirrored(name: str) -> None:
    assert BY_NAME[name].may_mirror


def test_mirroring_is_never_applied_against_the_rule(data: EmojiPairs) -> None:
    fixed = np.flatnonzero([not c.may_mirror for c in CAPTIONS])
    rows = np.flatnonzero(np.isin(data.train_group_id, fixed))[:200]
    single = changed(data, scenes={"fraction": 0.0})
    for source, expected in ((single, 0.0), (changed(data, scenes={"fraction": 0.0}, mirror=False), 0.0)):
        places = Placements.plain(
            np.arange(200), np.zeros(200, int), data.train[rows], np.full((200, 2), 0.5), np.full(200, 0.9)
        )
        assert source._vary(places, Draws(7, 0, rows), 1.0).mirror.mean() == expected
    free = np.setdiff1d(np.arange(len(data.train)), np.flatnonzero(np.isin(data.train_group_id, fixed)))[:200]
    places = replace(places, drawing=data.train[free])
    assert 0.3 < single._vary(places, Draws(7, 0, free), 1.0).mirror.mean() < 0.7


def test_named_colours_stay(data: EmojiPairs) -> None:
    assert BY_NAME["red apple"].names_colour
    assert BY_NAME["flag: Japan"].names_colour
    assert not BY_NAME["bicycle"].names_colour
    row = int(np.flatnonzero([CAPTIONS[g].name == "red apple" for g in data.train_group_id])[0])
    many = np.full(300, row)
    places = Placements.plain(
        np.arange(300), np.zeros(300, int), data.train[many], np.full((300, 2), 0.5), np.full(300, 0.9)
    )
    varied = data._vary(places, Draws(7, 0, np.arange(300)), 1.0)
    assert (varied.saturation == 1).all()
    assert (varied.gain == varied.gain[:, :1]).all()


def test_without_augmentation_a_single_is_the_plain_drawing(data: EmojiPairs) -> None:
    still = changed(data, augment=0.0, scenes={"fraction": 0.0}, word_drop=0.0)
    batch = still.train_batch(np.arange(5), 0)
    plain = data.plain_batch(data.train[:5], np.arange(5))
    assert torch.equal(batch.images, plain.images)
    assert torch.equal(batch.token_ids, plain.token_ids)
    assert (data.normalisation.undo(plain.images)[:, :, 0, 0] == 1).all()
    assert plain.things is not None
    assert set(plain.things.unique().tolist()) == {0, 1}


def test_single_drawings_may_be_as_small_as_those_of_scenes(data: EmojiPairs) -> None:
    """In training alone: from the smallest side on to nearly the canvas, and never in what is held out."""
    usual = changed(data, augment=0.2, scenes={"fraction": 0.0})
    small = changed(data, augment=0.2, scenes={"fraction": 0.0, "single_side": 0.3})
    sides = []
    for source in (usual, small):
        things = source.train_batch(np.arange(300), 0, truth=True).things
        assert things is not None
        rows, columns = (things > 0).any(2).float().sum(1), (things > 0).any(1).float().sum(1)
        sides.append(torch.maximum(rows, columns) / things.shape[1])
    assert sides[0].quantile(0.05) > 0.6
    assert sides[1].quantile(0.05) < 0.4
    assert sides[1].quantile(0.95) > 0.8
    assert (sides[1] > 0.2).all()
    held_out = [source.plain_batch(data.train[:5], np.arange(5)).images for source in (usual, small)]
    assert torch.equal(*held_out)


def test_scenes_have_the_wanted_share_and_groups_of_their_own(data: EmojiPairs) -> None:
    indices = np.arange(data.train_size)
    chance = uniform(data.seed, 0, indices, "scene", 1)[:, 0]
    assert 0.47 < (chance < 0.5).mean() < 0.53
    some = np.arange(400)
    first, second = data.train_batch(some, 0), data.train_batch(some, 1)
    scenes = [set(b.group_id[b.group_id >= len(CAPTIONS)].tolist()) for b in (first, second)]
    assert len(scenes[0]) == (first.group_id >= len(CAPTIONS)).sum()
    assert not scenes[0] & scenes[1]
    single = first.group_id < len(CAPTIONS)
    assert first.group_id[single].tolist() == data.train_group_id[some][single.numpy()].tolist()


def test_scene_truth_is_consistent(data: EmojiPairs) -> None:
    batch = data.scene_batch("c", 200, seed=5)
    assert batch.things is not None
    assert batch.words is not None
    unnamed = undrawn = 0
    for things, words, ids, maskable in zip(batch.things, batch.words, batch.token_ids, batch.maskable, strict=True):
        drawn, named = set(things.unique().tolist()) - {0}, set(words.unique().tolist()) - {0}
        assert 2 <= max(drawn) <= 4
        assert named
        assert named - {255} <= set(range(1, max(drawn) + 1))
        assert ((words > 0) == maskable).all()
        unnamed, undrawn = unnamed + len(drawn - named), undrawn + (255 in named)
        assert tuple(ids.shape) == tuple(words.shape)
    assert 40 < unnamed < 150  # 15 % of about 600 things
    assert 15 < undrawn < 50  # 15 % of 200 scenes


def test_words_name_what_is_drawn(data: EmojiPairs) -> None:
    """The numbers of words and of pixels mean the same drawing, checked against the plan."""
    split, seed, count = data.splits["b"], 3, 40
    batch = data.scene_batch("b", count, seed)
    assert batch.words is not None
    assert batch.things is not None
    draws = Draws(seed, _EVALUATION, np.arange(count))
    anchors = split.drawings[(draws.uniform("anchor", 1)[:, 0] * split.image_count).astype(np.int64)]
    plan = plan_scenes(anchors, split.drawings, data.art.caption, data.art.style, data.section.scenes, draws)
    for i in range(count):
        text, words = data.tokenizer.words(batch.token_ids[i]), batch.words[i].tolist()
        for number in set(words) - {0}:
            column = data.section.scenes.max_things if number == 255 else number - 1
            caption = data.art.captions[data.art.caption[plan.drawing[i, column]]]
            said = "".join(t.removeprefix("##") for t, w in zip(text, words, strict=True) if w == number)
            assert said.startswith("".join(w for w in split_words(caption.name) if w not in FUNCTION_WORDS))
        for number in set(batch.things[i].unique().tolist()) - {0}:
            centre = plan.centre[i, number - 1] * 32
            y, x = np.nonzero((batch.things[i] == number).numpy())
            assert np.hypot(x.mean() - centre[0], y.mean() - centre[1]) < 16 * plan.scale[i, number - 1] + 2


def test_scenes_use_their_own_split_only(data: EmojiPairs) -> None:
    for name in "abc":
        split = data.splits[name]
        draws = Draws(0, _EVALUATION, np.arange(300))
        plan = plan_scenes(
            split.drawings[:100].repeat(3), split.drawings, data.art.caption, data.art.style, data.section.scenes, draws
        )
        assert set(plan.drawing.ravel()) <= set(split.drawings.tolist())
        captions = data.art.caption[plan.drawing]
        for row, drawn, named in zip(captions, plan.drawn, plan.named, strict=True):
            used = row[drawn | named]
            assert len(set(used)) == len(used)
        if name == "b":  # several designers: seldom the same hand twice
            styles = [data.art.style[r[d]] for r, d in zip(plan.drawing, plan.drawn, strict=True)]
            assert np.mean([len(set(s)) == len(s) for s in styles]) > 0.97
    with pytest.raises(DataError, match="no split 'd'"):
        data.scene_batch("d", 1, 0)


@pytest.mark.parametrize(("unnamed", "undrawn"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_unnamed_and_undrawn(data: EmojiPairs, unnamed: float, undrawn: float) -> None:
    other = changed(
        data, scenes={"fraction": 1.0, "unnamed": unnamed, "undrawn": undrawn, "min_things": 3, "max_things": 3}
    )
    batch = other.scene_batch("a", 60, 0)
    assert batch.words is not None
    for row in batch.words:
        numbers = set(row.tolist()) - {0}
        assert numbers == ({1} if unnamed else {1, 2, 3}) | ({255} if undrawn else set())


@pytest.mark.parametrize("things", [1, 2, 4, 8])
def test_drawings_of_a_scene_hardly_overlap(data: EmojiPairs, things: int) -> None:
    settings = {"fraction": 1.0, "min_things": things, "max_things": things}
    batch = changed(data, scenes=settings).scene_batch("a", 64, 1)
    assert batch.things is not None
    seen = [len(set(t.unique().tolist()) - {0}) for t in batch.things]
    assert min(seen) >= things - (things == 8)
    assert np.mean(seen) > things - 0.1


def test_every_word_may_be_dropped_but_never_all(data: EmojiPairs) -> None:
    sparse = changed(data, word_drop=0.95)
    batch = sparse.train_batch(np.arange(300), 0)
    assert batch.maskable.any(1).all()
    full = changed(data, word_drop=0.0).train_batch(np.arange(300), 0)
    assert batch.token_mask.sum() < 0.6 * full.token_mask.sum()


def test_every_shipped_file_has_its_licence() -> None:
    notice = (SET / "LICENSES.md").read_text("utf-8")
    for path in SET.iterdir():
        assert path.name == "LICENSES.md" or path.name in notice, path.name
    for name in ("LICENSE-Apache-2.0.txt", "LICENSE-MIT.txt", "LICENSE-Unicode-3.0.txt"):
        assert (SET / name).stat().st_size > 1000
