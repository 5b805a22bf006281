"""What is measured on held-out data, and how a person sees it."""

from .evaluate import evaluate
from .gallery import write_gallery
from .machine import describe_machine
from .matching import ITM_PRIOR
from .report import build_report, save_pictures
from .run_folder import read_metrics
from .summary import print_summary

__all__ = [
    "ITM_PRIOR",
    "build_report",
    "describe_machine",
    "evaluate",
    "print_summary",
    "read_metrics",
    "save_pictures",
    "write_gallery",
]
