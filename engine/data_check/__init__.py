"""``crossmask data check``: reads all of a set of pairs, decodes every image, and says what is wrong with which."""

from __future__ import annotations

from .command import check_data

__all__ = ["check_data"]
