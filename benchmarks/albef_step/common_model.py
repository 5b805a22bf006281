"""ALBEF's networks as one commonly writes them; modules carry the names of the official checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import Sizes


class ImageAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ImageBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = ImageAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, sizes.width, kernel_size=sizes.patch, stride=sizes.patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ImageEncoder(nn.Module):
    """ViT (Dosovitskiy et al. 2021): (B, 3, H, W) -> (B, 1 + P, width)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.patch_embed = PatchEmbedding(sizes)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, sizes.image_tokens, width))
        blocks = (ImageBlock(width, sizes.heads, width * sizes.mlp_ratio) for _ in range(sizes.image_depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SelfAttention(nn.Module):
    """Of ``states``, or of ``states`` to another sequence; ``mask`` is added to the scores."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query = nn.Linear(sizes.width, sizes.width)
        self.key = nn.Linear(sizes.width, sizes.width)
        self.value = nn.Linear(sizes.width, sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, states: Tensor, mask: Tensor, other: Tensor | None = None) -> Tensor:
        source = states if other is None else other
        q, k, v = self.split(self.query(states)), self.split(self.key(source)), self.split(self.value(source))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
        weights = self.dropout(scores.softmax(dim=-1))
        return (weights @ v).permute(0, 2, 1, 3).contiguous().flatten(2)


class Output(nn.Module):
    """Project, drop, add, normalise."""

    def __init__(self, inner: int, sizes: Sizes) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class AttentionLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = Output(sizes.width, sizes)

    def forward(self, states: Tensor, mask: Tensor, other: Tensor | None = None) -> Tensor:
        return self.output(self.self(states, mask, other), states)


class Intermediate(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.width, sizes.width * sizes.mlp_ratio)

    def forward(self, states: Tensor) -> Tensor:
        return F.gelu(self.dense(states))


class BertLayer(nn.Module):
    def __init__(self, sizes: Sizes, fuses: bool) -> None:
        super().__init__()
        self.attention = AttentionLayer(sizes)
        if fuses:
            self.crossattention = AttentionLayer(sizes)
        self.intermediate = Intermediate(sizes)
        self.output = Output(sizes.width * sizes.mlp_ratio, sizes)

    def forward(self, states: Tensor, mask: Tensor, image: Tensor | None, image_mask: Tensor | None) -> Tensor:
        states = self.attention(states, mask)
        if image is not None and image_mask is not None:
            states = self.crossattention(states, image_mask, image)
        return self.output(self.intermediate(states), states)


class Embeddings(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocabulary, sizes.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(sizes.positions, sizes.width)
        self.token_type_embeddings = nn.Embedding(2, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.dropout = nn.Dropout(sizes.dropout)
        self.register_buffer("position_ids", torch.arange(sizes.positions)[None])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        x = x + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        return self.dropout(self.LayerNorm(x))


class Encoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        depth = sizes.text_depth + sizes.fusion_depth
        self.layer = nn.ModuleList(BertLayer(sizes, number >= sizes.text_depth) for number in range(depth))


class Bert(nn.Module):
    """BERT-base cut in two: the first layers read words, the others words and the image."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.text_depth = sizes.text_depth
        self.embeddings = Embeddings(sizes)
        self.encoder = Encoder(sizes)

    @staticmethod
    def added(mask: Tensor) -> Tensor:
        """(B, N) True = attend -> what is added to scores (B, 1, 1, N)."""
        return (1.0 - mask[:, None, None].float()) * -10000.0

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.embeddings(ids)
        for layer in self.encoder.layer[: self.text_depth]:
            states = layer(states, self.added(mask), None, None)
        return states

    def fuse(self, states: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        image_mask = self.added(torch.ones(image.shape[:2], dtype=torch.bool, device=image.device))
        for layer in self.encoder.layer[self.text_depth :]:
            states = layer(states, self.added(mask), image, image_mask)
        return states


class Transform(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.width, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=1e-12)

    def forward(self, states: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(states)))


class Predictions(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.transform = Transform(sizes)
        self.decoder = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        self.decoder.bias = self.bias

    def forward(self, states: Tensor) -> Tensor:
        return self.decoder(self.transform(states))


class Heads(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.predictions = Predictions(sizes)


class TextEncoder(nn.Module):
    """BERT with its masked-language head, whose decoder is the word embeddings."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bert = Bert(sizes)
        self.cls = Heads(sizes)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def predict(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, V) logits."""
        return self.cls.predictions(self.bert.fuse(self.bert.read(ids, mask), mask, image))
