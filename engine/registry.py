"""Parts by name: systems, objectives and data sources that a recipe may ask for, and how others bring theirs.

A part is a class or a function under a decorator, ``@register_system("name")`` for instance. It is known as soon as
the module that it stands in has been imported: a recipe names such modules in ``plugins`` (plugins.py), and installed
packages announce theirs by the entry point group ``crossmask.parts``. Importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import ValidationError

from .errors import RecipeError, nearest
from .plugins import import_announced
from .recipe_fields import describe
from .recipe_section import Section

if TYPE_CHECKING:
    from .recipe import Recipe

T = TypeVar("T")
HINT = "plugins names the modules that register further ones"


class NoOptions(Section):
    """Of a part that has no settings."""


@dataclass(frozen=True)
class Part(Generic[T]):
    """What was registered under a name."""

    name: str
    made: T
    options: type[Section]
    reads_teacher: bool = False  # an objective: whether the teacher has to look for it


class Registry(Generic[T]):
    """Parts of one kind, each under a name of its own."""

    def __init__(self, kind: str, built_in: Iterable[str] = ()) -> None:
        """``kind`` is what a part is called in messages; ``built_in`` are names that are taken."""
        self.kind, self.built_in = kind, tuple(built_in)
        self._parts: dict[str, Part[T]] = {}

    def add(self, name: str, made: T, options: type[Section] = NoOptions, reads_teacher: bool = False) -> None:
        """ValueError where the name is taken, unless by the same object of a module that is imported once more."""
        known = self._parts.get(name)
        if name in self.built_in or (known is not None and _origin(known.made) != _origin(made)):
            raise ValueError(f"{self.kind} {name!r} is already registered")
        self._parts[name] = Part(name, made, options, reads_teacher)

    def names(self) -> list[str]:
        """All that can be asked for now."""
        return sorted({*self.built_in, *self._parts})

    def knows(self, name: str) -> bool:
        """Whether there is such a part; installed packages are asked before the answer is no."""
        if name not in self._parts and name not in self.built_in:
            import_announced()
        return name in self._parts or name in self.built_in

    def find(self, name: str, where: str) -> Part[T]:
        """The part of a name. RecipeError, one line, where there is none; ``where`` is the field that names it."""
        if not self.knows(name) or name in self.built_in:
            raise RecipeError(f"{where}: unknown {self.kind} {name!r}; {told(hint(name, self.names()))}")
        return self._parts[name]

    def options_of(self, name: object) -> type[Section] | None:
        """What a part's options are; None where it is not known, or has none that were registered."""
        part = self._parts.get(name) if isinstance(name, str) and self.knows(name) else None
        return part.options if part else None

    def options(self, name: str, given: Mapping[str, Any], where: str) -> Any:
        """A part's options, validated. RecipeError, one line, for what it has not or does not take."""
        return read_options(self.find(name, where).options, given, f"{self.kind} {name!r}", where)


def read_options(kind: type[Section], given: Mapping[str, Any], whose: str, where: str) -> Any:
    """``given`` as ``kind``; RecipeError, one line, that names the field and what it accepts."""
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = list(kind.model_fields)
            told = hint(option, known) if known else "it has none"
            raise RecipeError(f"{where}: {whose} has no option {option!r}; {told}") from None
        if first["type"] == "value_error":
            raise RecipeError(f"{where}: {first['ctx']['error']}") from None
        if first["type"] == "missing":
            raise RecipeError(f"{where}.{option} is missing; expected {describe(kind, option)}") from None
        raise RecipeError(
            f"{where}.{option}: {first['input']!r} is not allowed; expected {describe(kind, option)}"
        ) from None


def hint(word: str, known: Iterable[str]) -> str:
    """The nearest known name, or all of them."""
    known = sorted(known)
    close = nearest(word, known)
    if close:
        return f"did you mean {close!r}?"
    return f"known: {', '.join(known)}" if known else "none is registered"


def told(close: str) -> str:
    """A hint, and how further names come to be known."""
    return f"{close}{' ' if close.endswith('?') else '; '}{HINT}"


def _origin(made: Any) -> tuple[str, str]:
    return str(getattr(made, "__module__", "")), str(getattr(made, "__qualname__", repr(made)))


SOURCES = ("emoji", "pairs", "scenes", "composed_emoji", "fashioniq")  # data.source's own

systems: Registry[Any] = Registry("system")
objectives: Registry[Any] = Registry(
    "objective", ("itc", "itm", "mlm", "mim", "caption", "tg_mim", "composed", "recognition", "mask_network", "loss")
)
sources: Registry[Any] = Registry("source", SOURCES)


def unknown_parts(recipe: Recipe) -> Iterator[tuple[str, RecipeError]]:
    """The recipe's field, and what is wrong with the registered part that it names, or with its options."""
    data, model = recipe.data, recipe.model
    wanted: list[tuple[str, Registry[Any], str | None, dict[str, Any], str]] = [
        ("data.source", sources, data.source if data.source not in SOURCES else None, data.options, "data.options"),
        ("model.system", systems, model.system, model.options, "model.options"),
    ]
    for name, own in recipe.objectives.own.items():
        where = f"objectives.own.{name}"
        wanted.append((where, objectives, name, own.options, f"{where}.options"))
    for where, registry, asked, given, options in wanted:
        field = where
        try:
            if asked is not None:
                registry.find(asked, where)
                field = options
                registry.options(asked, given, options)
        except RecipeError as error:
            yield field, error


C = TypeVar("C", bound=Callable[..., Any])


def register_system(name: str) -> Callable[[C], C]:
    """Class decorator: make a :class:`~crossmask.engine.models.system.System` known to recipes as ``model.system``.

    Its ``Options``, a :class:`Section`, are ``model.options``.
    """

    def add(system: C) -> C:
        systems.add(name, system, getattr(system, "Options", NoOptions))
        return system

    return add


def register_objective(
    name: str, options: type[Section] = NoOptions, *, reads_teacher: bool = False
) -> Callable[[C], C]:
    """Decorator: make a function known to recipes as ``objectives.own: {name: {weight: 1.0, options: {…}}}``.

    It takes an :class:`~crossmask.engine.objectives.ObjectiveView` and its ``options``, and returns one scalar, or
    named scalars: the one under ``name`` is the loss, the others are measures that are logged. ``reads_teacher``: it
    reads ``view.teacher``, for which the teacher of a plain contrastive model has to look.
    """

    def add(objective: C) -> C:
        objectives.add(name, objective, options, reads_teacher)
        return objective

    return add


def register_source(name: str, options: type[Section] = NoOptions) -> Callable[[C], C]:
    """Decorator: make data known to recipes as ``data.source: name``, with ``data.options``.

    What it decorates is called with the recipe, the options and a tokenizer, and returns a
    :class:`~crossmask.engine.data.PairData`. The tokenizer is that of a trained model, which is to be evaluated on the
    data, and None where they are trained on.
    """

    def add(source: C) -> C:
        sources.add(name, source, options)
        return source

    return add
