"""What a plan takes for granted: a recipe's data without opening them, and what only values could tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import Batch
from ..data.classes import Classes
from ..masking import MaskPlan, MaskPlanner
from ..objectives import MaskedWords, RunMasks
from ..recipe import Ratio, RatioSection, Recipe

CLASSES = 100  # of a classifier, where only the data know how many
SPECIAL_TOKENS = 2  # [CLS] and [SEP], which are never masked


@dataclass(frozen=True)
class Assumed:
    """Sizes of the data. Batches are taken to be as long as the longest caption may be."""

    vocabulary: int
    tokens: int
    classes: Classes | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Assumed:
        """By the recipe alone: ``data.vocabulary_size``, and ``data.max_tokens`` or twice the words and 2."""
        column, classes = recipe.objectives.recognition.column, None
        if recipe.objectives.recognition.weight > 0:
            classes = Classes(column=column, names=tuple(f"class {n}" for n in range(CLASSES)))
        tokens = recipe.data.max_tokens or 2 * recipe.data.max_words + 2
        return cls(recipe.data.vocabulary_size, tokens, classes)

    def notes(self, recipe: Recipe) -> list[str]:
        """In words, for who reads the plan."""
        found = [
            f"data are not opened: vocabulary of {self.vocabulary:,} words (data.vocabulary_size), every batch padded"
            f" to {self.tokens} tokens (data.max_tokens)"
        ]
        if self.classes is not None:
            found.append(f"a classifier of {len(self.classes.names)} classes; how many there are only the data know")
        return found

    @property
    def data(self) -> Any:
        """What building models asks of a ``PairData``."""
        tokenizer = SimpleNamespace(mask_id=4, pad_id=0, vocabulary_size=self.vocabulary, word_ids=None)
        training = None if self.classes is None else SimpleNamespace(classes=self.classes)
        return SimpleNamespace(tokenizer=tokenizer, max_tokens=self.tokens, classes=training, train_size=1)


class AssumedMasks(RunMasks):
    """Masks of which only the sizes are known: each ratio at its largest, the same in every sample."""

    def __init__(self, recipe: Recipe, assumed: Assumed) -> None:
        self.recipe, self.priors = recipe, None
        tokenizer = assumed.data.tokenizer
        self.planner = MaskPlanner(recipe.masking, tokenizer.mask_id, tokenizer.vocabulary_size, None)

    def plan(self, model: Any, batch: Batch, seen: Any, step: int) -> MaskPlan:
        patches = model.patch_grid[0] * model.patch_grid[1]
        views = [batch.images.new_empty((len(batch), patches), dtype=torch.bool) for _ in range(self._views)]
        read = torch.empty_like(batch.token_ids)
        return MaskPlan(views[0], torch.empty_like(batch.token_mask), tuple(views[1:]), read)

    @property
    def _views(self) -> int:
        return max(1, self.planner.policy.views)


def largest(ratio: Ratio | RatioSection) -> float:
    return max(ratio.start, ratio.end) if isinstance(ratio, RatioSection) else float(ratio)


def hidden_patches(recipe: Recipe) -> int:
    """Of one image."""
    patches = (recipe.model.image.size // recipe.model.image.patch_size) ** 2
    return min(patches, round(largest(recipe.masking.image_ratio) * patches))


def masked_words(recipe: Recipe, assumed: Assumed) -> int:
    """Of one caption of the longest kind."""
    return max(1, math.ceil(largest(recipe.masking.text_ratio) * (assumed.tokens - SPECIAL_TOKENS)))


def meta_batch(recipe: Recipe, assumed: Assumed, pairs: int) -> Batch:
    """A batch of shapes."""
    side, tokens = recipe.model.image.size, assumed.tokens

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    images = empty(pairs, 3, side, side, dtype=torch.float32)
    reference = torch.empty_like(images) if recipe.objectives.composed.weight > 0 else None
    return Batch(
        images,
        empty(pairs, tokens),
        empty(pairs, tokens, dtype=torch.bool),
        empty(pairs, tokens, dtype=torch.bool),
        empty(pairs),
        empty(pairs),
        reference=reference,
        label=None if assumed.classes is None else empty(pairs),
    )


@contextmanager
def on_a_gpu(recipe: Recipe, assumed: Assumed, ranks: int, sent: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, shapes on ``meta`` take the way that tensors on a GPU take, one of ``ranks``.

    Kernels are those that a GPU gets, PyTorch's own attention is its fused one, masks hide as many as
    :func:`hidden_patches` and :func:`masked_words` say, and features come from all ranks: each collective is told to
    ``sent`` by its kind ("all_gather", "reduce_scatter") and its longer side.
    """
    from crossmask.kernels.cross_attention import dispatch as attention
    from crossmask.kernels.max_similarity import op as similarity
    from crossmask.kernels.soft_contrastive import dispatch as contrastive
    from crossmask.kernels.soft_cross_entropy import dispatch as cross_entropy
    from crossmask.kernels.topk_mask import dispatch as selection

    from ..models import dropping, text, vision
    from ..teacher import gather

    words = masked_words(recipe, assumed)

    def of_masked(cls: type[MaskedWords], masked: Tensor) -> MaskedWords:
        places = masked.new_empty((len(masked), words), dtype=torch.int64)
        return MaskedWords(places, places.new_empty((places.numel(),)))

    def visible(hidden: Tensor, count: int | None = None) -> dropping.Visible:
        rows, places = hidden.shape
        patches = (recipe.model.image.size // recipe.model.image.patch_size) ** 2
        gone = hidden_patches(recipe) if places == patches else words
        kept = places - gone if count is None else count
        return dropping.Visible(hidden.new_empty((rows, kept), dtype=torch.int64))

    def gathered(out: Tensor, rows: Tensor, **options: Any) -> None:
        sent("all_gather", out)

    def scattered(mine: Tensor, whole: Tensor, **options: Any) -> None:
        sent("reduce_scatter", whole)

    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for module in (attention, similarity, contrastive, cross_entropy, selection):
            put(module, "HAS_TRITON", True)
            put(module, "_pick", partial(_as_on_a_gpu, module._pick))
        put(MaskedWords, "of", classmethod(of_masked))
        put(vision, "keep_visible", visible)
        put(text, "keep_visible", visible)
        put(gather, "world_size", lambda group=None: ranks)
        put(gather, "_gather_into", gathered)
        put(gather, "_scatter_sum", scattered)
        put(F, "scaled_dot_product_attention", fused_attention)
        yield


def _as_on_a_gpu(pick: Callable[..., str], device_type: str, *more: Any) -> str:
    return pick("cuda" if device_type == "meta" else device_type, *more)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's attention as a GPU runs it: flash attention in 16 bits, the memory-efficient kernel in fp32 and where
    there is a mask, which is then made a bias of the queries' dtype."""
    ops, options = torch.ops.aten, {"scale": scale}
    if attn_mask is None and q.dtype is not torch.float32:
        found: Tensor = ops._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, **options)[0]
        return found
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    grad = torch.is_grad_enabled()
    attend = ops._scaled_dot_product_efficient_attention
    return attend(q, k, v, bias, grad, dropout_p, is_causal, **options)[0]
