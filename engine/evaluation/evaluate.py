"""Everything that is measured on held-out data: the quick probe of a running job and the final evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..data.base import EvaluationSplit, PairData
from ..data.batch import Batch
from ..errors import RecipeError
from ..recipe import Recipe
from .captioner import written
from .captioner_measures import captioner_measures, is_captioner
from .composed import composed_retrieval
from .machine import describe_machine
from .masks import Look, mask_measures
from .matching import match_measures
from .recognition import classifier_missing, recognition
from .retrieval import evaluate_split

PROBE_PAIRS = 128  # singles and scenes each, in a mid-run probe
MATCH_POOL = 128  # pairs among which ITM's hard negatives are drawn
CAPTIONER_FIELDS = (
    "caption_loss", "caption_loss_other", "reconstruction", "reconstruction_other", "reconstruction_mean",
    "low_on_drawing", "low_on_named",
)  # fmt: skip
MASK_FIELDS = (
    *CAPTIONER_FIELDS,
    "attention_entropy", "key_attention_entropy", "on_drawing", "on_drawing_random", "on_named", "on_named_random",
    "named_of_drawn", "named_of_drawn_random", "word_visible", "word_visible_random", "pointing", "pointing_random",
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
    drawings, ``scenes_itm_loss`` of scenes. ``b_…`` and ``c_…`` are of scenes of the further splits; in
    ``evaluation.json`` each split's are ``splits.NAME.masks``, with ``…_gain``: how many times what random masks get.
    A source whose samples are scenes has no single drawings: all fields are of scenes.
    """
    tau = recipe.objectives.itc.temperature if temperature is None else float(temperature)
    with frozen(model, recipe.seed):
        count = recipe.evaluation.mask_samples if full else PROBE_PAIRS
        name, split = next(iter(data.splits.items()))
        progress("masks and matching")
        scenes = data.scene_batch(name, count, recipe.seed)
        looks: dict[str, Batch] = {} if split.kind == "scene" else {"singles": sample(split, count, recipe.seed)}
        if scenes is not None:
            looks["scenes"] = scenes
        captioner = is_captioner(model)
        if recipe.model.system is not None:  # of which masks and matching are not known
            looks, scenes = {}, None
        matched = looks if matches(model) else {}
        matching = {kind: _matching(model, batch, tau, device, recipe.seed) for kind, batch in matched.items()}
        layer, words = recipe.masking.layer, 2048 if full else 512
        masks = {kind: mask_measures(model, batch, look, layer, device, words) for kind, batch in looks.items()}
        for kind, batch in looks.items() if captioner else ():
            masks[kind] |= captioner_measures(model, batch, look, recipe, device)
        probe = _flat(masks, matching) if masks else {}
        of_scenes = {name: masks["scenes"]} if scenes is not None else {}
        for other in list(data.splits)[1:]:
            others = data.scene_batch(other, count, recipe.seed) if looks else None
            if others is not None:
                of_scenes[other] = mask_measures(model, others, look, layer, device, words)
        if not full:
            return probe | {f"{n}_{key}": v for n in list(of_scenes)[1:] for key, v in of_scenes[n].items()}
        splits = {}
        for name, split in data.splits.items():
            splits[name] = retrieval(model, split, recipe, device, tau, progress)
            if name in of_scenes:
                splits[name]["masks"] = of_scenes[name] | gains(of_scenes[name])
        more = further(model, data, recipe, device, progress)
    main = matching.get("singles", matching.get("scenes", {}))
    return {
        "splits": splits,
        **more,
        "itm": {**main, **({"scenes": matching["scenes"]} if "scenes" in matching else {})},
        "masks": {**probe, "samples": count} if looks else {},
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
    section = recipe.evaluation
    if not matches(model):  # it has nothing to re-rank by
        section = section.model_copy(update={"rerank": 0})
    return evaluate_split(
        model, split, device, temperature, section, recipe.seed, lambda text: progress(f"{heading}: {text}")
    )


def further(
    model: Any,
    data: PairData,
    recipe: Recipe,
    device: torch.device | str,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What ``evaluation.json`` has beyond retrieval: ``recognition`` where the recipe asks for probes, or trains a
    classifier and the model has it, ``composed`` where the data have triplets, ``captioning`` and ``zero_shot`` as
    :func:`written` has them. For a model in evaluation mode."""
    found = written(model, data, recipe, device, progress)
    probes = recipe.evaluation.recognition
    own = recipe.objectives.recognition.weight > 0 and classifier_missing(model, data, recipe) is None
    if probes or own:
        found["recognition"] = recognition(model, data, device, recipe.seed, progress, probes=probes, classifier=own)
    if data.composed and not hasattr(model, "composed_feature"):
        raise RecipeError(
            f"data.source: {recipe.data.source} asks with image and words fused, and this model has no fusion encoder;"
            " take another model"
        )
    if data.composed:
        found["composed"] = composed_retrieval(model, data.composed, device, progress)
    return found


def matches(model: Any) -> bool:
    """Whether it has a match head: a captioner has none, nor need a model from outside."""
    return not is_captioner(model) and hasattr(model, "match_logits")


def gains(masks: Mapping[str, float]) -> dict[str, float]:
    """``NAME_gain`` of every measure that has a random expectation above 0: the measure over it."""
    pairs = {name: masks.get(f"{name}_random", 0.0) for name in masks}
    return {f"{name}_gain": masks[name] / random for name, random in pairs.items() if random > 0}


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
    if "singles" in masks and main == "scenes":
        probe |= {f"singles_{name}": v for name, v in masks["singles"].items()}
    singles = matching.get("singles", matching.get("scenes", {}))
    if singles:
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
