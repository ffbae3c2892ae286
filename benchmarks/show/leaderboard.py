"""The leaderboard: one reviewable JSON file per defense, rendered, never edited.

    python -m benchmarks submit --apply gaussian:0.01 --defense "Gaussian noise 0.01"
    python -m benchmarks leaderboard

Entries that were measured by the present protocol are ranked, those of every attacker apart.
Those of other protocols, and those from the rows of a table, are shown under headings of their
own and without ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attack.knowledge.threat_models import letters_of
from benchmarks.leaderboard.entry import SCHEMA_VERSION, BoardEntry, check_against, entry_from
from benchmarks.leaderboard.protocol import Protocol, read_protocol
from benchmarks.leaderboard.ranking import (
    Interval,
    Place,
    Ranking,
    frontier,
    rank,
)
from benchmarks.run.cells import ROOT
from benchmarks.show.pictures import Picture, save_picture
from benchmarks.show.render import DASH, TextTable, to_markdown, to_terminal
from benchmarks.show.report import ASSETS, embedded, plain_table
from benchmarks.show.table_entries import check_entry
from core.errors import InputError
from core.escaping import in_markdown, in_one_line
from core.figures import legend_beside, subplots
from core.reading import read_json_object
from core.storage import write_text

FOLDER = ROOT / "results" / "leaderboard"
HEADER = [
    "rank",
    "defense",
    "SSIM beyond a guess, worst tenth",
    "dB beyond a guess, worst tenth",
    "identified %",
    "accuracy %",
    "ε",
]
UNRANKED_HEADER = [
    "defense", "utility %", "ε", "worst SSIM", "mean SSIM", "worst PSNR", "images",
]  # fmt: skip
UNRANKED = "Unranked, from tables"
# What stands behind the settings where an attack shows no more than a guess does.
NO_BETTER = "°"
TableEntry = Mapping[str, Any]


@dataclass(frozen=True)
class Board:
    """All entries, by how they may be compared.

    Attributes:
        protocol: The present one.
        measured: Its entries, by attacker.
        others: Entries of other protocols, by their names.
        unranked: Entries from tables.
    """

    protocol: Protocol
    measured: Mapping[str, Sequence[BoardEntry]]
    others: Mapping[str, Sequence[BoardEntry]]
    unranked: Sequence[TableEntry]

    @property
    def size(self) -> int:
        """How many entries there are."""
        groups = [*self.measured.values(), *self.others.values(), self.unranked]
        return sum(len(group) for group in groups)


def show(
    entries: Path,
    output: Path,
    min_utility: float | None = None,
    protocol: Protocol | None = None,
) -> str:
    """Render the entries of a folder to Markdown, HTML and a figure.

    Args:
        entries: Folder of JSON files.
        output: Folder to write to.
        min_utility: Only defenses of this accuracy, in percent; None for all.
        protocol: By which entries are ranked; None for the present one.

    Returns:
        The same for a terminal.

    Raises:
        InputError: There are no entries, or one is broken; names the file and the field.
    """
    board = load_board(entries, protocol or read_protocol(), min_utility)
    rankings = {t: rank(found, board.protocol.worst_share) for t, found in board.measured.items()}
    pictures = {
        t: draw(ranking, output / _figure_name(t, board)) for t, ranking in rankings.items()
    }
    tables = [
        table for t, ranking in rankings.items() for table in ranked_tables(board, t, ranking)
    ]
    tables += other_tables(board)
    write_text(output / "leaderboard.md", _markdown(tables, pictures.values()))
    write_text(output / "leaderboard.html", to_html(tables, list(pictures.values())))
    written = f"{board.size} entries; written to {output}/leaderboard.md and leaderboard.html"
    return "\n".join(["\n\n".join(to_terminal(table) for table in tables), written])


def load_board(folder: Path, protocol: Protocol, min_utility: float | None = None) -> Board:
    """Every entry of a folder, checked, by how it may be compared.

    Args:
        folder: Of JSON files.
        protocol: The present one; its entries are checked against it.
        min_utility: Only defenses of this accuracy, in percent; None for all.

    Raises:
        InputError: There is none, or one is broken; names the file and the field.
    """
    measured: dict[str, list[BoardEntry]] = {}
    others: dict[str, list[BoardEntry]] = {}
    unranked: list[TableEntry] = []
    for file in _files(folder):
        entry = load_entry(file)
        if _utility(entry) < (min_utility or 0):
            continue
        if not isinstance(entry, BoardEntry):
            unranked.append(entry)
        elif entry.protocol == protocol.name:
            check_against(entry, protocol, str(file))
            measured.setdefault(entry.threat, []).append(entry)
        else:
            others.setdefault(entry.protocol, []).append(entry)
    return Board(protocol, _sorted(measured), _sorted(others), unranked)


def _sorted(groups: Mapping[str, list[BoardEntry]]) -> dict[str, list[BoardEntry]]:
    return {name: groups[name] for name in sorted(groups)}


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"--entries: there are no .json files in {folder}")
    return files


def load_entry(file: Path) -> BoardEntry | TableEntry:
    """One entry of either form, checked for sense.

    Raises:
        InputError: Names the file and the field.
    """
    values = read_json_object(file, what="leaderboard entry")
    if values.get("schema") == SCHEMA_VERSION:
        return entry_from(values, str(file))
    check_entry(values, str(file))
    return values


def _utility(entry: BoardEntry | TableEntry) -> float:
    if isinstance(entry, BoardEntry):
        return float(np.mean(entry.accuracies))
    return entry["utility"] or 0.0


def ranked_tables(board: Board, threat: str, ranking: Ranking) -> Iterator[TextTable]:
    """The ranks of one attacker, and below them every setting's mean."""
    title = f"{board.protocol.name}: {_attacker(threat)}"
    yield TextTable(
        title,
        HEADER,
        [_place_texts(place) for place in ranking.places],
        footnotes=[*_ranking_notes(ranking), *_descriptions(ranking.places)],
        n_labels=2,
    )
    yield _settings_table(f"{title}: mean SSIM of every setting", ranking)


def _attacker(threat: str) -> str:
    letters = letters_of(threat)
    return f"{threat} ({letters})" if letters else threat


def _place_texts(place: Place) -> list[str]:
    first, last = place.first, place.last
    epsilon = place.entry.epsilon
    return [
        str(first) if first == last else f"{first}{DASH}{last}",
        place.entry.defense,
        _interval(place.worst["ssim"], 3),
        _interval(place.worst["psnr"], 1),
        _interval(place.identified, 0, 100),
        _interval(place.utility, 1),
        DASH if epsilon is None else f"{epsilon:.3g}",
    ]


def _interval(interval: Interval, digits: int, factor: float = 1.0) -> str:
    low, value, high = (factor * x for x in (interval.low, interval.value, interval.high))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _ranking_notes(ranking: Ranking) -> Iterator[tuple[str, str]]:
    n = len(ranking.places)
    if ranking.tau is not None:
        yield (
            "order",
            f"Kendall's tau between this order of {n} and that of resampled images: "
            f"{_interval(ranking.tau, 2)}.",
        )
    if ranking.tau_metrics is not None:
        yield (
            "metrics",
            f"Kendall's tau between the orders by SSIM and by PSNR: {ranking.tau_metrics:.2f}.",
        )


def _descriptions(places: Iterable[Place]) -> Iterator[tuple[str, str]]:
    for place in places:
        entry = place.entry
        about = " ".join(filter(None, (entry.description, entry.reference)))
        if about:
            yield entry.defense, about


def _settings_table(title: str, ranking: Ranking) -> TextTable:
    """Mean SSIM by setting; marked where the best guess does as well."""
    settings = list(ranking.places[0].entry.leaks)
    rows = [
        [place.entry.defense, *(_setting_text(place, setting) for setting in settings)]
        for place in ranking.places
    ]
    guesses = ranking.places[0].entry.guesses
    baselines = [
        [guess, *[f"{np.mean(values['ssim']):.3f}"] * len(settings)]
        for guess, values in guesses.items()
    ]
    notes = [(NO_BETTER, "The attack shows no more than the best guess: no larger mean SSIM.")]
    return TextTable(title, ["defense", *settings], rows, baselines, notes)


def _setting_text(place: Place, setting: str) -> str:
    mean = float(np.mean(place.entry.leaks[setting].ssim))
    return f"{mean:.3f}{NO_BETTER if setting in place.lost else ''}"


def other_tables(board: Board) -> Iterator[TextTable]:
    """What has no rank: entries of other protocols, and entries from tables."""
    for name, entries in board.others.items():
        yield TextTable(
            f"{name}: another protocol, not ranked",
            ["defense", "attacker", "mean SSIM", "accuracy %"],
            [_other_texts(entry) for entry in entries],
        )
    groups: dict[str, list[TableEntry]] = {}
    for entry in board.unranked:
        title = f"{entry['threat_model']}; attack {entry['attack']}; {entry['data']}"
        groups.setdefault(title, []).append(entry)
    for title, group in sorted(groups.items()):
        yield _unranked(f"{UNRANKED}: {title}", group)


def _other_texts(entry: BoardEntry) -> list[str]:
    values = [value for leak in entry.leaks.values() for value in leak.ssim]
    mean = f"{np.mean(values):.3f}" if values else DASH
    return [entry.defense, entry.threat, mean, f"{_utility(entry):.1f}"]


def _unranked(title: str, entries: Iterable[TableEntry]) -> TextTable:
    # Equal leakage: the more useful one first.
    ordered = sorted(entries, key=lambda e: (e["leakage"]["ssim"]["worst"], -_utility(e)))
    notes = [
        (e["defense"], " ".join(filter(None, (e["description"], e["reference"])))) for e in ordered
    ]
    rows = [_unranked_texts(entry) for entry in ordered]
    return TextTable(title, UNRANKED_HEADER, rows, footnotes=[n for n in notes if n[1]])


def _unranked_texts(entry: TableEntry) -> list[str]:
    leakage = entry["leakage"]
    return [
        entry["defense"],
        DASH if entry["utility"] is None else f"{entry['utility']:.1f}",
        DASH if entry["epsilon"] is None else f"{entry['epsilon']:.3g}",
        f"{leakage['ssim']['worst']:.3f}",
        f"{leakage['ssim']['mean']:.3f}",
        f"{leakage['psnr']['worst']:.2f}",
        str(leakage["ssim"]["n"]),
    ]


def _figure_name(threat: str, board: Board) -> str:
    default = threat == board.protocol.threats[0]
    return "leaderboard.png" if default else f"leaderboard-{threat}.png"


def draw(ranking: Ranking, file: Path) -> Picture:
    """What was given away against what the model is worth, a point per entry.

    Args:
        ranking: Of one attacker.
        file: PNG to write; a PDF lies beside it.
    """
    figure, axes = subplots(1, 1, 7.2, 4.2)
    ax = axes[0][0]
    for number, place in enumerate(ranking.places):
        ssim, utility = place.worst["ssim"], place.utility
        ax.errorbar(
            utility.value, ssim.value, xerr=_whiskers(utility), yerr=_whiskers(ssim),
            fmt="osD^vPX*"[number // 10 % 8], color=f"C{number % 10}", capsize=2, markersize=5,
            elinewidth=0.8, label=_plain_label(place.entry.defense),
        )  # fmt: skip
    best = frontier(ranking.places)
    ax.plot(
        [p.utility.value for p in best], [p.worst["ssim"].value for p in best], "k:", linewidth=0.8
    )
    ax.set(
        xlabel="validation accuracy under the defense (%)",
        ylabel="SSIM beyond a guess, worst tenth",
    )
    legend_beside(figure)
    caption = (
        "Leakage against utility with 95 % intervals; the dotted line joins the defenses that no "
        "other beats in both."
    )
    return save_picture(figure, file, caption)


def _plain_label(name: str) -> str:
    """A name that matplotlib draws as it stands: no formula between dollars."""
    return in_one_line(name).replace("$", r"\$")


def _whiskers(interval: Interval) -> list[list[float]]:
    # Rounding may put an end of an interval on the wrong side.
    below, above = interval.value - interval.low, interval.high - interval.value
    return [[max(0.0, below)], [max(0.0, above)]]


def _markdown(tables: Iterable[TextTable], pictures: Iterable[Picture]) -> str:
    shown = [f"![{in_markdown(p.caption)}]({p.file.name})\n" for p in pictures]
    return "\n".join([*shown, *(to_markdown(table) for table in tables)])


def to_html(tables: Iterable[TextTable], pictures: Sequence[Picture] = ()) -> str:
    """A page that needs no other file."""
    css = (ASSETS / "report.css").read_text(encoding="utf-8")
    body = "\n".join([*map(embedded, pictures), *(plain_table(table) for table in tables)])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Leaderboard</title><style>{css}</style></head>\n"
        f"<body><h1>Leaderboard of defenses against gradient inversion</h1>\n{body}</body></html>\n"
    )
