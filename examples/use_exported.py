"""An exported model at work, without DeepSpeed: captions ranked for pictures, and pictures for captions.

    crossmask export RUN --to model        # or RUN/export, which every finished run has
    python examples/use_exported.py model                                  # on the embedded emoji
    python examples/use_exported.py model --pictures *.jpg --captions "a red bus" "two cats" "a slice of pizza"

Writes a sheet: each picture with its three best captions, then each caption with its three best pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from crossmask.engine.exported import load_exported, prepare_images, prepare_texts

SIDE, BEST = 96, 3
EMOJI = ["pizza", "rocket", "rose", "pig", "frog", "umbrella", "guitar", "bus", "crown", "penguin", "castle", "banana"]


def embedded() -> tuple[list[Image.Image], list[str]]:
    """A dozen emoji by the designer that the shipped recipes hold out, and their names."""
    from crossmask.engine.data.emoji import HELD_OUT_DESIGNER, load_art

    art = load_art(64)
    style = art.styles.index(HELD_OUT_DESIGNER)
    rows = {art.captions[c].name: i for i, c in enumerate(art.caption) if art.style[i] == style}
    named = [name for name in EMOJI if name in rows]
    return [to_pil_image(art.rgba[rows[n], :3] + 255 - art.rgba[rows[n], 3:]) for n in named], named


def rank(folder: Path, pictures: list[Image.Image], captions: list[str]) -> Tensor:
    """(pictures, captions): cosine similarities."""
    model, tokenizer, config = load_exported(folder)
    with torch.no_grad():
        images = model.encode_image(prepare_images(pictures, config)).feature
        texts = model.encode_text(*prepare_texts(captions, tokenizer, config)).feature
    assert "deepspeed" not in sys.modules
    return images @ texts.T


def draw(pictures: list[Image.Image], captions: list[str], similarities: Tensor) -> Image.Image:
    """Left each picture with its best captions, right each caption with its best pictures."""
    row, left, right = SIDE + 8, SIDE + 190, 150 + BEST * (SIDE + 4)
    sheet = Image.new("RGB", (left + right, row * max(len(pictures), len(captions))), "white")
    pen, small = ImageDraw.Draw(sheet), [picture.convert("RGB").resize((SIDE, SIDE)) for picture in pictures]
    for i, picture in enumerate(small):
        sheet.paste(picture, (4, i * row))
        for n, (score, j) in enumerate(zip(*similarities[i].topk(min(BEST, len(captions))), strict=True)):
            pen.text((SIDE + 14, i * row + 16 + 22 * n), f"{score:.2f}  {captions[j][:24]}", "black")
    for j, caption in enumerate(captions):
        pen.text((left, j * row + SIDE // 2), caption[:22], "black")
        for n, i in enumerate(similarities[:, j].topk(min(BEST, len(pictures))).indices.tolist()):
            sheet.paste(small[i], (left + 150 + n * (SIDE + 4), j * row))
    return sheet


def main(folder: Path, files: list[Path], captions: list[str], output: Path) -> Tensor:
    pictures = [Image.open(file) for file in files]
    if not pictures or not captions:
        pictures, captions = embedded()
    found = rank(folder, pictures, captions)
    draw(pictures, captions, found).save(output)
    for i, j in enumerate(found.argmax(1).tolist()):
        print(f"{files[i] if files else f'picture {i + 1}'}\t{captions[j]}\t{found[i, j]:.3f}")
    print(f"{len(pictures)} pictures, {len(captions)} captions, no DeepSpeed: {output}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the exported folder")
    parser.add_argument("--pictures", type=Path, nargs="*", default=[])
    parser.add_argument("--captions", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=Path("retrieved.png"))
    given = parser.parse_args()
    if absent := [file for file in given.pictures if not file.is_file()]:
        parser.error(f"there is no picture {absent[0]}")
    main(given.model, given.pictures, given.captions, given.output)
