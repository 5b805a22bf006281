"""What soft_contrastive refuses, each in one line that names the culprit and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cross_attention.finite import costs_nothing

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    queries: Any,
    keys: Any,
    teacher_queries: Any,
    query_groups: Any,
    key_groups: Any,
    temperature: Any,
    distillation: Any,
    queue: Any,
    queue_groups: Any,
) -> None:
    """
    Raises:
        TypeError: an argument that is no tensor, or a distillation that is no number.
        ValueError: shapes, dtypes, devices or values that do not fit.
    """
    features = {"queries": queries, "keys": keys, "teacher_queries": teacher_queries, "queue": queue}
    groups = {"query_groups": query_groups, "key_groups": key_groups, "queue_groups": queue_groups}
    if (queue is None) != (queue_groups is None):
        there, missing = ("queue", "queue_groups") if queue_groups is None else ("queue_groups", "queue")
        raise ValueError(f"{there} needs {missing}: pass both, or neither")
    given = {name: x for name, x in {**features, **groups, "temperature": temperature}.items() if x is not None}
    for name in ("queries", "keys", "teacher_queries", "query_groups", "key_groups", "temperature"):
        given.setdefault(name, None)
    for name, x in given.items():
        if not isinstance(x, Tensor):
            hint = ": torch.tensor(tau)" if name == "temperature" else ""
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}{hint}")
    for name, x in given.items():
        if name != "temperature" and x.device != queries.device:
            raise ValueError(f"{name} must be on the device of queries, {queries.device}, got {x.device}")
    _check_features({name: x for name, x in given.items() if name in features})
    for name, rows in (("query_groups", queries), ("key_groups", keys), ("queue_groups", queue)):
        if name not in given:
            continue
        x, wanted = given[name], (len(rows),)
        if x.shape != wanted or x.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 {wanted}, an id for each row, got {x.dtype} {tuple(x.shape)}")
    if len(keys) + (0 if queue is None else len(queue)) == 0:
        raise ValueError("there must be a key: keys and queue are both empty")
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(
            f"temperature must be one floating-point number, got {temperature.dtype} {tuple(temperature.shape)}"
        )
    if costs_nothing(temperature) and bool(temperature.detach() <= 0):
        raise ValueError(f"temperature must be above 0, got {float(temperature.detach())}: clamp it before")
    _check_distillation(distillation)


def _check_features(features: dict[str, Tensor]) -> None:
    queries, keys, teacher = features["queries"], features["keys"], features["teacher_queries"]
    for name, x in features.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be (N, E) and (M, E)")
    if queries.shape[1] == 0:
        raise ValueError(f"features must have a width, got queries {tuple(queries.shape)}")
    if teacher.shape != queries.shape:
        raise ValueError(f"teacher_queries {tuple(teacher.shape)} must match queries {tuple(queries.shape)}")
    queue = features.get("queue")
    if queue is not None and (queue.ndim != 2 or queue.shape[1] != queries.shape[1]):
        raise ValueError(f"queue must be (Q, {queries.shape[1]}), as wide as queries, got {tuple(queue.shape)}")


def _check_distillation(distillation: Any) -> None:
    if isinstance(distillation, Tensor):
        raise TypeError("distillation must be a number, got a tensor: pass distillation.item()")
    if not isinstance(distillation, (int, float, torch.SymFloat)):
        raise TypeError(f"distillation must be a number in [0, 1], got {type(distillation).__name__}")
    if not 0 <= distillation <= 1:
        raise ValueError(f"distillation must lie in [0, 1], got {distillation}")
