"""Whether a state dict is of open_clip's CoCa, and of which shape; else, in one line, what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pydantic import ValidationError
from torch import Tensor

from ..errors import CheckpointError
from ..recipe import ModelSection
from .albef_recognition import count_blocks, differences, mlp_ratio
from .open_clip_layout import DECODER_RATIO, HEAD_WIDTH, POOLER_HEADS, SCALE, OpenClipLayout

_STRANGERS = {  # how a name begins -> what that is
    "visual.trunk.": "its image tower is a model of timm, which is not supported",
    "text.transformer.embeddings.": "its text tower is a model of transformers, which is not supported",
    "text.transformer.encoder.": "its text tower is a model of transformers, which is not supported",
    "visual.attn_pool_contrastive.": "its attentional pooler is parallel or cascaded, which is not supported",
    "visual.layer1.": "its image tower is a ResNet, which is not supported",
    "logit_bias": "it was trained with a bias of its logits (SigLIP), which is not supported",
    "visual_encoder.": "ALBEF's names look like that: crossmask convert albef",
    "model.text": "these are crossmask's own names: give the folder that it lies in",
}
_BEGIN = ("visual.", "text.", "text_decoder.", SCALE)


def recognise(state: Mapping[str, object], config: Mapping[str, Any], where: str) -> OpenClipLayout:
    """The layout of a state dict: its shape is read from the tensors, and the heads, which no tensor tells, from
    ``config``, one of open_clip's model configurations; where that is silent they are those of open_clip's own CoCas.

    Raises:
        CheckpointError: one line, where names are missing or foreign, or shapes or dtypes are others.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    ranks = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "visual.proj": 2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "text.token_embedding.weight": 2,
        "text.positional_embedding": 2,
        "text.cls_emb": 1,
        "text.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "text_decoder.resblocks.0.mlp.c_fc.weight": 2,
    }
    if missing := [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]:
        if "text_decoder.ln_final.weight" not in state and {"visual.conv1.weight", "visual.proj"} <= state.keys():
            _refuse(where, "it is a CLIP, which has no text decoder")
        _compare(where, missing, [name for name in state if not name.startswith(_BEGIN)], list(state), more=True)
    patch, places, projection, feed, words, positions, _, text_feed, decoder_feed = (shapes[name] for name in ranks)
    side = math.isqrt(max(0, places[0] - 1))
    if patch[2] != patch[3] or side * side != places[0] - 1 or not side:
        _refuse(where, f"its patches, {places[0] - 1} of {patch[2]} × {patch[3]} pixels, are no square")
    vision, text, decoder = (config.get(f"{part}_cfg") or {} for part in ("vision", "text", "multimodal"))
    width = decoder_feed[1]
    if width != words[1] or decoder_feed[0] != int(width * DECODER_RATIO):
        _refuse(
            where, f"its text decoder is {width} wide with {decoder_feed[0]} in between, its words are {words[1]} wide"
        )
    pooler = shapes.get("visual.attn_pool.query")
    section = _section(
        where,
        {
            "image": {
                "size": side * patch[2],
                "patch_size": patch[2],
                "width": patch[0],
                "depth": count_blocks(state, r"visual\.transformer\.resblocks\.(\d+)\."),
                "heads": _heads(where, "image", patch[0], int(vision.get("head_width", HEAD_WIDTH))),
                "mlp_ratio": mlp_ratio(feed[0], patch[0]),
            },
            "text": {
                "width": words[1],
                "depth": count_blocks(state, r"text\.transformer\.resblocks\.(\d+)\."),
                "heads": int(text.get("heads") or _heads(where, "text", words[1])),
                "mlp_ratio": mlp_ratio(text_feed[0], words[1]),
                "dropout": 0.0,
                "positions": positions[0] - 1,
            },
            "captioner": {
                "depth": count_blocks(state, r"text_decoder\.(?:resblocks|cross_attn)\.(\d+)\."),
                "heads": int(decoder.get("heads") or _heads(where, "text decoder", width)),
                "mlp_ratio": DECODER_RATIO,
                "quick_gelu": bool(config.get("quick_gelu", False)),
                "cls_mask": "shifted",
                "pooler": None
                if pooler is None
                else {"queries": pooler[0], "heads": int(vision.get("attn_pooler_heads", POOLER_HEADS))},
            },
            "projection_width": projection[1],
        },
    )
    if pooler is None and patch[0] != width:
        _refuse(where, f"its patches are {patch[0]} wide and its text decoder reads {width}, without a pooler between")
    layout = OpenClipLayout(section, words[0])
    expected = layout.their_shapes(scalar=shapes.get(SCALE) == ())
    others = [f"{name} is {shapes.get(name)}, not {shape}" for name, shape in expected.items()
              if name in state and shapes.get(name) != shape]  # fmt: skip
    dtypes = {value.dtype for value in state.values() if isinstance(value, Tensor) and value.ndim}
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name not in expected]
    if missing or foreign or others:
        _compare(where, missing, foreign, list(state), others)
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        _refuse(where, f"it mixes {' and '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}")
    return layout


def _heads(where: str, part: str, width: int, head_width: int = HEAD_WIDTH) -> int:
    if width % head_width:
        _refuse(
            where,
            f"how many heads its {part} has no tensor tells, and {width} is no multiple of {head_width}; give its"
            " configuration with --config",
        )
    return width // head_width


def _section(where: str, values: dict[str, Any]) -> ModelSection:
    try:
        return ModelSection.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        _refuse(
            where, f"its model.{place} cannot be built: {first['msg'].lower()}; give its configuration with --config"
        )


def _compare(
    where: str, missing: list[str], foreign: list[str], names: list[str], others: Sequence[str] = (), more: bool = False
) -> NoReturn:  # fmt: skip
    hint = next((hint for begin, hint in _STRANGERS.items() if any(name.startswith(begin) for name in names)), None)
    if hint is None and any(".ls_1." in name for name in names):
        hint = "it has layer scales, which are not supported"
    if hint is None and missing and not foreign and not others:
        hint = "the file is not whole: save or download it again"
    told = differences(missing, foreign, others, more)
    _refuse(where, f"{told}; {hint or 'give one of coca_ViT-B-32 or coca_ViT-L-14, or alike'}")


def _refuse(where: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{where} is no CoCa in open_clip's layout: {problem}")
