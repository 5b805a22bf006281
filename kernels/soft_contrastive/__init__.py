from .api import soft_contrastive

__all__ = ["soft_contrastive"]
