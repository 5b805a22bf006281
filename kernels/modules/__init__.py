"""Attention as modules: one of our own, one that replaces ``nn.MultiheadAttention``, and a record of what they do."""

from .cross_attention import Attended, CrossAttention
from .multihead import MultiheadAttention
from .recording import record_attention
from .swapping import swap_attention

__all__ = ["Attended", "CrossAttention", "MultiheadAttention", "record_attention", "swap_attention"]
