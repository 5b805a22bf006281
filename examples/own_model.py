"""A model of your own in crossmask's engine: timm's ViT and a small BERT, with an objective and data of yours.

    python examples/own_model.py --steps 30 --output run           # one rank; torchrun --nproc-per-node 2 … for two
    python examples/own_model.py --steps 30 --output run --resume  # goes on where it was interrupted

A recipe gets at the same parts by name, with ``crossmask train`` and everything else: ``plugins: [own_model]``,
``model: {system: vit_bert}``, ``data: {source: squares}``, ``objectives: {own: {uniformity: {weight: 0.1}}}``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from crossmask.engine import (
    CaptionTokenizer,
    ObjectiveView,
    PairList,
    Pretrainer,
    Recipe,
    Section,
    System,
    register_objective,
    register_source,
    register_system,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
PLACES = ("left", "middle", "right", "top", "bottom")


class TwoTowers(nn.Module):
    """What a system has to offer: two methods that return features."""

    def __init__(self, vit: nn.Module, bert: BertModel, width: int) -> None:
        super().__init__()
        self.vit, self.bert = vit, bert
        self.image_head = nn.Linear(vit.num_features, width)
        self.text_head = nn.Linear(bert.config.hidden_size, width)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image_head(self.vit(images))

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        words = self.bert(token_ids, attention_mask=token_mask).last_hidden_state
        read = token_mask[:, :, None].to(words.dtype)
        return self.text_head((words * read).sum(1) / read.sum(1))


@register_system("vit_bert")
class VitBert(System):
    class Options(Section):
        width: int = 32
        depth: int = 2
        heads: int = 2
        patch_size: int = 8

    def build(self) -> nn.Module:
        o, sizes = self.options, self.sizes
        vit = timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=sizes.image_size,
            patch_size=o.patch_size,
            embed_dim=o.width,
            depth=o.depth,
            num_heads=o.heads,
            num_classes=0,
            global_pool="avg",
        )
        words = BertConfig(
            vocab_size=sizes.vocabulary_size,
            hidden_size=o.width,
            num_hidden_layers=o.depth,
            num_attention_heads=o.heads,
            intermediate_size=4 * o.width,
            max_position_embeddings=sizes.max_tokens,
            pad_token_id=sizes.pad_id,
            initializer_range=0.2,
            hidden_dropout_prob=0.0,
        )
        return TwoTowers(vit, BertModel(words, add_pooling_layer=False), sizes.feature_width)


class Spread(Section):
    sharpness: float = 2.0


@register_objective("uniformity", Spread)
def uniformity(view: ObjectiveView, options: Spread) -> dict[str, Tensor]:
    """Features of a batch spread over the sphere: log of the mean Gaussian potential (Wang & Isola, 2020)."""
    x = view.image.feature
    distances = 2 - 2 * x @ x.T
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    loss = distances[apart].mul(-options.sharpness).exp().mean().log()
    return {"uniformity": loss, "mean_distance": distances[apart].mean().detach()}


def squares(count: int, seed: int = 0) -> list[tuple[np.ndarray, str]]:
    """Coloured squares somewhere on white paper, and where they are in words."""
    found = []
    for i in range(count):
        colour, place = list(COLOURS)[i % 4], PLACES[i // 4 % 5]
        random = np.random.default_rng([seed, i])
        x, y = {"left": (0, 8), "right": (16, 8), "top": (8, 0), "bottom": (8, 16)}.get(place, (8, 8))
        picture = np.full((32, 32, 3), 255, np.uint8)
        picture[y : y + 14 + random.integers(3), x : x + 14 + random.integers(3)] = COLOURS[colour]
        found.append((picture, f"a {colour} square at the {place}"))
    return found


@register_source("squares")
def squares_source(recipe: Recipe, options: Section, tokenizer: CaptionTokenizer | None) -> PairList:
    return PairList(recipe, squares(120), validation=squares(40, seed=1), tokenizer=tokenizer, name="squares")


def recipe(steps: int, *, stage: int = 2, batch_size: int = 20) -> Recipe:
    """In Python here; a YAML file says the same."""
    return Recipe.model_validate(
        {
            "name": "own-model",
            "plugins": ["own_model"],
            "data": {"source": "squares", "vocabulary_size": 64, "max_words": 8},
            "model": {
                "system": "vit_bert",
                "options": {"depth": 1},
                "image": {"size": 32, "patch_size": 8},
                "projection_width": 16,
            },
            # no queue and no distillation: a plain contrastive loss, as CLIP's
            "objectives": {
                "itc": {"queue_length": 0, "distillation": 0.0},
                "own": {"uniformity": {"weight": 0.1, "options": {"sharpness": 1.0}}},
            },
            "teacher": {"momentum": 0.9},
            "optimizer": {"lr": 2e-3, "warmup_steps": 3},
            "training": {"max_steps": steps, "batch_size": batch_size, "precision": "fp32", "checkpoint_every": 10},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }
    )


def main(steps: int, output: Path, resume: bool, stage: int) -> None:
    with Pretrainer(recipe(steps, stage=stage), resumed=resume) as pretrainer:
        if resume:
            print(f"goes on from step {pretrainer.load(output)}")
        for batch in pretrainer.batches():
            loss = pretrainer.step(batch)
            done = pretrainer.next_step
            if done % 10 == 0:
                pretrainer.save(output)
                if pretrainer.rank == 0:
                    terms = pretrainer.last.terms
                    print(f"step {done}: loss {loss:.3f}, uniformity {terms['uniformity']:.3f}")
        split = pretrainer.evaluate()["splits"]["held-out"]
        pretrainer.export(output / "export", force=True)
        if pretrainer.rank == 0:
            print(f"held-out pictures: {split['i2t']['r1']:.0f} % find their caption first")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("own-model-run"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO")
    given = parser.parse_args()
    main(given.steps, given.output, given.resume, given.stage)
