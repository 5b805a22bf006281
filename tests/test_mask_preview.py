"""``crossmask data masks``: the picture shows the masks, and what cannot be drawn is said in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from crossmask.engine import mask_preview
from crossmask.engine.data import load_data
from crossmask.engine.errors import CheckpointError, RecipeError
from crossmask.engine.evaluation.mask_pictures import GAP, SIDE, Word, draw_masks, masked_image, words, wrapped
from crossmask.engine.mask_preview import fresh_teacher, preview
from crossmask.engine.masking import MaskPlan
from crossmask.engine.objectives import RunMasks
from crossmask.engine.recipe_files import dump_recipe, load_recipe

RECIPE = "syncmask-emoji"


def run(output: Path, *overrides: str, recipe: str = RECIPE, pairs: int = 2, step: int | None = None) -> list[str]:
    return list(preview(recipe, overrides, output, pairs, step))


def test_hidden_patches_are_grey_and_others_as_they_were() -> None:
    image, hidden = torch.ones(3, 8, 8), torch.tensor([True, False, False, True])
    shown = np.asarray(masked_image(image, hidden, (2, 2)))
    assert shown.shape == (SIDE, SIDE, 3)
    quarter = SIDE // 4
    corners = [shown[y, x].tolist() for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter)]
    assert corners[1] == corners[2] == [255, 255, 255]
    assert corners[0] == corners[3]
    assert 130 < corners[0][0] < 170


def test_words_join_their_pieces_and_lines_fit() -> None:
    data = load_data(load_recipe(RECIPE))
    batch = mask_preview.pick(load_recipe(RECIPE), data, 8)
    plan = MaskPlan(torch.zeros(8, 36, dtype=torch.bool), batch.maskable)
    for i in range(8):
        found = words(batch, plan, i, data.tokenizer)
        assert " ".join(word.text for word in found) == data.tokenizer.text(batch.token_ids[i])
        assert all(not word.text.startswith(("##", "[")) for word in found)
        assert sum(word.masked for word in found) >= 1
    assert wrapped([Word("a" * 60, False), Word("b", True)], 100) == [[Word("a" * 60, False)], [Word("b", True)]]
    assert draw_masks(batch, plan, (6, 6), data.tokenizer).width == GAP + 8 * (SIDE + GAP)


def test_the_picture_of_a_recipe(tmp_path: Path) -> None:
    said = run(tmp_path / "new" / "masks.png", "masking.policy=random", "masking.image_ratio=0.5")
    assert said[0].startswith("random at step 1800 hides 50% of the patches and ")
    assert "untrained" in said[1]
    picture = Image.open(tmp_path / "new" / "masks.png")
    assert picture.size[0] == GAP + 2 * (SIDE + GAP)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["masks.png"]
    first, again, other = (tmp_path / f"{name}.png" for name in "abc")
    for path, step in ((first, 5), (again, 5), (other, 6)):
        run(path, "masking.policy=random", step=step)
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_a_run_is_looked_at_through_its_teacher(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE)
    data = load_data(recipe)
    teacher = fresh_teacher(recipe.model_copy(update={"seed": 9}), data, RunMasks(recipe, data))
    folder = tmp_path / "run"
    (folder / "export").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(CheckpointError, match=r"no export/model.safetensors, so the run is not finished"):
        run(tmp_path / "a.png", recipe=str(folder))
    save_file(teacher.state_dict(), folder / "export/model.safetensors")
    said = run(tmp_path / "a.png", recipe=str(folder))
    assert len(said) == 2
    run(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(CheckpointError, match="does not fit the recipe"):
        run(tmp_path / "c.png", "model.image.width=64", recipe=str(folder))
    assert not (tmp_path / "c.png").exists()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"masks.doc is no picture's name; end it in one of .png"):
        run(tmp_path / "masks.doc")
    with pytest.raises(RecipeError, match="unknown policy 'attmsk'; did you mean 'attmask'"):
        run(tmp_path / "masks.png", "masking.policy=attmsk")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        run(tmp_path / "file" / "masks.png")
