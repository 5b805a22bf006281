from .api import Linear, linear, use_linear

__all__ = ["Linear", "linear", "use_linear"]
