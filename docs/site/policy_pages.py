"""A page for each mask policy: what its docstring says, its options, what it needs, its picture, a recipe of it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from docstrings import plain
from recipe_page import accepts, default_of, escaped
from rooms import ROOT

from crossmask.engine.masking import Policy, policies
from crossmask.engine.masking.plan import PROVIDED_BY

OVERVIEW = ROOT / "docs/policies.md"
# settings without which a policy has nothing to show, or that show what is its own
SETTINGS: dict[str, dict[str, object]] = {
    "prior": {"prior": "contrast"},
    "entity_words": {"text_policy": "entity_words", "text_options": {"words": ["heart", "mobile phone"]}},
    "mmclip": {"options": {"words": ["heart", "mobile phone"]}},
    "attmask": {"options": {"mode": "hint"}},
    "sycoca": {"options": {"side": "high"}},
    "colour": {"options": {"colour": "green"}},
    "informask": {"text_policy": "informask", "text_options": {"rule": "rates"}},
    "pmi": {"text_policy": "pmi"},
    "term_weight": {"text_policy": "term_weight"},
    "difference": {"text_policy": "difference"},
    "time_variant": {"text_policy": "time_variant"},
}


def pages() -> dict[str, str]:
    return {f"policies/{name}.md": page(name) for name in sorted(policies())}


def modules() -> dict[str, str]:
    """By page: the file that the policy is in."""
    return {f"policies/{name}.md": source(policy) for name, policy in policies().items()}


def source(policy: type[Policy]) -> str:
    return str(Path(inspect.getfile(policy)).resolve().relative_to(ROOT))


def navigation() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Sections of the overview, each with its policies, in its order."""
    for heading, text in re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", OVERVIEW.read_text(), re.MULTILINE | re.DOTALL):
        if named := [name for name in re.findall(r"^\| \[?`(\w+)`", text, re.MULTILINE) if name in policies()]:
            yield heading, [(name, f"policies/{name}.md") for name in named]


@functools.cache
def words_alone() -> frozenset[str]:
    """Policies that say of themselves that they choose words, and hide patches at random."""
    return frozenset(name for name, policy in policies().items() if "Patches are hidden at random." in doc(policy))


def doc(policy: type[Policy]) -> str:
    return " ".join((inspect.getdoc(policy) or "").split())


def recipe(name: str) -> str:
    """Lines of a recipe that asks for the policy; the tests read them as one."""
    settings = SETTINGS.get(name, {})
    patches = {"policy": "syncmask" if "text_policy" in settings else name}
    masking = {**patches, "image_ratio": 0.5, "text_ratio": 0.3, **settings}
    return yaml.safe_dump({"masking": masking}, sort_keys=False, allow_unicode=True)


def page(name: str) -> str:
    policy = policies()[name]
    lead, _, rest = plain(inspect.getdoc(policy) or "").partition("\n\n")
    if not rest and lead.count("\n") == 0 and len(lead) > 90:
        rest = ""
    lines = [f"# {name}", "", f"**{' '.join(lead.split())}**", ""]
    lines += [f"![Three scenes and what {name} hides of them](../images/policies/{name}.png)", ""]
    lines += ["/// caption" if False else "", rest, ""]
    lines += ["## In a recipe", "", "```yaml", recipe(name).rstrip(), "```", ""]
    changed = f"masking.policy={name}" if name not in words_alone() else f"masking.text_policy={name}"
    given = SETTINGS.get(name, {})
    extra = " ".join(
        f"masking.{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
        for key, value in given.items()
        if not isinstance(value, dict) and key != "text_policy"
    )
    extra = f" {extra}" if extra else ""
    lines += ["Look at what it would hide before training with it:", "", "```bash"]
    lines += [f"crossmask data masks syncmask-emoji {changed}{extra} --output {name}.png", "```", ""]
    lines += ["## Options", "", *options(policy), "", "## What it reads", "", *needs(policy), ""]
    path = source(policy)
    code = inspect.getsource(policy)
    lines += [f'??? example "The whole policy: `{path}`"', "", "    ```python no-run", ""]
    lines += [f"    {line}".rstrip() for line in code.rstrip().splitlines()] + ["    ```", ""]
    lines += [
        "All policies: [the overview](../policies.md). One of your own: [adding a policy](../adding/policy.md).",
        "",
    ]
    return "\n".join(lines)


def options(policy: type[Policy]) -> list[str]:
    fields = policy.Options.model_fields
    if not fields:
        return ["None beyond those that all policies share: [`masking`](../reference/recipe.md#masking)."]
    rows = ["| option | accepts | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        rows += [f"| `{name}` | {accepts(field)} | {default_of(field)} | {escaped(field.description or '')} |"]
    owner = "`masking.text_options`, or `masking.options`" if policy.name in words_alone() else "`masking.options`"
    return [f"They go into {owner}; an unknown one is an error that names the nearest.", "", *rows]


def needs(policy: type[Policy]) -> list[str]:
    lines = []
    if policy.needs:
        lines += ["| input | provided by |", "|---|---|"]
        lines += [f"| `{name}` | {PROVIDED_BY[name].rstrip(',')} |" for name in policy.needs]
    else:
        lines += ["Nothing of a model: it works from the first step on, and in `choose_masks` without statistics."]
    further = []
    if policy.prepare is not Policy.prepare:
        further += ["counts the training captions once before the run, alike on every rank"]
    if policy.network is not Policy.network:
        further += ["has a network of its own, which student and teacher carry and reconstruction losses train"]
    if policy.reads_thresholds:
        further += ["reads `masking.image_threshold` and `masking.text_threshold`"]
    if further:
        lines += ["", *(f"* It {each}." for each in further)]
    return lines
