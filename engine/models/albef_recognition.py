"""Whether a state dict is in ALBEF's layout, and of which shape; else, in one line, what is wrong with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import CheckpointError
from ..recipe import ModelSection
from .albef_layout import PARTS, QUEUE_IDS, QUEUES, WORDS, AlbefFile, AlbefLayout, twin

HEAD_WIDTH = 64  # of every attention
MOMENTUM = tuple(twin(part) for part in PARTS if part != "itm_head")
_STRANGERS = {  # how a name begins -> whose it is
    "visual.": "CLIP's names look like that",
    "text_decoder.": "BLIP and ALBEF for question answering have that, ALBEF for pre-training and retrieval has not",
    "cls_head.": "ALBEF for classification has that, ALBEF for pre-training and retrieval has not",
    "module.": "take module. off the names, which DistributedDataParallel put there",
    "model.text.bert.": "these are crossmask's own names: give the folder that it lies in",
}


def recognise(state: Mapping[str, object], where: str) -> AlbefLayout:
    """The layout of a state dict, its shape read from the tensors.

    Raises:
        CheckpointError: one line, where names are missing or foreign, shapes or dtypes are others, or copies are none.
    """
    bert = "text_encoder.bert." if any(name.startswith("text_encoder.bert.") for name in state) else "text_encoder."
    shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    ranks = {
        "visual_encoder.patch_embed.proj.weight": 4,
        "visual_encoder.pos_embed": 3,
        "visual_encoder.blocks.0.mlp.fc1.weight": 2,
        f"{bert}embeddings.word_embeddings.weight": 2,
        f"{bert}embeddings.position_embeddings.weight": 2,
        f"{bert}embeddings.token_type_embeddings.weight": 2,
        f"{bert}encoder.layer.0.intermediate.dense.weight": 2,
        "vision_proj.weight": 2,
        "itm_head.weight": 2,
    }
    if missing := [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]:
        known = tuple(f"{part}{end}" for part in PARTS for end in (".", "_m."))
        foreign = [name for name in state if not name.startswith(known) and name not in {*QUEUES, QUEUE_IDS, "temp"}]
        _refuse(where, missing, foreign, [], more=True)
    patch, places, feed, words, positions, segments, bert_feed, projection = (
        shapes[name] for name in ranks if name != "itm_head.weight"
    )
    # Counted in the momentum model, too, so that a block that one of the two has not is told as missing there.
    blocks = count_blocks(state, r"visual_encoder(?:_m)?\.blocks\.(\d+)\.")
    layer = re.escape(bert).replace("text_encoder", "text_encoder(?:_m)?") + r"encoder\.layer\.(\d+)\."
    layers, fused = count_blocks(state, layer), _numbers(state, layer + r"crossattention\.")
    side = math.isqrt(max(0, places[1] - 1))
    _require(patch[2] == patch[3], where, f"its patches are {patch[2]} × {patch[3]} pixels, ALBEF's are square")
    _require(side > 0 and side * side == places[1] - 1, where, f"its {places[1] - 1} patches are no square")
    _require(bool(fused), where, "no layer of its BERT has a cross-attention, so there is no fusion encoder")
    _require(min(fused, default=1) > 0, where, "its BERT has cross-attention from the first layer on, as BLIP's has")
    for name, width in (("image", patch[0]), ("text", words[1])):
        _require(width % HEAD_WIDTH == 0, where, f"its {name} tower's width {width} is no multiple of {HEAD_WIDTH}")
    text = {"width": words[1], "heads": words[1] // HEAD_WIDTH, "mlp_ratio": mlp_ratio(bert_feed[0], words[1])}
    section = _section(
        where,
        {
            "image": {
                "size": side * patch[2],
                "patch_size": patch[2],
                "width": patch[0],
                "depth": blocks,
                "heads": patch[0] // HEAD_WIDTH,
                "mlp_ratio": mlp_ratio(feed[0], patch[0]),
            },
            "text": {**text, "depth": min(fused), "positions": positions[0], "segments": segments[0]},
            "fusion": {"depth": layers - min(fused), "norm": "post"} | {k: text[k] for k in ("heads", "mlp_ratio")},
            "projection_width": projection[0],
        },
    )
    file = AlbefFile(
        bert=bert == "text_encoder.bert.",
        words=any(name.startswith(WORDS) for name in state),
        decoder_weight=f"{WORDS}decoder.weight" in state,
        decoder_bias=f"{WORDS}decoder.bias" in state,
        position_ids=f"{bert}embeddings.position_ids" in state,
        momentum=any(name.partition(".")[0] in MOMENTUM for name in state),
        queue=any(name in state for name in (*QUEUES, QUEUE_IDS)),
        queue_ids=QUEUE_IDS in state,
    )
    columns = next((shapes[name][1] for name in QUEUES[:2] if len(shapes.get(name, ())) == 2), 0)
    layout = AlbefLayout(section, file, words[0], positions[0], columns)
    _compare(layout, state, where)
    return layout


def _section(where: str, values: dict[str, Any]) -> ModelSection:
    try:
        return ModelSection.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{where} cannot be built: its model.{place} is {first['input']}; {first['msg'].lower()}"
        ) from None


def _compare(layout: AlbefLayout, state: Mapping[str, object], where: str) -> None:
    expected = layout.official_shapes()
    whole = {*QUEUES[2:], QUEUE_IDS}
    others, dtypes = [], set()
    for name in expected.keys() & state.keys():
        value = state[name]
        if not isinstance(value, Tensor):
            others.append(f"{name} is no tensor")
            continue
        integers = name in whole or name.endswith("position_ids")
        if tuple(value.shape) != expected[name]:
            others.append(f"{name} is {tuple(value.shape)}, not {expected[name]}")
        elif value.is_floating_point() == integers:
            others.append(f"{name} is {str(value.dtype).removeprefix('torch.')}")
        elif not integers:
            dtypes.add(value.dtype)
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name not in expected]
    if missing or foreign or others:
        _refuse(where, missing, foreign, sorted(others))
    _require(len(dtypes) == 1, where, f"it mixes {' and '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}")
    copies = list(layout.copies())
    for name, repeated in copies + ([(twin(a), twin(b)) for a, b in copies] if layout.file.momentum else []):
        _require(_same(state[name], state[repeated]), where, f"{name} is not {repeated}, to which ALBEF ties it")
    for name in expected:
        if name.endswith("position_ids"):
            _require(_same(state[name], torch.arange(layout.positions)[None]), where, f"{name} does not count from 0")
    if layout.file.queue:
        pointer = state["queue_ptr"]
        assert isinstance(pointer, Tensor)
        inside = 0 <= int(pointer) < layout.queue_length
        _require(inside, where, f"queue_ptr is {int(pointer)}, its queue has {layout.queue_length} columns")


def _same(a: object, b: object) -> bool:
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _require(holds: bool, where: str, problem: str) -> None:
    if not holds:
        raise CheckpointError(f"{where} is no checkpoint in ALBEF's layout: {problem}")


def _refuse(
    where: str, missing: Sequence[str], foreign: Sequence[str], others: Sequence[str], more: bool = False
) -> None:
    """``more``: no more than the first that are missing were looked for."""
    hint = next((hint for begin, hint in _STRANGERS.items() if any(name.startswith(begin) for name in foreign)), None)
    raise CheckpointError(
        f"{where} is no checkpoint in ALBEF's layout: {differences(missing, foreign, others, more)}; "
        + (hint or "give one of ALBEF for pre-training or retrieval")
    )


def differences(missing: Sequence[str], foreign: Sequence[str], others: Sequence[str], more: bool = False) -> str:
    """How the names of a state dict differ from a layout's; ``others``: those of another shape or type, told whole."""
    kinds = ((missing, " or more missing" if more else " missing"), (foreign, " foreign"),
             (others, " of another shape or type"))  # fmt: skip
    return f"of its names {', '.join(f'{len(n)}{kind} ({_some(n)})' for n, kind in kinds if n)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _numbers(state: Mapping[str, object], pattern: str) -> set[int]:
    return {int(found[1]) for name in state if (found := re.match(pattern, name))}


def count_blocks(state: Mapping[str, object], pattern: str) -> int:
    return max(_numbers(state, pattern), default=-1) + 1


def mlp_ratio(hidden: int, width: int) -> float:
    """``int(width * ratio)`` is ``hidden``, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
