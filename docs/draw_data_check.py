"""Draws docs/images/data-check.png: the check's picture of a small set of emoji drawings with a few defects planted.

    python docs/draw_data_check.py [FOLDER]

The set is written to FOLDER, a temporary one by default: every 43rd drawing of the emoji set as a PNG, its name as the
caption, in pairs.jsonl.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from crossmask.engine.data.emoji import load_art
from crossmask.engine.data_check import check_data
from crossmask.engine.data_check.writing import save

PICTURE = Path(__file__).parent / "images/data-check.png"
EVERY = 43


def drawings(every: int) -> list[tuple[str, Image.Image, str]]:
    """Name of a file, drawing on white, and caption."""
    art, found = load_art(64), []
    for number in range(0, len(art.rgba), every):
        caption, style = art.captions[art.caption[number]], art.styles[art.style[number]]
        pixels = art.rgba[number].permute(1, 2, 0).numpy()
        white = pixels[..., :3] + (255 - pixels[..., 3:])  # colours are premultiplied
        found.append((f"{style}-{caption.id}.png", Image.fromarray(np.ascontiguousarray(white)), caption.name))
    return found


def write(folder: Path, every: int = EVERY, broken: bool = True) -> Path:
    rows = []
    for name, image, caption in drawings(every):
        image.save(folder / name)
        rows.append({"image": name, "caption": caption})
    if broken:
        plant(folder, rows)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def plant(folder: Path, rows: list[dict[str, str]]) -> None:
    """A few of what goes wrong when sets are gathered."""

    def image(row: int) -> Image.Image:
        return Image.open(folder / rows[row]["image"])

    cut = folder / rows[20]["image"]
    cut.write_bytes(cut.read_bytes()[:400])
    rows[41]["image"] = "lost/" + rows[41]["image"]
    image(60).save(folder / "again.png")
    rows.insert(75, {"image": "again.png", "caption": "the same drawing under another name"})
    image(90).convert("RGB").save(folder / "export.jpg", quality=90)
    rows.insert(110, {"image": "export.jpg", "caption": "saved again as JPEG"})
    image(120).convert("CMYK").save(folder / "print.jpg")
    rows[120]["image"] = "print.jpg"
    image(130).resize((8, 8)).save(folder / "thumb.png")
    rows[130]["image"] = "thumb.png"
    image(140).save(folder / "moving.gif", save_all=True, append_images=[image(141), image(142)])
    rows[140]["image"] = "moving.gif"
    Image.new("RGBA", (64, 64)).save(folder / "layer.png")
    rows[150]["image"] = "layer.png"
    Image.new("RGB", (64, 64), "#c8c8c8").save(folder / "coming-soon.png")
    rows[160]["image"] = "coming-soon.png"
    rows[170]["caption"] = "café".encode().decode("cp1252")
    rows[180]["caption"] = "DSC_0180.JPG"
    rows[190]["caption"] = " "
    rows[200]["caption"] = "&lt;b&gt;" + rows[200]["caption"]


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _, lines = check_data(str(write(folder)), [], PICTURE, None, 14)
    save(Image.open(PICTURE).quantize(128, dither=Image.Dither.NONE), PICTURE)
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
