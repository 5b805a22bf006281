"""Attention for Hugging Face Transformers that also tells where it looked, without ``output_attentions=True``.

::

    from crossmask.kernels.integrations.transformers import record_attention, register

    register()
    model.set_attn_implementation("crossmask")  # or from_pretrained(..., attn_implementation="crossmask")
    with record_attention(model, layers="cross", statistics=("key_attention",)) as found:
        model(**batch)
    found["decoder.layers.0.encoder_attn"].key_attention  # (B, P)

Which models and which statistics: ``docs/transformers.md``. Transformers itself is imported at the first call.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from .layers import IMPLEMENTATION, attention_layers, config_of, foreign_attention
from .recording import AttentionRecord, record_attention

__all__ = ["IMPLEMENTATION", "AttentionRecord", "record_attention", "register", "use_crossmask"]

OLDEST, TOO_NEW = (5, 20), (6, 0)  # the range that pyproject.toml asks for; a test holds the two together


def register() -> None:
    """Add the attention implementation ``"crossmask"`` to Transformers; again does nothing.

    Models on the shared attention interface (``ALL_ATTENTION_FUNCTIONS``) take it as they take ``"sdpa"``. BLIP writes
    its attention itself; its two attention classes get a ``forward`` that asks its configuration, and computes as
    before under every implementation but this one.

    Raises:
        ImportError: Transformers is missing or of a version outside the tested range.
    """
    _require_tested_version()
    from transformers import AttentionInterface, AttentionMaskInterface

    from . import blip
    from .shared_attention import attend, make_mask

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, make_mask)
    blip.adapt()


def use_crossmask(model: Any) -> Any:
    """``register()`` and ``model.set_attn_implementation("crossmask")``, which only warns where it changes nothing.

    Returns:
        The model.

    Raises:
        ValueError: no attention of the model is on the shared interface.
        ImportError: as ``register``.
    """
    register()
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            f"{type(model).__name__} is no Transformers model (it has no set_attn_implementation): pass the "
            "PreTrainedModel, before any wrapper"
        )
    layers = attention_layers(model)
    if not layers:
        raise ValueError(foreign_attention(model))
    model.set_attn_implementation(IMPLEMENTATION)
    for name in layers:  # some keep a copy of the configuration that the line above does not reach (ViT-MAE's decoder)
        config = config_of(model, name)
        if config is not None and config._attn_implementation != IMPLEMENTATION:
            config._attn_implementation = IMPLEMENTATION
    return model


def _require_tested_version() -> None:
    wanted = f"transformers>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"transformers is not installed: pip install '{wanted}'") from None
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not OLDEST <= numbers < TOO_NEW:
        raise ImportError(f"transformers {version} is outside the tested range: pip install '{wanted}'")
