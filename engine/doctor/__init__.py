"""``crossmask doctor``: what this machine can run, what is missing or silently different, and what to do about it.

Each module looks (``look``: facts of this machine) and judges (``judge``: findings from facts, on any machine).
"""

from .finding import INSTALL, Finding
from .report import run_doctor

__all__ = ["INSTALL", "Finding", "run_doctor"]
