"""Everything that is measured on held-out data: the quick probe of a running job and the final evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..data.base import EvaluationSplit, PairData
from ..data.batch import Batch
from ..recipe import Recipe
from .machine import describe_machine
from .masks import Look, mask_measures
from .matching import match_measures
from .retrieval import evaluate_split

PROBE_PAIRS = 128  # singles and scenes each, in a mid-run probe
MATCH_POOL = 128  # pairs among which ITM's hard negatives are drawn
MASK_FIELDS = (
    "attention_entropy", "key_attention_entropy", "on_drawing", "on_drawing_random", "on_named", "on_named_random",
    "word_visible", "word_visible_random", "pointing", "pointing_random",
)  # fmt: skip


def evaluate(
    model: Any,
    data: PairData,
    look: Look,
    recipe: Recipe,
    device: torch.device | str,
    full: bool,
    temperature: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure ``model``, as a rule the teacher, on held-out data. Neither its mode nor any random state is changed.

    Args:
        look: what the model sees of a batch, and the masks that the run's policy takes from it.
        full: ``False`` gives a probe, the flat dict of ``metrics.jsonl``, on a fixed sample of 128 scenes and 128
            single drawings of the first split; ``True`` gives ``evaluation.json`` with retrieval on every split.
        temperature: the student's learned one; the recipe's initial value when not given.
        progress: is told in a few words what is being measured.

    In a probe, fields without a prefix are of scenes where the source can compose them (there a mask has something to
    choose from) and of single drawings otherwise; ``singles_…`` are of single drawings. ``itm_loss`` is of single
    drawings, ``scenes_itm_loss`` of scenes.
    """
    tau = recipe.objectives.itc.temperature if temperature is None else float(temperature)
    with frozen(model, recipe.seed):
        count = recipe.evaluation.mask_samples if full else PROBE_PAIRS
        name, split = next(iter(data.splits.items()))
        progress("masks and matching")
        singles = sample(split, count, recipe.seed)
        scenes = data.scene_batch(name, count, recipe.seed)
        looks = {"singles": singles} if scenes is None else {"singles": singles, "scenes": scenes}
        matching = {kind: _matching(model, batch, tau, device, recipe.seed) for kind, batch in looks.items()}
        layer, words = recipe.masking.layer, 2048 if full else 512
        masks = {kind: mask_measures(model, batch, look, layer, device, words) for kind, batch in looks.items()}
        probe = _flat(masks, matching)
        if not full:
            return probe
        splits = {}
        for name, split in data.splits.items():
            splits[name] = retrieval(model, split, recipe, device, tau, progress)
    return {
        "splits": splits,
        "itm": {**matching["singles"], **({"scenes": matching["scenes"]} if "scenes" in matching else {})},
        "masks": {**probe, "samples": count},
        "machine": describe_machine(),
        "seed": recipe.seed,
    }


def retrieval(
    model: Any,
    split: EvaluationSplit,
    recipe: Recipe,
    device: torch.device | str,
    temperature: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """A split's entry of ``evaluation.json``, and word of how far it has come."""
    heading = f"retrieval: {split.title}"
    progress(heading)
    return evaluate_split(
        model, split, device, temperature, recipe.evaluation, recipe.seed, lambda text: progress(f"{heading}: {text}")
    )


def sample(split: EvaluationSplit, count: int, seed: int) -> Batch:
    """At most ``count`` pairs of a split, in a fixed random order, as one batch. The order matters: neighbours in a
    source resemble one another, and hard negatives are drawn among the pairs of a batch."""
    order = torch.randperm(split.image_count, generator=torch.Generator().manual_seed(seed))
    return split.take(order[:count].numpy())


def _matching(model: Any, batch: Batch, temperature: float, device: torch.device | str, seed: int) -> dict[str, float]:
    return match_measures(model, _pools(batch), temperature, device, seed)


def _pools(batch: Batch) -> Iterable[Batch]:
    for start in range(0, len(batch), MATCH_POOL):
        yield batch.rows(slice(start, start + MATCH_POOL))


def _flat(masks: dict[str, dict[str, float]], matching: dict[str, dict[str, float]]) -> dict[str, Any]:
    main = "scenes" if "scenes" in masks else "singles"
    probe: dict[str, Any] = {name: masks[main][name] for name in MASK_FIELDS if name in masks[main]}
    if main == "scenes":
        probe |= {f"singles_{name}": v for name, v in masks["singles"].items()}
    singles = matching["singles"]
    probe |= {"itm_loss": singles["loss"], "itm_prior": singles["prior"]}
    probe |= {"itm_accuracy": singles["accuracy"], "itm_auc": singles["auc"]}
    if "scenes" in matching:
        scenes = matching["scenes"]
        probe |= {"scenes_itm_loss": scenes["loss"], "scenes_itm_auc": scenes["auc"]}
    return probe


@contextmanager
def frozen(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, and a random state of its own: a run with probes equals one without."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
