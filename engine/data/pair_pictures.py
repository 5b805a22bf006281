"""The pictures of a table of pairs, each read as its layout keeps it."""

from __future__ import annotations

from PIL import Image

from . import arrow_sets, fashion_gen, shards
from .pair_files import Source
from .pictures import open_picture, read_picture


def read_pair_picture(source: Source, address: str, where: str) -> Image.Image:
    """The picture at an address of ``PairTable.images``, RGB and upright. Any thread may ask.

    Raises:
        DataError: it cannot be read; ``where`` says who named it.
    """
    if source.layout == fashion_gen.LAYOUT:
        return fashion_gen.picture(address, where)
    return read_picture(address, where, _contents(source, address, where))


def open_pair_picture(source: Source, address: str, where: str) -> Image.Image:
    """The same as it is stored, opened and not decoded: its mode, size and frames. Close it.

    Raises:
        DataError, or whatever Pillow raises for what is no image.
    """
    if source.layout == fashion_gen.LAYOUT:
        return fashion_gen.picture(address, where)
    return open_picture(address, _contents(source, address, where))


def _contents(source: Source, address: str, where: str) -> bytes | None:
    """An encoded image as it lies in an archive; None where the address is a file of its own."""
    if source.layout == shards.LAYOUT:
        return shards.contents(source, address, where)
    if source.layout == arrow_sets.LAYOUT:
        return arrow_sets.contents(source, address, where)
    return None
