"""From a recipe's masking section to a plan: ratios, the policy, the words' own policy, corruption."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch

from ..errors import RecipeError
from ..recipe import MaskingSection, Recipe
from .corruption import FIRST_WORD_ID, corrupt
from .plan import MaskContext, MaskPlan, missing_input
from .registry import Corpus, Policy, build_policy
from .schedules import ratio_at
from .word_counts import Resident


class MaskPlanner:
    """A recipe's masks.

    Args:
        word_ids: (words,) int64, ids of the words that a masked one may be replaced by; default all but the first five.

    Raises:
        RecipeError: an unknown policy or option.
    """

    def __init__(
        self, section: MaskingSection, mask_id: int, vocabulary_size: int, word_ids: np.ndarray | None = None
    ) -> None:
        self.section, self.mask_id, self.vocabulary_size = section, mask_id, vocabulary_size
        self._words = None if word_ids is None else Resident(torch.from_numpy(word_ids))
        self.policy: Policy = build_policy(section)
        self.text_policy: Policy | None = build_policy(section, text=True) if section.text_policy else None

    @property
    def _policies(self) -> tuple[Policy, ...]:
        return (self.policy,) if self.text_policy is None else (self.policy, self.text_policy)

    @property
    def needs(self) -> frozenset[str]:
        """Optional inputs of the context that are read."""
        return frozenset(name for policy in self._policies for name in policy.needs)

    @property
    def counts(self) -> bool:
        """Whether a policy counts words before the run."""
        return any(type(policy).prepare is not Policy.prepare for policy in self._policies)

    def require(self, missing: Collection[str]) -> None:
        """Raise a RecipeError where a policy needs one of the ``missing`` inputs."""
        for policy in self._policies:
            for name in policy.needs:
                if name in missing:
                    raise missing_input(policy.name, name)

    def prepare(self, corpus: Corpus) -> None:
        """Let the policies count what they count in the training captions."""
        for policy in self._policies:
            policy.prepare(corpus)

    def __call__(self, context: MaskContext) -> MaskPlan:
        """The plan for a context whose ratios are still to be set."""
        section, draws = self.section, context.draws
        context = replace(
            context,
            image_ratio=ratio_at(section.image_ratio, context.progress, draws, "image ratio"),
            text_ratio=ratio_at(section.text_ratio, context.progress, draws, "text ratio"),
        )
        plan = self.policy(context)
        if self.text_policy is not None:
            words = self.text_policy(context)
            plan = replace(plan, text=words.text, replacement=words.replacement)
        if plan.replacement is None:
            ids = None if self._words is None else self._words.on(context.token_ids.device)[0]
            read = corrupt(plan.text, context, section.corruption, self.mask_id, self.vocabulary_size, ids)
            plan = replace(plan, replacement=read)
        return plan


def check_masking(recipe: Recipe) -> None:
    """What can be said of a recipe's masks before data and models exist.

    Raises:
        RecipeError: an unknown policy or option, or a policy whose input the recipe does not provide.
    """
    section = recipe.masking
    planner = MaskPlanner(section, mask_id=0, vocabulary_size=FIRST_WORD_ID + 1)
    given = {
        "priors": section.prior is not None,
        "image_attention": recipe.model.image.depth > 0,
        "patch_scores": recipe.objectives.mim.weight > 0,
        "word_attention": recipe.objectives.mim.weight > 0,
        "statistics": recipe.model.captioner is None,
        "patch_losses": False,
    }
    planner.require([name for name, is_given in given.items() if not is_given])
    if recipe.model.captioner is not None:
        low, views = recipe.objectives.caption, planner.policy.views
        if low.weight > 0 and low.low_patches != "keep" and views < 2:
            raise RecipeError(
                f"objectives.caption.low_patches ({low.low_patches}): masking.policy {planner.policy.name!r} gives no"
                " low patches; take 'sycoca' with side: both, 'random' with a low_ratio, or low_patches: keep"
            )
    if section.prior is not None and "priors" not in planner.needs:
        raise RecipeError(f"masking.prior: policy {planner.policy.name!r} reads no prior; remove it, or take 'prior'")
    words = planner.text_policy
    if words is not None and "patch_scores" in words.needs:
        raise RecipeError(
            f"masking.text_policy: {words.name!r} has a network that chooses patches; name it as masking.policy"
        )
    for field, policy in (("image_threshold", planner.policy), ("text_threshold", words or planner.policy)):
        if getattr(section, field) is not None and not policy.reads_thresholds:
            raise RecipeError(f"masking.{field}: policy {policy.name!r} has no threshold; remove it or take 'syncmask'")
