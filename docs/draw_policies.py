"""Draws docs/images/policies/*.png: every policy's masks on the same three scenes, chosen by a trained teacher.

    python docs/draw_policies.py runs/DEFAULT hard_patches=runs/A adamae=runs/B

The first folder is a finished run of recipes/syncmask-emoji.yaml; a policy with a network of its own is drawn from a
run that trained it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from crossmask.engine.data import load_data
from crossmask.engine.evaluation.mask_pictures import draw_masks
from crossmask.engine.mask_preview import load_teacher, plan_for
from crossmask.engine.masking import policies
from crossmask.engine.objectives import RunMasks
from crossmask.engine.recipe_files import load_recipe

PICTURES = Path(__file__).parent / "images/policies"
SEED, PAIRS = 4, 3
RATIOS = {"image_ratio": 0.4, "text_ratio": 0.34}
ENTITIES = ["heart", "santa claus", "monorail", "mobile phone", "telephone", "woman"]
SETTINGS: dict[str, dict[str, Any]] = {
    "prior": {"prior": "contrast"},
    "entity_words": {"options": {"words": ENTITIES}},
    "mmclip": {"options": {"words": ENTITIES}},
    "attmask": {"options": {"mode": "high"}},
    "sycoca": {"options": {"side": "both"}},
    "blockwise": {"options": {"min_area": 4}},
}


def main() -> int:
    runs = dict(argument.split("=") for argument in sys.argv[2:])
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in sorted(policies()):
        run = Path(runs.get(name, sys.argv[1]))
        masking = yaml.safe_dump(
            {"policy": name, **RATIOS, **SETTINGS.get(name, {})}, default_flow_style=True, width=10**6
        )
        recipe = load_recipe(run / "recipe.yaml", [f"masking={masking.strip()}"])
        data = load_data(recipe)
        masks = RunMasks(recipe, data)
        model = load_teacher(run, recipe, data, masks)
        batch = data.scene_batch(next(iter(data.splits)), PAIRS, SEED)
        assert batch is not None
        plan = plan_for(recipe, model, masks, batch, recipe.training.max_steps)
        picture = draw_masks(batch, plan, model.patch_grid, data.tokenizer)
        picture.quantize(128, method=Image.Quantize.MEDIANCUT).save(PICTURES / f"{name}.png", optimize=True)
        print(PICTURES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
