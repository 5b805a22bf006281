"""A tiny BLIP learns in about a minute to look at what a word names; the maps of blip_attention.py show it.

    python examples/blip_learns_to_look.py --output maps.png [--steps 1000]

A scene is four words and a picture with the emoji of some of them; the model says of each word whether it is drawn. No
one tells it where. The maps are of scenes by a designer whose drawings it has never seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from blip_attention import draw, tiny_blip, word_maps
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from crossmask.engine.data.emoji import EmojiArt, load_art

WORDS = ["pig", "frog", "penguin", "rose", "sunflower", "pizza"]
WORDS += ["banana", "watermelon", "bus", "rocket", "umbrella", "guitar"]
UNSEEN = "noto"  # the designer


def scenes(art: EmojiArt, unseen: bool, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, 64, 64) in -1..1, words (B, 4), and the quarter each is drawn in, -1 = none (B, 4)."""
    drawings: dict[str, list[Tensor]] = {word: [] for word in WORDS}
    for rgba, caption, style in zip(art.rgba, art.caption, art.style, strict=True):
        name = art.captions[caption].name
        if name in drawings and (art.styles[style] == UNSEEN) == unseen:
            drawings[name].append(rgba / 255)
    words = torch.rand(count, len(WORDS), generator=generator).topk(4).indices
    quarters = torch.rand(count, 4, generator=generator).argsort(1)
    quarters[torch.rand(count, 4, generator=generator) < 0.4] = -1
    pictures = torch.ones(count, 3, 64, 64)
    for b, i in (quarters >= 0).nonzero().tolist():
        of = drawings[WORDS[words[b, i]]]
        rgba = of[int(torch.randint(len(of), (), generator=generator))]
        y, x = 32 * (quarters[b, i] // 2), 32 * (quarters[b, i] % 2)
        pictures[b, :, y : y + 32, x : x + 32] = rgba[:3] + 1 - rgba[3]
    return 2 * pictures - 1, words, quarters


def main(output: Path, steps: int, batch: int = 48, looks: int = 200) -> float:
    """The share of words that look brightest at the quarter in which they are drawn."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    blip, art = tiny_blip(len(WORDS)), load_art(32)
    pictures, words, quarters = scenes(art, False, min(8000, batch * max(steps, 1)), generator)
    optimizer = torch.optim.AdamW(blip.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        rows = torch.randint(len(words), (batch,))
        seen = blip.vision_model(pixel_values=pictures[rows]).last_hidden_state
        answers = blip.itm_head(blip.text_encoder(words[rows], encoder_hidden_states=seen).last_hidden_state)
        drawn = (quarters[rows] >= 0).long()
        F.cross_entropy(answers.flatten(0, 1), drawn.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: {(answers.argmax(-1) == drawn).float().mean():.0%} of the answers are right")
    blip.eval()
    sheet, right = Image.new("RGB", (5 * 160, 4 * 178)), []
    for n, (picture, asked, truth) in enumerate(zip(*scenes(art, True, looks, generator), strict=True)):
        maps = word_maps(blip, picture[None], asked[None])
        brightest = maps.flatten(1).argmax(1)
        right += (brightest // 32 * 2 + brightest % 8 // 4 == truth)[truth >= 0].tolist()  # of 8 x 8 patches
        if n < 4:
            titles = [WORDS[w] + (" (not drawn)" if q < 0 else "") for w, q in zip(asked, truth, strict=True)]
            sheet.paste(draw(to_pil_image((picture + 1) / 2), maps, titles), (0, 178 * n))
    sheet.save(output)
    share = sum(right) / len(right)
    print(f"{share:.0%} of the drawn words look brightest at the quarter with their drawing (chance 25%): {output}")
    return share


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("maps.png"))
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    main(given.output, given.steps)
