"""Statistics of named attention layers, collected while a model runs.

A recorded layer carries a slot, a plain object that the attention finds on its module: no hook, no graph break, and
nothing in the state dict.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..cross_attention import AttentionStatistics
from ..cross_attention.checks import check_names
from .layers import IMPLEMENTATION, attention_layers, config_of, is_cross, select

SLOT = "_crossmask_slot"  # the attribute of a recorded layer
OF_KEYS = ("key_attention", "query_attention", "key_max")  # means and maxima over what sees a key, or softmax over it


class AttentionRecord(Mapping[str, AttentionStatistics]):
    """Layer's name → statistics of its latest call, for the layers that have run; stays readable after the context.

    ``query_mask`` may be set again before each forward.
    """

    def __init__(self, query_mask: Tensor | None = None) -> None:
        self.query_mask = query_mask  # (B, S), non-zero = count in key_attention, query_attention and key_max
        self._slots: dict[str, Slot] = {}

    def __getitem__(self, name: str) -> AttentionStatistics:
        slot = self._slot(name)
        if slot.latest is None:
            raise KeyError(f"{name} has not run since it is recorded")
        return slot.latest

    def all_calls(self, name: str) -> list[AttentionStatistics]:
        """Every call's statistics in order: the steps of a generation. Needs ``calls="all"``."""
        slot = self._slot(name)
        if slot.calls is None:
            raise ValueError(f"only the latest call of {name} was kept: record_attention(..., calls='all') keeps all")
        return list(slot.calls)

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            raise KeyError(f"{name} is not recorded; recorded are {', '.join(self._slots)}")
        return self._slots[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, slot in self._slots.items() if slot.latest is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._slots and self._slots[str(name)].latest is not None

    def __repr__(self) -> str:
        return f"AttentionRecord({', '.join(self._slots)})"


class Slot:
    """What a recorded layer is asked, and what it answered."""

    def __init__(
        self,
        name: str,
        record: AttentionRecord,
        statistics: tuple[str, ...],
        per_head: bool,
        cross: bool,
        causal: bool,
        keep_all: bool,
    ) -> None:
        self.name, self.record, self.statistics, self.per_head = name, record, statistics, per_head
        self.cross, self.causal = cross, causal
        self.latest: AttentionStatistics | None = None
        self.calls: list[AttentionStatistics] | None = [] if keep_all else None

    def query_mask(self, query: Tensor) -> Tensor | None:
        """The valid queries (B, S) bool; ``query`` is (B, H, S, D)."""
        mask = self.record.query_mask
        if mask is None:
            return None
        if mask.shape != (query.shape[0], query.shape[2]):
            raise ValueError(
                f"query_mask is {tuple(mask.shape)}, but {self.name} has queries {(query.shape[0], query.shape[2])}: "
                "record layers with other queries in a context of their own"
            )
        return mask.to(torch.bool)

    def keep(self, found: AttentionStatistics) -> None:
        compiling = torch.compiler.is_compiling()
        # Activation checkpointing runs the forward again inside the backward: the first answer stands.
        if not compiling and torch._C._current_graph_task_id() >= 0:
            return
        self.latest = found
        if self.calls is not None:
            if compiling:  # a list that grows would compile the model again for every length
                raise ValueError("calls='all' is not for compiled models: read the record after every call instead")
            self.calls.append(found)

    def refuse_causal(self) -> None:
        """Raise where causal self-attention is asked for what only compares keys that equally many queries see."""
        unfit = [name for name in self.statistics if name in OF_KEYS]
        if unfit and not self.causal and not self.cross:
            raise ValueError(
                f"{self.name} is self-attention with a causal mask: an early key is seen by more queries than a late "
                f"one, so {', '.join(unfit)} would tell positions apart; ask for lse, max_probability or entropy, for "
                "other layers, or pass causal=True"
            )


@contextmanager
def record_attention(
    model: nn.Module,
    layers: str | Collection[str] | None = None,
    statistics: Collection[str] = ("key_attention",),
    *,
    query_mask: Tensor | None = None,
    per_head: bool = False,
    calls: Literal["latest", "all"] = "latest",
    causal: bool = False,
) -> Iterator[AttentionRecord]:
    """Collect statistics of the attention of named layers from every forward inside the context.

    Gradients flow through the statistics (but ``key_max``). The weights are never in memory, in the backward neither.
    With activation checkpointing (not the reentrant one) call ``backward`` inside the context.

    Args:
        model: a Transformers model that runs ``"crossmask"``; also compiled, or wrapped for data parallelism.
        layers: names of attention layers, of modules that contain some, ``fnmatch`` patterns, ``"cross"`` or
            ``"self"``; one or several. None: the cross-attention if the model has some, else all that is not causal.
        statistics: any of ``cross_attention``'s.
        query_mask: (B, S) bool or 0/1: the valid queries, such as the text's ``attention_mask``; the interface does not
            pass them on. For every recorded layer, so record layers with other queries in a context of their own.
        per_head: key and query statistics for every head.
        calls: ``"all"`` keeps every call, for the steps of a generation (``AttentionRecord.all_calls``); not compiled.
        causal: allow ``key_attention``, ``query_attention`` and ``key_max`` of self-attention with a causal mask, over
            the pairs that the mask allows. The other statistics need no permission.

    Yields:
        The record: a mapping of names to ``AttentionStatistics`` of the latest call.

    Raises:
        ValueError: no layer of that name (with the closest), a model that is not on the shared interface or does not
            run ``"crossmask"``, an unknown statistic, a layer that is recorded already, key statistics of causal
            self-attention; and in the forward, attention that has a bias, another mask for every head, or queries that
            fit no ``query_mask``.
    """
    names = tuple(check_names(statistics))
    if not names:
        raise ValueError("statistics is empty: name at least one, such as 'key_attention'")
    if calls not in ("latest", "all"):
        raise ValueError(f"calls must be 'latest' or 'all', got {calls!r}")
    chosen = select(model, layers) if layers is not None else _default(model)
    for name, module in chosen.items():
        runs = getattr(config_of(model, name), "_attn_implementation", None)
        if runs != IMPLEMENTATION:
            raise ValueError(f"{name} runs {runs!r} attention: call use_crossmask(model) before record_attention")
        if SLOT in vars(module):
            raise ValueError(f"{name} is recorded already: leave the other record_attention first")
    record = AttentionRecord(query_mask)
    for name, module in chosen.items():
        slot = Slot(name, record, names, per_head, is_cross(name, module), causal, calls == "all")
        if getattr(module, "is_causal", False) is True:
            slot.refuse_causal()
        record._slots[name] = slot
    try:
        for name, module in chosen.items():
            setattr(module, SLOT, record._slots[name])
        yield record
    finally:
        for module in chosen.values():
            vars(module).pop(SLOT, None)


def _default(model: nn.Module) -> dict[str, nn.Module]:
    layers = attention_layers(model)
    if any(is_cross(name, module) for name, module in layers.items()):
        return select(model, "cross")
    free = [name for name, module in layers.items() if getattr(module, "is_causal", False) is not True]
    return select(model, free or list(layers) or "self")
