"""Formulas without a script: what stands between dollars, which GitHub renders too, becomes MathML in the page."""

from __future__ import annotations

import html as escapes
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def render(page: str, name: str) -> str:
    def change(found: re.Match[str]) -> str:
        text = escapes.unescape(found[3]).strip()
        display = found[2] == "["
        try:
            formula = convert(text, display="block" if display else "inline")
        except Exception as error:  # of latex2mathml: whatever it could not read
            raise PluginError(f"{name}: this is no formula that latex2mathml reads: {text!r} ({error})") from error
        return f'<div class="formula">{formula}</div>' if display else formula

    return FORMULA.sub(change, page)
