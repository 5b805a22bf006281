"""SyCoCa's losses written down once more, sample by sample in float64, from a student's state dict alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
State = dict[str, Tensor]


class Losses(NamedTuple):
    itc: Tensor
    caption: Tensor
    tg_mim: Tensor
    high: Tensor  # (B, P) bool
    low: Tensor


def norm(s: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], EPS)


def dense(s: State, name: str, x: Tensor) -> Tensor:
    y = x @ s[f"{name}.weight"].T
    return y + s[f"{name}.bias"] if f"{name}.bias" in s else y


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """(S, W), (N, W), (N, W) -> (S, W)."""
    found = []
    for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        logits = qh @ kh.T / math.sqrt(qh.shape[1])
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        found.append(logits.softmax(1) @ vh)
    return torch.cat(found, 1)


def block(s: State, name: str, x: Tensor, heads: int, context: Tensor | None = None, causal: bool = False) -> Tensor:
    y = norm(s, f"{name}.norm", x)
    read = y if context is None else norm(s, f"{name}.key_norm", context)
    q = dense(s, f"{name}.attention.query", y)
    k, v = dense(s, f"{name}.attention.key_value", read).chunk(2, 1)
    allowed = torch.ones(len(x), len(read)).tril().bool() if causal else None
    x = x + dense(s, f"{name}.attention.output", attend(q, k, v, heads, allowed))
    y = F.gelu(dense(s, f"{name}.feed_forward.0", norm(s, f"{name}.feed_norm", x)))
    return x + dense(s, f"{name}.feed_forward.2", y)


def encode_image(s: State, image: Tensor, size: int, depth: int, heads: int, hidden: Tensor, drop: bool) -> Tensor:
    """(3, H, W) -> (1 + P, W); with ``drop`` the mask token and its position where a patch is hidden."""
    vit, mask_token = "model.image.vit", s["model.image.mask_token"]
    patches = F.unfold(image[None], size, stride=size)[0].T @ s[f"{vit}.patch_embed.proj.weight"].flatten(1).T
    if f"{vit}.patch_embed.proj.bias" in s:
        patches = patches + s[f"{vit}.patch_embed.proj.bias"]
    positions = s[f"{vit}.pos_embed"][0]
    if not drop:
        patches = torch.where(hidden[:, None], mask_token, patches)
    x = torch.cat([s[f"{vit}.cls_token"][0], patches]) + positions
    if f"{vit}.norm_pre.weight" in s:
        x = norm(s, f"{vit}.norm_pre", x)
    kept = torch.cat([torch.ones(1).bool(), ~hidden]) if drop else torch.ones(len(x)).bool()
    x = x[kept]
    for i in range(depth):
        name = f"{vit}.blocks.{i}"
        q, k, v = dense(s, f"{name}.attn.qkv", norm(s, f"{name}.norm1", x)).chunk(3, 1)
        x = x + dense(s, f"{name}.attn.proj", attend(q, k, v, heads))
        y = F.gelu(dense(s, f"{name}.mlp.fc1", norm(s, f"{name}.norm2", x)))
        x = x + dense(s, f"{name}.mlp.fc2", y)
    x = norm(s, f"{vit}.norm", x)
    if not drop:
        return x
    whole = mask_token + positions
    return whole.index_copy(0, kept.nonzero()[:, 0], x)


def encode_text(s: State, ids: Tensor, depth: int, heads: int) -> tuple[Tensor, Tensor]:
    """(n,) words, no padding -> (n, W) and the feature before its projection (W,)."""
    table = s["model.text.position_embeddings"]
    x = s["model.text.word_embeddings.weight"][ids] + table[: len(ids)]
    x = torch.cat([x, (s["model.text.cls_embedding"] + table[-1])[None]])
    for i in range(depth):
        x = block(s, f"model.text.blocks.{i}", x, heads, causal=True)
    return x[:-1], norm(s, "model.text.norm", x[-1])


def decode(s: State, name: str, x: Tensor, context: Tensor | None, depth: int, heads: int, causal: bool) -> Tensor:
    for i in range(depth):
        x = block(s, f"{name}.self_blocks.{i}", x, heads, causal=causal)
        if context is not None:
            x = block(s, f"{name}.cross_blocks.{i}", x, heads, context)
        else:
            cross = f"{name}.cross_blocks.{i}"
            y = F.gelu(dense(s, f"{cross}.feed_forward.0", norm(s, f"{cross}.feed_norm", x)))
            x = x + dense(s, f"{cross}.feed_forward.2", y)
    return norm(s, f"{name}.norm", x)


def contrast(queries: Tensor, keys: Tensor, groups: Tensor, tau: Tensor) -> Tensor:
    same = (groups[:, None] == groups[None]).double()
    return -(same / same.sum(1, keepdim=True) * (queries @ keys.T / tau).log_softmax(1)).sum(1).mean()


def chosen(scores: Tensor, ratio: float, largest: bool) -> Tensor:
    """Ties go to the lower index."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if largest else scores[i], i))
    mask = torch.zeros(len(scores)).bool()
    mask[order[: max(1, math.floor(ratio * len(scores)))]] = True
    return mask


def losses(s: State, batch: Any, recipe: Any) -> Losses:
    """Every objective of one step, unweighted. Of models whose pool is cls and whose stem is plain."""
    model, masking, o = recipe.model, recipe.masking, recipe.objectives
    image, text, captioner = model.image, model.text, model.captioner
    drop, size = masking.hidden_patches == "drop", image.patch_size
    patches = (image.size // size) ** 2
    none = torch.zeros(patches).bool()

    def look(pixels: Tensor, hidden: Tensor) -> Tensor:
        return encode_image(s, pixels, size, image.depth, image.heads, hidden, drop and bool(hidden.any()))

    v, w, words, pixel_losses, highs, lows = [], [], [], [], [], []
    for i in range(len(batch)):
        pixels, ids = batch.images[i].double(), batch.token_ids[i][batch.token_mask[i]]
        whole = look(pixels, none)
        tokens, pooled = encode_text(s, ids, text.depth, text.heads)
        v.append(F.normalize(dense(s, "model.image_projection", whole[0]), dim=0))
        w.append(F.normalize(dense(s, "model.text_projection", pooled), dim=0))
        of_patches = F.normalize(dense(s, "model.image_projection", whole[1:]), dim=1)
        of_words = F.normalize(dense(s, "model.text_projection", norm(s, "model.text.norm", tokens)), dim=1)
        maskable = batch.maskable[i][: len(ids)]
        high = low = none
        if maskable.any():
            scores = (of_patches @ of_words[maskable].T).max(1).values.detach()
            low_ratio = masking.options.get("low_ratio", masking.image_ratio)
            high, low = chosen(scores, masking.image_ratio, True), chosen(scores, low_ratio, False)
        highs.append(high)
        lows.append(low)
        how = o.caption.low_patches
        context = look(pixels, low)[1:] if how == "encode" else whole[1:]
        if how == "drop" or (how == "encode" and drop):
            context = context[~low]
        hidden = decode(s, "model.text_decoder", tokens[:-1], context, captioner.depth, captioner.heads, causal=True)
        logits = hidden @ s["model.vocabulary.weight"].T
        words.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        guide = tokens if o.tg_mim.text else None
        depth = captioner.image_depth or captioner.depth
        painted = decode(s, "model.image_decoder", look(pixels, high)[1:], guide, depth, captioner.heads, causal=False)
        painted = dense(s, "model.pixel_head", painted)
        wanted = F.unfold(pixels[None], size, stride=size)[0].T
        pixel_losses.append((painted - wanted).abs()[high].flatten())
    features, captions, tau = torch.stack(v), torch.stack(w), s["temperature"][0]
    itc = 0.5 * (contrast(features, captions, batch.group_id, tau) + contrast(captions, features, batch.group_id, tau))
    return Losses(itc, torch.cat(words).mean(), torch.cat(pixel_losses).mean(), torch.stack(highs), torch.stack(lows))
