"""How the comparison is shown: on its page, on the attacks' cards, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fidelity.declare import Row
from benchmarks.fidelity.record import OURS, Entry, Record
from benchmarks.fidelity.rows import ROWS
from benchmarks.fidelity.verdict import Measured, verdict
from benchmarks.markdown import row_of

NOT_OPENED = "*"
UNITS = {"dB": ("{:.2f}", " dB"), "share": ("{:.3f}", "")}


@dataclass(frozen=True)
class Line:
    """A row with what was measured of it.

    Attributes:
        row: What was compared.
        ours: Our trials; None where there are none.
        others: Of every other implementation.
        entries: Our trials one by one.
    """

    row: Row
    ours: Measured | None
    others: dict[str, Measured]
    entries: list[Entry]

    @staticmethod
    def of(row: Row, record: Record) -> Line:
        """What a record says of a row."""
        kind = row.experiment.kind if row.experiment else ""
        entries = record.of(row.name, kind)
        others = {}
        for name in record.others(row.name):
            measured = Measured.of([e.value for e in record.of(row.name, kind, name)])
            if measured is not None:
                others[name] = measured
        return Line(row, Measured.of([e.value for e in entries]), others, entries)

    @property
    def stands_in(self) -> bool:
        """Whether other samples than the row asks for were attacked."""
        kind = self.row.experiment.kind if self.row.experiment else ""
        return any(entry.samples != kind for entry in self.entries)

    @property
    def verdict(self) -> str:
        """In words."""
        return verdict(self.row, self.ours, self.stands_in)

    @property
    def date(self) -> str:
        """Of the newest trial."""
        return max((entry.date for entry in self.entries), default="")

    def number(self, value: float) -> str:
        """A value in the row's digits, without its unit."""
        return UNITS[self.row.published.unit][0].format(value)

    @property
    def published(self) -> str:
        """The published value with its unit."""
        star = "" if self.row.published.opened else NOT_OPENED
        return self.number(self.row.published.value) + UNITS[self.row.published.unit][1] + star

    def measured(self, measured: Measured | None) -> str:
        """A mean with its interval and the number of trials."""
        if measured is None:
            return "–"
        low, high = self.number(measured.low), self.number(measured.high)
        return f"{self.number(measured.mean)} ({low} to {high}, n = {measured.n})"


def lines(record: Record, rows: Sequence[Row] = ROWS) -> list[Line]:
    """All rows with what a record says of them."""
    return [Line.of(row, record) for row in rows]


def of_attack(record: Record, attack: str) -> list[Line]:
    """The rows of one attack."""
    return [line for line in lines(record) if line.row.attack == attack]


def to_text(rows: Sequence[Row], record: Record) -> str:
    """For the terminal: a row in two lines."""
    shown = []
    for line in lines(record, rows):
        beside = "".join(f"; {n} {line.measured(m)}" for n, m in line.others.items())
        shown.append(
            f"{line.row.name}: published {line.published}, {OURS} {line.measured(line.ours)}"
            f"{beside}\n    {line.verdict}"
        )
    return "\n".join(shown)


def reproduced(line: Line) -> str:
    """Ours, its interval and the date of the record, in one sentence without a full stop."""
    if line.ours is None:
        return line.verdict
    return f"{line.measured(line.ours)}, {line.date}: {line.verdict}"


def page_of(folder: Path) -> str:
    """The page of the documents that shows the record in a folder, in Markdown."""
    shown = lines(Record.read(folder))
    computed = [line for line in shown if line.ours is not None]
    return _PAGE.format(
        rows=len(shown),
        computed=len(computed),
        counts=_counts(computed),
        table="\n".join(_cells(line) for line in computed),
        settings="\n".join(_setting(line) for line in shown),
        waiting="\n".join(_waiting(line) for line in shown if line.ours is None),
    )


def _counts(computed: Sequence[Line]) -> str:
    """How many rows got which verdict."""
    whole = [line for line in computed if line.ours and line.ours.n >= line.row.trials]
    words = [line.verdict.split(":")[0] for line in whole]
    words += ["in part"] * (len(computed) - len(whole))
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def _cells(line: Line) -> str:
    beside = "<br>".join(f"{n}: {line.measured(m)}" for n, m in line.others.items()) or "–"
    cells = (f"[`{line.row.name}`](#{line.row.name})", line.published, line.measured(line.ours))
    return row_of((*cells, beside, line.verdict))


def _setting(line: Line) -> str:
    return "\n".join([f"### {line.row.name}", "", *_facts(line)]) + "\n"


def _facts(line: Line) -> Iterator[str]:
    row, published = line.row, line.row.published
    note = f"; {published.note}" if published.note else ""
    quoted = "" if published.opened else " Quoted; not opened by us for this table."
    yield f"- Attack `{row.attack}`. {row.setting[0].upper()}{row.setting[1:]}."
    yield (
        f"- Published: {line.number(published.value)} ({published.where}{note}), "
        f"<{published.address}>.{quoted}"
    )
    if row.differs:
        yield f"- What differs here: {row.differs}."
    yield f"- Computed by `{row.run_by}`."


def _waiting(line: Line) -> str:
    return f"| [`{line.row.name}`](#{line.row.name}) | {line.published} | {line.verdict} |"


_PAGE = """# Does an attack here do what its paper says?

<!-- Written by docs/generate.py from results/fidelity/fidelity.json. -->
Every row is a published attack or label rule at its published setting: the published value, ours
over several images (or batches, or sentences) with the 95 % interval of the mean by bootstrap over
them, and where it can be installed a second implementation
([breaching](https://github.com/JonasGeiping/breaching), for records
[TabLeak's own code](https://github.com/eth-sri/tableak)) on the same parameters, gradients and
images. Every image has initial parameters and a start of its own. The verdict follows from the
numbers: the published value lies inside our interval ("reproduced"), below it ("above") or above
it ("below", with the reason). Many published values are of a single image, whose deviation from
image to image nobody states. A star marks values that are quoted and were not read at their source
for this table.

{computed} of {rows} rows are computed: {counts}.

| row | published | ours | second implementation | verdict |
| :--- | ---: | ---: | ---: | :--- |
{table}

## Not computed

| row | published | |
| :--- | ---: | :--- |
{waiting}

`python -m benchmarks fidelity` computes what is missing, the cheap rows first, and resumes where it
was stopped. `--data cifar10=DIR` names a folder of class folders with CIFAR-10's images; without it
photographs from installed packages stand in and the row says so. Pictures are never stored.
`--budget MINUTES` begins no trial later; `--only ROW` takes one row; `--device cuda` also computes
those that need a GPU, `--weights resnet18=FILE` those on trained networks, and
`--weights adult.data=FILE` those on Adult.

## Settings

{settings}"""
