"""What a column shows: where its numbers are in the records, and how they are written.

A table names a column in one of these ways:

- a name of `COLUMNS` ("validation accuracy", "epsilon", "seconds", ...);
- a metric of `attack.metrics`, one that a plugin registers too ("psnr"), or "worst-case psnr",
  where an ensemble attacked;
- "labels by RULE", "recovered at N dB" and "rdlv SITE", "rdlv SITE round N";
- "STAGE.KEY.KEY...", for any number of the records (`benchmarks.declare.records`).

"worst NAME" shows the value of greatest leakage in place of the mean, "interval NAME" the 95 %
interval of the mean, "change NAME" the mean difference from the same image in the row that the
table compares with (`compare`), and its 95 % interval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.declare.measured_utility import committed_utility
from benchmarks.declare.names import unknown
from benchmarks.declare.records import Entry, Run, example_paths, is_recorded
from core.errors import InputError

# An image above this PSNR is recovered exactly, up to rounding.
RECOVERED_DB = 60.0


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Name that tables use.
        header: Header of the column.
        values: The numbers of one run; per image where there are several.
        digits: After the decimal point; None for three significant ones.
        leak: "high" or "low", on which side the metric says that more leaked.
        missing: Why a run may have no value, for the footnote.
        note: Explains a value's absence from the run itself.
        text: For a column of words instead of numbers, the word of one run.
    """

    name: str
    header: str
    values: Callable[[Run], Sequence[float]]
    digits: int | None = 3
    leak: str | None = None
    missing: str = "not recorded"
    note: Callable[[Run], str | None] = lambda run: None
    text: Callable[[Run], str | None] | None = None


def _path(path: str) -> Callable[[Run], list[float]]:
    return lambda run: run.numbers(path)


def _no_numbers(run: Run) -> list[float]:
    return []


def _strongest(run: Run) -> str | None:
    """The attacks that got most out of the images, by SSIM or else PSNR."""
    names = [row.get("ssim_attack") or row.get("psnr_attack") for row in run.worst_images]
    return ", ".join(dict.fromkeys(name for name in names if name)) or None


def _threat(run: Run) -> str | None:
    threat = run.value("attack.threat") or {}
    if threat.get("name") != "custom":
        return threat.get("name")
    # Every custom attacker is given these.
    usual = {
        "batch size known",
        "running BatchNorm statistics known",
        "the client's local hyper-parameters known",
    }
    more = sorted(set(threat.get("granted", [])) - usual)
    return "; ".join(["custom", *more])


def _recovered(run: Run, above: float = RECOVERED_DB) -> list[float]:
    """The share of the batch above a PSNR: its spread is over batches."""
    values = run.numbers("attack.evaluation.per_image.psnr")
    return [sum(value > above for value in values) / len(values)] if values else []


def _wholly_recovered(run: Run) -> list[float]:
    """1 where every image of the batch is recovered up to rounding, else 0."""
    return [float(share == 1) for share in _recovered(run)]


def _validation_accuracy(run: Run) -> list[float]:
    """Of the very model whose gradient was taken: the last, the best or the initial one."""
    return run.numbers(f"train.{'initial' if run.is_untrained else 'best'}_val_acc1")


def _defended_accuracy(run: Run) -> list[float]:
    """Of clients that trained under the defenses of the update, from the record of utility."""
    found = committed_utility(tuple(run.value("extract.defenses") or ()))
    return [] if found is None else [found]


def _kept(run: Run) -> str | None:
    """How much of the update's direction is left."""
    cosines = run.numbers("extract.update_cosine")
    if not cosines or not run.value("extract.defenses"):
        return None
    return f"update cosine {cosines[0]:.3f}"


def _accuracy_note(run: Run) -> str | None:
    return "the model is untrained and guesses" if run.is_untrained else None


def _test_accuracy(run: Run) -> list[float]:
    return [100 * value for value in run.numbers("federated.test_accuracy")]


def _epsilon(run: Run) -> list[float]:
    """Spent on the very model that was attacked, or by the one release from an untrained one."""
    return run.numbers(f"{'extract' if run.is_untrained else 'train'}.privacy.epsilon")


_ALL = [
    Column("validation accuracy", "val. acc. %", _validation_accuracy, 1, note=_accuracy_note),
    Column(
        "epsilon",
        "ε",
        _epsilon,
        None,
        missing="not differentially private",
        note=lambda run: run.text("train.privacy.note"),
    ),
    Column("test accuracy", "test acc. %", _test_accuracy, 1),
    Column("RA index", "RA index", _path("extract.rank_analysis.maximum"), 0),
    Column("trained accuracy", "trained acc. %", _path("train.best_val_acc1"), 1),
    Column(
        "defended accuracy",
        "defended acc. %",
        _defended_accuracy,
        1,
        missing="not measured; python -m benchmarks.utility --defense NAME:PARAM does",
        note=_kept,
    ),
    Column(
        "update cosine",
        "update kept",
        _path("extract.update_cosine"),
        3,
        missing="the noise is inside training; see the trained accuracy",
    ),
    Column("label accuracy", "label acc.", _path("attack.label_accuracy"), 2, "high"),
    Column("recovered", "recovered", _recovered, 2, "high"),
    Column("wholly recovered", "whole batches", _wholly_recovered, 2, "high"),
    Column("information ratio", "GInfoR", _path("attack.GInfoR.by_sample.ratio"), 3, "high"),
    Column("objective", "objective", _path("attack.objective"), 5),
    Column("seconds", "seconds", _path("attack.seconds"), 1),
    Column("cpu seconds", "CPU s", _path("attack.details.cpu_seconds"), 1),
    Column("training seconds", "training s", _path("train.seconds"), 1),
    Column("threat", "threat model", _no_numbers, text=_threat),
    Column(
        "chosen attack",
        "chosen attack",
        _no_numbers,
        text=lambda run: run.text("attack.details.chosen"),
    ),
    Column("strongest attack", "strongest attack", _no_numbers, text=_strongest),
]

COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}

# Header and digits of the metrics that have had them in print; others by their title.
_IN_PRINT = {
    "mse": ("MSE", 4),
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 3),
    "cw_ssim": ("CW-SSIM", 3),
    "lpips_alex": ("LPIPS", 3),
    "lpips_vgg": ("LPIPS (VGG)", 3),
}
BY_WORST_ATTACK = "worst-case "
BY_RULE = "labels by "
_RECOVERED_AT = re.compile(r"recovered at (\d+(?:\.\d+)?) dB")
_RDLV = re.compile(r"rdlv (\S+?)(?: round (\d+))?")


def _metrics() -> list[str]:
    """Every metric of the registry, those of plugins that are imported too."""
    # Torch takes seconds, and a table may have no metric at all.
    from attack.metrics import metric_names

    return metric_names()


def _metric_column(name: str) -> Column | None:
    """`METRIC`, per image, or `worst-case METRIC`, of the attack from which most leaked."""
    from attack.metrics import is_smaller_better, metric_title

    metric = name.removeprefix(BY_WORST_ATTACK)
    if metric not in _metrics():
        return None
    header, digits = _IN_PRINT.get(metric, (metric_title(metric), 3))
    leak = "low" if is_smaller_better(metric) else "high"
    if name != metric:
        values = _path(f"attack.worst_case.per_image.{metric}")
        missing = "only an ensemble of attacks has a worst case"
        return Column(name, f"{header}, worst attack", values, digits, leak, missing)
    values = _path(f"attack.evaluation.per_image.{metric}")

    def note(run: Run) -> str | None:
        return run.text(f"attack.evaluation.missing.{metric}")

    return Column(name, header, values, digits, leak, "not measured", note)


def _label_rule(name: str) -> Column | None:
    """`labels by RULE`: label accuracy of one rule, from a run of label recovery alone."""
    if not name.startswith(BY_RULE):
        return None
    rule = name.removeprefix(BY_RULE)
    place = f"attack.label_rules.{rule}"

    def note(run: Run) -> str | None:
        return run.text(f"{place}.reason")

    return Column(name, rule, _path(f"{place}.accuracy"), 2, "high", note=note)


def _recovered_column(name: str) -> Column | None:
    """`recovered at N dB`: the share of images above a PSNR that a person recognises them at."""
    found = _RECOVERED_AT.fullmatch(name)
    if found is None:
        return None
    above = float(found.group(1))
    return Column(name, f"> {above:g} dB", lambda run: _recovered(run, above), 2, "high")


def _rdlv_column(name: str) -> Column | None:
    """`rdlv SITE`, of the last round measured, or `rdlv SITE round N`; per training image."""
    found = _RDLV.fullmatch(name)
    if found is None:
        return None
    site, number = found.groups()
    header = f"RDLV {site}" if number is None else f"{site}, round {number}"
    round_number = None if number is None else int(number)
    values, note = _rdlv(site, round_number), _rdlv_note(site, round_number)
    return Column(name, header, values, 2, "high", "this site did not measure", note=note)


def _recorded(run: Run, site: str, round_number: int | None) -> Entry | None:
    """The last record, or that of a round."""
    found = run.leakage(site)
    if round_number is not None:
        found = [entry for entry in found if entry["round"] == round_number]
    return found[-1] if found else None


def _rdlv(site: str, round_number: int | None) -> Callable[[Run], list[float]]:
    def values(run: Run) -> list[float]:
        entry = _recorded(run, site, round_number)
        return [image["rdlv"] for image in entry["images"]] if entry else []

    return values


def _rdlv_note(site: str, round_number: int | None) -> Callable[[Run], str | None]:
    """Why a round has no value: an earlier round's must not pass for it, but is told."""

    def note(run: Run) -> str | None:
        entry = _recorded(run, site, round_number)
        if entry is None or entry["images"]:
            return None
        before = [e for e in run.leakage(site) if e["images"]]
        told = "".join(f"; round {e['round']}: RDLV {e['rdlv']:.2f}" for e in before[-1:])
        return f"round {entry['round']}: {entry['statement']}{told}"

    return note


def _record_column(name: str) -> Column | None:
    """`STAGE.KEY.KEY...`: the numbers of the records at a path."""
    if "." not in name or not is_recorded(name, _metrics()):
        return None
    return Column(name, name.rpartition(".")[2].replace("_", " "), _path(name))


def find_column(name: str) -> Column:
    """A column by its name, a metric's, or the path of a number in the records.

    Raises:
        InputError: There is no such column; names those that are near.
    """
    kinds = (_rdlv_column, _recovered_column, _label_rule, _metric_column, _record_column)
    found = COLUMNS.get(name) or next(filter(None, (kind(name) for kind in kinds)), None)
    if found is None:
        raise InputError(_unknown(name))
    return found


def _unknown(name: str) -> str:
    metrics = _metrics()
    if "." in name:
        return unknown("column", name, example_paths(metrics), "the stages record no such value")
    names = [*COLUMNS, *metrics, *(f"{BY_WORST_ATTACK}{metric}" for metric in metrics)]
    more = ("labels by RULE", "recovered at N dB", "rdlv SITE", "STAGE.KEY.KEY of the records")
    return unknown("column", name, names, f"known are {', '.join([*names, *more])}")


@dataclass(frozen=True)
class View:
    """One column as a table shows it.

    Attributes:
        column: The column whose numbers are collected.
        part: "mean" (with the standard deviation), "worst", "interval", or "change": the paired
            difference from the row that the table compares with, and its interval.
    """

    column: Column
    part: str = "mean"

    @property
    def header(self) -> str:
        """What readers see."""
        return {
            "mean": self.column.header,
            "worst": f"worst {self.column.header}",
            "interval": f"{self.column.header} 95 %",
            "change": f"{self.column.header} change",
        }[self.part]

    def number(self, value: float) -> str:
        """A value in the column's precision."""
        digits = self.column.digits
        return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"


def find_view(name: str) -> View:
    """`NAME`, `worst NAME`, `interval NAME` or `change NAME`."""
    part, _, rest = name.partition(" ")
    if part in ("worst", "interval", "change") and rest:
        return View(find_column(rest), part)
    return View(find_column(name))
