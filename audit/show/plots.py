"""The figures of an audit, as SVG that is part of a page: lines and texts, no pixels.

Colours are drawn as stand-ins and become variables of the page, so that a figure is readable on
light and on dark paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from audit.record import AuditRecord, RateSection, SimilaritySection, TestSection
from audit.show.sections import CHANCE, deciding, excludes_chance, public_knowledge
from audit.show.words import count
from core.escaping import in_one_line
from core.figures import subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Stand-ins of colours, and the page's variables (`audit.css`) that they become.
INK, FAINT, MEMBER, OTHER, NOISE, GOOD = (
    "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
)  # fmt: skip
VARIABLES = {
    INK: "ink", FAINT: "faint", MEMBER: "member", OTHER: "other", NOISE: "noise", GOOD: "good"
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Points of a cloud and rows of a figure; of more, evenly spaced ones are shown.
MOST_POINTS, MOST_ROWS, MOST_RATES = 200, 24, 12
SMALLEST_P = 1e-5
WIDTH, MOST_LETTERS = 6.4, 40


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        section: Key of the section that it belongs to.
        svg: To be put into the page as it is.
        text: What it shows, for a caption and for those who cannot see it.
    """

    section: str
    svg: str
    text: str


def plots_of(record: AuditRecord) -> tuple[Plot, ...]:
    """Every figure that the record has numbers for."""
    drawn = (draw(record) for draw in _DRAW)
    return tuple(plot for plots in drawn for plot in plots)


# -- Reconstructions ---------------------------------------------------------------------


def _matches(record: AuditRecord) -> Iterator[Plot]:
    """Best matches of the attack that decides, beside their references."""
    attack = deciding(record) or next((a for a in record.attacks if a.similarities), None)
    if attack is None or not attack.similarities:
        return
    figure, axes = subplots(len(attack.similarities), 1, WIDTH, 1.9)
    for (ax,), found in zip(axes, attack.similarities, strict=True):
        _clouds(ax, found)
    said = ", ".join(
        f"{found.metric.upper()} {_range(found.best_member)} against "
        f"{_range(found.best_non_member)} and {_range(found.noise)}"
        for found in attack.similarities
    )
    yield _plot(
        "attacks", figure,
        f"Best matches of {attack.attack}: a point per reconstruction among members and among "
        f"non-members, and one per image of noise ({said}). Members to the right of non-members "
        f"are what a leak looks like.",
    )  # fmt: skip


def _clouds(ax: Axes, found: SimilaritySection) -> None:
    clouds = [
        ("members", found.best_member, MEMBER),
        ("non-members", found.best_non_member, OTHER),
        ("noise", found.noise, NOISE),
    ]
    for row, (_, values, colour) in enumerate(clouds):
        shown = spread(values, MOST_POINTS)
        ax.plot(shown, row + _jitter(len(shown)), "o", ms=4, color=colour, alpha=0.65)
    _line(ax, found.noise_99, NOISE, "noise, 99 %")
    _line(ax, public_knowledge(found), INK, "public")
    _rows(ax, [name for name, _, _ in clouds])
    ax.set_xlabel(_plain(found.metric.upper()))


def _line(ax: Axes, place: float, colour: str, words: str) -> None:
    """A vertical line that is named at its upper end."""
    ax.axvline(place, color=colour, ls="--", lw=1.2)
    ax.annotate(
        words, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), color=INK,
        textcoords="offset points", ha="center", va="bottom", fontsize=8,
    )  # fmt: skip


def _jitter(n: int) -> np.ndarray:
    """Offsets that keep points apart, the same every time."""
    return ((np.arange(n) * 0.618034) % 1 - 0.5) * 0.5


def _p_values(record: AuditRecord) -> Iterator[Plot]:
    """The p-value of every member, the smallest first."""
    attack = deciding(record)
    test = attack.test if attack else None
    if test is None or not test.per_image:
        return
    figure, axes = subplots(1, 1, WIDTH, 2.3)
    _draw_p_values(axes[0][0], test)
    below = sum(p <= test.alpha for p in test.per_image)
    yield _plot(
        "verdict", figure,
        f"p-value of each of {len(test.per_image)} members, corrected for looking at all of them; "
        f"{below} at or below the level of {test.alpha:g} (line).",
    )  # fmt: skip


def _draw_p_values(ax: Axes, test: TestSection) -> None:
    shown = np.maximum(np.sort(spread(test.per_image, MOST_POINTS)), SMALLEST_P)
    colours = [MEMBER if p <= test.alpha else OTHER for p in shown]
    ax.vlines(np.arange(1, len(shown) + 1), shown, 1, color=FAINT, lw=1)
    ax.scatter(np.arange(1, len(shown) + 1), shown, c=colours, s=26, zorder=3)
    ax.axhline(test.alpha, color=INK, ls="--", lw=1.2)
    _p_axis(ax)
    ax.set_ylim(min(shown.min() / 2, test.alpha / 2), 1.3)
    ax.set(xlabel="member, the one that stands out most first")
    _whole_numbers(ax.xaxis)


# -- Power, membership, classes, labels ------------------------------------------------------


def _power(record: AuditRecord) -> Iterator[Plot]:
    """How many plants are found at each setting, with exact 95 % intervals."""
    settings = [power for power in record.power if power.of][:MOST_ROWS]
    if not settings:
        return
    from scipy.stats import binomtest

    figure, axes = subplots(1, 1, WIDTH, 0.9 + 0.42 * len(settings))
    ax = axes[0][0]
    for row, power in enumerate(settings):
        share = power.found / power.of
        low, high = binomtest(power.found, power.of).proportion_ci()
        ax.plot([low, high], [row, row], color=FAINT, lw=5, solid_capstyle="round")
        ax.plot(share, row, "o", ms=8, color=GOOD if share >= CHANCE else OTHER)
    ax.axvline(CHANCE, color=INK, ls="--", lw=1.2)
    names = [f"batch {p.batch_size}, {count(p.steps, 'step')}" for p in settings]
    _rows(ax, names)
    ax.set(xlim=(-0.03, 1.03), xlabel="share of planted images that were found")
    said = ", ".join(f"{p.found} of {p.of} at {n}" for p, n in zip(settings, names, strict=True))
    yield _plot(
        "power", figure,
        f"What the attack finds of planted images, with 95 % intervals: {said}. Right of the line "
        "a leak would have been found more often than not.",
    )  # fmt: skip


def _membership(record: AuditRecord) -> Iterator[Plot]:
    """Areas under the ROC curve with their intervals."""
    # Classes one by one are in the table; many of them would be a long figure.
    rates = sorted(record.membership, key=lambda rate: rate.of_class is not None)
    rates = rates if len(rates) <= MOST_RATES else [r for r in rates if r.of_class is None]
    rates = rates[:MOST_ROWS]
    if not rates:
        return
    figure, axes = subplots(1, 1, WIDTH, 0.9 + 0.3 * len(rates))
    ax = axes[0][0]
    for row, rate in enumerate(rates):
        colour = MEMBER if excludes_chance(rate) else OTHER
        ax.plot([rate.auroc_low, rate.auroc_high], [row, row], color=colour, lw=2)
        ax.plot(rate.auroc, row, "o", ms=6, color=colour)
    ax.axvline(CHANCE, color=INK, ls="--", lw=1.2)
    _rows(ax, [_rate_name(rate) for rate in rates])
    ax.set_xlabel("AUROC: 0.5 is guessing, 1 tells every member")
    yield _plot(
        "membership", figure,
        "How well members are told from non-members: area under the ROC curve with its 95 % "
        "interval; those that exclude 0.5 (line) are findings.",
    )  # fmt: skip


def _rate_name(rate: RateSection) -> str:
    name = f"{rate.method}, {rate.model}"
    return name if rate.of_class is None else f"{name}, class {rate.of_class}"


def _classes(record: AuditRecord) -> Iterator[Plot]:
    """Best matches of class representatives, by the first similarity."""
    found = [(c.of_class, c.similarities[0]) for c in record.classes if c.similarities]
    found = [(number, s) for number, s in found if s.best_member][:MOST_ROWS]
    if not found:
        return
    figure, axes = subplots(1, 1, WIDTH, 0.9 + 0.34 * len(found))
    ax = axes[0][0]
    for row, (_, s) in enumerate(found):
        ax.plot(s.noise_99, row, "|", ms=14, mew=2, color=NOISE)
        if s.best_non_member:
            ax.plot(max(s.best_non_member), row, "s", ms=7, mfc="none", color=OTHER)
        ax.plot(max(s.best_member), row, "o", ms=6, color=MEMBER)
    _rows(ax, [f"class {number}" for number, _ in found])
    metric = _plain(found[0][1].metric.upper())
    ax.set_xlabel(f"{metric} (point: members, square: non-members, bar: noise, 99 %)")
    yield _plot(
        "classes", figure,
        f"{metric} of each class representative's best match among members and non-members, beside "
        "the 99th percentile of noise.",
    )  # fmt: skip


def _labels(record: AuditRecord) -> Iterator[Plot]:
    """Images per class, as they are and as they are read from the update."""
    labels = record.labels
    if labels is None or not labels.recovered_counts or not labels.true_counts:
        return
    n = min(len(labels.true_counts), len(labels.recovered_counts), 2 * MOST_ROWS)
    figure, axes = subplots(1, 1, WIDTH, 2.1)
    ax, places = axes[0][0], np.arange(n)
    ax.bar(places - 0.2, labels.true_counts[:n], 0.38, color=OTHER, label="in the training")
    ax.bar(places + 0.2, labels.recovered_counts[:n], 0.38, color=MEMBER, label="from the update")
    ax.set(xlabel="class", ylabel="images")
    _whole_numbers(ax.xaxis)
    _whole_numbers(ax.yaxis)
    ax.legend(frameon=False, labelcolor=INK)
    yield _plot(
        "labels", figure,
        "Images of each class in the training, and as the update betrays them.",
    )  # fmt: skip


def _remedies(record: AuditRecord) -> Iterator[Plot]:
    """p-value over the update's cosine, a marker per defense."""
    placed = [r for r in record.remedies if r.cosine is not None]
    if not placed:
        return
    test = deciding(record)
    alpha = test.test.alpha if test and test.test else None
    figure, axes = subplots(1, 1, WIDTH, 2.6)
    ax = axes[0][0]
    for number, defense in enumerate(dict.fromkeys(r.defense for r in placed)):
        own = [r for r in placed if r.defense == defense]
        points = [(r.cosine or 0.0, max(r.p_value, SMALLEST_P)) for r in own]
        colours = [GOOD if r.enough else MEMBER for r in own]
        marker = MARKERS[number % len(MARKERS)]
        ax.scatter(*zip(*points, strict=True), c=colours, marker=marker, s=46, zorder=3)
        ax.scatter([], [], c=INK, marker=marker, label=_plain(defense))
        for point, remedy in zip(points, own, strict=True):
            ax.annotate(f"{remedy.strength:.3g}", point, xytext=(6, 4), color=INK, fontsize=8,
                        textcoords="offset points")  # fmt: skip
    if alpha is not None:
        ax.axhline(alpha, color=INK, ls="--", lw=1.2)
    _p_axis(ax)
    lowest = min(0.0, *(r.cosine or 0.0 for r in placed))
    ax.set(xlim=(lowest - 0.05, 1.1), xlabel="cosine with the update as it is (1: unchanged)")
    ax.legend(frameon=False, labelcolor=INK)
    yield _plot(
        "remedies", figure,
        "What each defense leaves of the update (cosine) and of the leak (p-value); numbers are "
        "strengths; above the line nothing is found.",
    )  # fmt: skip


_DRAW: tuple[Callable[[AuditRecord], Iterator[Plot]], ...] = (
    _p_values, _labels, _matches, _power, _membership, _classes, _remedies
)  # fmt: skip


def spread(values: Sequence[float], most: int) -> np.ndarray:
    """The values in order; of too many, evenly spaced quantiles, both ends among them."""
    ordered = np.sort(np.asarray(values, dtype=float))
    if len(ordered) <= most:
        return ordered
    return ordered[np.linspace(0, len(ordered) - 1, most).round().astype(int)]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "none"


def _plain(text: str) -> str:
    """A name from a record; matplotlib takes what is between two dollars for a formula."""
    return in_one_line(text)[:MOST_LETTERS].replace("$", r"\$")


def _whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _p_axis(ax: Axes) -> None:
    """p-values on a logarithmic axis, written as 0.01 and not as a power of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("p-value")


def _rows(ax: Axes, names: Sequence[str]) -> None:
    """A name for every row, the first above."""
    ax.set_yticks(range(len(names)), list(map(_plain, names)))
    ax.set_ylim(len(names) - 0.5, -0.5)


# -- SVG ---------------------------------------------------------------------------------------


def _plot(section: str, figure: Figure, text: str) -> Plot:
    return Plot(section, to_svg(figure, section), text)


def to_svg(figure: Figure, name: str) -> str:
    """A figure as SVG for the middle of a page: its texts are texts, its colours variables.

    Args:
        figure: The drawn figure.
        name: Of the figure in its page, so that no two have the same identifiers.
    """
    import matplotlib as mpl

    for ax in figure.axes:
        _plain_frame(ax)
    # Without a date and with identifiers of our own, the same numbers give the same page.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        written = file.getvalue()
    svg = re.sub(r"<style.*?</style>", "", written[written.index("<svg") :], flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)


def _plain_frame(ax: Axes) -> None:
    """Two faint axes with texts in ink."""
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=FAINT)
    ax.tick_params(color=FAINT, which="both", labelcolor=INK, labelsize=9)
    ax.xaxis.label.set(color=INK, fontsize=9)
    ax.yaxis.label.set(color=INK, fontsize=9)
