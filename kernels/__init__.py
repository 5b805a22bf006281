"""Cross-attention that tells you where to mask: tensors in, tensors out."""

from .cross_attention import AttentionStatistics, CrossAttentionOutput, cross_attention
from .ema import ema_update_
from .max_similarity import MaxSimilarity, max_similarity
from .semi_hard import semi_hard_order
from .soft_contrastive import soft_contrastive
from .soft_cross_entropy import SoftCrossEntropy, soft_cross_entropy
from .topk_mask import Selection, topk_mask

__all__ = [
    "AttentionStatistics",
    "CrossAttentionOutput",
    "MaxSimilarity",
    "Selection",
    "SoftCrossEntropy",
    "cross_attention",
    "ema_update_",
    "max_similarity",
    "semi_hard_order",
    "soft_contrastive",
    "soft_cross_entropy",
    "topk_mask",
]
