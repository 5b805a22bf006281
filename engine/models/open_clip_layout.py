"""The layout of open_clip's CoCa: names and shapes of its state dict, and ours, bitwise.

Theirs has the projections of queries, keys and values in one tensor, projections to features and words transposed, and
the logarithm of the inverse temperature. It has neither the image tower's mask token nor SyCoCa's image decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..recipe import ModelSection, Section
from .albef_layout import STUDENT
from .captioner import CaptioningModel

SCALE = "logit_scale"
HEAD_WIDTH = 64  # of an attention in open_clip's own CoCa models, but for
POOLER_HEADS = 8  # its attentional pooler's
DECODER_RATIO = 4.0  # of the feed-forward parts of its text decoder, whatever its configuration says
_NAMES = {  # ours -> theirs, by how a name begins
    "image.vit.cls_token": "visual.class_embedding",
    "image.vit.pos_embed": "visual.positional_embedding",
    "image.vit.patch_embed.proj.": "visual.conv1.",
    "image.vit.norm_pre.": "visual.ln_pre.",
    "image.vit.norm.": "visual.ln_post.",
    "pooled_norm.": "visual.ln_post.",
    "pooler.query_norm.": "visual.attn_pool.ln_q.",
    "pooler.key_norm.": "visual.attn_pool.ln_k.",
    "pooler.query": "visual.attn_pool.query",
    "text.word_embeddings.": "text.token_embedding.",
    "text.cls_embedding": "text.cls_emb",
    "text.position_embeddings": "text.positional_embedding",
    "text.norm.": "text.ln_final.",
    "text_decoder.norm.": "text_decoder.ln_final.",
}
_TRANSPOSED = {
    "image_projection.weight": "visual.proj",
    "text_projection.weight": "text.text_projection",
    "vocabulary.weight": "text_decoder.text_projection",
}
_LEADING = {"image.vit.cls_token": 2, "image.vit.pos_embed": 1}  # dimensions of 1 that theirs have not
_IMAGE_BLOCK = {  # the same within a block
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_TEXT_BLOCK = {
    "norm.": "ln_1.",
    "key_norm.": "ln_1_kv.",
    "feed_norm.": "ln_2.",
    "attention.output.": "attn.out_proj.",
    "feed_forward.0.": "mlp.c_fc.",
    "feed_forward.2.": "mlp.c_proj.",
}
_BLOCKS = {
    "image.vit.blocks.": ("visual.transformer.resblocks.", _IMAGE_BLOCK),
    "text.blocks.": ("text.transformer.resblocks.", _TEXT_BLOCK),
    "text_decoder.self_blocks.": ("text_decoder.resblocks.", _TEXT_BLOCK),
    "text_decoder.cross_blocks.": ("text_decoder.cross_attn.", _TEXT_BLOCK),
}


class OpenClipFile(Section):
    """What a converted file had that our weights do not tell to the last bit."""

    logit_scale: float
    scalar: bool = Field(True, description="whether it had no dimension")


class Same(NamedTuple):
    """Tensors of theirs that, one below the other, are tensors of ours, one below the other."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class OpenClipLayout:
    """One model in the layout."""

    section: ModelSection
    vocabulary_size: int
    shapes: dict[str, torch.Size] = field(init=False, repr=False)  # of our parameters, without an image decoder

    def __post_init__(self) -> None:
        positions = self.section.text.positions
        assert positions is not None
        with torch.device("meta"):
            model = CaptioningModel(self.section, self.vocabulary_size, positions)
        object.__setattr__(self, "shapes", {name: value.shape for name, value in model.named_parameters()})

    def groups(self) -> Iterator[Same]:
        """All that both sides have, in the order of ours."""
        for name in self.shapes:
            if name in _TRANSPOSED:
                yield Same((_TRANSPOSED[name],), (name,), True)
            elif found := re.fullmatch(r"(pooler\.|.*\d+\.)attention\.query\.(weight|bias)", name):
                yield from self._attention(found[1], found[2])
            elif ".attention.key_value." not in name and (theirs := _their_name(name)):
                yield Same((theirs,), (name,))

    def _attention(self, block: str, kind: str) -> Iterator[Same]:
        query, both = (f"{block}attention.{part}.{kind}" for part in ("query", "key_value"))
        begin = "visual.attn_pool.attn." if block == "pooler." else f"{_their_block(block)}attn."
        image = self.section.image.width
        if kind == "weight" and block == "pooler." and image != self.section.projection_width:
            yield Same((f"{begin}q_proj_weight",), (query,))
            yield Same((f"{begin}k_proj_weight", f"{begin}v_proj_weight"), (both,))
        else:
            yield Same((f"{begin}in_proj_{kind}",), (query, both))

    def their_shapes(self, scalar: bool = True) -> dict[str, tuple[int, ...]]:
        """Every name of theirs, with its shape."""
        found: dict[str, tuple[int, ...]] = {SCALE: () if scalar else (1,)}
        for group in self.groups():
            shape = self.shapes[group.ours[0]]
            rows = sum(self.shapes[name][0] for name in group.ours) // len(group.theirs)
            found |= dict.fromkeys(group.theirs, (rows, *shape[1:]))
            if group.transposed:
                found[group.theirs[0]] = (shape[1], shape[0])
            elif ours_only := _LEADING.get(group.ours[0]):
                found[group.theirs[0]] = tuple(shape[ours_only:])
        return found

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's tensors, as far as the layout has them, of a state dict that has :meth:`their_shapes`."""
        student = {}
        for group in self.groups():
            whole = (
                torch.cat([state[name] for name in group.theirs]) if len(group.theirs) > 1 else state[group.theirs[0]]
            )
            whole = whole.T.contiguous() if group.transposed else whole
            if len(group.ours) == 1:
                student[STUDENT + group.ours[0]] = whole.reshape(self.shapes[group.ours[0]])
                continue
            rows = [self.shapes[name][0] for name in group.ours]
            student |= zip((STUDENT + name for name in group.ours), whole.split(rows), strict=True)
        student["temperature"] = temperature_of(state[SCALE])
        return student

    def to_theirs(self, student: Mapping[str, Tensor], file: OpenClipFile | None) -> dict[str, Tensor]:
        """The state dict, in the student's dtype; what has no place in it is left out."""
        shapes = self.their_shapes(file is None or file.scalar)
        found = {SCALE: scale_of(student["temperature"], file).reshape(shapes[SCALE])}
        for group in self.groups():
            tensors = [student[STUDENT + name] for name in group.ours]
            whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            whole = whole.T if group.transposed else whole
            if len(group.theirs) > 1:
                parts = whole.chunk(len(group.theirs))
            else:
                parts = (whole.reshape(shapes[group.theirs[0]]),)
            found |= zip(
                group.theirs, (part.clone(memory_format=torch.contiguous_format) for part in parts), strict=True
            )
        return {name: found[name] for name in shapes}

    def describe(self) -> dict[str, Any]:
        """The model in the form of open_clip's configuration files."""
        image, text, captioner = self.section.image, self.section.text, self.section.captioner
        assert captioner is not None
        pooler = captioner.pooler
        vision: dict[str, Any] = {
            "image_size": image.size,
            "patch_size": image.patch_size,
            "width": image.width,
            "layers": image.depth,
            "head_width": image.width // image.heads,
            "mlp_ratio": image.mlp_ratio,
            "output_tokens": True,
        }
        if pooler is not None:
            vision |= {
                "attentional_pool": True,
                "attn_pooler_queries": pooler.queries,
                "attn_pooler_heads": pooler.heads,
            }
        words = {"context_length": text.positions, "vocab_size": self.vocabulary_size, "width": text.width}
        return {
            "embed_dim": self.section.projection_width,
            "quick_gelu": captioner.quick_gelu,
            "vision_cfg": vision,
            "text_cfg": {**words, "heads": text.heads, "layers": text.depth, "mlp_ratio": text.mlp_ratio,
                         "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**words, "heads": captioner.heads, "layers": captioner.depth},
            "custom_text": True,
        }  # fmt: skip


def temperature_of(scale: Tensor) -> Tensor:
    """(1,) in the dtype of ``logit_scale``."""
    return (-scale.double()).exp().to(scale.dtype).reshape(1)


def scale_of(temperature: Tensor, file: OpenClipFile | None) -> Tensor:
    """() ``logit_scale``: the file's own where the temperature is still that."""
    if file is not None:
        own = torch.tensor(file.logit_scale, dtype=temperature.dtype)
        if torch.equal(temperature_of(own), temperature.reshape(1)):
            return own
    return torch.tensor(-math.log(float(temperature)), dtype=temperature.dtype)


def _their_name(name: str) -> str | None:
    """None: they have no such tensor."""
    for begin, (theirs, inside) in _BLOCKS.items():
        if name.startswith(begin):
            number, _, rest = name.removeprefix(begin).partition(".")
            part = next(part for part in inside if rest.startswith(part))
            return f"{theirs}{number}.{inside[part]}{rest.removeprefix(part)}"
    if name.startswith("pooler.attention.output."):
        return f"visual.attn_pool.attn.out_proj.{name.rpartition('.')[2]}"
    begin = next((begin for begin in _NAMES if name.startswith(begin)), "")
    return _NAMES[begin] + name.removeprefix(begin) if begin else None


def _their_block(block: str) -> str:
    """text.blocks.3. -> text.transformer.resblocks.3."""
    begin = next(begin for begin in _BLOCKS if block.startswith(begin))
    return _BLOCKS[begin][0] + block.removeprefix(begin)
