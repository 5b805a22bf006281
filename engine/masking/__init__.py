"""From what the teacher sees to masks: policies, ratios and their schedules, corruption."""

from . import policies as _files  # noqa: F401  (importing a policy's file registers it)
from .choosing import choose_masks
from .draws import Draws
from .plan import KEEP, MaskContext, MaskPlan
from .planner import MaskPlanner, check_masking
from .registry import Corpus, Policy, build_policy, policies, reads_words, register_policy

__all__ = [
    "KEEP",
    "Corpus",
    "Draws",
    "MaskContext",
    "MaskPlan",
    "MaskPlanner",
    "Policy",
    "build_policy",
    "check_masking",
    "choose_masks",
    "policies",
    "reads_words",
    "register_policy",
]
