"""The record of all models, and the page that shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.markdown import row_of
from benchmarks.models.measure import BATCH, ENOUGH, Agreement
from core.records import check_types, read_record
from core.storage import write_json

# Groups of models, and what the page calls them.
GROUPS = {
    "own": "What a module of your own may contain",
    "torchvision": "Torchvision's classifiers",
    "timm": "Some of timm's classifiers",
}
FILE = "models.json"
# What a row says that a machine with more memory, or another torch, would fill.
UNMEASURED = "not measured"
# A cosine distance that float32 cannot tell from zero.
NO_DISTANCE = 1e-7
HEADER = (
    "Model",
    "Input",
    "Parameters",
    "Eval: exact",
    "Eval: difference",
    "Train: exact",
    "Train: difference",
    "Default, eval / train",
    "Remark",
)


class Record:
    """What was measured, by group of models.

    Args:
        path: The file that keeps it.
        rows: By group.
    """

    def __init__(self, path: Path, rows: Mapping[str, Sequence[Agreement]]) -> None:
        self.path = path
        self.rows = {group: list(rows.get(group, ())) for group in GROUPS}

    @staticmethod
    def read(folder: Path) -> Record:
        """The record in a folder; an empty one where there is none."""
        path = folder / FILE
        if not path.exists():
            return Record(path, {})
        return read_record(path, "models", lambda values: Record(path, _rows(values["models"])))

    def holds(self, group: str, model: str) -> bool:
        """Whether a model was measured."""
        return any(row.model == model for row in self.rows[group])

    def add(self, group: str, found: Sequence[Agreement]) -> None:
        """Put a model's rows in the place of its former ones, or at the end."""
        new = {row.model for row in found}
        kept = [row for row in self.rows[group] if row.model not in new]
        self.rows[group] = [*kept, *found]

    def write(self) -> None:
        """Write the file anew, with the versions that the rows came from."""
        import torch
        import torchvision

        rows = {g: [dataclasses.asdict(row) for row in self.rows[g]] for g in self.rows}
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path, {"command": "python -m benchmarks.models", **versions, "models": rows}
        )

    def page(self) -> str:
        """The page of the documents that shows it, in Markdown."""
        parts = ["# Which models work", _INTRODUCTION]
        for group, title in GROUPS.items():
            if self.rows[group]:
                models = list(_by_model(self.rows[group]))
                n = sum(not any(UNMEASURED in row.refusal for row in both) for both in models)
                parts += [f"## {title}", f"{n} measured so far.", _table(models)]
        return "\n\n".join(parts) + "\n"


_INTRODUCTION = f"""<!-- Written by docs/generate.py from results/models/models.json. -->
Any `nn.Module` can be shared and inverted. Here each model's gradient of the objective in the
images is held against plain double backward in float64, written without a line of the attack's
code: a batch of {BATCH} random images, the cosine of the two gradients. *Exact* is the attack's
second backward pass, *difference* its difference of two passes, both in float64; at least
{ENOUGH} is asked for. *Default* is what an attack does on its own in float32: it takes the
difference, and where that is too coarse two backward passes (marked E). Where this default is
below {ENOUGH}, plain double backward was run in float32, too; the remark says what it has. All
networks are freshly initialised: in some the images hardly move the gradient, whose distance from
the shared one is then below float32's rounding. `python -m benchmarks.models` measures what is
missing here, one model after the other. The tests hold the own modules to it, small classifiers as
they are, and the large architectures with few channels and blocks."""


def _rows(stored: Mapping[str, Sequence[Mapping[str, object]]]) -> dict[str, list[Agreement]]:
    return {group: [_row(row) for row in stored[group]] for group in stored}


def _row(stored: Mapping[str, object]) -> Agreement:
    row = Agreement(**stored)  # type: ignore[arg-type]
    check_types(row)
    return dataclasses.replace(row, shape=tuple(row.shape))


def _by_model(rows: Sequence[Agreement]) -> Iterator[tuple[Agreement, Agreement]]:
    """Every model's rows in eval and in train mode."""
    modes = {(row.model, row.mode): row for row in rows}
    for name in dict.fromkeys(row.model for row in rows):
        yield modes[name, "eval"], modes[name, "train"]


def _table(models: Sequence[tuple[Agreement, Agreement]]) -> str:
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(*both) for both in models)]
    return "\n".join(map(row_of, lines))


def _cells(evaluated: Agreement, trained: Agreement) -> tuple[str, ...]:
    cosines = (evaluated.exact, evaluated.difference, trained.exact, trained.difference)
    parameters = max(evaluated.parameters, trained.parameters)
    return (
        evaluated.model,
        " x ".join(map(str, evaluated.shape)),
        f"{parameters:,}" if parameters else "",
        *map(_number, cosines),
        f"{_default(evaluated)} / {_default(trained)}",
        " ".join(dict.fromkeys(filter(None, map(_remark, (evaluated, trained))))),
    )


def _remark(row: Agreement) -> str:
    """Why a row is below `ENOUGH`, from what was measured there."""
    if row.avoids_the_difference:
        return (
            f"{row.mode}: the difference's step is too long for so curved a network, and the "
            "default takes two backward passes; plain double backward in float32 has "
            f"{row.plain:.6f}."
        )
    if row.plain is None or row.distance is None:
        return row.refusal
    if row.plain >= ENOUGH:
        return f"{row.mode}: the difference's rounding; plain float32 has {row.plain:.6f}."
    remark = f"{row.mode}: rounding of float32, plain double backward in it has {row.plain:.6f}"
    if abs(row.distance) < NO_DISTANCE:
        remark += f" (nothing is left to match: the distance is {row.distance:.0e})"
    return remark + "."


def _number(cosine: float | None) -> str:
    return "" if cosine is None else f"{cosine:.6f}"


def _default(row: Agreement) -> str:
    return _number(row.automatic) + (" E" if row.chosen == "exact" else "")


def page_of(folder: Path) -> str:
    """The page of the documents that shows the record in a folder."""
    return Record.read(folder).page()
