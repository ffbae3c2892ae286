"""What a column shows: where its numbers are in the records, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Results of one repeat of a row, by stage.
Run = Mapping[str, Mapping[str, Any]]
# An image above this PSNR is recovered exactly, up to rounding.
RECOVERED_DB = 60.0


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: What tables call it.
        header: What readers see.
        values: The numbers of one run; per image where there are several.
        digits: After the decimal point; None for three significant ones.
        leak: "high" or "low", on which side the metric says that more leaked.
        missing: Why a run may have no value, for the footnote.
        note: Explains a value's absence from the run itself.
        text: For a column of words instead of numbers, the word of one run.
    """

    name: str
    header: str
    values: Callable[[Run], Sequence[float | None]]
    digits: int | None = 3
    leak: str | None = None
    missing: str = "not recorded"
    note: Callable[[Run], str | None] = lambda run: None
    text: Callable[[Run], str | None] | None = None


def dig(value: Any, path: str) -> Any:
    """Follow a dotted path into nested records; None where it ends early."""
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _scalar(path: str) -> Callable[[Run], list[float | None]]:
    def values(run: Run) -> list[float | None]:
        value = dig(run, path)
        return [float(value)] if isinstance(value, (int, float)) else []

    return values


def _per_image(metric: str) -> Callable[[Run], list[float | None]]:
    def values(run: Run) -> list[float | None]:
        rows = dig(run, "attack.evaluation.per_image") or []
        return [row.get(metric) for row in rows if row.get(metric) is not None]

    return values


def _worst_case(metric: str) -> Column:
    """For every image the value of the attack from which most leaked."""

    def values(run: Run) -> list[float | None]:
        rows = dig(run, "attack.worst_case.per_image") or []
        return [row.get(metric) for row in rows if row.get(metric) is not None]

    known = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "lpips_alex": ("LPIPS", 3)}
    title, digits = known[metric]
    side = "low" if metric == "lpips_alex" else "high"
    missing = "only an ensemble of attacks has a worst case"
    return Column(f"worst-case {metric}", f"{title}, worst attack", values, digits, side, missing)


def _words(path: str) -> Callable[[Run], str | None]:
    def text(run: Run) -> str | None:
        value = dig(run, path)
        return None if value is None else str(value)

    return text


def _strongest(run: Run) -> str | None:
    """The attacks that got most out of the images, by SSIM or else PSNR."""
    rows = dig(run, "attack.worst_case.per_image") or []
    names = [row.get("ssim_attack") or row.get("psnr_attack") for row in rows]
    return ", ".join(dict.fromkeys(name for name in names if name)) or None


def _threat(run: Run) -> str | None:
    threat = dig(run, "attack.threat") or {}
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


def _no_numbers(run: Run) -> list[float | None]:
    return []


def _information_ratios(run: Run) -> list[float | None]:
    return [sample["ratio"] for sample in dig(run, "attack.GInfoR.by_sample") or []]


def _recovered(run: Run) -> list[float | None]:
    """The share of the batch that is recovered up to rounding: its spread is over batches."""
    values = _per_image("psnr")(run)
    return [sum((value or 0) > RECOVERED_DB for value in values) / len(values)] if values else []


def _wholly_recovered(run: Run) -> list[float | None]:
    """1 where every image of the batch is recovered up to rounding, else 0."""
    return [float(share == 1) for share in _recovered(run)]


def _missing_metric(metric: str) -> Callable[[Run], str | None]:
    def note(run: Run) -> str | None:
        reason = dig(run, f"attack.evaluation.missing.{metric}")
        return None if reason is None else str(reason)

    return note


def _metric(name: str, header: str, digits: int, leak: str) -> Column:
    return Column(
        name, header, _per_image(name), digits, leak, "not measured", _missing_metric(name)
    )


def _validation_accuracy(run: Run) -> list[float | None]:
    """Of the very model whose gradient was taken: the last, the best or the initial one."""
    name = "initial_val_acc1" if _is_untrained(run) else "best_val_acc1"
    return _scalar(f"train.{name}")(run)


def _accuracy_note(run: Run) -> str | None:
    return "the model is untrained and guesses" if _is_untrained(run) else None


def _is_untrained(run: Run) -> bool:
    if "extract" not in run:
        return False
    model = dig(run, "extract.arguments.pretrained")
    return model is None or str(model).endswith("model_init.pth.tar")


def _test_accuracy(run: Run) -> list[float | None]:
    return [100 * value for value in _scalar("federated.test_accuracy")(run) if value is not None]


def measured_leakage(run: Run, site: str) -> list[Mapping[str, Any]]:
    """What a site of a federation recorded, by round; without images where it withheld blindly."""
    entries = dig(run, "federated.leakage") or []
    return sorted((e for e in entries if e["site"] == site), key=lambda e: e["round"])


def _recorded(run: Run, site: str, round_number: int | None) -> Mapping[str, Any] | None:
    """The last record, or that of a round."""
    found = measured_leakage(run, site)
    if round_number is not None:
        found = [entry for entry in found if entry["round"] == round_number]
    return found[-1] if found else None


def _rdlv(site: str, round_number: int | None) -> Callable[[Run], list[float | None]]:
    def values(run: Run) -> list[float | None]:
        entry = _recorded(run, site, round_number)
        return [image["rdlv"] for image in entry["images"]] if entry else []

    return values


def _rdlv_note(site: str, round_number: int | None) -> Callable[[Run], str | None]:
    """Why a round has no value: an earlier round's must not pass for it, but is told."""

    def note(run: Run) -> str | None:
        entry = _recorded(run, site, round_number)
        if entry is None or entry["images"]:
            return None
        before = [e for e in measured_leakage(run, site) if e["images"]]
        told = "".join(f"; round {e['round']}: RDLV {e['rdlv']:.2f}" for e in before[-1:])
        return f"round {entry['round']}: {entry['statement']}{told}"

    return note


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


def _epsilon(run: Run) -> list[float | None]:
    """Spent on the very model that was attacked, or by the one release from an untrained one."""
    stage = "extract" if _is_untrained(run) else "train"
    return _scalar(f"{stage}.privacy.epsilon")(run)


def _epsilon_note(run: Run) -> str | None:
    note = dig(run, "train.privacy.note")
    return None if note is None else str(note)


_RDLV = re.compile(r"rdlv (\S+?)(?: round (\d+))?")
_ALL = [
    Column("validation accuracy", "val. acc. %", _validation_accuracy, 1, note=_accuracy_note),
    Column(
        "epsilon", "ε", _epsilon, None, missing="not differentially private", note=_epsilon_note
    ),
    Column("test accuracy", "test acc. %", _test_accuracy, 1),
    Column("RA index", "RA index", _scalar("extract.rank_analysis.maximum"), 0),
    Column("trained accuracy", "trained acc. %", _scalar("train.best_val_acc1"), 1),
    Column(
        "update cosine",
        "update kept",
        _scalar("extract.update_cosine"),
        3,
        missing="the noise is inside training; see the trained accuracy",
    ),
    Column("label accuracy", "label acc.", _scalar("attack.label_accuracy"), 2, "high"),
    Column("recovered", "recovered", _recovered, 2, "high"),
    Column("wholly recovered", "whole batches", _wholly_recovered, 2, "high"),
    Column("information ratio", "GInfoR", _information_ratios, 3, "high"),
    Column("objective", "objective", _scalar("attack.objective"), 5),
    Column("seconds", "seconds", _scalar("attack.seconds"), 1),
    Column("training seconds", "training s", _scalar("train.seconds"), 1),
    Column("threat", "threat model", _no_numbers, text=_threat),
    Column("chosen attack", "chosen attack", _no_numbers, text=_words("attack.details.chosen")),
    Column("strongest attack", "strongest attack", _no_numbers, text=_strongest),
    _worst_case("psnr"),
    _worst_case("ssim"),
    _worst_case("lpips_alex"),
    _metric("mse", "MSE", 4, "low"),
    _metric("psnr", "PSNR", 2, "high"),
    _metric("ssim", "SSIM", 3, "high"),
    _metric("cw_ssim", "CW-SSIM", 3, "high"),
    _metric("lpips_alex", "LPIPS", 3, "low"),
    _metric("lpips_vgg", "LPIPS (VGG)", 3, "low"),
]

COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}


BY_RULE = "labels by "


def _label_rule(name: str) -> Column:
    """Label accuracy of one rule, from a run of label recovery alone."""
    place = f"attack.label_rules.{name.removeprefix(BY_RULE)}"

    def note(run: Run) -> str | None:
        reason = dig(run, f"{place}.reason")
        return None if reason is None else str(reason)

    rule = name.removeprefix(BY_RULE)
    return Column(name, rule, _scalar(f"{place}.accuracy"), 2, "high", note=note)


def find_column(name: str) -> Column:
    """A column by its name, or for any number of the records by `STAGE.DOTTED.PATH`."""
    known = COLUMNS.get(name) or _rdlv_column(name)
    if name.startswith(BY_RULE):
        return _label_rule(name)
    return known or Column(name, name.rpartition(".")[2].replace("_", " "), _scalar(name))


@dataclass(frozen=True)
class View:
    """One column as a table shows it.

    Attributes:
        column: Whose numbers.
        part: "mean" (with the standard deviation), "worst" or "interval".
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
        }[self.part]

    def number(self, value: float) -> str:
        """A value in the column's precision."""
        digits = self.column.digits
        return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"


def find_view(name: str) -> View:
    """`NAME`, `worst NAME` or `interval NAME`."""
    part, _, rest = name.partition(" ")
    if part in ("worst", "interval") and rest:
        return View(find_column(rest), part)
    return View(find_column(name))


def is_known(name: str) -> bool:
    """Whether a table may show a column of this name."""
    column = find_view(name).column
    computed = column.name.startswith(BY_RULE) or _rdlv_column(column.name) is not None
    return column.name in COLUMNS or "." in column.name or computed
