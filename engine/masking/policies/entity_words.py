"""Words from a list come first."""

from __future__ import annotations

from ...errors import RecipeError
from ..entities import Entities, EntityOptions
from ..plan import MaskContext, MaskPlan
from ..registry import Corpus, Policy, register_policy
from ..word_counts import prepared
from .random import random_patches


@register_policy("entity_words")
class EntityWordsMask(Policy):
    """Hide the named things of a caption, and other words only where those are too few for ``text_ratio``.

    Entity-level masking of ERNIE (Sun et al. 2019), and the entity-driven masked language modelling of MMCLIP (Wu et
    al. 2024): a word of the list is hidden with all of its pieces or not at all,

        hidden = entities in random order, then other words in random order, until text_ratio is reached.

    A reconstruction: the papers find entities by a recogniser, here the user lists them; MMCLIP hides all of them. So
    that an entity is never hidden in part, the last one may go beyond text_ratio by the rest of its pieces. Patches are
    hidden at random.
    """

    class Options(EntityOptions):
        pass

    options: Options
    entities: Entities | None = None

    def prepare(self, corpus: Corpus) -> None:
        if not self.options.given:
            raise RecipeError(
                f"mask policy {self.name!r} has no words: give options.words, a list, or options.file, a word a line"
            )
        self.entities = Entities(self.options.read(self.name), corpus, self.name)

    def __call__(self, context: MaskContext) -> MaskPlan:
        return MaskPlan(random_patches(context), prepared(self.entities, self.name).choose(context))
