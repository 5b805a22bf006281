"""What is measured on held-out data, and how a person sees it."""

from .batch_pictures import write_batches
from .caption_gallery import write_caption_gallery
from .composed_gallery import write_composed_gallery
from .evaluate import evaluate
from .gallery import write_gallery
from .machine import describe_machine
from .mask_history import snapshot_steps, write_snapshot
from .matching import ITM_PRIOR
from .reconstructions import write_reconstructions
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
    "snapshot_steps",
    "write_batches",
    "write_caption_gallery",
    "write_composed_gallery",
    "write_gallery",
    "write_reconstructions",
    "write_snapshot",
]
