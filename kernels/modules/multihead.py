"""``nn.MultiheadAttention`` that can also say cheaply where it looked."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cross_attention import AttentionStatistics
from ..integrations.recording import Slot
from .telling import Allowed, Asked, attend, read_float, slot_of, squeezed


class MultiheadAttention(nn.MultiheadAttention):
    """A drop-in for ``nn.MultiheadAttention``: the same constructor, parameters and call, and with ``statistics=`` the
    statistics of its weights without the weights.

    Without ``statistics`` the call is PyTorch's own, bit by bit. With it the second result is
    :class:`AttentionStatistics` and ``need_weights`` counts for nothing. Two things then differ: a query all of whose
    keys are masked gives the output projection of zeros, not NaN; and dropout draws other weights.
    """

    def forward(  # type: ignore[override]  # the second result can be statistics
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        statistics: Collection[str] = (),
        per_head: bool = False,
        query_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | AttentionStatistics | None]:
        """As ``nn.MultiheadAttention``, and:

        Args:
            statistics, per_head: as for :func:`crossmask.kernels.cross_attention`. Their shapes begin with the batch,
                whatever ``batch_first``; unbatched inputs give them without it.
            query_mask: (B, S) bool, (1, S) unbatched, True = counts in the key and query statistics. Default: in
                self-attention (query and key are one tensor) what ``key_padding_mask`` leaves, elsewhere all.

        With statistics, masks that hold anything but 0 and -inf make it write the weights down, as PyTorch does with
        ``need_weights``; to see what a floating mask holds it waits for the GPU. Give bool masks.

        Raises:
            ValueError: statistics of a module with ``add_bias_kv`` or ``add_zero_attn``, of nested tensors, of keys in
                causal attention, or what :func:`crossmask.kernels.cross_attention` refuses.
        """
        slot = slot_of(self)
        plain = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if slot is None and not statistics:
            return super().forward(query, key, value, *plain)
        call = (query, key, value, key_padding_mask, attn_mask, is_causal)
        if slot is not None:
            output, noted = self._tell(*call, slot)
            slot.keep(noted)
        if statistics:
            return self._tell(*call, Asked(tuple(statistics), per_head, query_mask))
        return super().forward(query, key, value, *plain) if need_weights else (output, None)

    def _tell(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        asked: Asked | Slot,
    ) -> tuple[Tensor, AttentionStatistics]:
        where = asked.name if isinstance(asked, Slot) else "nn.MultiheadAttention"
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError(
                f"{where}: no statistics with add_bias_kv or add_zero_attn, which add keys that nothing stands for;"
                " call it without statistics, or build it without them"
            )
        if query.is_nested:
            raise ValueError(f"{where}: no statistics of nested tensors; pad them and give key_padding_mask")
        if is_causal and attn_mask is None:  # as PyTorch, which takes is_causal for a hint alone
            raise ValueError(f"{where}: is_causal says what attn_mask is, and there is none; give attn_mask")
        itself, batched = query is key, query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        allowed = _read(key_padding_mask, attn_mask, is_causal, itself, q.shape, k.shape[2], where)
        found = attend(q, k, v, allowed, asked, self.dropout if self.training else 0.0, where)
        output = self.out_proj(found.output.transpose(1, 2).flatten(-2))
        if not batched:
            return output[0], squeezed(found.statistics)
        return output if self.batch_first else output.transpose(0, 1), found.statistics

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (..., embed_dim)"""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            return q, k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v


def _read(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    itself: bool,
    shape: torch.Size,
    P: int,
    where: str,
) -> Allowed:
    """PyTorch's masks, in which True = not attended to, or added to the logits. ``shape`` of the queries (B, H, S, D).

    Raises:
        ValueError: a mask of another shape.
    """
    B, H, S, _ = shape
    keys = links = None
    biases: list[Tensor | None] = []
    if key_padding_mask is not None:
        if key_padding_mask.shape != (B, P):
            raise ValueError(f"{where}: key_padding_mask must be {(B, P)}, got {tuple(key_padding_mask.shape)}")
        keys, rest = (~key_padding_mask, None) if key_padding_mask.dtype == torch.bool else read_float(key_padding_mask)
        biases.append(None if rest is None else rest[:, None, None])
    if attn_mask is not None and not is_causal:
        if attn_mask.shape not in ((S, P), (B * H, S, P)):
            raise ValueError(f"{where}: attn_mask must be {(S, P)} or {(B * H, S, P)}, got {tuple(attn_mask.shape)}")
        whole = attn_mask.view(1, 1, S, P) if attn_mask.ndim == 2 else attn_mask.view(B, H, S, P)
        links, rest = (~whole, None) if whole.dtype == torch.bool else read_float(whole)
        biases.append(rest)
    given = [bias for bias in biases if bias is not None]
    return Allowed(keys, links, sum(given[1:], given[0]) if given else None, is_causal, itself)
