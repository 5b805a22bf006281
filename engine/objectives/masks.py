"""A run's masks: the planner, and what it reads of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crossmask.kernels import AttentionStatistics, max_similarity

from ..data import PairData
from ..data.batch import Batch
from ..errors import RecipeError
from ..masking import Corpus, Draws, MaskContext, MaskPlan, MaskPlanner, check_masking
from ..masking.priors import PatchPriors
from ..models import Encoded, VisionLanguageModel
from ..models.captioner import CaptioningModel
from ..models.fusion import KeyValue
from ..recipe import Recipe


@dataclass(frozen=True)
class Seen:
    """Intact pairs through a model, as far as masks are chosen from them."""

    image: Encoded
    text: Encoded
    statistics: AttentionStatistics | None = None
    fused_tokens: Tensor | None = None  # (B, M, width) of the words that were asked for
    word_attention: Tensor | None = None  # (B, L): what the patches read of the words, where a block for it is there
    similarities: Tensor | None = None  # (B, P) float32 of a captioner, as MaskContext has them


class RunMasks:
    """From a batch and a model to the plan of a recipe.

    Raises:
        RecipeError: the recipe's policy, its options or its prior cannot be used, or its policy needs an input that the
            recipe does not provide.
    """

    def __init__(self, recipe: Recipe, data: PairData) -> None:
        section, image = recipe.masking, recipe.model.image
        self.recipe = recipe
        tokenizer = data.tokenizer
        self.planner = MaskPlanner(section, tokenizer.mask_id, tokenizer.vocabulary_size, tokenizer.word_ids)
        grid = (image.size // image.patch_size,) * 2
        self.priors = None if section.prior is None else PatchPriors(section.prior, grid, data.train_size)
        check_masking(recipe)
        source = recipe.data.source
        single = source == "pairs" or (source == "emoji" and recipe.data.scenes.fraction == 0)
        if self.priors is not None and self.priors.table is not None and (recipe.data.augment > 0 or not single):
            raise RecipeError(
                f"masking.prior: {section.prior} has a row for every sample, of the image as it lies; set data.augment"
                " and data.scenes.fraction to 0, or give one row for all"
            )
        if self.planner.counts:
            self.planner.prepare(corpus(data))

    def network(self) -> nn.Module | None:
        """A fresh network of the policy, for a model to carry; most policies have none."""
        return self.planner.policy.network(self.recipe.model.image.width)

    @property
    def attention(self) -> bool:
        """Whether the image tower's own attention is read."""
        return "image_attention" in self.planner.needs

    @property
    def statistics(self) -> bool:
        """Whether the fusion encoder's cross-attention is read."""
        return "statistics" in self.planner.needs

    @property
    def word_attention(self) -> bool:
        """Whether the block in which patches read the words is read."""
        return "word_attention" in self.planner.needs

    def add_priors(self, batch: Batch) -> Batch:
        """A training batch, still on the CPU, with its patches' weights."""
        if self.priors is None:
            return batch
        return replace(batch, priors=self.priors(batch, training=True))

    def see(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        image: Encoded | None = None,
        text: Encoded | None = None,
        keys: Sequence[KeyValue] | None = None,
        rows: Callable[[Seen], Tensor] | None = None,
    ) -> Seen:
        """A batch through the model; what has been computed already is not computed again.

        ``rows`` makes the places (B, M) int64 of the words whose fused tokens are wanted, of all else that was seen;
        default none are.
        """
        if image is None:
            image = model.encode_image(batch.images, attention=self.attention)
        if text is None:
            text = model.encode_text(batch.token_ids, batch.token_mask)
        if self.recipe.model.captioner is not None:
            return Seen(image, text, similarities=self._similarities(model, batch, image, text))
        attention = model.word_attention(image.tokens, text.tokens, batch.maskable) if self.word_attention else None
        seen = Seen(image, text, word_attention=attention)

        def wanted(statistics: AttentionStatistics) -> Tensor:
            return batch.token_ids[:, :0] if rows is None else rows(replace(seen, statistics=statistics))

        fused = model.fuse(
            text.tokens,
            batch.token_mask,
            model.project_image(image.tokens) if keys is None else keys,
            statistics_layer=self.recipe.masking.layer,
            query_mask=batch.maskable,
            rows=wanted,
        )
        return replace(seen, statistics=fused.statistics, fused_tokens=None if rows is None else fused.tokens)

    @staticmethod
    def _similarities(
        model: VisionLanguageModel | CaptioningModel, batch: Batch, image: Encoded, text: Encoded
    ) -> Tensor:
        patches, words = model.patch_features(image.tokens), model.word_features(text.tokens)
        return max_similarity(patches, words, batch.maskable)

    @torch.no_grad()
    def plan(self, model: VisionLanguageModel | CaptioningModel, batch: Batch, seen: Seen, step: int) -> MaskPlan:
        """What to hide in a batch at a step of the run."""
        return self.planner(self.context(model, batch, seen, step))

    def context(self, model: VisionLanguageModel | CaptioningModel, batch: Batch, seen: Seen, step: int) -> MaskContext:
        needs = self.planner.needs
        given: dict[str, Any] = {}
        if "similarities" in needs:
            found = seen.similarities
            given["similarities"] = self._similarities(model, batch, seen.image, seen.text) if found is None else found
        if "caption_similarity" in needs:
            patches = model.patch_features(seen.image.tokens)
            given["caption_similarity"] = (patches @ seen.text.feature[:, :, None])[:, :, 0]
        if "patch_scores" in needs and not isinstance(model, CaptioningModel) and model.mask_network is not None:
            given["patch_scores"] = model.score_patches(seen.image.tokens)
        if "priors" in needs and self.priors is not None:
            given["priors"] = batch.priors if batch.priors is not None else self.priors(batch, training=False)
        return MaskContext(
            batch.token_ids,
            batch.token_mask,
            batch.maskable,
            model.patch_grid,
            Draws(self.recipe.seed, step, batch.index),
            step=step,
            progress=min(1.0, step / self.recipe.training.max_steps),
            statistics=seen.statistics,
            word_attention=seen.word_attention,
            image_attention=seen.image.attention,
            image_features=seen.image.tokens[:, 1:],
            **given,
        )


def corpus(data: PairData) -> Corpus:
    """The training captions as token ids."""
    tokenizer = data.tokenizer
    split, pieces, size = tokenizer.split, tokenizer.pieces, tokenizer.vocabulary_size
    captions = [[i for word in split(text) for i in pieces(word)] for text in data.training_captions()]
    continuations = [i for i, name in enumerate(tokenizer.words(range(size))) if name.startswith("##")]
    return Corpus(captions, size, pieces, frozenset(continuations), tokenizer.special_ids, split)
