"""The picture of a check: pairs drawn at random with their captions, and thumbnails of what is suspicious."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..data.pair_files import PairTable, Source
from ..data.pair_pictures import read_pair_picture
from ..errors import DataError
from .display import fact_lines, short_place
from .findings import Finding, Findings, kind_of
from .images import ImageFacts

SIDE, GAP, MARGIN, COLUMNS = 168, 14, 24, 7  # pixels, and tiles beside each other
WIDTH = 2 * MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * GAP
SHOWN, LISTED = 4, 4  # of one kind: images, lines
PAPER, INK, MUTED, RED, AMBER, TILE = "#ffffff", "#202124", "#6b7075", "#b02a37", "#9a6700", "#f1f3f4"


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # its font has Greek, Cyrillic, Arabic and Hebrew letters; Pillow's has Latin ones

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


class Text(NamedTuple):
    text: str
    lines: int  # at most
    colour: str = INK
    bold: bool = False


class Tile(NamedTuple):
    picture: Image.Image
    texts: list[Text]

    @property
    def columns(self) -> int:
        return 1 if self.picture.width <= SIDE else 2


class _Sheet:
    """Grows downwards as it is written."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 4096), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def room(self, height: int) -> None:
        if self.y + height + MARGIN > self.image.height:
            taller = Image.new("RGB", (WIDTH, 2 * self.image.height + height), PAPER)
            taller.paste(self.image)
            self.image, self.draw = taller, ImageDraw.Draw(taller)

    def text(self, text: str, size: int = 14, colour: str = INK, bold: bool = False, lines: int = 2) -> None:
        for line in wrapped(text, WIDTH - 2 * MARGIN, _font(size, bold), lines):
            self.room(size + 8)
            self.draw.text((MARGIN, self.y), line, fill=colour, font=_font(size, bold))
            self.y += size + 7

    def tiles(self, tiles: list[Tile]) -> None:
        """Pictures beside each other, one or two columns wide, in rows; below each its texts."""
        rows: list[list[Tile]] = [[]]
        for tile in tiles:
            if sum(other.columns for other in rows[-1]) + tile.columns > COLUMNS:
                rows.append([])
            rows[-1].append(tile)
        for row in rows:
            self.room(SIDE + 40 + 17 * max(sum(text.lines for text in tile.texts) for tile in row))
            left, height = MARGIN, 0
            for tile in row:
                self.image.paste(tile.picture, (left, self.y))
                y = self.y + SIDE + 5
                for text in tile.texts:
                    font = _font(12, text.bold)
                    for line in wrapped(text.text, tile.picture.width, font, text.lines):
                        self.draw.text((left, y), line, fill=text.colour, font=font)
                        y += 16
                height, left = max(height, y - self.y), left + tile.picture.width + GAP
            self.y += height + GAP

    def heading(self, text: str) -> None:
        self.y += 6
        self.text(text, 17, bold=True)
        self.y += 4

    def done(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, self.y + MARGIN - GAP))


def draw_sheet(pairs: PairTable, rows: np.ndarray, images: ImageFacts, facts: Mapping[str, Any], findings: Findings,
               root: str, drawn: int, seed: int) -> Image.Image:  # fmt: skip
    """``rows``: the first pair of each image; ``root``: a folder that is left out of places."""
    sheet = _Sheet()
    sheet.text(
        f"{Path(str(facts['source'])).name}: {facts['pairs']:,} pairs, {facts['images']:,} images", 22, bold=True
    )
    sheet.y += 4
    for line in fact_lines(facts):
        sheet.text(line, 13, MUTED)
    sheet.y += GAP
    if tiles := list(_random_pairs(pairs, images, drawn, seed)):
        sheet.heading(f"{len(tiles)} pairs at random")
        sheet.tiles(tiles)
    if not findings.counts:
        sheet.heading("Nothing suspicious was found")
    pictured = [kind for kind, _ in findings.ordered() if findings.first[kind][0].images]
    if pictured:
        sheet.heading("Images to look at")
        sheet.tiles([_tile(finding, count, root) for kind, count in findings.ordered() if kind in pictured
                     for finding in findings.first[kind][:SHOWN]])  # fmt: skip
    others = [(kind, count) for kind, count in findings.ordered() if kind not in pictured]
    if others:
        sheet.heading("Captions and files to look at")
    for kind, count in others:
        known = kind_of(kind)
        sheet.text(f"{kind}: {count:,}", 14, RED if known.defect else AMBER, bold=True)
        for finding in findings.first[kind][:LISTED]:
            sheet.text(finding.line.replace(root.rstrip("/") + "/", ""), 13)
        sheet.y += 5
    return sheet.done()


def _random_pairs(pairs: PairTable, images: ImageFacts, count: int, seed: int) -> Iterator[Tile]:
    """Pairs whose image can be read, in a fixed random order."""
    readable = np.flatnonzero(images.good[pairs.image])
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(readable)
    for row in np.sort(order[:count]).tolist():
        source = pairs.sources[pairs.source[row]]
        picture = _thumbnail(source, pairs.images[pairs.image[row]])
        yield Tile(picture, [Text(pairs.captions[row], 3), Text(pairs.where(row, short=True), 1, MUTED)])


def _tile(finding: Finding, count: int, root: str) -> Tile:
    """The image of a finding, or the two of a pair beside each other."""
    known = kind_of(finding.kind)
    texts = [
        Text(f"{finding.kind} ({count:,})" if count > 1 else finding.kind, 1, RED if known.defect else AMBER, True)
    ]
    if len(finding.images) == 1:
        picture = _thumbnail(finding.images[0].source, finding.images[0].address)
        texts.append(Text(short_place(finding.where, root), 2))
    else:
        picture = Image.new("RGB", (2 * SIDE + GAP, SIDE), PAPER)
        for column, shown in enumerate(finding.images[:2]):
            picture.paste(_thumbnail(shown.source, shown.address), (column * (SIDE + GAP), 0))
        sign = "≈" if finding.kind.startswith("near") else "="
        ImageDraw.Draw(picture).text((SIDE + GAP / 2, SIDE / 2), sign, fill=RED, font=_font(16, True), anchor="mm")
        texts += [Text(" and ".join(shown.label for shown in finding.images[:2]), 2),
                  Text(short_place(finding.where, root), 1, MUTED)]  # fmt: skip
    return Tile(picture, texts)


def _thumbnail(source: Source, address: str) -> Image.Image:
    """An image in a square, whole; what cannot be read says why."""
    try:
        picture = read_pair_picture(source, address, "")
    except DataError as error:
        return _reason(str(error).removeprefix(": ").replace(address, "").replace("  ", " ").replace(" :", ":"))
    except Exception as error:  # whatever Pillow raises for a broken file
        return _reason(str(error))
    tile = Image.new("RGB", (SIDE, SIDE), TILE)
    most = SIDE * 9 // 10
    if max(picture.size) > SIDE:
        picture = ImageOps.contain(picture, (SIDE, SIDE), Image.Resampling.LANCZOS)
    elif (times := most // max(picture.size)) > 1:  # a small one: its pixels as squares
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    tile.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return tile


def _reason(text: str) -> Image.Image:
    tile = Image.new("RGB", (SIDE, SIDE), "#fdecea")
    draw = ImageDraw.Draw(tile)
    for n, line in enumerate(wrapped(text, SIDE - 16, _font(11), 10)):
        draw.text((8, 8 + 14 * n), line, fill=RED, font=_font(11))
    return tile


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, most: int) -> list[str]:
    """At most ``most`` lines of ``width`` pixels, the last with … where there is more; long words are broken."""
    text = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    lines, rest = list[str](), text[: 200 * most]
    while rest and len(lines) < most:
        low, high = 1, len(rest)
        while low < high:  # the longest beginning that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if font.getlength(rest[:middle]) <= width else (low, middle - 1)
        end = low
        if end < len(rest) and " " in rest[1 : end + 1]:
            end = rest.rindex(" ", 1, end + 1)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest and lines:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last + "…"
    return lines
