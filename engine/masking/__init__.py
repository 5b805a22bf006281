"""From attention statistics to masks."""

from . import random, syncmask  # noqa: F401  (importing a policy's file registers it)
from .plan import MaskContext, MaskPlan
from .registry import MaskPolicy, build_policy, policies, register_policy

__all__ = ["MaskContext", "MaskPlan", "MaskPolicy", "build_policy", "policies", "register_policy"]
