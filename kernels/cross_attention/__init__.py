from .api import AttentionStatistics, CrossAttentionOutput, cross_attention

__all__ = ["AttentionStatistics", "CrossAttentionOutput", "cross_attention"]
