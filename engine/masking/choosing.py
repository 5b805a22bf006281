"""Masks of a policy in any loop: one call from what some model has seen to what is hidden, without a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from crossmask.kernels import AttentionStatistics

from ..errors import RecipeError, nearest
from ..recipe import MaskingSection
from .draws import Draws
from .plan import PROVIDED_BY, MaskContext, MaskPlan
from .registry import Policy, build_policy


def choose_masks(
    policy: str | Policy = "syncmask",
    *,
    grid: tuple[int, int],
    words: Tensor | None = None,
    image_ratio: float | Tensor = 0.5,
    text_ratio: float | Tensor = 0.15,
    image_threshold: float | None = None,
    text_threshold: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    step: int = 0,
    samples: Tensor | None = None,
    progress: float = 0.0,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    **seen: Any,
) -> MaskPlan:
    """What ``policy`` hides of B images with P patches and captions with L tokens.

    Args:
        policy: a registered name (``docs/policies.md``), or a policy; one that counts words before a run is one whose
            ``prepare`` has been called.
        grid: rows and columns of patches; P is their product.
        words: (B, L) bool, True = a word that may be masked, no special token and no padding. Default: all.
        image_ratio, text_ratio: shares that are hidden of the patches and of the ``words``; (B,) float32 where they
            differ from sample to sample.
        image_threshold, text_threshold: what a score has to exceed besides, for policies that have one.
        options: of the policy.
        seed, step, samples: what random draws depend on, and nothing else; ``samples`` (B,) int64 are the samples'
            numbers in their data set, default 0 to B - 1.
        progress: share of the run that is done, for policies that change over it.
        token_ids, token_mask: (B, L) int64 and bool, for policies that read the words themselves.
        seen: what the policy reads, on one device: ``statistics`` (its ``key_attention`` (B, P), ``query_attention``
            (B, L)), or any of the other optional inputs of :class:`MaskContext`.

    Returns:
        ``image`` (B, P) and ``text`` (B, L) bool, True = hidden; see :class:`MaskPlan`. ``corrupt`` of
        ``masking/corruption.py`` fills ``replacement``.

    Raises:
        RecipeError: an unknown policy or option, or an input that the policy needs and was not given.
        ValueError: an input that no policy reads, shapes that do not fit, or nothing that says how many samples.
    """
    for name in seen:
        if name not in PROVIDED_BY:
            close = nearest(name, PROVIDED_BY)
            raise ValueError(f"choose_masks: no policy reads {name!r}; {f'did you mean {close!r}?' if close else ''}")
    given = {name: x for name, x in seen.items() if x is not None}
    patches = grid[0] * grid[1]
    told = given.get("statistics", AttentionStatistics())
    looks: dict[str, Tensor | None] = {name: x for name, x in given.items() if name != "statistics"}
    looks["statistics.key_attention"] = told.key_attention
    for name, x in looks.items():
        if x is not None and name != "word_attention" and x.shape[1] != patches:
            raise ValueError(f"choose_masks: {name} is {tuple(x.shape)}, and a grid of {grid} has {patches} patches")
    first = next((x for x in (words, token_ids, samples, told.query_attention, *looks.values()) if x is not None), None)
    if first is None:
        raise ValueError("choose_masks: nothing says how many samples there are; give words (B, L), or samples (B,)")
    B, device = len(first), first.device
    if words is None:
        of_words = next((x for x in (token_ids, told.query_attention) if x is not None), None)
        words = torch.ones(B, 1 if of_words is None else of_words.shape[1], dtype=torch.bool, device=device)
    if isinstance(policy, str):
        try:
            section = MaskingSection(
                policy=policy,
                options=dict(options or {}),
                image_threshold=image_threshold,
                text_threshold=text_threshold,
            )
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            raise RecipeError(f"choose_masks: {found['loc'][0]}: {found['input']!r}: {found['msg']}") from None
        policy = build_policy(section)
        if not policy.reads_thresholds and (image_threshold, text_threshold) != (None, None):
            raise RecipeError(f"choose_masks: policy {policy.name!r} has no threshold; leave it out")
        if type(policy).prepare is not Policy.prepare:
            raise RecipeError(
                f"choose_masks: policy {policy.name!r} counts words before a run: give build_policy(...) of it, after"
                " its prepare(Corpus(...))"
            )
    if missing := [name for name in policy.needs if name not in given]:
        raise RecipeError(
            f"choose_masks: policy {policy.name!r} reads {missing[0]}, which is missing; give {missing[0]}="
        )
    return policy(
        MaskContext(
            token_ids=words.long() if token_ids is None else token_ids,
            token_mask=words if token_mask is None else token_mask,
            maskable=words,
            grid=grid,
            draws=Draws(seed, step, torch.arange(B, device=device) if samples is None else samples),
            image_ratio=image_ratio,
            text_ratio=text_ratio,
            step=step,
            progress=progress,
            **given,
        )
    )
