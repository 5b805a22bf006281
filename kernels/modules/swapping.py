"""Attention modules of a model that can be made to tell, and how they are."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable

from torch import nn

from ..integrations.names import select_layers, unwrap
from .cross_attention import CrossAttention
from .multihead import MultiheadAttention


def telling_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Attention classes and what they become; timm's only where somebody has imported timm."""
    known: dict[type[nn.Module], type[nn.Module]] = {nn.MultiheadAttention: MultiheadAttention}
    if "timm.layers" in sys.modules:
        from ..integrations.timm import TELLING

        known |= TELLING
    return known


def tells(module: nn.Module) -> bool:
    """Whether it can give statistics as it is."""
    return isinstance(module, (CrossAttention, *telling_classes().values()))


def attention_modules(model: nn.Module, names: str | Collection[str]) -> dict[str, nn.Module]:
    """Attention modules that tell, or can be made to, that the names select; each once.

    Args:
        names: of modules or of modules that contain some, inside torch.compile's and data parallelism's wrappers, or
            patterns with ``*``, ``?`` and ``[...]``.

    Raises:
        ValueError: no such module in the model, or a name that selects none, with those nearest to it.
    """
    model, known = unwrap(model), telling_classes()
    able = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) in known or tells(m)}
    if not able:
        other = sorted({type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__})
        has = f"it has {', '.join(other[:4])}" if other else "it has no attention module"
        can = ", ".join(f"{kind.__module__.split('.')[0]}'s {kind.__name__}" for kind in known)
        raise ValueError(f"{type(model).__name__} has no attention that can tell ({has}; those that can: {can})")
    found: dict[str, nn.Module] = {}
    for name in select_layers(model, able, names):
        if all(able[name] is not module for module in found.values()):
            found[name] = able[name]
    return found


def swap_attention(model: nn.Module, names: str | Collection[str] = "*") -> list[str]:
    """Let ``nn.MultiheadAttention`` and timm's attention modules take ``statistics=``, in place; returns their names.

    Nothing is copied: a module stays the object it is, with its parameters, hooks and state_dict, and only its class
    becomes that of a module which can do more (:class:`MultiheadAttention`, or those of ``integrations/timm.py``).
    Called without statistics, it does what it did before, bit by bit. Subclasses of the user's own are left alone.

    Args:
        names: see :func:`attention_modules`; default all.

    Raises:
        ValueError: a pattern that matches no attention module, with the nearest names.
    """
    found = attention_modules(model, names)
    make_telling(found.values())
    return list(found)


def make_telling(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Makes modules tell that do not yet; returns each of these with the class it had."""
    known = telling_classes()
    changed = [(module, type(module)) for module in modules if type(module) in known]
    for module, before in changed:
        module.__class__ = known[before]
    return changed
