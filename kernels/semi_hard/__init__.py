from .api import semi_hard_order

__all__ = ["semi_hard_order"]
