"""Masked image modelling with the intact caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import PretrainingModel
from .views import StudentView, TeacherView, Terms

NetworkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of a mask policy: scores, hidden, losses, all (R, P)


def masked_image_modelling(
    student_model: PretrainingModel,
    student: StudentView,
    view: TeacherView,
    images: Tensor,
    token_mask: Tensor,
    target: Literal["teacher_feature", "pixel", "normalised_pixel"],
    *,
    drop: bool = False,
    drop_after: int = 0,
    network_loss: NetworkLoss | None = None,
) -> Terms:
    """Predict the patches of the plan from the rest of the image and the whole caption; smooth L1, mean over patches.

    ``teacher_feature`` is the layer-normalised output of the teacher's image tower on the intact image (SyncMask's
    "enhanced labels"; layer norm and smooth L1 are a reconstruction), ``pixel`` the patch itself and
    ``normalised_pixel`` the patch less its mean over its standard deviation (MAE, He et al. 2022). A plan of several
    views gives the mean of their losses. No masked patch at all gives 0 with a live graph.
    ``images`` (R, 3, H, W), ``token_mask`` (R, L).

    Args:
        drop: hidden patches leave the image tower after ``drop_after`` blocks and join as mask tokens in the decoder.
        network_loss: of a policy with a network, which learns from each patch's loss: the term ``mask_network``.
    """
    assert view.plan is not None
    assert view.image_tokens is not None
    words = student.text.tokens[: len(images)]
    size, terms = student_model.model.patch_size, []
    scores = None
    if network_loss is not None:
        # of the features that the masks were chosen from, which it learns from and does not shape
        scores = student_model.model.score_patches(view.image_tokens)
    networks = []
    for hidden in view.plan.images:
        encoded = student_model.model.encode_image(images, hidden, drop=drop, drop_after=drop_after)
        predicted = student_model.decode_patches(encoded, words, token_mask)[:, 1:][hidden].float()
        with torch.no_grad():
            if target == "teacher_feature":
                wanted = F.layer_norm(view.image_tokens[:, 1:][hidden].float(), predicted.shape[-1:])
            else:
                wanted = F.unfold(images.float(), size, stride=size).transpose(1, 2)[hidden]
                if target == "normalised_pixel" and len(wanted):
                    wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, keepdim=True) + 1e-6).sqrt()
        losses = F.smooth_l1_loss(predicted, wanted, reduction="none")
        terms.append(losses.sum() / max(1, wanted.numel()))
        if network_loss is not None and scores is not None:
            of_patch = torch.zeros(hidden.shape, device=hidden.device)
            of_patch = of_patch.masked_scatter(hidden, losses.detach().mean(1))
            networks.append(network_loss(scores, hidden, of_patch))
    found: Terms = {"mim": torch.stack(terms).mean()}
    if networks:
        found["mask_network"] = torch.stack(networks).mean()
    return found
