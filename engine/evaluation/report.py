"""``report.html``: one self-contained file that says what a run reached, made from its folder alone."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..atomic import replace_file, writing_to
from ..errors import CheckpointError
from . import plots
from .batch_pictures import read_batches
from .caption_gallery import SCORES as SCORES_OF_CAPTIONS
from .caption_gallery import caption_rows, class_rows, read_captions
from .composed import COMPOSED_CUTS
from .composed_gallery import ASKED_WITH, composed_card, composed_rows, read_composed
from .mask_history import history, read_snapshots
from .matching import ITM_PRIOR
from .orders import SCORES, orders
from .ranking import CUTS, rsum
from .recognition_rows import all_remarks, by_what, recognition_table
from .reconstructions import read_reconstructions
from .run_folder import Record, Run, read_run, series
from .summary import legend

TEMPLATES = Path(__file__).parent / "templates"
EMOJI_SOURCES = (
    ("Noto Emoji and its earlier blobs", "Google", "Apache-2.0"),
    ("Twemoji", "Twitter and contributors", "CC-BY-4.0"),
    ("EmojiOne 2.2.7 / Emojitwo", "Ranks.com and contributors", "CC-BY-4.0"),
    ("Fluent Emoji, with shading and flat", "Microsoft", "MIT"),
    ("FxEmojis", "Mozilla", "Apache-2.0"),
    ("Streamline Emojis", "Streamline", "CC-BY-4.0"),
    ("names and keywords", "Unicode CLDR, through emojibase", "Unicode-3.0, MIT"),
)


def build_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run folder and return its path. Missing pieces are named in it, not an error.

    Raises:
        CheckpointError: not a run folder, or one that cannot be written.
    """
    import jinja2

    run = read_run(run_dir)
    splits = run.evaluation.get("splits", {})
    recognition = run.evaluation.get("recognition", {})
    snapshots = read_snapshots(run.path)
    source = run.recipe.get("data", {}).get("source", "emoji") if run.recipe else ""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    html = environment.get_template("report.html.j2").render(
        run=run,
        name=run.recipe.get("name") or run.path.resolve().name,
        folder=run.path.resolve().name,
        state=_state(run),
        facts=_facts(run),
        cards=_cards(run),
        selectivity=_selectivity(run),
        losses=_losses(run),
        retrieval=_svg(plots.retrieval_chart(splits), "retrieval"),
        sampled=_svg(plots.retrieval_chart(splits, sampled=True), "sampled"),
        sampled_size=next((1 + split["sampled"]["negatives"] for split in splits.values() if split.get("sampled")), 0),
        rows=_rows(splits),
        legend=legend(splits),
        cuts=CUTS,
        pairs=_pairs(run),
        history=history(snapshots),
        batches=read_batches(run.path),
        captions=read_captions(run.path),
        caption_rows=caption_rows(run.evaluation),
        caption_scores=list(SCORES_OF_CAPTIONS.values()),
        class_rows=class_rows(run.evaluation),
        recognition=_svg(plots.recognition_chart(recognition), "recognition"),
        recognition_rows=recognition_table(recognition),
        recognition_levels=[f"{name}, {level['classes']:,} classes" for name, level in recognition.items()],
        recognised_by=by_what(recognition),
        remarks=all_remarks(recognition),
        composed=read_composed(run.path),
        composed_rows=composed_rows(run.evaluation),
        composed_cuts=COMPOSED_CUTS,
        asked_with=list(ASKED_WITH.values()),
        reconstructions=read_reconstructions(run.path),
        history_grid=snapshots[0]["grid"] if snapshots else [1, 1],
        scale=plots.heat_scale([pair["attention"] for pair in run.gallery.get("pairs", [])]),
        grid=run.gallery.get("grid", [1, 1]),
        gallery_split=run.gallery.get("split", ""),
        measures=_measures(run),
        versions=(run.evaluation.get("machine") or {}).get("versions", {}),
        sources=EMOJI_SOURCES if source in ("emoji", "scenes", "composed_emoji") else (),
    )
    path = run.path / "report.html"
    with writing_to(run.path):
        replace_file(path, html)
    return path


def save_pictures(run_dir: Path | str, dest: Path | str) -> list[Path]:
    """Write ``curves.png``, ``retrieval.png``, ``sampled.png`` and ``masks.png`` for a README; not without data.

    Raises:
        CheckpointError: not a run folder, nothing in it to draw, or ``dest`` cannot be written.
    """
    from .mask_picture import mask_picture

    run, folder = read_run(run_dir), Path(dest)
    pictures = {
        "curves.png": plots.overview(run.train, run.probes),
        "retrieval.png": plots.retrieval_chart(run.evaluation.get("splits", {})),
        "sampled.png": plots.retrieval_chart(run.evaluation.get("splits", {}), sampled=True),
        "masks.png": mask_picture(run.path, run.gallery),
    }
    if not any(pictures.values()):
        raise CheckpointError(f"{run.path} has no curves, no evaluation and no gallery to draw; train it first")
    drawn = {folder / name: plots.to_png(figure) for name, figure in pictures.items() if figure is not None}
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, picture in drawn.items():
            replace_file(path, picture)
    return list(drawn)


def _svg(figure: Any, salt: str) -> str:
    return "" if figure is None else plots.to_svg(figure, salt)


def _state(run: Run) -> dict[str, str]:
    total = run.recipe.get("training", {}).get("max_steps")
    state = str(run.status.get("state", "finished" if run.evaluation else "unknown"))
    step = int(run.status.get("step", run.last_step))
    words = f"{state} after {step:,} steps" if step and state != "running" else state
    if total and step and step < total:
        words = f"{state} at step {step:,} of {total:,}"
    return {"name": state, "words": words, "reason": str(run.status.get("reason") or "")}


def _facts(run: Run) -> list[tuple[str, str]]:
    machine, last = run.evaluation.get("machine") or {}, run.train[-1] if run.train else {}
    minutes = run.evaluation.get("minutes") or (last["time_s"] / 60 if last.get("time_s") else None)
    objectives = run.recipe.get("objectives", {})
    on = [n.upper() for n in ("itc", "itm", "mlm", "mim") if objectives.get(n, {}).get("weight", 1.0)]
    on += [words for n, words in FURTHER_TERMS.items() if objectives.get(n, {}).get("weight")]
    training = run.recipe.get("training", {})
    facts = [
        ("took", f"{minutes:.1f} min" if minutes else ""),
        ("machine", machine.get("summary", "")),
        ("ranks", str(machine.get("ranks", "") or "")),
        ("seed", str(run.evaluation.get("seed", run.recipe.get("seed", "")))),
        ("batch", f"{training['batch_size']:,}" if "batch_size" in training else ""),
        ("precision", str(training.get("precision", ""))),
        ("objectives", " + ".join(on) if objectives else ""),
        ("masks", str(run.recipe.get("masking", {}).get("policy", ""))),
        ("time", _time_shares(run.evaluation.get("seconds_by_part") or {})),
    ]
    return [(k, v) for k, v in facts if v]


def _time_shares(seconds: Mapping[str, float]) -> str:
    """Where the wall time of training went, in words."""
    total = sum(seconds.values())
    if not total:
        return ""
    shares = {"model": sum(seconds.get(part, 0.0) for part in ("teacher", "student", "backward", "optimizer"))}
    shares |= {part: seconds.get(part, 0.0) for part in ("data", "ema", "logging", "probes", "checkpoints")}
    return ", ".join(f"{name} {100 * value / total:.1f} %" for name, value in shares.items())


def _cards(run: Run) -> list[dict[str, Any]]:
    cards = [composed_card(run.evaluation)] if run.evaluation.get("composed") else []
    for name, split in run.evaluation.get("splits", {}).items():
        r1, luck = split["i2t"]["r1"], split["chance_r1"]
        best, how = r1, "features alone"
        if split.get("reranked") and split["reranked"]["i2t"]["r1"] > r1:
            by = SCORES[split["reranked"].get("score", "sum")]
            best, how = split["reranked"]["i2t"]["r1"], f"{by}, {r1:.1f} % by ITC alone"
        cards.append(
            {
                "title": f"({name}) {split['title']}",
                "label": f"image→text R@1, {how}",
                "value": f"{best:.1f}",
                "unit": "%",
                "note": f"chance {luck:.2g} %"
                + (f", {best / luck:,.0f} times that" if best > luck > 0 else "")
                + f"; sum of all six recalls {max(rsum(split), rsum(split.get('reranked') or split)):.1f}",
                "mood": _mood(best - luck, max(1.0, luck)),
            }
        )
    probes, masks = run.probes, {**(run.probes[-1] if run.probes else {}), **(run.evaluation.get("masks") or {})}
    itm = masks.get("itm_loss") or (run.evaluation.get("itm") or {}).get("loss")
    if itm is not None:
        cards.append(
            {
                "title": "Matching", "label": "ITM loss on held-out pairs", "value": f"{itm:.3f}", "unit": "nats",
                "note": f"nothing learned: {ITM_PRIOR:.4f}", "mood": _mood(ITM_PRIOR - itm, 0.02),
            }
        )  # fmt: skip
    if masks.get("on_drawing") is not None:
        # An untrained teacher may already prefer drawings to blank paper; where measured, it is the one to beat.
        untrained = next((p.get("on_drawing") for p in probes if p.get("step") == 0), None)
        luck = masks["on_drawing_random"]
        note = f"random masks {100 * luck:.1f} %"
        if untrained is not None:
            note += f", untrained teacher {100 * untrained:.1f} %"
        gain = 100 * (masks["on_drawing"] - max(luck, untrained or 0.0))
        cards.append(
            {
                "title": "Masks", "label": "masked patches on a drawing", "value": f"{100 * masks['on_drawing']:.1f}",
                "unit": "%", "note": note, "mood": _mood(gain, 2.0),
            }
        )  # fmt: skip
    if masks.get("attention_entropy") is not None:
        now, (steps, values) = masks["attention_entropy"], series(probes, "attention_entropy")
        note = f"{values[0]:.3f} at step {steps[0]:,.0f}; 1 is uniform" if values else "1 is uniform"
        cards.append(
            {
                "title": "Attention", "label": "entropy, share of maximum", "value": f"{now:.3f}", "unit": "",
                "note": note, "mood": _mood((values[0] if values else 1.0) - now, 0.02),
            }
        )  # fmt: skip
    return cards


def _mood(gain: float, clear: float) -> str:
    return "good" if gain >= clear else "bad" if gain <= 0 else "even"


def _selectivity(run: Run) -> list[dict[str, str]]:
    found = []
    for i, chart in enumerate(plots.SELECTIVITY):
        svg = _svg(plots.probe_chart(chart, run.probes), f"probe{i}")
        if not svg:
            continue
        form: Callable[[float], str] = (lambda v: f"{100 * v:.1f}\u00a0%") if chart.percent else (lambda v: f"{v:.3f}")
        line = next(line for line in chart.lines if not line.dashed and series(run.probes, line.field)[0])
        values = series(run.probes, line.field)[1]
        change = f"{form(values[0])} → {form(values[-1])}" if len(values) > 1 else form(values[0])
        base = next((series(run.probes, b.field)[1] for b in chart.lines if b.dashed), [])
        name = next((b.label for b in chart.lines if b.dashed), "")
        said = f"{line.label} {change}" if len(chart.lines) - bool(base) > 1 else change
        versus = f"; {name.removesuffix(' masks').removesuffix(' 1:2')} {form(base[-1])}" if base else ""
        found.append({"title": chart.title, "hint": chart.hint, "change": said + versus, "svg": svg})
    return found


def _losses(run: Run) -> list[dict[str, str]]:
    found = []
    for name, title in plots.LOSS_TITLES.items():
        svg = _svg(plots.loss_chart(name, run.train), f"loss-{name}")
        if svg:
            values = plots.smooth(series(run.train, name)[1])
            # The total grows where further terms begin: its first value says nothing about its last.
            change = f"{values[-1]:.3f} at the end" if name == "loss" else f"{values[0]:.3f} → {values[-1]:.3f}"
            found.append({"title": title, "change": change, "svg": svg})
    svg = _svg(plots.rate_chart(run.train), "rate")
    if svg:
        found.append({"title": "Learning rate", "change": f"peak {max(series(run.train, 'lr')[1]):.2g}", "svg": svg})
    return found


def _rows(splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, split in splits.items():
        lines = list(orders(split))
        for i, order in enumerate(lines):
            values = [
                f"{value:.2f}" if spread is None else f"{value:.1f} ± {spread:.1f}"
                for value, spread in zip(order.values(), order.spreads(), strict=True)
            ]
            rows.append(
                {
                    "split": f"({name}) {split['title']}", "kind": order.name, "first": i == 0, "span": len(lines),
                    "values": values,
                    "size": f"{split['images']:,} images, {split['captions']:,} captions",
                }
            )  # fmt: skip
    return rows


def _pairs(run: Run) -> list[dict[str, Any]]:
    found = []
    scale = plots.heat_scale([pair["attention"] for pair in run.gallery.get("pairs", [])])
    for pair in run.gallery.get("pairs", []):
        path = run.path / pair["image"]
        if not path.is_file():
            continue
        attention = pair["attention"]
        named = set(pair.get("named_patches") or [])
        hit = sum(p in named for p in pair["masked_patches"])
        score = ""
        if pair.get("named_patches") is not None and pair["masked_patches"]:
            share, luck = 100 * hit / len(pair["masked_patches"]), 100 * len(named) / len(attention)
            score = f"{share:.0f} % of the masked patches on a named thing (random {luck:.0f} %)"
        found.append(
            {
                **pair,
                "data": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
                "heat": plots.heat(attention, scale),
                "peak": max(attention) * len(attention),
                "score": score,
            }
        )
    return found


FURTHER_TERMS = {
    "caption": "captions",
    "tg_mim": "TG-MIM",
    "composed": "text-guided retrieval",
    "recognition": "classes",
}
_MEASURES = {
    "caption_loss": ("caption, nats a word; by chance: from another pair's image", "caption_loss_other"),
    "reconstruction": ("L1 of high patches painted back; by chance: in the other patches' mean", "reconstruction_mean"),
    "reconstruction_other": ("the same, with another pair's caption", None),
    "low_on_drawing": ("low patches on a drawing", "on_drawing_random"),
    "low_on_named": ("low patches on a thing drawn and named", "on_named_random"),
    "attention_entropy": ("attention entropy of a head's row, share of maximum", None),
    "key_attention_entropy": ("entropy of the mean that picks the patches, share of maximum", None),
    "on_drawing": ("masked patches on a drawing", "on_drawing_random"),
    "on_named": ("masked patches on a thing drawn and named", "on_named_random"),
    "named_of_drawn": ("of the masked patches on a drawing, on a named one", "named_of_drawn_random"),
    "word_visible": ("masked words whose thing is visible", "word_visible_random"),
    "pointing": ("words whose strongest patch is on their thing", "pointing_random"),
    "itm_loss": ("ITM loss on held-out pairs, nats", "itm_prior"),
    "itm_accuracy": ("ITM accuracy", None),
    "itm_auc": ("ITM area under ROC", None),
}


def _measures(run: Run) -> list[tuple[str, str, str, str]]:
    """(measure, on scenes, on single drawings, by chance) of the final evaluation, or else of the last probe."""
    masks: Record = {**(run.probes[-1] if run.probes else {}), **(run.evaluation.get("masks") or {})}
    split = any(name.startswith("singles_") for name in masks)

    def show(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, (int, float)) and math.isfinite(value) else "–"

    found = []
    for name, (words, base) in _MEASURES.items():
        itm = name.startswith("itm")
        scene = masks.get(f"scenes_{name}") if itm else (masks.get(name) if split else None)
        single = masks.get(name) if itm or not split else masks.get(f"singles_{name}")
        if scene is None and single is None:
            continue
        bases = [] if base is None else [masks.get(base), None if itm else masks.get(f"singles_{base}")]
        if not split:
            bases = bases[:1]
        found.append((words, show(scene), show(single), " / ".join(show(b) for b in bases if b is not None)))
    return found
