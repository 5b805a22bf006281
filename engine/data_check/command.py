"""The command itself: reads, looks, and writes down what it found."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.pair_files import PairTable, read_pairs
from ..data.tokenizer import CaptionTokenizer, split_words
from ..errors import DataError, RecipeError, nearest
from ..failures import EXIT_STOPPED
from ..recipe import Recipe
from ..recipe_files import load_recipe, shipped_recipes
from .captions import captions_of, check_captions, common_captions
from .display import Watch, show
from .findings import Finding, Findings, Shown
from .images import ImageFacts, duplicates, first_rows, looks, near_duplicates, place_of, tell
from .sheet import draw_sheet
from .split_use import TRAIN, SplitUse, histogram, split_use, spread
from .writing import FORMATS, save, write_json

EXIT_CLEAN, EXIT_DEFECTS = 0, 1
GIANT = 0.25  # share of the pairs that one group has: from there on it is told of, ...
GIANT_LEAST = 20  # ... and from so many pairs


def check_data(
    source: str, overrides: Sequence[str], output: Path | None, json_file: Path | None, drawn: int
) -> tuple[int, list[str]]:
    """Check all of ``source``: what ``data.path`` takes, or a recipe. Prints what was found.

    Args:
        output: where a picture of some pairs, and of what is suspicious, is written; None draws nothing.
        json_file: where every finding is written.
        drawn: how many pairs the picture shows.

    Returns:
        The exit code, 0 where there is no defect, 1 where there are some, 130 where it was stopped; and lines to print.

    Raises:
        RecipeError, DataError: ``source`` cannot be opened at all, or the output not be written; one line.
    """
    for option, file, endings in (("--output", output, FORMATS), ("--json", json_file, (".json",))):
        if file is not None and file.suffix.lower() not in endings:
            raise RecipeError(f"{option}: {file} is no name for it; end it in one of {', '.join(endings)}")
    recipe = find_source(source, overrides)
    findings, stopped = Findings(), False
    look = Check(recipe, findings)
    try:
        with Watch().watching() as watch:
            try:
                look.run(watch)
            except KeyboardInterrupt:
                stopped = True
                look.compare_exactly()  # what was decoded; a moment, whatever its number
        facts = look.facts(stopped)
        path = recipe.data.path
        root = str(path if path and path.is_dir() else path and path.parent)
        show(facts, findings, root, Console())
        lines = []
        if json_file is not None:
            write_json(json_file, facts, findings)
            lines.append(str(json_file))
        if output is not None and look.pairs is not None:
            save(draw_sheet(look.pairs, look.rows, look.images, facts, findings, root, drawn, recipe.seed), output)
            lines.append(str(output))
        lines.append(_verdict(findings, look, stopped))
        code = EXIT_STOPPED if stopped else EXIT_DEFECTS if findings.defects else EXIT_CLEAN
        return code, lines
    finally:
        findings.close()


class Check:
    """All that is looked at; each step leaves what it found, so that the check may be stopped anywhere."""

    def __init__(self, recipe: Recipe, findings: Findings) -> None:
        self.recipe, self.findings = recipe, findings
        self.pairs: PairTable | None = None
        self.rows = np.zeros(0, np.int64)  # the first pair of each image
        self.images = ImageFacts(0)
        self.use: SplitUse | None = None
        self._facts: dict[str, Any] = {}
        self._compared = False

    def run(self, watch: Watch) -> None:
        section = self.recipe.data
        given = CaptionTokenizer.from_vocabulary(section.vocabulary) if section.vocabulary else None
        pairs, other = self._read()
        if pairs is None:
            return
        self.pairs, self.rows, self.images = pairs, first_rows(pairs), ImageFacts(len(pairs.images))
        watch.at("splitting the captions into words")
        split = split_words if given is None else given.split
        known: dict[str, str] = {}
        texts = []
        for caption in pairs.captions:
            words = " ".join(split(caption))
            texts.append(known.setdefault(words, words))
        self.use = use = split_use(section, pairs, texts, other)
        train = np.flatnonzero(use.part == TRAIN)
        table = check_captions(pairs, texts, train, given, self.recipe, self.findings.add)
        common_captions(pairs, texts, self.findings.add)
        words_of = np.array([text.count(" ") + 1 if text else 0 for text in texts])
        self._count(pairs, texts, use, words_of)
        if table is not None and given is not None:
            self._facts["unknown words"] = round(table.unknown_share(train), 4)
        del texts, known
        for number, (image, found) in enumerate(looks(pairs, self.rows), 1):
            self.images.take(image, found)
            tell(pairs, self.rows, image, found, self.findings.add)
            watch.at("decoding the images", number, len(pairs.images))
        watch.at("comparing the images")
        self.compare_exactly()
        for first, copy in near_duplicates(pairs, self.rows, self.images):
            self._same("near-identical images", first, copy, "looks the same as")

    def _read(self) -> tuple[PairTable | None, PairTable | None]:
        """All pairs, and those of ``data.validation_path`` among them."""
        section, tables = self.recipe.data, []
        for path, name in ((section.path, "data.path"), (section.validation_path, "data.validation_path")):
            if path is None:
                continue
            before = self.findings.counts.total()
            try:
                tables.append(read_pairs(path, section.image_root, name, complain=self.findings.complain))
            except DataError as error:
                if self.findings.counts.total() == before:
                    raise  # it cannot be opened at all
                self.findings.complain("nothing left", error)
        if not tables:
            return None, None
        if len(tables) == 1:
            return tables[0], None
        return tables[0].joined(tables[1]), tables[1]

    def _count(self, pairs: PairTable, texts: list[str], use: SplitUse, words: np.ndarray) -> None:
        number: dict[str, int] = {}
        caption = np.array([number.setdefault(text, len(number)) for text in texts], np.int64)
        both = np.unique(caption * len(pairs.images) + pairs.image)
        groups = np.bincount(use.group)
        sizes = {
            "images per caption": np.bincount(both // len(pairs.images)),
            "captions per image": np.bincount(pairs.image),
            "pairs per group": groups,
        }
        for name, found in sizes.items():
            self._facts[name] = histogram(found)
            self._facts[f"most {name}"] = int(found.max())
        self._facts["caption words"] = spread(words)
        self._facts["splits"] = use.sizes(pairs)
        if groups.max() >= max(GIANT_LEAST, GIANT * len(pairs)):
            row = int(np.argmax(use.group == groups.argmax()))
            where = pairs.where(row)
            line = f"{where}: its group has {groups.max():,} of the {len(pairs):,} pairs, which all match each other"
            self.findings.add(Finding("giant group", where, line))
        trained, evaluated = use.sides(pairs)
        for image in np.flatnonzero(trained & evaluated).tolist():
            source, where = place_of(pairs, self.rows, image)
            shown = (Shown(source, pairs.images[image], pairs.names[image]),)
            line = f"{where}: the image {pairs.names[image]} is trained on and evaluated on"
            self.findings.add(Finding("trained and validated", where, line, shown))

    def compare_exactly(self) -> None:
        """Tells of images with the same pixels, once."""
        pairs, use = self.pairs, self.use
        if pairs is None or use is None or self._compared:
            return
        self._compared = True
        trained, evaluated = use.sides(pairs)
        found = duplicates(self.images)
        captions = captions_of(pairs, [image for same in found for image in same])
        for first, *copies in found:
            for copy in copies:
                again = captions.get(first, set()) & captions.get(copy, set())
                kind = "repeated pair" if again else "duplicate image"
                self._same(kind, first, copy, "has the same pixels" + (" and caption" if again else "") + " as")
            same = [first, *copies]
            if trained[same].any() and evaluated[same].any():
                one = next(image for image in same if trained[image])
                other = next((image for image in same if evaluated[image] and image != one), one)
                if one != other:  # the same file on both sides was told of before
                    self._same("trained and validated", one, other, "is evaluated on, and has the pixels of one that is"
                               " trained on:")  # fmt: skip

    def _same(self, kind: str, first: int, copy: int, what: str) -> None:
        pairs = self.pairs
        assert pairs is not None
        (_, before), (_, where) = (place_of(pairs, self.rows, image) for image in (first, copy))
        shown = tuple(
            Shown(place_of(pairs, self.rows, image)[0], pairs.images[image], pairs.names[image])
            for image in (first, copy)
        )
        line = f"{where}: the image {pairs.names[copy]} {what} {pairs.names[first]} of {before}"
        self.findings.add(Finding(kind, where, line, shown))

    def facts(self, stopped: bool) -> dict[str, Any]:
        images, pairs = self.images, self.pairs
        found: dict[str, Any] = {
            "source": str(self.recipe.data.path),
            "complete": not stopped,
            "pairs": len(pairs) if pairs is not None else 0,
            "images": len(pairs.images) if pairs is not None else 0,
            "decoded": int(images.seen.sum()),
            "defects": self.findings.defects,
            "kinds": dict(self.findings.ordered()),
            **self._facts,
            "notices": list(pairs.notices) if pairs is not None else [],
        }
        if images.good.any():
            found["image sizes"] = {"width": spread(images.width[images.good]),
                                    "height": spread(images.height[images.good])}  # fmt: skip
            found["modes"] = dict(sorted(images.modes.items(), key=lambda item: -item[1]))
        return found


def find_source(source: str, overrides: Sequence[str]) -> Recipe:
    """A recipe of the pairs at a path, or the recipe that ``source`` is."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or (not path.exists() and source in shipped_recipes()):
        recipe = load_recipe(source, overrides)
        if recipe.data.source != "pairs":
            raise RecipeError(f"{source}: its data.source is {recipe.data.source}, which the check does not read; give"
                              " data.source=pairs data.path=FILE")  # fmt: skip
        return recipe
    if not path.exists() and "{" not in source:  # which a pattern of shards has
        close = nearest(source, shipped_recipes()) if not path.suffix else None
        hint = f"did you mean the recipe {close}?" if close else "give what data.path takes, or a recipe"
        raise RecipeError(f"{source}: no such file or folder; {hint}")
    with tempfile.TemporaryDirectory() as folder:  # as if a recipe had named it, so that overrides read as ever
        file = Path(folder, "check.yaml")
        file.write_text(json.dumps({"data": {"source": "pairs", "path": os.path.abspath(source)}}), "utf-8")
        return load_recipe(file, overrides)


def _verdict(findings: Findings, check: Check, stopped: bool) -> str:
    told = findings.counts.total() - findings.defects
    notes = f"; {told:,} to know of" if told else ""
    if stopped:
        count = len(check.pairs.images) if check.pairs is not None else 0
        return (
            f"stopped after {int(check.images.seen.sum()):,} of {count:,} images; defects so far: {findings.defects:,}"
        )
    return (f"defects: {findings.defects:,}" if findings.defects else "no defects") + notes
