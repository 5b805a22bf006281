"""Pictures of masks: each pair's image with its hidden patches greyed, its caption with its masked words marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data import CaptionTokenizer
from ..data.batch import Batch
from ..data.normalisation import HALF, Normalisation
from ..masking import MaskPlan

SIDE, GAP, LINE, LETTERS = 168, 10, 19, 14  # pixels: an image, between images, a line of text, its letters
HIDDEN = 122.0  # grey, through which a hidden patch still shimmers
INK, MARK, MARKED = (32, 33, 36), (176, 42, 55), (255, 255, 255)


@dataclass(frozen=True)
class Word:
    text: str
    masked: bool


def draw_masks(
    batch: Batch,
    plan: MaskPlan,
    grid: tuple[int, int],
    tokenizer: CaptionTokenizer,
    normalisation: Normalisation = HALF,
) -> Image.Image:
    """All pairs of a batch side by side, further views of an image below the first, captions at the bottom."""
    captions = [wrapped(words(batch, plan, i, tokenizer), SIDE) for i in range(len(batch))]
    top = GAP + len(plan.images) * (SIDE + GAP)
    height = top + max(len(lines) for lines in captions) * LINE + GAP
    sheet = Image.new("RGB", (GAP + len(batch) * (SIDE + GAP), height), "white")
    for i, lines in enumerate(captions):
        left = GAP + i * (SIDE + GAP)
        for j, hidden in enumerate(plan.images):
            sheet.paste(masked_image(batch.images[i], hidden[i], grid, normalisation), (left, GAP + j * (SIDE + GAP)))
        _write(ImageDraw.Draw(sheet), lines, left, top)
    return sheet


def masked_image(
    image: Tensor, hidden: Tensor, grid: tuple[int, int], normalisation: Normalisation = HALF
) -> Image.Image:
    """A (3, H, W) image as the model reads it; the patches of ``hidden`` (P,) are greyed, and a grid lies over all."""
    pixels = (normalisation.undo(image) * 255).byte().permute(1, 2, 0).cpu().numpy()
    shown = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.float64)
    row, column = (np.minimum(np.arange(SIDE) * n // SIDE, n - 1) for n in grid)
    covered = hidden.reshape(grid).cpu().numpy()[row][:, column]
    shown[covered] = 0.22 * shown[covered] + 0.78 * HIDDEN
    shown[np.flatnonzero(np.diff(row)) + 1] = 225
    shown[:, np.flatnonzero(np.diff(column)) + 1] = 225
    return Image.fromarray(shown.round().astype(np.uint8))


def words(batch: Batch, plan: MaskPlan, i: int, tokenizer: CaptionTokenizer) -> list[Word]:
    """The words of caption ``i``, pieces joined; a word is masked when any of its pieces is."""
    found: list[Word] = []
    parts = zip(tokenizer.words(batch.token_ids[i]), plan.text[i].tolist(), batch.token_mask[i].tolist(), strict=True)
    for name, masked, real in parts:
        if not real or name in ("[CLS]", "[SEP]", "[PAD]"):
            continue
        if name.startswith("##") and found:
            found[-1] = Word(found[-1].text + name[2:], found[-1].masked or masked)
        else:
            found.append(Word(name, masked))
    return found


def wrapped(caption: Sequence[Word], width: int) -> list[list[Word]]:
    """Words in lines of at most ``width`` pixels; a word that is wider has a line to itself."""
    font = ImageFont.load_default(LETTERS)
    lines: list[list[Word]] = [[]]
    used = 0.0
    for word in caption:
        length = font.getlength(word.text + " ")
        if lines[-1] and used + length > width:
            lines.append([])
            used = 0.0
        lines[-1].append(word)
        used += length
    return lines


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[Sequence[Word]], left: int, top: int) -> None:
    font = ImageFont.load_default(LETTERS)
    for i, line in enumerate(lines):
        x, y = float(left), top + i * LINE
        for word in line:
            length = font.getlength(word.text)
            if word.masked:
                draw.rounded_rectangle((x - 2, y, x + length + 2, y + LINE - 2), 3, fill=MARK)
            draw.text((x, y), word.text, fill=MARKED if word.masked else INK, font=font)
            x += length + font.getlength(" ")
