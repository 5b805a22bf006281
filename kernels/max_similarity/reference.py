"""Maximum similarity with all similarities in memory: the specification. Any float dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def max_similarity_reference(
    image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """score and argmax (B, P) of (B, P, D) and (B, S, D); the rules stand in ``api.py``."""
    if image_tokens.dtype in (torch.float16, torch.bfloat16):
        image_tokens, text_tokens = image_tokens.float(), text_tokens.float()
    if text_mask is not None:  # so that no gradient is 0 times what stands in a masked place
        text_tokens = text_tokens.masked_fill(~text_mask[..., None], 0.0)
    s = torch.einsum("bpd,bsd->bps", image_tokens, text_tokens)
    found = s.detach() if text_mask is None else s.detach().masked_fill(~text_mask[:, None], -torch.inf)
    highest = found.amax(2, keepdim=True)  # NaN, if there is one
    equal = (found == highest) | found.isnan()
    if text_mask is not None:
        equal &= text_mask[:, None]
    argmax = equal.to(torch.uint8).argmax(2).where(equal.any(2), -1)  # the first
    score = s.gather(2, argmax.clamp(min=0)[..., None])[..., 0]
    return score.where(argmax >= 0, 0.0), argmax
