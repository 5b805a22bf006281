from .api import Linear, linear, use_linear
from .bf16 import bf16_products

__all__ = ["Linear", "bf16_products", "linear", "use_linear"]
