"""Numbers as people read them, for everything that shows an audit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DASH = "–"


def sentence(text: str) -> str:
    """A text with a capital and a full stop."""
    text = text.strip()
    return text if not text else text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def count(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(words: Iterable[str]) -> str:
    """Words with commas; "nothing" without any."""
    return ", ".join(words) or "nothing"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.3g} %"


def p_text(p: float) -> str:
    """A p-value."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def shape(sizes: Sequence[int]) -> str:
    """A shape, such as 1x32x32."""
    return "x".join(map(str, sizes)) or DASH


def middle_and_largest(values: Sequence[float]) -> str:
    """Median and maximum."""
    if not values:
        return DASH
    ordered = sorted(values)
    half = len(ordered) // 2
    median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return f"{median:.2f} / {ordered[-1]:.2f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def optional(value: float | None) -> str:
    """A number that may be missing."""
    return DASH if value is None else f"{value:.3g}"
