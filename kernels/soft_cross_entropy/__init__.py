from .api import SoftCrossEntropy, soft_cross_entropy

__all__ = ["SoftCrossEntropy", "soft_cross_entropy"]
