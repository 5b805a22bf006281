"""Text-guided image retrieval: what a reference image and words ask for."""

from __future__ import annotations

from torch import Tensor

from crossmask.kernels import soft_contrastive

from ..data.batch import Batch
from ..models import VisionLanguageModel
from .itc import within_bounds
from .views import StudentView, Terms


def text_guided_retrieval(model: VisionLanguageModel, student: StudentView, batch: Batch, temperature: Tensor) -> Terms:
    """Cross-entropy of each reference with its words, fused, over the target images of this rank's batch.

    A reconstruction: SyncMask fine-tunes for text-guided retrieval and does not say how its query is made; ours is
    :meth:`VisionLanguageModel.composed_feature`. Targets of one ``group_id`` are the same picture and all right. Both
    sides receive gradients, for what sets a target apart (a designer's hand) may be what pre-training taught the
    image tower to overlook. ``student`` has seen the targets and the words.
    """
    assert batch.reference is not None
    reference = model.encode_image(batch.reference)
    query = model.composed_feature(reference.tokens, student.text.tokens, batch.token_mask)
    groups = batch.group_id
    tau = within_bounds(temperature)
    return {"composed": soft_contrastive(query, student.image.feature, query, groups, groups, tau, 0.0).mean()}
