"""An order in which neighbours are each other's semi-hard negatives: the public face of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import op, reference
from .checks import check
from .dispatch import Implementation, choose, implementation
from .similarity import similarities

__all__ = ["implementation", "semi_hard_order"]


def semi_hard_order(
    image_features: Tensor,
    text_features: Tensor,
    groups: Tensor | None = None,
    *,
    similar: int = 3,
    start: int = 0,
    apart: int = 1,
    impl: Implementation | None = None,
) -> Tensor:
    """Order M image-text pairs by a walk to the s-th most similar pair that is left, images and texts in turn.

        order[0] = start
        order[k] = the s-th largest, over unused j, of   <image[order[k-1]], text[j]>   for odd k
                                                         <text[order[k-1]], image[j]>   for even k

    A sample is a pair: whichever of its two sides was picked, all of it is used, and the walk goes on from the side
    that was picked, as in the public code of GRIT-VLP (Byun et al., ECCV 2022), which takes s = 1. The s-th is
    SyncMask's (Song et al., CVPR 2024). Similarities are plain dot products: GRIT-VLP's softmax changes no row's order,
    but rounds small ones to zero, which it also writes over used entries and can then not tell apart.

    * With fewer than s candidates left, the least similar of them is taken: the rank is ``min(s, left)``.
    * Candidates of a group that is among the last ``apart`` samples of the walk come last: they are taken when no
      others are left; then, while there are any, those of other groups than the last sample's.
    * Of equal similarities the lower index is the more similar, the two zeros are one number, and NaN is less than
      -inf: a sample with features that are not numbers comes where its partners rank it last.

    Args:
        image_features: (M, E) floating point, on any device.
        text_features: (M, E), of the same pairs and on the same device.
        groups: (M,) int64, equal for pairs that are true matches of each other; None = there are none.
        similar: s, at least 1.
        start: where the walk begins, in [0, M). Draw it, or shuffle the samples before.
        apart: at least 1. The rule above for consecutive samples alone is 1; a batch of B has as few pairs of one
            group as can be with B - 1, where the walk does not come back to a group after every second sample.
        impl: ``native`` is C++ on one core of the host, ``reference`` the specification in plain PyTorch; None picks.

    Returns:
        (M,) int64 on the CPU: a permutation of ``range(M)``, checked. Both implementations give the same for the same
        similarities. No gradient flows.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, or an implementation that cannot run.
        TypeError: an argument of another type than the above.

    The M x M float32 similarities are held on the host, by C++ in both directions, M = 1920: 29.5 MB; they are computed
    where the features lie, 512 rows at a time. From a GPU they come to the host, where the walk is: each pick waits for
    the one before.
    """
    check(image_features, text_features, groups, similar, start, apart)
    chosen = choose(impl)
    if chosen == "reference" and impl is None:
        native.announce("semi_hard_order", "cpu")
    similarity = similarities(image_features.detach(), text_features.detach())
    groups = None if groups is None else groups.cpu().contiguous()
    similar, apart = (min(number, len(similarity)) for number in (similar, apart))  # more is no more: int64 holds it
    walk = op.WALK if chosen == "native" else reference.walk
    order: Tensor = walk(similarity, groups, similar, start, apart)
    if not torch.equal(order.sort().values, torch.arange(len(similarity))):
        raise RuntimeError("semi_hard_order: the walk is not a permutation; this is a defect of crossmask, report it")
    return order
