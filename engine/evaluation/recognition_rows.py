"""``recognition`` of ``evaluation.json`` as rows, for the tables on the screen and in the report and for its chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEATURES = {"image": "image alone", "text": "text alone", "fused": "image and text fused"}  # by linear probes
OWN = "fine_tuned"  # by the classifier that was trained with the model
Scores = Mapping[str, Mapping[str, float]]  # by split: accuracy and macro_f1, percent


def recognised(level: Mapping[str, Any]) -> dict[str, Scores]:
    """What was asked for one level's classes and how well it knew them, where a run has measured it."""
    found = {FEATURES.get(name, name): probe["splits"] for name, probe in level.get("features", {}).items()}
    return found | ({"fine-tuned classifier": level[OWN]["splits"]} if OWN in level else {})


def by_what(levels: Mapping[str, Any]) -> str:
    """What recognised, in words."""
    probes = ["linear probes on the frozen model"] if any(level.get("features") for level in levels.values()) else []
    own = ["the fine-tuned classifier"] if any(OWN in level for level in levels.values()) else []
    return " and ".join(probes + own)


def recognition_table(levels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report's table: for each split a row for each of :func:`recognised` and one for the majority class, with
    accuracy and macro-F1 of each level, percent."""
    found = []
    for name in dict.fromkeys(name for of in levels.values() for name in of["splits"]):
        splits = [of["splits"].get(name) for of in levels.values()]
        rows: dict[str, list[Any]] = {row: [] for of in levels.values() for row in recognised(of)}
        for row, scores in rows.items():
            scores += [recognised(of).get(row, {}).get(name) for of in levels.values()]
        rows["majority class"] = [split and split["majority"] for split in splits]
        known = next(split for split in splits if split)
        for i, (row, scores) in enumerate(rows.items()):
            found.append(
                {
                    "split": f"({name}) {known['title']}", "size": f"{known['images']:,} images",
                    "first": i == 0, "span": len(rows), "kind": row,
                    "values": [value for one in scores for value in _both(one)],
                }
            )  # fmt: skip
    return found


def remarks(level: Mapping[str, Any]) -> list[str]:
    """What a reader should know of one level: what was unseen, unlabelled or rare."""
    lines = []
    for name, split in level["splits"].items():
        if split["unseen_images"]:
            unseen = split["unseen_classes"]
            lines.append(
                f"{name}: {split['unseen_images']:,} of {split['images']:,} images are of {unseen:,} unseen"
                f" class{'' if unseen == 1 else 'es'}: always wrong"
            )
        unknown = level.get(OWN, {}).get("splits", {}).get(name, {}).get("unseen_images", 0)
        if unknown > split["unseen_images"]:
            lines.append(f"{name}: the fine-tuned classifier was not taught the classes of {unknown:,} images")
        if split["unlabelled"]:
            lines.append(f"{name}: {split['unlabelled']:,} images without a class are left out")
        if not split["images"]:
            lines.append(f"{name}: no image has a class, so all figures are 0")
    if level["single"]:
        lines.append(f"{level['single']} of the classes have one training image")
    return lines


def all_remarks(levels: Mapping[str, Any]) -> list[str]:
    """Those of every level, which each begins with."""
    return [f"{name}: {line}" for name, level in levels.items() for line in remarks(level)]


def _both(scores: Mapping[str, float] | None) -> tuple[str, str]:
    return ("–", "–") if scores is None else (f"{scores['accuracy']:.1f}", f"{scores['macro_f1']:.1f}")
