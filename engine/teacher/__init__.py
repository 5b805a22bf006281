"""Momentum teacher, momentum queue and the gathers they need."""

from .ema import Teacher
from .gather import all_gather_with_grad, gather_features, world_size
from .queue import FeatureQueue
from .schedule import momentum_at

__all__ = ["FeatureQueue", "Teacher", "all_gather_with_grad", "gather_features", "momentum_at", "world_size"]
