"""Momentum teacher, momentum queue and the gathers they need."""

from .ema import Teacher
from .gather import all_gather_with_grad, gather_features, world_size
from .lightning import LightningEma
from .queue import FeatureQueue
from .schedule import Constant, Cosine, WarmUp, named_schedule
from .standalone import EmaTeacher
from .zero import initialize_untouched

__all__ = [
    "Constant",
    "Cosine",
    "EmaTeacher",
    "FeatureQueue",
    "LightningEma",
    "Teacher",
    "WarmUp",
    "all_gather_with_grad",
    "gather_features",
    "initialize_untouched",
    "named_schedule",
    "world_size",
]
