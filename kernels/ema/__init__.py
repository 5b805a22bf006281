from .api import ema_update_

__all__ = ["ema_update_"]
