"""Mask policies by name. A policy is a small class; register yours with ``@register_policy("name")``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from ..errors import RecipeError, nearest
from ..recipe import MaskingSection
from .plan import MaskContext, MaskPlan


class MaskPolicy(Protocol):
    def __init__(self, section: MaskingSection) -> None: ...

    def __call__(self, context: MaskContext) -> MaskPlan: ...


P = TypeVar("P", bound=type)
_policies: dict[str, type] = {}


def register_policy(name: str) -> Callable[[P], P]:
    """Class decorator: make a policy known to recipes as ``masking.policy: name``."""

    def add(policy: P) -> P:
        if name in _policies:
            raise ValueError(f"mask policy {name!r} is already registered")
        _policies[name] = policy
        return policy

    return add


def policies() -> dict[str, type]:
    """All registered policies by name."""
    return dict(_policies)


def build_policy(section: MaskingSection) -> MaskPolicy:
    """The policy that a recipe names.

    Raises:
        RecipeError: no such policy; the message names the nearest one.
    """
    if section.policy not in _policies:
        close = nearest(section.policy, _policies)
        hint = f"did you mean {close!r}?" if close else f"known: {', '.join(sorted(_policies))}"
        raise RecipeError(f"masking.policy: unknown policy {section.policy!r}; {hint}")
    return _policies[section.policy](section)
