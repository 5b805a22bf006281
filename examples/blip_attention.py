"""Where each word of a caption looks: a BLIP of Hugging Face Transformers, and no attention weights in memory.

    python examples/blip_attention.py photo.jpg "a dog beside a bicycle" --model FOLDER --output maps.png

FOLDER is a BlipForImageTextRetrieval and its processor, as save_pretrained writes them, or a name on Hugging Face's
hub. Without --model the weights are random, and the maps say nothing: blip_learns_to_look.py has some that do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipProcessor

from crossmask.kernels.integrations.transformers import record_attention, use_crossmask


def tiny_blip(words: int) -> BlipForImageTextRetrieval:
    """Random weights: 64 x 64 pixels in patches of 8, one layer for each modality."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": words, "encoder_hidden_size": 64}
    text |= dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id"), 0)
    config = BlipConfig(text_config=text, vision_config={**size, "image_size": 64, "patch_size": 8})
    return use_crossmask(BlipForImageTextRetrieval(config))


@torch.no_grad()
def word_maps(model: BlipForImageTextRetrieval, pixels: Tensor, words: Tensor) -> Tensor:
    """(W, rows, columns): where each of a caption's tokens (1, W) looks in the picture (1, 3, S, S), in the last layer.

    ``key_attention`` is a mean over the words that ``query_mask`` counts. So the words stand in the batch W times, and
    in copy i only word i counts.
    """
    seen = model.vision_model(pixel_values=pixels).last_hidden_state
    W, layers = words.shape[1], model.text_encoder.encoder.layer
    last = f"text_encoder.encoder.layer.{len(layers) - 1}.crossattention"
    with record_attention(model, last, query_mask=torch.eye(W, dtype=torch.bool)) as found:
        model.text_encoder(words.expand(W, -1), encoder_hidden_states=seen.expand(W, -1, -1))
    (told,) = found.values()
    side = int((told.key_attention.shape[1] - 1) ** 0.5)
    return told.key_attention[:, 1:].view(W, side, side)  # without the picture's [CLS]


def draw(picture: Image.Image, maps: Tensor, titles: list[str], side: int = 160) -> Image.Image:
    """The picture, and beside it once a word: bright where the word looks."""
    shown = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    row = Image.new("RGB", ((1 + len(titles)) * side, side + 18), "white")
    row.paste(shown, (0, 18))
    for i, (title, found) in enumerate(zip(titles, maps, strict=True), 1):
        bright = F.interpolate(found[None, None] / found.max(), (side, side), mode="bicubic")[0].clamp(0, 1)
        row.paste(to_pil_image(pil_to_tensor(shown) / 255 * (0.1 + 0.9 * bright)), (i * side, 18))
        ImageDraw.Draw(row).text((i * side + 4, 3), title, "black")
    return row


def main(picture: Path, caption: str, output: Path, model: str | None) -> None:
    torch.manual_seed(0)
    image = Image.open(picture).convert("RGB")
    if model:
        blip, processor = BlipForImageTextRetrieval.from_pretrained(model), BlipProcessor.from_pretrained(model)
        inputs = processor(images=image, text=caption, return_tensors="pt")
        pixels, words = inputs["pixel_values"], inputs["input_ids"]
        titles = processor.tokenizer.convert_ids_to_tokens(words[0].tolist())
    else:
        titles = caption.split()
        blip, words = tiny_blip(len(titles)), torch.arange(len(titles))[None]
        pixels = pil_to_tensor(image.resize((64, 64)))[None] / 127.5 - 1
    maps = word_maps(use_crossmask(blip).eval(), pixels, words)
    draw(image, maps, titles).save(output)
    print(f"where {len(titles)} tokens look{'' if model else ' (random weights: by chance)'}: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("caption")
    parser.add_argument("--model", help="a folder, or a name on the hub")
    parser.add_argument("--output", type=Path, default=Path("maps.png"))
    given = parser.parse_args()
    if not given.picture.is_file():
        parser.error(f"there is no picture {given.picture}")
    main(given.picture, given.caption, given.output, given.model)
