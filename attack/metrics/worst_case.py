"""The worst case over several attacks: for every image, what leaked most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attack.metrics.evaluation import Evaluation, is_smaller_better, metric_title

if TYPE_CHECKING:
    from prettytable import PrettyTable


@dataclass
class WorstCase:
    """Several attacks' evaluations against one truth, and the worst of them per image.

    This looks at the truth and is no attack: an attacker cannot know which of the
    results to believe. What one would have believed is the ensemble's own choice.

    Attributes:
        metrics: Names of the metrics.
        per_image: One dictionary per original: index, and per metric the value of the
            attack from which most leaked (`psnr`) and that attack (`psnr_attack`).
        by_attack: Mean and std of every metric by attack.
    """

    metrics: tuple[str, ...]
    per_image: list[dict[str, Any]]
    by_attack: dict[str, dict[str, dict[str, float | None]]]

    def to_record(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return {"per_image": self.per_image, "by_attack": self.by_attack}

    def to_table(self, metrics: Sequence[str] = ("psnr", "ssim")) -> PrettyTable:
        """One row per image: the worst value of each metric and who got it."""
        from prettytable import PrettyTable

        shown = [metric for metric in metrics if metric in self.metrics]
        titles = [metric_title(metric).partition(" (")[0] for metric in shown]
        table = PrettyTable(["image", *(word for t in titles for word in (t, f"{t} by"))])
        table.title = "worst case over all attacks (chosen with the truth)"
        for row in self.per_image:
            cells = [(_number(row[m]), row[f"{m}_attack"] or "-") for m in shown]
            table.add_row([row["index"], *(word for pair in cells for word in pair)])
        table.align = "r"
        return table


def worst_case(evaluations: Mapping[str, Evaluation]) -> WorstCase:
    """For every image and metric, the attack from which most leaked.

    Args:
        evaluations: By attack, against the same truth.
    """
    first = next(iter(evaluations.values()))
    rows = [_worst(index, evaluations, first.metrics) for index in range(len(first.per_image))]
    by_attack = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    return WorstCase(first.metrics, rows, by_attack)


def _worst(
    index: int, evaluations: Mapping[str, Evaluation], metrics: Sequence[str]
) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index}
    for metric in metrics:
        values = {n: e.per_image[index][metric] for n, e in evaluations.items()}
        known = {name: value for name, value in values.items() if value is not None}
        choose = min if is_smaller_better(metric) else max
        name = choose(known, key=lambda n: known[n]) if known else None
        row[metric] = None if name is None else known[name]
        row[f"{metric}_attack"] = name
    return row


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
