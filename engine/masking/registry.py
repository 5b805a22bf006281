"""Mask policies by name. A policy is a small class; register yours with ``@register_policy("name")``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from ..data.tokenizer import split_words
from ..errors import RecipeError
from ..plugins import import_announced
from ..recipe import MaskingSection, Section
from ..registry import hint, read_options, told
from .corruption import FIRST_WORD_ID
from .plan import MaskContext, MaskPlan


@dataclass(frozen=True)
class Corpus:
    """The captions of the training set, for policies that count words once before the run."""

    captions: Sequence[Sequence[int]]  # token ids without special tokens
    vocabulary_size: int
    pieces: Callable[[str], Sequence[int]]  # the token ids of a word
    continuations: frozenset[int] = frozenset()  # ids of pieces that go on with a word, such as ##s
    specials: frozenset[int] = frozenset(range(FIRST_WORD_ID))  # ids of [PAD], [UNK] and so on, which are no words
    split: Callable[[str], Sequence[str]] = split_words  # a text as words


class Policy:
    """Base of the policies: its settings, and hooks that most of them leave alone."""

    name: ClassVar[str] = ""  # set by register_policy
    needs: tuple[str, ...] = ()  # optional inputs of MaskContext that it reads; an option may add some

    reads_thresholds: ClassVar[bool] = False  # of the recipe: image_threshold and text_threshold

    class Options(Section):
        """Settings beyond those that every policy shares: ``masking.options`` in a recipe."""

    def __init__(self, section: MaskingSection | None = None, options: Section | None = None) -> None:
        self.section = section or MaskingSection()
        self.options = options if options is not None else self.Options()

    def __call__(self, context: MaskContext) -> MaskPlan:
        raise NotImplementedError

    @property
    def views(self) -> int:
        """How many masks of one image a plan has; a captioner reads the second as its low patches."""
        return 1

    def prepare(self, corpus: Corpus) -> None:
        """Count whatever is to be counted in the training captions; called once, with the same corpus on every rank."""

    def network(self, width: int) -> nn.Module | None:
        """A module (B, P, ``width``) -> (B, P) that student and teacher carry; the teacher's gives ``patch_scores``."""
        return None

    def network_loss(self, scores: Tensor, hidden: Tensor, losses: Tensor) -> Tensor:
        """What the student's network is trained with: its ``scores``, the patches that were ``hidden`` and their
        reconstruction ``losses``, all (B, P); ``losses`` are detached, and 0 where nothing was hidden."""
        raise NotImplementedError


P = TypeVar("P", bound=type[Policy])
_policies: dict[str, type[Policy]] = {}


def register_policy(name: str) -> Callable[[P], P]:
    """Class decorator: make a policy known to recipes as ``masking.policy: name``."""

    def add(policy: P) -> P:
        if name in _policies:
            raise ValueError(f"mask policy {name!r} is already registered")
        policy.name = name
        _policies[name] = policy
        return policy

    return add


def policies() -> dict[str, type[Policy]]:
    """All registered policies by name."""
    return dict(_policies)


def find_policy(name: str) -> type[Policy] | None:
    """The policy of a name; installed packages are asked before the answer is None."""
    if name not in _policies:
        import_announced()
    return _policies.get(name)


def build_policy(section: MaskingSection, text: bool = False) -> Policy:
    """The policy that a recipe names; with ``text`` the one that chooses the words.

    Raises:
        RecipeError: no such policy or option; the message names the nearest one.
    """
    field = "text_policy" if text else "policy"
    name, given = (section.text_policy, section.text_options) if text else (section.policy, section.options)
    assert name is not None
    kind = find_policy(name)
    if kind is None:
        raise RecipeError(f"masking.{field}: unknown policy {name!r}; {told(hint(name, _policies))}")
    where = f"masking.{'text_options' if text else 'options'}"
    options = read_options(kind.Options, given, f"policy {name!r}", where)
    for field, value in options:
        if isinstance(value, Path) and not value.expanduser().is_file():
            raise RecipeError(f"{where}.{field}: no such file {value}; check the path")
    return kind(section, options)


def reads_words(section: MaskingSection) -> bool:
    """Whether masks are chosen by what patches read of the words, which takes a block of the model for it."""
    texts = (False, True) if section.text_policy else (False,)
    return any("word_attention" in build_policy(section, text=text).needs for text in texts)
