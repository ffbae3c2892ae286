"""Finished cells in a committed table: what a table's JSON keeps of them, and taking them back.

The store of a machine is not committed; a table's JSON is, with a compact record of every
finished cell. A later run (`--from TABLE.json`) takes those cells back and computes the others.
They are known by their setting, which is a cell's key without the version of the code: whoever
takes results of an earlier version over says so with the flag, and each record names its version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.run.cells import Cell
from core.errors import InputError
from core.reading import read_json_object

# Parts of a stage's record that no column of a committed table needs.
LEFT_OUT = frozenset(
    {
        "trace", "psnr_curve", "tables", "pictures", "provenance", "arguments", "config", "history",
        "checkpoints", "target", "labels", "checksum", "schema_version", "local_training", "model",
        "data", "gradient_norms", "key", "threat", "images_per_second", "indices", "shards",
        "bn_statistics", "versions",
    }
)  # fmt: skip
# What is kept of the details of an attack.
DETAILS = (
    "cpu_seconds", "targets_at_once", "hvp_agreement", "chosen", "adaptations",
    "tokens_over_width",
)  # fmt: skip
DIGITS = 6
# In a result that was taken back: the version of the code that computed it.
COMPUTED_BY = "computed_by"


class Committed:
    """Compact records of finished cells, by their setting.

    Args:
        records: As `compact_records` made them.
    """

    def __init__(self, records: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.records = dict(records or {})

    @classmethod
    def read(cls, path: Path, flag: str = "--from") -> Committed:
        """The finished cells in a table's JSON.

        Raises:
            InputError: It is no such file.
        """
        records = read_json_object(path, what=f"table ({flag})").get("records", {})
        if not isinstance(records, dict) or not all(_is_record(r) for r in records.values()):
            raise InputError(f"{flag}: {path} holds no records of finished cells")
        return cls(_with_guesses(records))

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What is kept of a cell's result; None where it is not among them."""
        record = self.records.get(cell.setting)
        return None if record is None else {**record["result"], COMPUTED_BY: record.get("code")}


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("result"), dict)


def compact_records(found: Iterable[tuple[Cell, Mapping[str, Any]]]) -> dict[str, Any]:
    """What a table's JSON keeps of its finished cells, by their setting.

    Guesses that know nothing of the gradient are the same for all attacks on one target; they
    are kept with the first.

    Args:
        found: Cells, and what their commands recorded.
    """
    records: dict[str, Any] = {}
    first: dict[str, str] = {}
    for cell, result in found:
        if cell.setting in records:
            continue
        kept = _compact(result)
        code = kept.pop(COMPUTED_BY, None) or cell.code
        evaluation = kept.get("evaluation", {})
        if "baselines" in evaluation:
            guesses = json.dumps(evaluation["baselines"], sort_keys=True)
            if guesses in first:
                evaluation["baselines"] = first[guesses]
            first.setdefault(guesses, cell.setting)
        records[cell.setting] = {"stage": cell.stage, "code": code, "result": kept}
    return records


def _with_guesses(records: Mapping[str, Any]) -> dict[str, Any]:
    """The records, each with its guesses, which may stand in another's."""
    for record in records.values():
        evaluation = record["result"].get("evaluation", {})
        place = evaluation.get("baselines")
        if isinstance(place, str):
            holder = records.get(place, {"result": {}})["result"]
            evaluation["baselines"] = holder.get("evaluation", {}).get("baselines", {})
    return dict(records)


def _compact(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _rounded(value) for key, value in result.items() if key not in LEFT_OUT}
    details = kept.get("details")
    if isinstance(details, dict):
        kept["details"] = {key: details[key] for key in DETAILS if key in details}
    evaluation = kept.get("evaluation")
    if isinstance(evaluation, dict):
        parts = ("per_image", "baselines", "missing")
        kept["evaluation"] = {key: evaluation[key] for key in parts if key in evaluation}
    if "checkpoint" in kept:
        # The folder is one of the machine that computed it.
        kept["checkpoint"] = Path(kept["checkpoint"]).name
    if "arguments" in result:
        pretrained = result["arguments"].get("pretrained")
        # Says of a gradient whether the model was trained.
        kept["arguments"] = {} if pretrained is None else {"pretrained": Path(pretrained).name}
    return kept


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
