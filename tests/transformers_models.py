"""Small models of Transformers' real classes, with inputs that have padding, for the tests of the integration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, BATCH, WORDS, VOCABULARY = 32, 4, 2, 3, 7, 50
IMAGE, PATCH = 24, 8  # 9 patches
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Case:
    """A model, what it is fed, and what the table of ``docs/transformers.md`` says of it."""

    name: str
    build: Callable[[], nn.Module]
    feed: Callable[[], dict[str, Any]]
    told: tuple[str, ...]  # patterns of the layers that have statistics, each attending over what it should
    refused: dict[str, str] = field(default_factory=dict)  # pattern → what the refusal says
    valid: str | None = "attention_mask"  # the input that says which positions of the output count
    queries: dict[str, str] = field(default_factory=dict)  # pattern → the input with its layers' valid queries


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(length: int = WORDS, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=draw(seed))


def padding(length: int = WORDS) -> Tensor:
    """The last words of the second and third sample are padding."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, -2:] = 0
    mask[2, -3:] = 0
    return mask


def images() -> Tensor:
    return torch.randn(BATCH, 3, IMAGE, IMAGE, generator=draw(2))


def text() -> dict[str, Any]:
    return {"input_ids": words(), "attention_mask": padding()}


def pictures() -> dict[str, Any]:
    return {"pixel_values": images()}


def _cross_text() -> dict[str, Any]:
    states = torch.randn(BATCH, 9, WIDTH, generator=draw(3))
    return {**text(), "encoder_hidden_states": states, "encoder_attention_mask": padding(9), "use_cache": False}


def _pairs() -> dict[str, Any]:
    return {**text(), **pictures()}


def _seq2seq() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": words(5, 4), "use_cache": False}


def _whisper() -> dict[str, Any]:
    sound = torch.randn(BATCH, 8, 20, generator=draw(5))
    return {"input_features": sound, "decoder_input_ids": words(5, 4), "use_cache": False}


def _qformer() -> dict[str, Any]:
    return {
        "query_embeds": torch.randn(1, 6, WIDTH, generator=draw(6)),  # learned: a batch of one
        "encoder_hidden_states": torch.randn(BATCH, 9, WIDTH, generator=draw(3)),
        "encoder_attention_mask": padding(9),
    }


def _mae() -> dict[str, Any]:
    return {**pictures(), "noise": torch.rand(BATCH, 9, generator=draw(7))}


def _blip(kind: Any) -> nn.Module:
    config = hf.BlipConfig(
        text_config={**_BERT, "encoder_hidden_size": WIDTH, "bos_token_id": 1, "sep_token_id": 2, "projection_dim": 16},
        vision_config=_VISION,
        projection_dim=16,
        image_text_hidden_size=16,
    )
    return kind(config)


def _bart() -> nn.Module:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=40,
            forced_eos_token_id=None,
        )
    )


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_heads=HEADS,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
        )
    )


def _whisper_model() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=WIDTH,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=10,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def _towers(config: Any, model: Any) -> nn.Module:
    towers = {"text_config": {**_BERT, "projection_dim": 16, "eos_token_id": 2}, "vision_config": _VISION}
    return model(config(**towers, projection_dim=16) if config is hf.CLIPConfig else config(**towers))


def _llama() -> nn.Module:
    return hf.LlamaModel(hf.LlamaConfig(**_BERT, num_key_value_heads=2))


_CAUSAL = "causal mask"
_BIAS = "position bias"
_MODELS = (
    Case("BERT", lambda: hf.BertModel(hf.BertConfig(**_BERT)), text, ("self",), queries={"self": "attention_mask"}),
    Case(
        "BERT decoder with cross-attention",
        lambda: hf.BertLMHeadModel(hf.BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)),
        _cross_text,
        ("cross",),
        {"self": _CAUSAL},
        queries={"cross": "attention_mask"},
    ),
    Case("RoBERTa", lambda: hf.RobertaModel(hf.RobertaConfig(**_BERT)), text, ("self",)),
    Case("ViT", lambda: hf.ViTModel(hf.ViTConfig(**_VISION)), pictures, ("self",), valid=None),
    Case(
        "ViT-MAE",
        lambda: hf.ViTMAEForPreTraining(
            hf.ViTMAEConfig(
                **_VISION,
                decoder_hidden_size=WIDTH,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=HEADS,
                decoder_intermediate_size=48,
            )
        ),
        _mae,
        ("self",),
        valid=None,
    ),
    Case("DINOv2", lambda: hf.Dinov2Model(hf.Dinov2Config(**_VISION)), pictures, ("self",), valid=None),
    Case(
        "CLIP", lambda: _towers(hf.CLIPConfig, hf.CLIPModel), _pairs, ("vision_model",), {"text_model": _CAUSAL}, None
    ),
    Case(
        "SigLIP",
        lambda: _towers(hf.SiglipConfig, hf.SiglipModel),
        _pairs,
        ("vision_model.encoder", "text_model"),
        valid=None,
    ),
    Case(
        "BLIP captioner",
        lambda: _blip(hf.BlipForConditionalGeneration),
        _pairs,
        ("vision_model", "cross"),
        {"text_decoder.bert.encoder.layer.*.attention.self": _CAUSAL},
        queries={"cross": "attention_mask"},
    ),
    Case(
        "BLIP image-text matching",
        lambda: _blip(hf.BlipForImageTextRetrieval),
        _pairs,
        ("vision_model", "text_encoder"),
        valid=None,
    ),
    Case(
        "BLIP-2 Q-Former",
        lambda: hf.Blip2QFormerModel(hf.Blip2QFormerConfig(**_BERT, encoder_hidden_size=WIDTH)),
        _qformer,
        ("self", "cross"),
        valid=None,
    ),
    Case(
        "BART",
        _bart,
        _seq2seq,
        ("cross", "model.encoder"),
        {"model.decoder.layers.*.self_attn": _CAUSAL},
        None,
        {"model.encoder": "attention_mask"},
    ),
    Case("T5", _t5, _seq2seq, ("cross",), {"encoder": _BIAS, "decoder.block.*.layer.0": f"{_CAUSAL}|{_BIAS}"}, None),
    Case(
        "Whisper",
        _whisper_model,
        _whisper,
        ("cross", "model.encoder"),
        {"model.decoder.layers.*.self_attn": _CAUSAL},
        None,
    ),
    Case("Llama", _llama, lambda: {**text(), "use_cache": False}, (), {"self": _CAUSAL}),
)
CASES = {case.name: case for case in _MODELS}


@cache
def eager(name: str) -> nn.Module:
    """The model with Transformers' own eager attention; shared by the tests, so they copy it before they change it."""
    torch.manual_seed(0)
    model = CASES[name].build()
    for parameter in model.parameters():  # attention that differs from place to place
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    for module in model.modules():  # set_attn_implementation does not reach ViT-MAE's decoder, and warns on BLIP
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    return model.eval()


def table() -> str:
    """The table of ``docs/transformers.md``."""
    rows = ["| model | `layers=` with all statistics | refused: key statistics, with a bias all | because of |"]
    rows.append("|---|---|---|---|")
    for case in _MODELS:
        told = ", ".join(f"`{name}`" for name in case.told) or "none by default"
        refused = ", ".join(f"`{name}`" for name in case.refused)
        why = ", ".join(dict.fromkeys("|".join(case.refused.values()).split("|")))
        rows.append(f"| {case.name} | {told} | {refused} | {why} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
