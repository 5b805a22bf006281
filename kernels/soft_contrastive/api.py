"""Contrastive loss against soft teacher targets: the public face of the op."""

from __future__ import annotations

from torch import Tensor

from .reference import soft_contrastive_reference


def soft_contrastive(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    temperature: Tensor,
    distillation: float,
) -> Tensor:
    """Cross-entropy of each query over all keys, against a mixture of the teacher's softmax and the true matches.

    With z_j = <query, key_j> / tau, z'_j = <teacher_query, key_j> / tau and T = alpha * softmax(z') +
    (1 - alpha) * uniform over the keys of the query's group, the loss of a row is -sum_j T_j log softmax(z)_j
    (image–text contrast of ALBEF, Li et al. 2021, eq. 6, with group-uniform targets instead of a one-hot).

    Args:
        queries: (N, E) normalised student features; receive gradients.
        keys: (M, E) normalised teacher features, in-batch ones and the queue; receive none.
        teacher_queries: (N, E) normalised teacher features of the same samples; receive none.
        query_groups, key_groups: (N,), (M,) int64; equal ids are true matches. Every query needs one among the keys.
        temperature: scalar tensor tau; receives a gradient.
        distillation: alpha in [0, 1].

    Returns:
        (N,) losses in float32, nats.

    Raises:
        ValueError: shapes that do not fit.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be (N, E) and (M, E)")
    if teacher_queries.shape != queries.shape:
        raise ValueError(f"teacher_queries {tuple(teacher_queries.shape)} must match queries {tuple(queries.shape)}")
    if query_groups.shape != queries.shape[:1] or key_groups.shape != keys.shape[:1]:
        raise ValueError(
            f"groups must be ({len(queries)},) and ({len(keys)},), got {query_groups.shape}, {key_groups.shape}"
        )
    return soft_contrastive_reference(
        queries, keys.detach(), teacher_queries.detach(), query_groups, key_groups, temperature, distillation
    )
