"""What a run says, once, where its masks hide nothing."""

from __future__ import annotations

from collections.abc import Mapping

from ..recipe import Recipe


def nothing_hidden(numbers: Mapping[str, float], recipe: Recipe) -> str | None:
    """A line where, since the last record, not one caption or not one picture had anything hidden, else None.

    ``masked_rows`` and ``masked_images`` of a record are the shares of captions and pictures that had. MLM's and MIM's
    losses are 0 then, and teach nothing.
    """
    masking, objectives = recipe.masking, recipe.objectives
    sides = (
        ("masked_rows", "text", "caption", "MLM", objectives.mlm.weight, masking.text_threshold, masking.text_ratio),
        ("masked_images", "image", "picture", "MIM", objectives.mim.weight, masking.image_threshold,
         masking.image_ratio),
        ("masked_images", "image", "picture", "TG-MIM", objectives.tg_mim.weight, masking.image_threshold,
         masking.image_ratio),
    )  # fmt: skip
    for name, side, what, objective, weight, threshold, ratio in sides:
        if numbers.get(name) != 0.0 or weight == 0 or ratio == 0:
            continue
        why = f"no weight exceeds masking.{side}_threshold ({threshold}); lower it"
        if threshold is None:
            why = "no word of the captions may be masked: all are special, function words or unknown"
        return f"masks: not one {what} had anything hidden since the last record, so {objective}'s loss is 0: {why}"
    return None
