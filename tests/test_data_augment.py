"""Training pictures: crops as RandomResizedCrop draws them, RandAugment's changes, normalisation, by seed and index."""

from __future__ import annotations

import hashlib
import json
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from crossmask.engine.data import PairData, load_data
from crossmask.engine.data.normalisation import CLIP, HALF, NORMALISATIONS
from crossmask.engine.data.pairs import FilePairs
from crossmask.engine.data.pictures import Chances, crop
from crossmask.engine.data.rand_augment import DRAWS, OPERATIONS, rand_augment
from crossmask.engine.data.randomness import Draws
from crossmask.engine.errors import RecipeError
from crossmask.engine.recipe import DataSection, RandAugmentSection, Recipe

COUNT = 3000


def section(**settings: Any) -> DataSection:
    return DataSection.model_validate(settings)


def crops(width: int, height: int, **settings: Any) -> np.ndarray:
    """(COUNT, 4) boxes as shares of the image."""
    asked = section(**settings)
    chances = Chances(Draws(0, 0, np.arange(COUNT)), asked)
    boxes = np.array([crop(width, height, asked, chances, row) for row in range(COUNT)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    return boxes / [width, height, width, height]


def sizes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the most that two distribution functions differ by."""
    both = np.concatenate([one, other])
    shares = [np.searchsorted(np.sort(some), both, side="right") / len(some) for some in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(("width", "height", "least"), [(6400, 4800, 0.2), (4800, 6400, 0.5), (5000, 5000, 0.2)])
def test_crops_are_distributed_as_torchvisions(width: int, height: int, least: float) -> None:
    torch.manual_seed(0)
    image = torch.empty(3, height, width, device="meta")
    drawn = [RandomResizedCrop.get_params(image, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(COUNT)]
    their = np.array(drawn) / [height, width, height, width]  # top, left, height, width
    boxes = crops(width, height, crop_area=least)
    w, h = sizes(boxes)
    for ours, theirs in ((w * h, their[:, 2] * their[:, 3]), (np.log(w / h), np.log(their[:, 3] / their[:, 2])),
                         (boxes[:, 0], their[:, 1]), (boxes[:, 1], their[:, 0])):  # fmt: skip
        assert distance(ours, theirs) < 0.045  # 0.2 % of two equal distributions lie further apart
    assert (w * h).min() >= least - 1e-9
    assert (w * h).min() < least + 0.05


def test_a_weaker_crop_keeps_more_and_the_shape() -> None:
    for strength in (0.5, 0.01):
        w, h = sizes(crops(640, 480, augment=strength, crop_area=0.2))
        assert (w * h).min() >= 1 - 0.8 * strength - 1e-9
    assert abs(w / h - 1).max() < 0.02
    w, h = sizes(crops(640, 480, crop_area=1.0))
    assert np.allclose(w * h, 1)


def test_a_panorama_keeps_its_least_area() -> None:
    boxes = crops(3000, 300, crop_area=0.5)
    w, h = sizes(boxes)
    assert np.allclose(w, 0.5)
    assert np.allclose(h, 1)
    assert boxes[:, 0].std() > 0.1
    w, h = sizes(crops(300, 900, crop_area=0.2))
    assert ((w * h) >= 0.2 - 1e-9).all()


# RandAugment ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(40, 200, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def test_the_ten_changes(noise: Image.Image) -> None:
    before = pixels(noise)
    after = {name: pixels(change(noise, 0.7)) for name, change in OPERATIONS.items()}
    other = {name: pixels(change(noise, -0.7)) for name, change in OPERATIONS.items()}
    assert list(after) == [
        "identity", "auto_contrast", "equalise", "brightness", "sharpness",
        "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    ]  # fmt: skip
    assert all(image.shape == before.shape for image in after.values())
    assert (after["identity"] == before).all()
    assert (after["auto_contrast"].min(), after["auto_contrast"].max()) == (0, 255)
    assert abs(np.bincount(after["equalise"].astype(int).ravel() // 64) / before.size - 0.25).max() < 0.02
    assert np.allclose(after["brightness"], np.clip(before * 1.36, 0, 255), atol=1)
    padded = np.pad(before, ((1, 1), (1, 1), (0, 0)), "edge")
    blurred = sum(padded[i : i + 256, j : j + 256] for i in range(3) for j in range(3)) + 4 * before
    sharp = blurred / 13 + 1.36 * (before - blurred / 13)
    assert np.abs(after["sharpness"] - sharp)[1:-1, 1:-1].max() <= 2
    assert np.allclose(after["translate_x"][:, :-8], before[:, 7:-1], atol=1)  # by 7 of 256 pixels
    assert (after["translate_x"][:, -6:] == 128).all()
    assert np.allclose(other["translate_y"][8:], before[1:-7], atol=1)
    assert (other["translate_y"][:6] == 128).all()
    for name in ("auto_contrast", "equalise", "brightness", "sharpness"):
        assert (after[name] == other[name]).all()
    for name in ("shear_x", "shear_y", "rotate"):
        assert (after[name] != other[name]).mean() > 0.5
    grey = Image.new("RGB", (256, 256), (255, 255, 255))
    assert np.isclose((pixels(OPERATIONS["shear_x"](grey, 0.7))[:, :, 0] == 128).mean(), 0.21 / 2, atol=0.01)
    kept = 2 / (1 + np.sin(np.radians(21)) + np.cos(np.radians(21)))  # of a square within itself, rotated
    assert np.isclose((pixels(OPERATIONS["rotate"](grey, 0.7))[:, :, 0] == 128).mean(), 1 - kept, atol=0.005)
    dot = Image.new("RGB", (257, 257))
    dot.paste((255, 255, 255), (226, 126, 231, 131))  # 100 to the right of the centre
    y, x = np.argwhere(pixels(OPERATIONS["rotate"](dot, 0.7))[:, :, 0] > 200).mean(0) - 128
    assert np.allclose((np.hypot(x, y), abs(np.degrees(np.arctan2(y, x)))), (100, 21), atol=1)


def test_every_random_number_depends_on_seed_and_epoch() -> None:
    asked = section(rand_augment={"operations": 2})
    one, *others = (vars(Chances(Draws(*at, np.arange(9)), asked)) for at in ((0, 0), (0, 1), (1, 0)))
    for name, values in one.items():
        assert (values >= 0).all()
        assert (values < 1).all()
        for other in others:
            assert (values != other[name]).all(), name
    assert one["changes"].shape == (9, 2 * DRAWS)


def test_each_change_is_drawn_alike_and_happens_in_half_of_the_cases() -> None:
    luck = Draws(3, 1, np.arange(20_000)).uniform("rand augment", DRAWS)
    kinds = np.bincount((luck[:, 0] * 10).astype(int), minlength=10)
    assert abs(kinds / 20_000 - 0.1).max() < 0.01
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None] + 60, (1, 64, 3)))
    asked, still = RandAugmentSection(operations=1, magnitude=7), pixels(ramp)
    changed = np.array([(pixels(rand_augment(ramp, asked, row)) != still).any() for row in luck[:2000]])
    drawn = (luck[:2000, 1] < 0.5) & (luck[:2000, 0] >= 0.1)
    assert (changed <= drawn).all()
    assert changed.sum() > 0.9 * drawn.sum()
    assert 0.4 < changed.mean() < 0.5
    assert rand_augment(ramp, RandAugmentSection(), np.empty(0)) is ramp


# In a run -------------------------------------------------------------------------------------------------------------


def recipe(path: Path | None, size: int = 32, **data: Any) -> Recipe:
    settings = {"validation_fraction": 0.0, **data}
    if path is not None:
        settings |= {"source": "pairs", "path": path}
    return Recipe.model_validate({"seed": 7, "data": settings, "model": {"image": {"size": size, "patch_size": 8}}})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    draw = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (40 + i, 60, 3), np.uint8)).save(folder / f"{i}.png")
    rows = [json.dumps({"image": f"{i}.png", "caption": f"thing {i}"}) for i in range(12)]
    (folder / "p.jsonl").write_text("\n".join(rows))
    return folder / "p.jsonl"


RAND = {"rand_augment": {"operations": 2, "magnitude": 7}, "crop_area": 0.2, "normalisation": "clip"}


def test_a_sample_depends_on_seed_epoch_and_index_alone(path: Path) -> None:
    data = load_data(recipe(path, **RAND))
    again = load_data(recipe(path, **RAND))
    indices = np.array([3, 11, 0, 7])
    together = data.train_batch(indices, 4).images
    for i, index in enumerate(indices):
        assert torch.equal(together[i], again.train_batch(indices[i : i + 1], 4).images[0]), index
    assert torch.equal(together.flip(0), again.train_batch(indices[::-1], 4).images)
    assert not torch.equal(together, data.train_batch(indices, 5).images)
    other = load_data(recipe(path, **RAND).model_copy(update={"seed": 8}))
    assert not torch.equal(together, other.train_batch(indices, 4).images)
    assert isinstance(data, FilePairs)
    changed = together != load_data(recipe(path, **{**RAND, "rand_augment": {}})).train_batch(indices, 4).images
    assert changed.any()


def test_with_rand_augment_no_other_change_of_light(path: Path) -> None:
    """Mirrored or not, a picture that no operation fell on is a mere crop of its file."""
    settings = {"crop_area": 1.0, "mirror": False, "rand_augment": {"operations": 1}}
    data = load_data(recipe(path, **settings))
    still = load_data(recipe(path, augment=0.0)).train_batch(np.arange(12), 0).images
    plain = [(data.train_batch(np.arange(12), epoch).images == still).flatten(1).all(1) for epoch in range(8)]
    assert 0.4 < torch.stack(plain).float().mean() < 0.75  # 0.55: half of nine in ten change it


@pytest.fixture(scope="module")
def emoji() -> PairData:
    return load_data(recipe(None, 64, scenes={"fraction": 0.5}, word_drop=0.2, normalisation="clip"))


@pytest.mark.parametrize("source", ["pairs", "emoji"])
def test_normalisation_is_the_recipes(source: str, path: Path, emoji: PairData) -> None:
    clip = load_data(recipe(path, normalisation="clip")) if source == "pairs" else emoji
    assert clip.normalisation == CLIP
    half = load_data(recipe(path)) if source == "pairs" else copy(emoji)
    if source == "emoji":
        half.normalisation = HALF
    assert half.normalisation == HALF
    one, other = (data.train_batch(np.arange(10), 1).images for data in (half, clip))
    torch.testing.assert_close(half.normalisation.undo(one), clip.normalisation.undo(other))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP.mean, CLIP.std))
    torch.testing.assert_close(other, ((one + 1) / 2 - mean) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["half", "clip"])
def test_normalisation_there_and_back(name: str) -> None:
    images = torch.rand(2, 3, 5, 7)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    normalisation = NORMALISATIONS[name]
    found = normalisation.apply_(images.clone())
    assert found[0, 2, 1, 1] == (images[0, 2, 1, 1] - np.float32(normalisation.mean[2])) / np.float32(
        normalisation.std[2]
    )
    torch.testing.assert_close(normalisation.undo(found), images)
    torch.testing.assert_close(normalisation.undo(found[0]), images[0])
    assert normalisation.undo(found * 3).max() <= 1
    if name == "half":
        assert torch.equal(found, images.sub(0.5).div(0.5))


def test_what_contradicts_itself(path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.rand_augment\.operations is 2, but data\.augment: 0 [^\n]*\Z"):
        load_data(recipe(path, augment=0.0, **RAND))
    with pytest.raises(RecipeError, match=r"data\.rand_augment is only for data\.source: pairs[^\n]*\Z"):
        load_data(recipe(None, **RAND))


def digest(*tensors: torch.Tensor | None) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return found.hexdigest()[:16]


def test_the_emoji_have_not_changed(emoji: PairData) -> None:
    """Words, groups and truth of the default data to the bit, and pixels to a rounding error of grid_sample."""
    data = copy(emoji)
    data.normalisation = HALF
    batch = data.train_batch(np.arange(64) * 100, 1, truth=True)
    assert digest(batch.token_ids, batch.token_mask, batch.maskable, batch.group_id, batch.index) == "7f80830ef575b066"
    plain = data.splits["b"].take(np.arange(20))
    assert digest(plain.token_ids, plain.token_mask, plain.maskable, plain.group_id, plain.index) == "d276b3f61abf9302"
    assert data.fingerprint()[:16] == "e31f9c4377be7f73"
    assert batch.words is not None
    assert (int(batch.words.sum()), data.max_tokens) == (4815, 62)
    assert np.isclose(float(batch.images.double().mean()), 0.656956177, atol=1e-6)
    assert np.isclose(float(batch.images.double().square().mean()), 0.672574050, atol=1e-6)
