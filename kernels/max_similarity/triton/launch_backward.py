"""Starts the backward kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .backward import backward_image, backward_text
from .launch_forward import dense, start


def backward(grad_score: Tensor, image_tokens: Tensor, text_tokens: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """d image (B, P, D) and d text (B, S, D), contiguous; grad_score (B, P) float32, argmax (B, P) int64."""
    (B, P, _), S = image_tokens.shape, text_tokens.shape[1]
    image, text = dense(image_tokens), dense(text_tokens)
    d_image, d_text = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (image, text))
    shared = {"GradScore": grad_score.contiguous(), "Argmax": argmax.contiguous()}
    start(backward_image, B, P, S, {"text": text, "di": d_image}, {**shared, "Text": text, "GradImage": d_image})
    arguments = {**shared, "Image": image, "GradText": d_text, "SCALED": image.dtype == torch.float16}
    start(backward_text, B, P, S, {"image": image, "dt": d_text}, arguments)
    return d_image, d_text
