"""``crossmask evaluate``: image–text retrieval of a trained model on any recipe's data."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .atomic import replace_file, writing_to
from .data import ALL, CaptionTokenizer, PairData, load_data
from .errors import CheckpointError, RecipeError
from .evaluation import describe_machine, print_summary, read_metrics
from .evaluation.captioner import prompts_of
from .evaluation.evaluate import frozen, further, retrieval
from .evaluation.recognition import classifier_missing
from .export_config import CONFIG, ExportConfig, Weights, build_model, read_config
from .exported import MODEL, TOKENIZER, load_exported, read_tensors
from .recipe import Recipe
from .recipe_files import load_recipe
from .training.manifest import STUDENT
from .training.stored import read_run

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A model with all that its evaluation needs besides data."""

    model: nn.Module
    tokenizer: CaptionTokenizer
    config: ExportConfig
    temperature: float
    learned: bool  # whether that is the temperature that training ended with
    trained_on: Path | None = None  # a run's ``data.path``


def evaluate_model(
    folder: Path,
    recipe: str,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    weights: Weights | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a recipe's pairs, print a table and write ``output``, whole or not at all.

    On which: :func:`load_data` with a tokenizer.

    The recipe says which data and how (``data``, ``evaluation``, ``seed``); the model's shape, image size,
    normalisation, vocabulary and longest text are its own.

    Args:
        folder: of a run, whose latest checkpoint is taken, of ``crossmask export`` or of ``crossmask convert``.
        weights: teacher or student; by default a run's teacher, an export as it is, a converted checkpoint's student.

    Raises:
        CheckpointError: no such model, or one without a tokenizer. RecipeError, DataError: a recipe or data that cannot
            be used, or nothing to evaluate on. One line each.
    """
    console = console or Console()
    if output is not None:
        _check_output(output)
    described, started = load_recipe(recipe, overrides), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _telling(console) as tell:
        trained = open_model(folder, weights, device, tell)
        data, notices = _open_data(described, trained)
        prompts_of(described, data)  # what is wrong with them is said before hours of work
        results: dict[str, Any] = {
            "model": str(folder),
            "weights": trained.config.weights,
            "step": trained.config.step,
            "recipe": described.name,
            "temperature": trained.temperature,
        }
        with frozen(trained.model, described.seed):
            results["splits"] = {
                name: retrieval(trained.model, split, described, device, trained.temperature, tell)
                for name, split in data.splits.items()
            }
            results |= further(trained.model, data, described, device, tell)
    results |= {
        "seed": described.seed,
        "minutes": (time.perf_counter() - started) / 60,
        "machine": describe_machine(),
        "notices": notices,
    }
    print_summary(results, console)
    for line in notices:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        with writing_to(output.absolute().parent):
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
            replace_file(output, json.dumps(results, indent=1))
        console.print(f"  {output}", highlight=False, markup=False, soft_wrap=True)
    return results


def _check_output(file: Path) -> None:
    """Whatever can be seen before hours of work."""
    if file.is_dir():
        raise RecipeError(f"--output: {file} is a folder; name a file such as {file / 'evaluation.json'}")
    existing = next(path for path in file.absolute().parents if path.exists())
    problem = None if existing.is_dir() else "is a file"
    try:
        if problem is None:
            tempfile.TemporaryFile(dir=existing).close()  # os.access knows nothing of mounts that are read-only
    except OSError as error:
        problem = f"may not be written to ({error.strerror})"
    if problem is not None:
        raise RecipeError(f"--output: {file} cannot be written, {existing} {problem}; name another")


def open_model(folder: Path, weights: Weights | None, device: torch.device, tell: Tell) -> Trained:
    """Reads the weights last, when all else fits."""
    if (folder / CONFIG).is_file():
        return _open_exported(folder, weights, device)
    if (folder / "recipe.yaml").is_file():
        return _open_run(folder, weights or "teacher", device, tell)
    what = f"neither {CONFIG} nor recipe.yaml is in it" if folder.is_dir() else "no such folder"
    raise CheckpointError(f"{folder}: {what}; give a folder of crossmask convert, crossmask export or a run")


def _open_exported(folder: Path, weights: Weights | None, device: torch.device) -> Trained:
    config = read_config(folder)
    if not (folder / TOKENIZER).is_file():
        converted = (config.albef or config.open_clip) is not None
        remedy = "convert it again with --vocabulary" if converted else "export it again"
        raise CheckpointError(f"{folder}: no {TOKENIZER} in it, so captions cannot be read; {remedy}")
    model, tokenizer, _ = load_exported(folder, device, weights=weights)
    assert tokenizer is not None
    temperature, learned = config.objectives.itc.temperature, False
    if config.weights == "student":  # which has the temperature, whichever of the two is evaluated
        temperature, learned = float(read_tensors(folder / MODEL)["temperature"]), True
    config = config.model_copy(update={"weights": weights or config.weights})
    return Trained(model, tokenizer, config, temperature, learned)


def _open_run(folder: Path, weights: Weights, device: torch.device, tell: Tell) -> Trained:
    own, step, found = read_run(folder, {STUDENT} if weights == "student" else (), tell=tell)
    tensors = found.teacher if found.student is None else found.student
    config = found.described(own, weights, step)
    built = build_model(config)
    built.load_state_dict(tensors, strict=False)  # tied weights come once
    model: nn.Module = built if weights == "teacher" else built.model  # type: ignore[assignment]
    logged = [r["temperature"] for r in read_metrics(folder) if r.get("step", 0) <= step and r.get("temperature")]
    temperature = logged[-1] if logged else config.objectives.itc.temperature
    model = model.to(device).eval().requires_grad_(False)
    return Trained(model, found.tokenizer, config, temperature, bool(logged), own.data.path)


def _open_data(recipe: Recipe, trained: Trained) -> tuple[PairData, list[str]]:
    """The recipe's data as the model reads them, and what the user should know of them."""
    config, asked = trained.config, recipe.data
    words = asked.max_words if "max_words" in asked.model_fields_set else config.max_words or asked.max_words
    limit = asked.max_tokens or 2 * words + 2
    tokens = min(limit, config.max_length)
    section = asked.model_copy(
        update={"max_words": words, "max_tokens": tokens, "normalisation": config.normalisation, "vocabulary": None}
    )
    # probes are fitted on what is trained on, and the majority class of a classifier is that of the training set
    probed = True if recipe.evaluation.recognition or recipe.objectives.recognition.weight > 0 else None
    read = recipe.model_copy(update={"data": section, "model": config.model})
    data = load_data(read, trained.tokenizer, training=probed)
    if not data.splits and not data.composed:
        raise RecipeError(
            f"{asked.path}: nothing is held out that a probe could be tested on; set data.validation_fraction above 0"
            " or give data.validation_path"
        )
    notices = []
    if recipe.objectives.recognition.weight > 0 and (why := classifier_missing(trained.model, data, recipe)):
        notices.append(f"objectives.recognition: {why}")
    paths = {path.resolve() for path in (asked.path, trained.trained_on) if path is not None}
    if ALL in data.splits and trained.trained_on is not None and len(paths) == 1:
        notices.append(f"the run was trained on pairs of {asked.path}: these recalls do not speak of new images")
    size, own = recipe.model.image.size, config.model.image.size
    if "size" in recipe.model.image.model_fields_set and size != own:
        notices.append(f"images read at the size that the model was trained at: {own} pixels, not {size}")
    if asked.max_tokens is not None and tokens < limit:
        notices.append(f"captions cut at the model's longest: {tokens} tokens, not {limit}")
    reranks = recipe.evaluation.rerank > 0 and config.model.captioner is None
    if not trained.learned and reranks and recipe.evaluation.rerank_score == "sum":
        notices.append(
            f"re-ranked with the temperature that training began with, {trained.temperature:g}: the export has no other"
        )
    if "normalisation" in asked.model_fields_set and asked.normalisation != config.normalisation:
        notices.append(f"pixels normalised as the model was trained: {config.normalisation}, not {asked.normalisation}")
    return data, notices


@contextmanager
def _telling(console: Console) -> Iterator[Tell]:
    """A line that changes on a terminal; elsewhere lines on stderr, so that stdout is the table alone."""
    if console.is_terminal:
        with console.status("reading the model") as status:
            yield status.update
    else:
        yield lambda text: print(text, file=sys.stderr, flush=True)
