"""What the attention of a model looks at, by the names of its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..cross_attention.checks import check_names
from ..integrations.recording import SLOT, AttentionRecord, Slot
from .swapping import attention_modules, make_telling


@contextmanager
def record_attention(
    model: nn.Module,
    layers: str | Collection[str] = "*",
    statistics: Collection[str] = ("key_attention",),
    *,
    query_mask: Tensor | None = None,
    per_head: bool = False,
    calls: Literal["latest", "all"] = "latest",
    causal: bool = False,
) -> Iterator[AttentionRecord]:
    """Collect statistics of the attention of named modules from every forward inside the context.

    For :class:`CrossAttention`, ``nn.MultiheadAttention`` and timm's attention, swapped or not; a compiled model
    compiles once more. Outputs stay what they are but for rounding. Gradients flow, through the statistics (but
    ``key_max``) too. PyTorch's fused inference path for whole encoder layers, which passes their attention by, is off
    meanwhile, in the whole process.

    Args:
        layers: names of attention modules or of modules that contain some, or patterns with ``*``, ``?`` and ``[...]``.
        statistics: any of ``cross_attention``'s.
        query_mask: (B, S) bool or 0/1: which queries count, for every recorded module. Default: in self-attention those
            that the mask of the keys leaves, else all.
        per_head: key and query statistics for every head.
        calls: ``"all"`` keeps every call (``AttentionRecord.all_calls``).
        causal: allow statistics of keys in self-attention that is called with ``is_causal``.

    Yields:
        The record: a mapping of names to ``AttentionStatistics`` of the latest call.

    Raises:
        ValueError: no attention module of that name (with the nearest), an unknown statistic, a module that is recorded
            already; and in the forward, what the module refuses statistics of.
    """
    names = tuple(check_names(statistics))
    if not names:
        raise ValueError("statistics is empty: name at least one, such as 'key_attention'")
    if calls not in ("latest", "all"):
        raise ValueError(f"calls must be 'latest' or 'all', got {calls!r}")
    modules = attention_modules(model, layers)
    for name, module in modules.items():
        if SLOT in vars(module):
            raise ValueError(f"{name} is recorded already: leave the other record_attention first")
    record = AttentionRecord(query_mask)
    for name in modules:
        record._slots[name] = Slot(name, record, names, per_head, False, causal, calls == "all")
    fast = torch.backends.mha.get_fastpath_enabled()
    before = make_telling(modules.values())
    for name, module in modules.items():
        setattr(module, SLOT, record._slots[name])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield record
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in modules.values():
            vars(module).pop(SLOT, None)
        for module, kind in before:
            module.__class__ = kind
