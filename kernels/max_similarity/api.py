"""The similarity of every patch to its most similar word: the public face of the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import op
from .op import Implementation, implementation
from .reference import max_similarity_reference

__all__ = ["MaxSimilarity", "implementation", "max_similarity"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class MaxSimilarity:
    """What :func:`max_similarity` returns where it is asked for the words, too."""

    score: Tensor  # (B, P) float32, float64 for float64
    argmax: Tensor  # (B, P) int64, the word that gave the score; -1 where no word is allowed


@overload
def max_similarity(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor | None = None,
    *,
    return_argmax: Literal[False] = False,
    impl: Implementation | None = None,
) -> Tensor: ...
@overload
def max_similarity(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor | None = None,
    *,
    return_argmax: Literal[True],
    impl: Implementation | None = None,
) -> MaxSimilarity: ...
def max_similarity(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor | None = None,
    *,
    return_argmax: bool = False,
    impl: Implementation | None = None,
) -> Tensor | MaxSimilarity:
    """How similar each patch is to the word it is most similar to, without the (B, P, S) similarities in memory.

        score[b, i] = max over allowed j of <image_tokens[b, i], text_tokens[b, j]>

    This is eq. 7 of SyCoCa (Ma et al., 2024), which masks by it, and the token-wise maximum of FILIP (Yao et al.,
    ICLR 2022). Tokens are taken as they are: normalise them first where the similarity is to be a cosine. For the other
    direction, of each word to its most similar patch, swap the arguments: ``max_similarity(text, image, image_mask)``.

    Args:
        image_tokens: (B, P, D) float16, bfloat16, float32 or float64, any strides.
        text_tokens: (B, S, D), same dtype and device. Under autocast both are cast first.
        text_mask: (B, S) bool, True = may be the most similar. It belongs to the second argument, which is what is
            maximised over: with swapped arguments it masks patches. Words that it leaves out get no gradient. A sample
            without an allowed word gets score 0, argmax -1 and no gradient.
        return_argmax: return :class:`MaxSimilarity` with ``argmax`` too.
        impl: ``None`` picks ``triton`` on a GPU, except for float64, and ``blockwise`` (plain PyTorch, any device)
            elsewhere. A name forces one; ``reference`` is the specification and materialises the similarities.

    Returns:
        (B, P) scores, summed in float32 whatever the input (float64 for float64). On CPUs that multiply bfloat16 a
        similarity of bfloat16 tokens is then rounded to it, as a matrix product is, and words that it makes equal are
        equal. Among equal similarities the first word is the argmax. A similarity that is NaN counts as the largest,
        so that it shows in the score.

    Gradients flow through the argmax to both tokens: to a patch from its word, to a word from all patches it is the
    argmax of, summed in a fixed order.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an implementation that cannot run.
        TypeError: an argument that is no tensor.
        NotImplementedError: under torch.func's transforms or forward-mode differentiation, and for second derivatives;
            ``reference`` has them.
    """
    _check_types(image_tokens, text_tokens)
    image_tokens, text_tokens = op.autocast(image_tokens, text_tokens)
    _check(image_tokens, text_tokens, text_mask)
    chosen = op.choose(impl, image_tokens.device, image_tokens.dtype)
    if chosen == "reference":
        with op.no_autocast(image_tokens.device.type):
            score, argmax = max_similarity_reference(image_tokens, text_tokens, text_mask)
    else:
        op.refuse_transforms(image_tokens, text_tokens)
        score, argmax = torch.ops.crossmask.max_similarity(image_tokens, text_tokens, text_mask, chosen)
    return MaxSimilarity(score, argmax) if return_argmax else score


def _check_types(image_tokens: Any, text_tokens: Any) -> None:
    for name, x in (("image_tokens", image_tokens), ("text_tokens", text_tokens)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _check(image: Tensor, text: Tensor, mask: Any) -> None:
    shapes = f"image_tokens {tuple(image.shape)} and text_tokens {tuple(text.shape)}"
    if image.ndim != 3 or text.ndim != 3:
        raise ValueError(f"tokens must be (batch, length, width), got {shapes}")
    if image.shape[0] != text.shape[0] or image.shape[2] != text.shape[2]:
        raise ValueError(f"{shapes} must agree in batch and width")
    if 0 in image.shape[1:] or text.shape[1] == 0:
        raise ValueError(f"there must be a patch, a word and a width, got {shapes}")
    if image.dtype != text.dtype or image.dtype not in DTYPES:
        raise ValueError(
            "image_tokens and text_tokens must share one dtype, float16, bfloat16, float32 or float64, "
            f"got {image.dtype} and {text.dtype}"
        )
    if image.device != text.device:
        raise ValueError(f"image_tokens and text_tokens must be on one device, got {image.device} and {text.device}")
    if mask is None:
        return
    wanted = tuple(text.shape[:2])
    if not isinstance(mask, Tensor):
        raise TypeError(f"text_mask must be a bool tensor {wanted}, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != wanted:
        hint = ": True = may be the most similar, so mask.bool()" if mask.shape == wanted else ""
        raise ValueError(f"text_mask must be bool {wanted}, got {mask.dtype} {tuple(mask.shape)}{hint}")
    if mask.device != text.device:
        raise ValueError(f"text_mask must be on the device of text_tokens, {text.device}, got {mask.device}")


# so that torch.export and checkpointing see the tensors
pytree.register_dataclass(MaxSimilarity, serialized_type_name="crossmask.MaxSimilarity")
