from .api import topk_mask

__all__ = ["topk_mask"]
