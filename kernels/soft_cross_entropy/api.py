"""Cross-entropy of a linear layer over a vocabulary against labels and a teacher: the public face of the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import op
from .checks import check, check_types
from .dispatch import Implementation, choose, implementation
from .reference import soft_cross_entropy_reference
from .request import Inputs

__all__ = ["SoftCrossEntropy", "implementation", "soft_cross_entropy"]


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class SoftCrossEntropy:
    """What :func:`soft_cross_entropy` returns where it is asked for the likeliest words, too."""

    loss: Tensor  # (N,) float32, float64 for float64; nats
    argmax: Tensor  # (N,) int64, the word with the largest logit; among equal ones the first


@overload
def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    distillation: float = 0.0,
    *,
    token_weights: Tensor | None = None,
    return_argmax: Literal[False] = False,
    impl: Implementation | None = None,
) -> Tensor: ...
@overload
def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    distillation: float = 0.0,
    *,
    token_weights: Tensor | None = None,
    return_argmax: Literal[True],
    impl: Implementation | None = None,
) -> SoftCrossEntropy: ...
def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    distillation: float = 0.0,
    *,
    token_weights: Tensor | None = None,
    return_argmax: bool = False,
    impl: Implementation | None = None,
) -> Tensor | SoftCrossEntropy:
    """Linear layer, softmax over a vocabulary and cross-entropy to labels and a teacher, without the (N, V) logits.

        L_i = w_i [lse(z_i) - alpha sum_j q_ij z_ij - (1 - alpha) z_i,label],
        z = hidden weight^T + bias,  q = softmax(teacher_hidden teacher_weight^T + teacher_bias)

    which is (1 - alpha) times the cross-entropy to the label and alpha times that to the teacher: masked language
    modelling with momentum distillation (ALBEF, Li et al. 2021, eq. 7). Only rows that are given count: leave words
    that are not masked out beforehand.

    Args:
        hidden: (N, W) float16, bfloat16, float32 or float64, any strides; gradient. N may be 0.
        weight: (V, W); gradient. It may be the embedding that ``hidden`` came from, whose gradients then add up.
        bias: (V,) or None; gradient.
        labels: (N,) int64, words of 0 to V - 1. On a CPU any other is an error; on a GPU, which is not waited for, its
            row's loss is NaN.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's, of the same shapes; no gradient. They are read
            again in the backward, so they have to keep their values until then. Not looked at where ``distillation``
            is 0.
        distillation: alpha in [0, 1].
        token_weights: (N,) float, w, factors of the rows' losses; no gradient. None: 1.
        return_argmax: return :class:`SoftCrossEntropy` with ``argmax`` too.
        impl: ``None`` picks ``triton`` on a GPU, except for float64, and ``blockwise`` (plain PyTorch, any device)
            elsewhere. A name forces one; ``reference`` is the specification and materialises the logits.

    All tensors but labels and token_weights share a dtype; under autocast they are cast first.

    Returns:
        (N,) losses in nats, float32 whatever the input (float64 for float64). Two calls agree bitwise, as do their
        gradients.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit, a teacher missing while ``distillation`` is
            positive, or an implementation that cannot run.
        TypeError: an argument that is no tensor.
        NotImplementedError: under torch.func's transforms or forward-mode differentiation, and for second derivatives;
            ``reference`` has them.
    """
    inputs = Inputs(
        hidden,
        weight,
        bias,
        labels,
        _constant(teacher_hidden),
        _constant(teacher_weight),
        _constant(teacher_bias),
        distillation,
        _constant(token_weights),
    )
    check_types(inputs)
    if distillation == 0:
        inputs = inputs._replace(teacher_hidden=None, teacher_weight=None, teacher_bias=None)
    inputs = op.autocast(inputs)
    check(inputs)
    chosen = choose(impl, hidden.device, inputs.hidden.dtype)
    if chosen == "reference":
        with op.no_autocast(hidden.device.type):
            loss, argmax = soft_cross_entropy_reference(*inputs)
    else:
        op.refuse_transforms(hidden, weight, bias)
        loss, argmax, _, _ = torch.ops.crossmask.soft_cross_entropy(*inputs, chosen)
    return SoftCrossEntropy(loss, argmax) if return_argmax else loss


def _constant(x: Tensor | None) -> Tensor | None:
    return x.detach() if isinstance(x, Tensor) else x


# so that torch.export and checkpointing see the tensors
pytree.register_dataclass(SoftCrossEntropy, serialized_type_name="crossmask.SoftCrossEntropy")
