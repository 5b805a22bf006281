"""What a reader of data does with an item that cannot be used: a run stops at the first, a check collects them all.

:data:`KINDS` are the kinds that readers and the check know of, with what to do about each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..errors import DataError

# Told of a kind of defect, one of KINDS, and of the item's own one line. Where it returns, the reader passes over that
# item and goes on.
Complain = Callable[[str, DataError], None]


def refuse(kind: str, error: DataError) -> None:
    """A run's: nothing is trained on while some of it is not what its owner meant."""
    raise error


class Unusable(DataError):
    """An item that cannot be used, with its kind: for readers that notice it deep inside and complain further out."""

    def __init__(self, kind: str, line: str) -> None:
        super().__init__(line)
        self.kind = kind


class Kind(NamedTuple):
    remedy: str  # what to do about it, a few words
    # A defect would stop a run, or teaches or measures what nobody meant. The rest is told: a run copes with it, in a
    # way that its owner should know of.
    defect: bool = True


KINDS: dict[str, Kind] = {
    # the files of pairs
    "unreadable file": Kind("make it readable, or copy it again"),
    "truncated": Kind("copy or write the file again: it ends too early"),
    "not UTF-8": Kind("save the file as UTF-8"),
    "not JSON": Kind("correct the line"),
    "not CSV": Kind("check the quotes around it"),
    "wrong columns": Kind("name the columns image and caption; quote captions with commas"),
    "wrong type": Kind("write it as text"),
    "half a character": Kind("write the whole character, or remove it"),
    "unknown split": Kind("name one that the layout knows"),
    "listed twice": Kind("remove one of them"),
    "no image named": Kind("give its path, or remove the entry"),
    # names of images
    "unusable name": Kind("rename the file, or correct its entry"),
    "outside the root": Kind("move it below data.image_root, or set that"),
    "missing image": Kind("add it, correct its path, or set data.image_root"),
    "ambiguous image": Kind("rename one of the images"),
    "missing caption": Kind("add it, or remove the image", defect=False),
    "caption without image": Kind("add the image, or remove the caption"),
    # tar shards
    "missing shard": Kind("copy it, or correct data.path"),
    "unsafe member": Kind("pack the shard anew, of plain files alone"),
    "scattered sample": Kind("pack the shard with tar --sort=name"),
    "oversized text": Kind("is it a caption? shorten it, or rename the member"),
    # images
    "unreadable image": Kind("replace it, or remove its pairs"),
    "oversized image": Kind("make it smaller"),
    "tiny image": Kind("replace it, or remove its pairs"),
    "extreme aspect": Kind("crop it: it is squeezed to a square", defect=False),
    "invisible image": Kind("it is wholly transparent: replace it"),
    "clipped image": Kind("save it with 8 or 16 bits a channel: values beyond 255 are clipped"),
    "one colour": Kind("a placeholder? remove its pairs", defect=False),
    "animated image": Kind("only its first frame is read", defect=False),
    "CMYK image": Kind("converted to RGB without its profile: colours may be off", defect=False),
    "16-bit image": Kind("scaled to 8 bits", defect=False),
    "palette image": Kind("converted to RGB", defect=False),
    "transparent image": Kind("laid on white", defect=False),
    "duplicate image": Kind("keep one, with all captions: else they are each other's negatives"),
    "near-identical images": Kind("keep one, if they are the same", defect=False),
    # captions
    "empty caption": Kind("write one, or remove the pair"),
    "wordless caption": Kind("write one with a word that can be masked, or remove the pair"),
    "wordless caption, left out": Kind("nothing: it is not trained on", defect=False),
    "control characters": Kind("remove them"),
    "broken encoding": Kind("UTF-8 was read as something else once: decode it anew"),
    "file name as caption": Kind("write a caption, or remove the pair"),
    "link as caption": Kind("write a caption, or remove the pair"),
    "markup in a caption": Kind("strip it", defect=False),
    "swallowed lines": Kind("close the quote: the lines behind it became part of the caption"),
    "long caption": Kind("raise data.max_words or data.max_tokens: it is cut", defect=False),
    "repeated pair": Kind("remove one of them"),
    "repeated caption": Kind("the benchmark has it twice for its image; nothing", defect=False),
    "common caption": Kind("a placeholder? its images all match each other", defect=False),
    # the set
    "nothing left": Kind("mend what else is said of its file"),
    "trained and validated": Kind("take its images out of one of the two"),
    "giant group": Kind("most pairs match each other: look at the group column, or at captions that link them",
                        defect=False),
}  # fmt: skip
