"""Image–text matching with hard negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masking import Draws
from ..models import VisionLanguageModel
from .views import StudentView, TeacherView, Terms

PRIOR = 0.6365141682948128  # entropy in nats of one match among three pairs: what ITM costs when nothing is learned


@torch.no_grad()
def draw_negatives(
    student: StudentView,
    teacher: TeacherView,
    group_id: Tensor,
    temperature: Tensor,
    rows: int,
    hardness: float,
    draws: Draws,
    kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of the first ``rows`` texts an image, and for each of those images a text, that do not belong to it.

    As in ALBEF's public code a text draws in proportion to softmax over this rank's images of <student text feature,
    teacher image feature> / temperature, and an image likewise by <student image feature, teacher text feature>. There
    true matches are taken out behind the softmax, here before it, which is the same distribution and cannot run out of
    mass. Both directions are drawn at once, by the largest of logit + Gumbel noise (Gumbel-max: Gumbel 1954), and
    nothing waits for the device.

    Args:
        group_id: (B,) equal ids are true matches and never drawn, so a row whose whole batch belongs to it cannot be
            drawn from.
        hardness: draw in proportion to softmax(hardness * similarity / temperature): 0 uniformly, 1 as ALBEF does.
            Beginning with easy negatives is our addition, for training from scratch.
        draws: of the batch's samples; a row's noise is that of its sample.
        kind: (B,) a negative is of the same kind. Where drawings alone and scenes share a batch, a caption of one and
            an image of the other are told apart by counting, and matching would learn to count and nothing else.

    Returns:
        (rows,) indices of images, (rows,) indices of texts, (rows,) bool: whether there is a legal negative on both
        sides. Features that are not finite are none. Without one the index is 0.
    """
    queries = torch.stack([student.text.feature[:rows], student.image.feature[:rows]])
    keys = torch.stack([teacher.image_feature, teacher.text_feature])
    z = hardness * (queries @ keys.mT).float() / temperature  # (2, rows, B)
    illegal = (group_id[:rows, None] == group_id[None, :]) | ~z.isfinite()
    if kind is not None:
        illegal |= kind[:rows, None] != kind[None, :]
    z = z.masked_fill(illegal, -torch.inf)
    noise = Draws(draws.seed, draws.step, draws.index[:rows]).uniform("negatives", 2, len(group_id)).transpose(0, 1)
    images, texts = (z - (-noise.log()).log()).argmax(2).unbind(0)
    return images, texts, (~illegal).any(2).all(0)


def image_text_matching(
    model: VisionLanguageModel,
    student: StudentView,
    view: TeacherView,
    token_mask: Tensor,
    group_id: Tensor,
    temperature: Tensor,
    rows: int,
    draws: Draws,
    hardness: float = 1.0,
    head_mask: Tensor | None = None,
    kind: Tensor | None = None,
) -> Terms:
    """ITM of ALBEF: a pair, the same text with a negative image, the same image with a negative text.

    Gradients reach the negatives too. A pair for which no negative exists is left out, and with it its own match, which
    would teach to say yes; a batch without any negative gives 0 with a live graph. ``token_mask`` (B, L), ``group_id``
    and ``kind`` (B,); ``head_mask`` (layers, H) bool says which heads of the fusion encoder's cross-attention are on.
    """
    assert student.image_keys is not None
    tau = temperature.detach().float().clamp(0.001, 0.5)
    images, texts, legal = draw_negatives(student, view, group_id, tau, rows, hardness, draws, kind)
    own = torch.arange(rows, device=group_id.device)
    text_index = torch.cat([own, own, texts])
    text_mask = token_mask[text_index]
    fused = model.fuse(
        student.text.tokens[text_index],
        text_mask,
        student.image_keys,
        head_mask=head_mask,
        image_index=(None, images, None),
        # where [CLS] speaks for the pair, nothing else is computed by the last layer
        rows=torch.zeros_like(text_index)[:, None] if model.pool == "cls" else None,
    )
    logits = model.match_logits(fused.tokens, text_mask)
    target = (torch.arange(3 * rows, device=group_id.device) < rows).long()
    kept = legal.repeat(3).float()
    count = kept.sum().clamp(min=1)
    loss = (F.cross_entropy(logits, target, reduction="none") * kept).sum() / count
    correct = ((logits.argmax(1) == target).float() * kept).sum() / count
    return {"itm": loss, "itm_accuracy": correct.detach()}
