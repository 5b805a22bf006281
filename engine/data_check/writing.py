"""The files that a check leaves: every finding as JSON, and the picture."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..atomic import replace_file
from ..errors import RecipeError
from .findings import Findings

FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def save(picture: Image.Image, file: Path) -> None:
    """As the ending of ``file`` says.

    Raises:
        RecipeError: it cannot be written.
    """
    kind = {".jpg": "jpeg"}.get(file.suffix.lower(), file.suffix.lower()[1:])
    contents = io.BytesIO()
    picture.save(contents, format=kind)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, contents.getvalue())
    except OSError as error:
        raise RecipeError(f"--output: {file} cannot be written: {error.strerror or error}") from None


def write_json(file: Path, facts: dict[str, Any], findings: Findings) -> None:
    """An object of the facts, with every finding in its list ``findings``, a line each.

    Raises:
        RecipeError: it cannot be written.
    """

    def parts() -> Iterator[str]:
        yield json.dumps(facts, indent=1).removesuffix("\n}") + ',\n "findings": ['
        for number, line in enumerate(findings.lines()):
            yield (",\n  " if number else "\n  ") + line
        yield "\n ]\n}\n"

    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8") as stream:
                stream.writelines(parts())
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(f"--json: {file} cannot be written: {error.strerror or error}") from None
