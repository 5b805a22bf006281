from .api import Selection, topk_mask

__all__ = ["Selection", "topk_mask"]
