"""Variants of a recipe, trained one after another over seeds, and the table and picture of what each reached."""

from .command import ablate
from .description import Ablation, load_ablation, shipped_ablations

__all__ = ["Ablation", "ablate", "load_ablation", "shipped_ablations"]
