"""Docstrings as the site shows them: two arguments on one line are two, and names of classes are code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=`)")
SEVERAL = re.compile(r"^(?P<space>[ ]+)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: Any, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)

    def on_package(self, *, pkg: Any, **others: Any) -> None:
        griffe.DataclassesExtension().on_package(pkg=pkg, **others)  # reads the fields, for constructors' signatures
        below(pkg)


def below(parent: Any) -> None:
    """Public fields of each class as a table, with the comment that stands behind each in the source."""
    for member in [each for each in parent.members.values() if not each.is_alias]:
        if member.is_class:
            tabulate(member)
        if member.is_class or member.is_module:
            below(member)


def tabulate(cls: Any) -> None:
    fields = {name: each for name, each in cls.members.items() if each.is_attribute and not name.startswith("_")}
    fields = {name: each for name, each in fields.items() if "property" not in each.labels and each.docstring is None}
    if not fields:
        return
    lines = ["Attributes:"]
    for name, each in fields.items():
        lines += [f"    {name} ({each.annotation or 'Any'}): {comment(each)}"]
        del cls.members[name]
    text = cls.docstring.value + "\n\n" if cls.docstring else "\n"
    cls.docstring = griffe.Docstring(text + "\n".join(lines), parent=cls, parser="google")


def comment(attribute: Any) -> str:
    _, mark, told = attribute.source.partition("  # ")
    return ROLE.sub("", " ".join(told.split())) if mark and not told.startswith(("noqa", "type:")) else ""


def plain(text: str) -> str:
    """In the form that griffe reads: no roles of Sphinx, one argument an entry."""

    def one_each(found: re.Match[str]) -> str:
        first, *rest = found["names"].split(", ")
        lines = [f"{found['space']}{first}: {found['text']}"]
        return "\n".join([*(f"{found['space']}{name}: as `{first}`." for name in rest), *lines])

    head, argument_mark, body = text.partition("\nArgs:\n")
    if argument_mark:
        body = SEVERAL.sub(one_each, body)
    return ROLE.sub("", head + argument_mark + body)
