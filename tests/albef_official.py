"""State dicts in the layout of ALBEF's official checkpoints, with random weights: written from its names alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Size:
    image: int = 32  # pixels a side
    patch: int = 16
    width: int = 128
    blocks: int = 2
    words: int = 97
    positions: int = 20
    text_width: int = 192
    text_layers: int = 2
    fusion_layers: int = 2
    feed: int = 2  # times the width
    projection: int = 16
    queue: int = 12


BASE = Size(256, 16, 768, 12, 30522, 512, 768, 6, 6, 4, 256, 65536)  # ALBEF.pth


def official(size: Size = Size(), seed: int = 0, *, retrieval: bool = False, draw: Any = None) -> dict[str, Tensor]:
    """``retrieval``: as fine-tuning saves it, without bert. in the names and word head, with the queue's ids.
    ``draw(*shape)``: random numbers; layer norms and biases, too, get some that show where they stand."""
    generator = torch.Generator().manual_seed(seed)
    draw = draw or (lambda *shape: torch.randn(*shape, generator=generator))
    state: dict[str, Tensor] = {"temp": torch.tensor(0.0625)}
    w, t = size.width, size.text_width

    def linear(name: str, outputs: int, inputs: int) -> None:
        state[f"{name}.weight"] = draw(outputs, inputs).mul_(1.5 * inputs**-0.5)
        state[f"{name}.bias"] = draw(outputs).mul_(0.3)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = draw(width).mul_(0.3).add_(1)
        state[f"{name}.bias"] = draw(width).mul_(0.3)

    def attention(name: str, keys: int) -> None:
        for part, inputs in (("self.query", t), ("self.key", keys), ("self.value", keys), ("output.dense", t)):
            linear(f"{name}.{part}", t, inputs)
        norm(f"{name}.output.LayerNorm", t)

    for m in ("", "_m"):
        image, text = f"visual_encoder{m}", f"text_encoder{m}" + ("" if retrieval else ".bert")
        state[f"{image}.cls_token"] = draw(1, 1, w)
        state[f"{image}.pos_embed"] = draw(1, 1 + (size.image // size.patch) ** 2, w)
        state[f"{image}.patch_embed.proj.weight"] = draw(w, 3, size.patch, size.patch).mul_(0.05)
        state[f"{image}.patch_embed.proj.bias"] = draw(w).mul_(0.3)
        for n in range(size.blocks):
            block = f"{image}.blocks.{n}"
            norm(f"{block}.norm1", w)
            linear(f"{block}.attn.qkv", 3 * w, w)
            linear(f"{block}.attn.proj", w, w)
            norm(f"{block}.norm2", w)
            linear(f"{block}.mlp.fc1", size.feed * w, w)
            linear(f"{block}.mlp.fc2", w, size.feed * w)
        norm(f"{image}.norm", w)
        embeddings = f"{text}.embeddings"
        state[f"{embeddings}.position_ids"] = torch.arange(size.positions)[None]
        for kind, rows in (("word", size.words), ("position", size.positions), ("token_type", 2)):
            state[f"{embeddings}.{kind}_embeddings.weight"] = draw(rows, t).mul_(0.1)
        norm(f"{embeddings}.LayerNorm", t)
        for n in range(size.text_layers + size.fusion_layers):
            layer = f"{text}.encoder.layer.{n}"
            attention(f"{layer}.attention", t)
            if n >= size.text_layers:
                attention(f"{layer}.crossattention", w)
            linear(f"{layer}.intermediate.dense", size.feed * t, t)
            linear(f"{layer}.output.dense", t, size.feed * t)
            norm(f"{layer}.output.LayerNorm", t)
        if not retrieval:
            words = f"text_encoder{m}.cls.predictions"
            state[f"{words}.bias"] = draw(size.words)
            linear(f"{words}.transform.dense", t, t)
            norm(f"{words}.transform.LayerNorm", t)
            state[f"{words}.decoder.weight"] = state[f"{embeddings}.word_embeddings.weight"]
            state[f"{words}.decoder.bias"] = state[f"{words}.bias"]
        linear(f"vision_proj{m}", size.projection, w)
        linear(f"text_proj{m}", size.projection, t)
    linear("itm_head", 2, t)
    for name in ("image_queue", "text_queue"):
        state[name] = F.normalize(draw(size.projection, size.queue), dim=0)
    state["queue_ptr"] = torch.tensor([size.queue // 3])
    if retrieval:
        state["idx_queue"] = torch.arange(size.queue)[None] // 2
        state["idx_queue"][0, -2:] = -100
    return state
