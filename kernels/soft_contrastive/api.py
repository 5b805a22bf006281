"""Contrastive loss against soft teacher targets: the public face of the op."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import op
from .checks import check
from .dispatch import Implementation, choose, implementation
from .reference import soft_contrastive_reference
from .request import accumulation

__all__ = ["implementation", "soft_contrastive"]


def soft_contrastive(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    temperature: Tensor,
    distillation: float,
    *,
    queue: Tensor | None = None,
    queue_groups: Tensor | None = None,
    impl: Implementation | None = None,
) -> Tensor:
    """Cross-entropy of each query over all keys, against a mixture of the teacher's softmax and the true matches.

    With z_j = <query, key_j> / tau and z'_j = <teacher_query, key_j> / tau over the in-batch keys and the queue,
    q = softmax(z') and T = alpha * q + (1 - alpha) * uniform over the keys of the query's group, the loss of a row is

        -sum_j T_j log softmax(z)_j  =  lse(z) - alpha sum_j q_j z_j - (1 - alpha) mean over matches of z_j

    (image–text contrast of ALBEF, Li et al. 2021, eq. 6, with group-uniform targets instead of a one-hot). Neither the
    (N, M + Q) logits nor [keys ; queue] ever exist, but in ``reference``. The target is a constant: no gradient passes
    through q, to the temperature neither.

    A query whose group no key has keeps the teacher's part alone, alpha * (lse(z) - sum_j q_j z_j): its targets sum to
    alpha, and without distillation its loss and its gradients are 0.

    Args:
        queries: (N, E) normalised student features; receive gradients. float16, bfloat16, float32 or float64, any
            strides. Products are in the widest dtype among the features, sums in float32, under autocast too.
        keys: (M, E) normalised features of the batch, those of other ranks included; receive gradients where they
            require them (``engine.teacher.all_gather_with_grad`` brings them home). M may be 0.
        teacher_queries: (N, E) normalised teacher features of the same samples; receive none, and are not read where
            ``distillation`` is 0.
        query_groups, key_groups: (N,), (M,) int64; equal ids are true matches, and -1 matches nothing.
        temperature: tau > 0, one number as a tensor; receives a gradient.
        distillation: alpha in [0, 1].
        queue: (Q, E) further keys, which receive no gradient. Read where they lie and in their own dtype; copied only
            where a row is not dense. As autograd keeps them, write to them after the backward.
        queue_groups: (Q,) int64; -1 for a row that matches nothing.
        impl: ``None`` picks ``triton`` on a GPU, except for float64, and ``blockwise`` (plain PyTorch, any device)
            elsewhere. A name forces one; ``reference`` is the specification and materialises the logits.

    Returns:
        (N,) losses in float32 (float64 for float64), nats.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, or an implementation that cannot run.
        TypeError: an argument of another type than the above.
        NotImplementedError: under torch.func's transforms or forward-mode differentiation, and for second derivatives;
            ``reference`` has them.
    """
    check(
        *(queries, keys, teacher_queries, query_groups, key_groups, temperature, distillation),
        *(queue, queue_groups),
    )
    features = (queries, keys, teacher_queries) if queue is None else (queries, keys, teacher_queries, queue)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in features))
    queries, keys, teacher_queries = queries.to(dtype), keys.to(dtype), teacher_queries.detach().to(dtype)
    tau = temperature.reshape(()).to(queries.device, accumulation(dtype))
    queue = None if queue is None else queue.detach()
    chosen = choose(impl, queries.device, dtype)
    if chosen == "reference":
        with op.no_autocast(queries.device.type):
            return soft_contrastive_reference(
                *(queries, keys, teacher_queries, query_groups, key_groups, tau, distillation, queue, queue_groups)
            )
    op.refuse_transforms(queries, keys, tau)
    loss: Tensor = torch.ops.crossmask.soft_contrastive(
        *(queries, keys, teacher_queries, query_groups, key_groups, tau, queue, queue_groups),
        *(float(distillation), chosen),
    )[0]
    return loss
