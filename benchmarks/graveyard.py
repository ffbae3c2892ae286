"""The page on published defenses: what is left of each, and beside it what its paper reports.

`docs/generate.py` writes it from the committed table `graveyard`. A defense counts as broken by
an attacker whose mean PSNR exceeds, with its whole 95 % interval, the best guess that knows
nothing of the gradient. Of one that stays unbroken stands how long it was attacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.declare.measured_utility import utility_of
from benchmarks.declare.tables import find_table
from benchmarks.declare.yaml_lines import read_yaml
from benchmarks.docstring_sections import linked, sections
from benchmarks.markdown import row_of
from core.errors import InputError
from core.reading import read_json_object
from gradients.defenses import defense_class

TABLE = "graveyard"
# The row without a defense, with which the others are compared.
NONE = "none"
# What the table's attackers are called in sentences.
ATTACKERS = {
    "paper's": "Inverting Gradients",
    "untold": "`spectral`, not told",
    "told": "`spectral`, told",
}
TOLD = "told"
HOUR = 3600.0

# In what our setting differs from the one that a paper reports of, by the name of the defense.
DIFFERENCES = {
    "ats": "a published policy, not searched anew for these images; the paper's attacker is not "
    "told of it",
    "censor": "16 px where the paper has 64; the public code has a constant seed and another "
    "projection, which stand here beside the paper's",
    "dcs2": "all images are concealed, by images that begin as noise; there sensitive ones, from "
    "the mean image of another class",
    "enclave": "the attacker knows the hidden layers' parameters, as where the model is deployed; "
    "the paper's server never does",
    "freeze": "no paper offers it as a defense; asked is what the last layer alone leaks",
    "graddefense": "the example's attack is DLG on a LeNet; here others attack a convolutional "
    "network",
    "instahide": "no public images are mixed in, and a batch of two has two to mix",
    "layerdrop": "after selective sharing, whose paper reports no reconstruction",
    "mixup": "two images are mixed, in half of the batches none; the paper mixes four",
    "outpost": "one update, on which it always acts; there ever more rarely during local "
    "training, with noise of a constant seed",
    "precode": "the paper's attacker is not told of the bottleneck; ours computes what it drew",
    "quantize": "a compression of gradients, whose paper reports no reconstruction",
    "refiner": "the weights, the start and the evaluation network are this project's, for the "
    "paper's full text was out of reach",
    "shadow": "photographs and an untrained network; what the shadow model is, and the noise's "
    "size, are this project's",
    "soteria": "other networks and images; Balunovic et al., <https://arxiv.org/abs/2111.04706>, "
    "reconstruct by leaving the layer out",
    "svdefense": "without the paper's adaptation to a client's classes and its weights of "
    "channels and layers, which were not at hand",
}
# Published iterations that would take hours in every round of every client, and what was trained
# under in their place.
TRAINED_UNDER = {"dcs2": "dcs2:50"}
# Where a docstring states nothing.
UNSTATED = "not at hand"


@dataclass(frozen=True)
class Line:
    """One defense of the table.

    Attributes:
        label: As the table calls it.
        word: What `--defense` takes; empty without one.
        psnr: Mean and 95 % interval by attacker, where it was computed.
        seconds: Of all attacks on it, processor time where that was recorded.
        accuracy: Of models trained under it, in percent; None: not measured.
    """

    label: str
    word: str
    psnr: Mapping[str, tuple[float, float, float]]
    seconds: float
    accuracy: float | None

    @property
    def name(self) -> str:
        """The defense's name."""
        return self.word.split(":")[0]

    def breakers(self, guess: float) -> list[str]:
        """The attackers whose whole interval lies above a guess."""
        return [attacker for attacker, (_, low, _) in self.psnr.items() if low > guess]

    def verdict(self, guess: float) -> str:
        """Who breaks it, or how long it was attacked in vain."""
        breakers = self.breakers(guess)
        if breakers == [TOLD]:
            return "broken, only by who is told"
        if breakers:
            return f"broken by {_listed(breakers)}"
        hours = f"{self.seconds / HOUR:.2g}"
        unit = "CPU-hour" if hours == "1" else "CPU-hours"
        return f"not broken in {hours} {unit} by {_listed(list(self.psnr))}"


def _listed(attackers: Sequence[str]) -> str:
    names = [ATTACKERS.get(attacker, attacker) for attacker in attackers]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def page_of(folder: Path) -> str:
    """The page of the documents that shows the table in a folder, in Markdown.

    Args:
        folder: Holds `graveyard.json`, as `python -m benchmarks graveyard` writes it; without
            it the page says how to compute it, and what papers report.
    """
    path, words = folder / f"{TABLE}.json", _words()
    measured = _UNMEASURED
    if path.exists():
        stored = read_json_object(path, what=f"table {TABLE}")
        measured = _measured(lines_of(stored, words), best_guess(stored), str(stored["preset"]))
    return _PAGE.format(measured=measured, papers="\n".join(_papers(words)))


def _words() -> dict[str, str]:
    """The defense of every row of the table, as its YAML declares it."""
    axes = read_yaml(find_table(TABLE)).value["axes"]
    return {
        label: str(settings.get("extract", {}).get("defense", ""))
        for label, settings in axes["defense"].items()
    }


def lines_of(stored: Mapping[str, Any], words: Mapping[str, str]) -> list[Line]:
    """The defenses of a table, in its order.

    Args:
        stored: Its JSON.
        words: What `--defense` takes, by the row's label.

    Raises:
        InputError: It holds a defense that is not declared.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in stored["rows"]:
        rows.setdefault(row["labels"]["defense"], []).append(row)
    if unknown := sorted(set(rows) - set(words)):
        raise InputError(f"table {TABLE}: {unknown[0]} is not among the declared defenses")
    return [_line(label, words[label], found) for label, found in rows.items()]


def _line(label: str, word: str, rows: Sequence[Mapping[str, Any]]) -> Line:
    psnr, seconds = {}, 0.0
    for row in rows:
        values = row["values"]
        found = values.get("psnr")
        if found is not None:
            mean = float(found["mean"])
            low, high = (
                mean if found[end] is None else float(found[end]) for end in ("low", "high")
            )
            psnr[str(row["labels"]["attacker"])] = (mean, low, high)
        spent = values.get("cpu seconds") or values.get("seconds")
        seconds += 0.0 if spent is None else float(spent["mean"]) * int(spent["n"])
    accuracies = [row["values"].get("defended accuracy") for row in rows]
    known = [float(each["mean"]) for each in accuracies if each is not None]
    if not known and word in TRAINED_UNDER:
        other = utility_of(TRAINED_UNDER[word])
        known = [] if other is None else [other.mean]
    return Line(label, word, psnr, seconds, known[0] if known else None)


def best_guess(stored: Mapping[str, Any]) -> float:
    """PSNR of the best of the guesses that know nothing of the gradient."""
    return max(float(each["psnr"]["mean"]) for each in stored["baselines"].values())


def _measured(lines: Sequence[Line], guess: float, preset: str) -> str:
    attackers = list(dict.fromkeys(name for line in lines for name in line.psnr))
    titles = [ATTACKERS.get(name, name) for name in attackers]
    header = ["defense", *titles, "accuracy", "verdict"]
    ruler = [":---", *("---:" for _ in titles), "---:", ":---"]
    table = [row_of(header), row_of(ruler)]
    for line in lines:
        values = [_decibels(line.psnr.get(name)) for name in attackers]
        accuracy = "–" if line.accuracy is None else f"{line.accuracy:.1f}"
        if line.word in TRAINED_UNDER and line.accuracy is not None:
            accuracy += f" (`{TRAINED_UNDER[line.word]}`)"
        verdict = line.verdict(guess) if line.word else "no defense"
        table.append(row_of([_linked(line), *values, accuracy, verdict]))
    judged = [line for line in lines if line.word and line.psnr]
    standing = [line for line in judged if not line.breakers(guess)]
    return _MEASURED.format(
        preset=preset, guess=f"{guess:.2f}", table="\n".join(table), judged=len(judged),
        standing=len(standing), broken=len(judged) - len(standing),
    )  # fmt: skip


def _decibels(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "–"
    mean, low, high = found
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _linked(line: Line) -> str:
    return f"[{line.label}](generated/defenses/{line.name}.md)" if line.name else line.label


def _papers(words: Mapping[str, str]) -> Iterator[str]:
    """A row for every defense: what its paper reports, and how our setting differs."""
    for name in dict.fromkeys(word.split(":")[0] for word in words.values() if word):
        said = sections(defense_class(name).__doc__ or "").get("Published")
        published = linked(" ".join(said.split())) if said else UNSTATED
        link = f"[`{name}`](generated/defenses/{name}.md)"
        yield row_of([link, published.rstrip("."), f"our setting differs: {DIFFERENCES[name]}"])


_UNMEASURED = """The table is not among the committed records yet. `python -m benchmarks graveyard`
computes it."""

_MEASURED = """[All of it](../results/reference/graveyard/graveyard.md), with the preset `{preset}`.
Mean PSNR in dB with its 95 % interval; the best guess reaches {guess}. Of {judged} defenses
{broken} are broken and {standing} stand.

{table}"""

_PAGE = """# Defenses that claim to hold

<!-- Written by docs/generate.py. Change benchmarks/graveyard.py or the table instead. -->

Every published defense at its published setting, against three attackers: Inverting Gradients,
which most of the papers used, and this project's `spectral`, once not told of the defense and
once told ([what it does then](defenses.md#what-the-attacker-does-who-is-told)).

    python -m benchmarks graveyard

A defense is broken by an attacker whose mean PSNR exceeds, with its whole interval, the best guess
that knows nothing of the gradient. One that only the untold attackers fail at hides nothing. One
that stays unbroken says how long it was attacked, in hours of one core; the short attacks by which
a told attacker finds what a defense drew are not counted. A stronger attack may break it tomorrow.

## What is left

{measured}

## What the papers report

Networks, images and iterations are others: the embedded preset attacks batches of two photographs
of 16 px with known labels and an untrained network in evaluation mode, for 1,000 iterations of
`spectral` and 4,800 of Inverting Gradients.
Where a value can be compared at all, the last column says what to keep in mind.

| defense | the paper's own result | explanation |
| :--- | :--- | :--- |
{papers}
"""
