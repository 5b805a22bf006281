"""How figures are written: three digits, a unit that fits, a ratio with its quartiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def digits(value: float) -> str:
    """Three of them: 0.0123, 1.23, 12.3, 1,235."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}" if abs(value) < 1 else f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if seconds * s >= 1), ("µs", 1e6))
    return f"{digits(seconds * scale)} {unit}"


def mebibytes(count: float) -> str:
    value = count / 2**20
    return "0" if value < 0.005 else digits(value)


def times(found: tuple[float, float, float]) -> str:
    """A ratio and, in brackets, its quartiles."""
    middle, low, high = (f"{x:.2f}" if x < 99.5 else f"{x:.0f}" for x in found)
    return f"{middle} ({low} – {high})"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}".replace("%", " %")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """In Markdown, and a blank line after it."""
    rows = [f"| {' | '.join(each.replace('|', '/') for each in line)} |" for line in (head, *lines)]
    return [rows[0], "|" + "---|" * len(head), *rows[1:], ""]
