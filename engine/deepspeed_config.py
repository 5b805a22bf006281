"""From a recipe to DeepSpeed's configuration, with nothing unknown, nothing contradictory and nothing left "auto".

Which keys DeepSpeed knows is asked of DeepSpeed itself: sections it describes by pydantic models answer by their
fields; for the rest it is handed a dictionary that remembers which keys it was asked for.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import RecipeError, nearest
from .recipe import Recipe
from .recipe_fields import as_model, describe_field
from .recipe_files import check_world, origin_of, read_deepspeed_json

KeyPath = tuple[str, ...]
Problem = tuple[str, str]  # dotted path, what is wrong with it

_OWN_OPTIMIZER = "the recipe's own section of that name describes it"
_NOT_USED = "this engine does not use it"
REFUSED = {
    "optimizer": _OWN_OPTIMIZER,
    "scheduler": "the recipe's optimizer section describes the schedule",
    **dict.fromkeys(
        ("autotuning", "data_efficiency", "dataloader_drop_last", "datastates_ckpt", "expert_parallel"), _NOT_USED
    ),
    **dict.fromkeys(("hybrid_engine", "managed_gradient_accumulation", "pipeline", "tensor_parallel"), _NOT_USED),
    **dict.fromkeys(("use_data_before_expert_parallelism", "weight_quantization"), _NOT_USED),
}


def build_deepspeed_config(recipe: Recipe, world_size: int, device_type: str) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize(config=…)``: ZeRO-2 and the recipe's values, the user's keys on top.

    Args:
        world_size: ranks of the run.
        device_type: "cuda" or "cpu".

    Raises:
        RecipeError: an unknown, contradictory or unsupported DeepSpeed key; a batch that does not divide; a
            precision that the device or the ZeRO stage cannot do.
    """
    if recipe.training.precision == "fp16" and device_type == "cpu":
        raise RecipeError("training.precision: fp16 does not run on a CPU; use bf16 or fp32")
    if recipe.deepspeed:
        check_deepspeed_keys(recipe)
    owned: dict[str, Any] = {
        "train_batch_size": recipe.training.batch_size,
        "train_micro_batch_size_per_gpu": check_world(recipe, world_size),
        **_owned(recipe),
    }
    given = _without_auto(_mapping(recipe))
    given = {"bf16" if key == "bfloat16" else key: value for key, value in given.items()}
    _refuse_contradictions(given, owned, "recipe", {})
    # DeepSpeed's own default clips gradients at 1.0, so the recipe's value is always written out.
    config = _merge({"zero_optimization": {"stage": 2}, "log_level": "error", **owned}, given)
    zero = config["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" or zero.get("cpu_offload"):
        # Offload otherwise insists on DeepSpeed's own CPU Adam and refuses torch's AdamW.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def check_deepspeed_keys(recipe: Recipe, source: str = "recipe", origins: Mapping[str, str] | None = None) -> None:
    """Refuse what can be refused of ``recipe.deepspeed`` before the number of ranks and the device are known.

    Imports DeepSpeed, which takes seconds. ``source`` and ``origins`` say where values came from, for the message.
    """
    given, origins = _mapping(recipe), origins or {}
    with quiet_deepspeed():
        problems = list(_problems(given))
    if problems:
        path, message = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecipeError(f"{origin_of(path, source, origins)}: {message}{more}")
    filled = _without_auto(given)
    _refuse_contradictions(filled, {"train_batch_size": recipe.training.batch_size, **_owned(recipe)}, source, origins)


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """No log lines below errors, such as DeepSpeed's on import; its messages reach users through this module."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _mapping(recipe: Recipe) -> dict[str, Any]:
    if isinstance(recipe.deepspeed, Path):
        return read_deepspeed_json(recipe.deepspeed, "recipe")
    return recipe.deepspeed


def _owned(recipe: Recipe) -> dict[str, Any]:
    """What the recipe decides and DeepSpeed's keys may only repeat."""
    precision = recipe.training.precision
    return {
        "gradient_accumulation_steps": recipe.training.accumulation_steps,
        "gradient_clipping": recipe.optimizer.gradient_clip,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
    }


_OWNERS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size / (ranks × training.accumulation_steps)",
    "gradient_accumulation_steps": "training.accumulation_steps",
    "gradient_clipping": "optimizer.gradient_clip",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "torch_autocast.enabled": "training.precision",
}


def _refuse_contradictions(
    given: Mapping[str, Any], owned: Mapping[str, Any], source: str, origins: Mapping[str, str]
) -> None:
    flat = dict(_flat(given))
    expected = {".".join(path): value for path, value in _flat(owned).items()}
    if expected["bf16.enabled"] or expected["fp16.enabled"]:
        expected["torch_autocast.enabled"] = False  # autocast keeps fp32 parameters: the other way to mixed precision
    for path, value in flat.items():
        name = ".".join(path).replace("bfloat16.", "bf16.")
        if name in expected and value != expected[name]:
            where = origin_of(f"deepspeed.{'.'.join(path)}", source, origins)
            raise RecipeError(
                f"{where}: deepspeed.{'.'.join(path)} ({_json(value)}) contradicts the recipe's {_OWNERS[name]}, which "
                f"makes it {_json(expected[name])}; leave it out of deepspeed"
            )


def _problems(given: Mapping[str, Any]) -> Iterator[Problem]:
    from deepspeed.runtime import config as deepspeed_runtime

    removed = getattr(deepspeed_runtime, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    removed_zero = getattr(deepspeed_runtime, "_REMOVED_ZERO_CONFIG_KEYS", {})
    gone: dict[KeyPath, str] = {(key,): message for key, message in removed.items()}
    gone |= {("zero_optimization", key): message for key, message in removed_zero.items()}
    found = list(_walk(given, (), gone))
    yield from found
    if not found:
        rest = _without_auto({key: value for key, value in given.items() if key not in _OWNERS})
        try:
            deepspeed_runtime.DeepSpeedConfig({**rest, "train_micro_batch_size_per_gpu": 1})
        except Exception as error:  # whatever else DeepSpeed finds, in its own words
            lines = str(error).strip().splitlines()
            yield "deepspeed", f"deepspeed: DeepSpeed refuses it: {lines[0] if lines else type(error).__name__}"


def _walk(given: Mapping[str, Any], path: KeyPath, gone: Mapping[KeyPath, str]) -> Iterator[Problem]:
    """Problems in one section of the user's mapping, unknown keys first."""
    model = _sections().get(path)
    known: dict[str, Any] = dict(_model_keys(model)) if model else _asked_for(path)
    if not known:  # DeepSpeed takes this value whole
        return
    for key, value in given.items():
        here = (*path, key)
        name = "deepspeed." + ".".join(here)
        if here in gone:
            yield name, f"{name}: {re.split('[;.] ', gone[here])[0]}; leave it out"
        elif not path and key in REFUSED:
            yield name, f"{name}: {REFUSED[key]}; leave it out"
        elif key not in known:
            usable = [k for k in known if (*path, k) not in gone and (path or k not in REFUSED)]
            close = nearest(key, usable)
            prefix = name[: -len(key)]
            hint = f"did you mean {prefix}{close}?" if close else f"known here: {', '.join(sorted(usable)[:12])}"
            yield name, f"unknown DeepSpeed key {name}; {hint}"
        elif value == "auto" and known[key] != "auto" and ".".join(here).replace("bfloat16", "bf16") not in _OWNERS:
            yield name, f'{name}: "auto" has no meaning here; give a value or leave it out'
        elif here in _sections() or isinstance(value, Mapping):
            if not isinstance(value, Mapping):
                yield name, f"{name}: {_json(value)} is not allowed; expected a section of keys"
            else:
                yield from _walk(value, here, gone)
        elif not model and value != "auto" and not _fits(value, known[key]):
            yield name, f"{name}: {_json(value)} is not allowed; expected {_kind(known[key])}"
    if model and len(path) == (2 if path[0] == "timers" else 1):  # nested models are validated with the outer one
        yield from _values_refused(model, given, path)


def _values_refused(model: type[BaseModel], given: Mapping[str, Any], path: KeyPath) -> Iterator[Problem]:
    fields = dict(_model_keys(model))
    try:
        model(**{k: v for k, v in given.items() if k in fields})
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            location = [str(part) for part in problem["loc"]]
            if problem["type"] == "extra_forbidden":
                continue  # told by name, with its nearest neighbour
            name = ".".join(("deepspeed", *path, *location))
            field = _field(model, location)
            if problem["type"] in ("value_error", "assertion_error") or field is None:
                yield name, f"{name}: {problem['msg'].partition(', ')[2] or problem['msg']}"
            else:
                yield name, f"{name}: {_json(problem['input'])} is not allowed; expected {describe_field(field)}"
    except Exception as error:  # deprecated next to its replacement, and the like
        yield ".".join(("deepspeed", *path)), f"deepspeed.{'.'.join(path)}: {error}"


@cache
def _sections() -> dict[KeyPath, type[BaseModel]]:
    """Sections that DeepSpeed describes by a pydantic model, nested ones included."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    outer: dict[KeyPath, type[BaseModel]] = {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("bf16",): DeepSpeedBF16Config,
        ("bfloat16",): DeepSpeedBF16Config,
        ("fp16",): DeepSpeedFP16Config,
        ("comms_logger",): CommsLoggerConfig,
        ("compile",): CompileConfig,
        ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
    }
    monitors = {name: as_model(field.annotation) for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    outer |= {(name,): model for name, model in monitors.items() if model}
    nested = {
        (*path, key): inner
        for path, model in outer.items()
        for name, field in model.model_fields.items()
        if (inner := as_model(field.annotation))
        for key in (name, field.alias)
        if key
    }
    return outer | nested


def _model_keys(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        for key in {name, field.alias or name}:
            yield key, field.default


def _field(model: type[BaseModel], location: list[str]) -> Any:
    field = None
    for part in location:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        inner = as_model(field.annotation) if field else None
        if inner is None:
            break
        model = inner
    return field


class _Asked(dict[str, Any]):
    """A dictionary that remembers the keys it was asked for, with the defaults they were asked with."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.asked: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return True  # an empty section would be skipped

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if self.asked.get(key) is None:
            self.asked[key] = default
        return super().get(key, default)

    def keys(self) -> Any:  # DeepSpeed asks ``KEY in config.keys()``
        return self


def _asked_for(path: KeyPath) -> dict[str, Any]:
    """Keys that DeepSpeed reads in a section without a model, with its defaults; empty where it reads none."""
    from deepspeed.runtime.config import DeepSpeedConfig

    section = _Asked()
    config: dict[str, Any] = section
    for key in reversed(path):
        config = _Asked({key: config})
    dict.__setitem__(config, "train_micro_batch_size_per_gpu", 1)
    with suppress(Exception):  # an empty section may be refused, after it was read
        DeepSpeedConfig(config)
    return section.asked


def _fits(value: Any, default: Any) -> bool:
    if default is None or value is None:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return not isinstance(default, str) or isinstance(value, (str, list))


def _kind(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    return "a number" if isinstance(default, (int, float)) else "text"


def _flat(values: Mapping[str, Any], path: KeyPath = ()) -> dict[KeyPath, Any]:
    found: dict[KeyPath, Any] = {}
    for key, value in values.items():
        found |= _flat(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
    return found


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _without_auto(given: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    """The mapping less the "auto" values that the recipe fills."""
    kept: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            kept[key] = _without_auto(value, (*path, key))
        elif value != "auto" or ".".join((*path, key)).replace("bfloat16", "bf16") not in _OWNERS:
            kept[key] = value
    return kept


def _json(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
