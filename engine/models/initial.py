"""Published weights to start a model from: a ViT for the image tower, a BERT for text tower and fusion encoder.

As ALBEF (Li et al. 2021) starts: from DeiT, and from the layers of one BERT, the first ones as the text tower and the
next ones as the fusion encoder, whose cross-attention is new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import HybridEmbed
from torch import Tensor

from ..errors import CheckpointError
from ..recipe import ModelSection
from .albef_layout import AlbefFile, official_names
from .positions import resize_table
from .vision import ImageTower
from .vision_language import VisionLanguageModel
from .weight_files import read_state_dict

_UNREAD_IMAGE = ("head.", "head_dist.", "pre_logits.")  # a classifier's
_UNREAD_TEXT = ("pooler.", "cls.seq_relationship.", "embeddings.position_ids", "cls.predictions.decoder.")


@torch.no_grad()
def load_image_weights(tower: ImageTower, file: Path) -> None:
    """Fill the tower from a ViT of its shape, ``.safetensors`` or ``.pth`` with timm's or DeiT's names; for another
    image size the position embeddings are resized.

    Raises:
        CheckpointError: a file that cannot be read, or that is of another model.
    """
    where = f"model.image.weights: {file}"
    if isinstance(tower.vit.patch_embed, HybridEmbed):
        raise CheckpointError(f"{where} is for patches as they are: set model.image.stem to patch, or leave it out")
    given = {name: x for name, x in _read(where, file).items() if not name.startswith(_UNREAD_IMAGE)}
    if "dist_token" in given:
        raise CheckpointError(f"{where} is a distilled DeiT, which has a token more; take one that is not distilled")
    table = given.get("pos_embed")
    if table is not None and table.ndim == 3 and table.shape[2] == tower.vit.pos_embed.shape[2]:
        try:
            given["pos_embed"] = resize_table(table, tower.patch_grid[0])
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}; take a ViT for square images") from None
    own: dict[str, Tensor] = dict(tower.vit.named_parameters())
    _compare(where, own, given, "set model.image as it was made")
    for name, parameter in own.items():
        parameter.copy_(given[name])


@torch.no_grad()
def load_text_weights(model: VisionLanguageModel, section: ModelSection, folder: Path) -> list[str]:
    """Fill the text tower from a folder of a transformers BERT, and with ``norm: post`` what has BERT's layout of the
    fusion encoder and, where the folder has it, the word head. Returns lines on what is new.

    Raises:
        CheckpointError: a folder that cannot be read, or whose BERT is of another shape or vocabulary.
    """
    where, post = f"model.text.weights: {folder}", section.fusion.norm == "post"
    config = _bert_config(where, folder)
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{where}: neither model.safetensors nor pytorch_model.bin is in it; download it again")
    given = {_today(name): x for name, x in _read(where, files[0]).items()}
    layers = section.text.depth + (section.fusion.depth if post else 0)
    _check_bert(where, config, section, layers, given)
    table = given.get("embeddings.word_embeddings.weight")
    if table is not None and len(table) != (own_words := model.text.word_embeddings.num_embeddings):
        raise CheckpointError(
            f"{where} has {len(table):,} words, the data's vocabulary {own_words:,}; set data.vocabulary to the "
            "vocab.txt beside it"
        )
    words = post and "cls.predictions.bias" in given
    own: dict[str, Tensor] = {}  # pieces of our parameters, by BERT's names
    for name, parameter in model.named_parameters():
        if name.startswith(("text.bert.", *(("fusion.",) if post else ()), *(("word_",) if words else ()))):
            parts = official_names(name, section.text.depth, AlbefFile())
            for part, piece in zip(parts, parameter.chunk(len(parts)), strict=True):
                if "crossattention" not in part:
                    own[part.removeprefix("text_encoder.").removeprefix("bert.")] = piece
    for name in ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"):
        if name in given and len(given[name]) >= len(own[name]):
            given[name] = given[name][: len(own[name])]  # of BERT's 512 positions and 2 segments, the first
    read = {name: x for name, x in given.items() if name in own or not _unread(name, layers, words)}
    _compare(where, own, read, "set model.text as it was made")
    for name, piece in own.items():
        piece.copy_(given[name])
    if not post:
        return ["model.text.weights: the fusion encoder is new, as model.fusion.norm is pre"]
    return ["model.text.weights: the cross-attention is new" + ("" if words else ", and so is the word head")]


def _unread(name: str, layers: int, words: bool) -> bool:
    """Whether it is right that a BERT's tensor is not read."""
    number = name.split(".")[2] if name.startswith("encoder.layer.") else ""
    deeper = number.isdigit() and int(number) >= layers
    return deeper or name.startswith(_UNREAD_TEXT) or (name.startswith("cls.predictions.") and not words)


def _bert_config(where: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise CheckpointError(
            f"{where}: config.json cannot be read: {reason}; give a transformers BERT's folder"
        ) from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "bert":
        raise CheckpointError(f"{where} is of type {kind!r}, not 'bert'; give a BERT's folder")
    return dict(config)


def _check_bert(
    where: str, config: Mapping[str, Any], section: ModelSection, layers: int, given: Mapping[str, Tensor]
) -> None:
    """What the tensors' shapes do not say, or say less clearly."""
    text, fusion = section.text, section.fusion
    fields = [("hidden_size", "model.text.width", text.width), ("num_attention_heads", "model.text.heads", text.heads)]
    if fusion.norm == "post":
        fields.append(("num_attention_heads", "model.fusion.heads", fusion.heads))
    for key, field, own in fields:
        if config.get(key) != own:
            raise CheckpointError(f"{where} has {key} {config.get(key)}, and {field} is {own}; make them the same")
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{where} has the activation {config['hidden_act']}, the model gelu; take another BERT")
    present = len({name.split(".")[2] for name in given if name.startswith("encoder.layer.")})
    if present < layers:
        depths = "model.text.depth" + (" and model.fusion.depth" if fusion.norm == "post" else "")
        raise CheckpointError(f"{where} has {present} layers, {depths} want {layers}; lower them")


def _read(where: str, file: Path) -> dict[str, Tensor]:
    try:
        found = read_state_dict(file)
    except CheckpointError as error:
        raise CheckpointError(f"{where.partition(':')[0]}: {error}") from None
    return {name: x for name, x in found.items() if isinstance(x, Tensor)}


def _today(name: str) -> str:
    """Without the prefix of a BERT with heads, and as layer norms are called since BERT's first checkpoints."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _compare(where: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], remedy: str) -> None:
    """CheckpointError names the first that are missing, foreign or of another shape."""
    found = {
        "has no": [name for name in own if name not in given],
        "has the foreign": [name for name in given if name not in own],
        "has other shapes:": [
            f"{name} is {tuple(given[name].shape)}, not {tuple(x.shape)}"
            for name, x in own.items()
            if name in given and given[name].shape != x.shape
        ],
    }
    for what, names in found.items():
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise CheckpointError(f"{where} {what} {', '.join(names[:2])}{more}; {remedy}")
