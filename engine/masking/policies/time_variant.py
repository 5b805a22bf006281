"""From any word to the hard ones over the run."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from ...recipe import Section
from ..plan import MaskContext, MaskPlan
from ..registry import Corpus, Policy, register_policy
from ..word_counts import Resident, WordCounts, prepared
from .random import drawn, random_patches


@register_policy("time_variant")
class TimeVariantMask(Policy):
    """Words all equally likely at first, and hard ones more and more as the run goes on.

    Yang et al. 2023, "Learning better masking for better language model pre-training". Their ratio that falls over the
    run is a schedule here (``text_ratio`` of kind linear or cosine). Their content, POS-tagging weighted masking, keeps
    running means of the loss of each part of speech and draws words by sigmoid(2 z), z being the mean's distance from
    the mean of all in standard deviations; the means start alike, so content starts uniform.

    A reconstruction, because there is no tagger: a token stands for its own class, and its cumulative loss is
    estimated by its surprisal -log p(w) in the captions, the loss of a model that knows frequencies alone, so that
    common words fade and rare ones come up:

        weight(w) = sigmoid(2 d z_w),  d = progress / until, at most 1.

    The mean and deviation in z are those over the tokens that occur. Patches are hidden at random.
    """

    class Options(Section):
        until: float = Field(1.0, gt=0.0, le=1.0, description="share of the run after which the weights stay")

    options: Options
    hardness: Resident | None = None  # (vocabulary,) float32: z

    def prepare(self, corpus: Corpus) -> None:
        counts = WordCounts(corpus)
        occurs = counts.occurrences > 0
        surprisal = -np.log(np.maximum(counts.occurrences, 1) / max(counts.words, 1))
        z = np.zeros_like(surprisal)
        if occurs.any():
            z = (surprisal - surprisal[occurs].mean()) / max(surprisal[occurs].std(), 1e-4)
        self.hardness = Resident(torch.from_numpy(z.astype(np.float32)))

    def __call__(self, context: MaskContext) -> MaskPlan:
        (z,) = prepared(self.hardness, self.name).on(context.token_ids.device)
        done = min(1.0, context.progress / self.options.until)
        weight = torch.sigmoid(2.0 * done * z[context.token_ids])
        text = drawn(weight, context.text_ratio, context, "words by hardness", context.maskable)
        return MaskPlan(random_patches(context), text)
