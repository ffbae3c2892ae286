"""What was recovered beside what was true: a bounded part of it, for a record and as HTML.

The record of an attack stays with whoever attacks. What leaves a site is an allow-list of numbers
(`audit.record`, `federated.gate.allowed`), and nothing of this module has a place in it.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch

from attack.metrics.evaluation import Evaluation, metric_title
from attack.metrics.records import as_words, right_cells
from core.data.columns import Columns
from core.data.specs import DataSpec
from core.errors import InputError
from core.escaping import printable
from core.records import BROKEN, check_types

# Samples that a record keeps; columns and tokens of each; characters of a cell and of a sentence.
SHOWN, MAX_COLUMNS, MAX_TOKENS, MAX_CELL, MAX_TEXT = 8, 64, 256, 80, 4000
STYLE = (
    ".recovered td { text-align: left; vertical-align: top; white-space: pre-wrap; } "
    ".recovered th { text-align: left; } .recovered mark { background: #fca5a5; color: #000; } "
    ".recovered tr.true > * { border-top: 2px solid #888; }"
)


@dataclass(frozen=True)
class Piece:
    """A recovered cell, or a run of recovered tokens.

    Attributes:
        text: As it reads.
        right: Whether it is the true one.
    """

    text: str
    right: bool


@dataclass(frozen=True)
class Pair:
    """An original with what was recovered of it.

    Attributes:
        true: The cells of a record; of a sentence its whole text alone.
        recovered: A piece per cell; of a sentence runs of tokens.
    """

    true: tuple[str, ...]
    recovered: tuple[Piece, ...]


@dataclass(frozen=True)
class Recovered:
    """Some samples of a batch beside what was recovered of them.

    Attributes:
        total: Samples of the batch.
        of_each: Columns or tokens of each sample.
        pairs: At most `SHOWN`, the first of the batch.
        scores: Over the whole batch, with names: how much is right, and what guesses get right.
        columns: Names of a record's columns, at most `MAX_COLUMNS`; empty for sentences.
        right: Of these columns, the share of right cells over the batch.
        guess: The same of the best guess that knows the columns' distributions alone.
    """

    total: int
    of_each: int
    pairs: tuple[Pair, ...]
    scores: tuple[tuple[str, float], ...]
    columns: tuple[str, ...] = ()
    right: tuple[float, ...] = ()
    guess: tuple[float, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        values = dataclasses.asdict(self)
        values["pairs"] = [
            {"true": list(p.true), "recovered": [[c.text, c.right] for c in p.recovered]}
            for p in self.pairs
        ]
        values["scores"] = [list(score) for score in self.scores]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @staticmethod
    def from_record(values: Mapping[str, Any]) -> Recovered:
        """The inverse of `to_record`.

        Raises:
            InputError: They are not of its form.
        """
        try:
            pairs = tuple(
                Pair(tuple(pair["true"]), tuple(Piece(*piece) for piece in pair["recovered"]))
                for pair in values["pairs"]
            )
            lists = {name: tuple(values[name]) for name in ("columns", "right", "guess")}
            scores = tuple((name, value) for name, value in values["scores"])
            found = Recovered(**{**values, **lists, "pairs": pairs, "scores": scores})
            check_types(found)
        except (InputError, *BROKEN):
            raise InputError("the recovered samples in the record are broken") from None
        if any(len(row) != len(found.columns) for row in _rows(found)):
            raise InputError("the recovered samples in the record have other columns than it says")
        return found

    def to_html(self) -> str:
        """A table with the true samples above or beside the recovered ones; what is wrong is
        marked.
        """
        parts = _records(self) if self.columns else _sentences(self)
        scores = ", ".join(f"{name} {value:.3f}" for name, value in self.scores)
        notes = [_part(self), "What is wrong is marked.", scores and f"Over the batch: {scores}."]
        return (
            f'<div class="recovered"><p>{_safe(" ".join(filter(None, notes)))}</p>'
            f"<table>{''.join(parts)}</table></div>"
        )

    def to_page(self, title: str, tables: str = "") -> str:
        """A page of its own.

        Args:
            title: What was attacked with what.
            tables: Further text, shown as it is.
        """
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_safe(title)}</title><style>:root {{ color-scheme: light dark; }} "
            "body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem; } table { border-collapse: "
            f"collapse; }} th, td {{ padding: 0.3rem 0.6rem; }} {STYLE}</style></head><body>"
            f"<h1>{_safe(title)}</h1>{self.to_html()}<pre>{_safe(tables)}</pre></body></html>\n"
        )


def recovered_sentences(
    true: torch.Tensor, found: torch.Tensor, data: DataSpec, evaluation: Evaluation
) -> Recovered:
    """Sentences beside the true ones.

    Args:
        true: N x T token ids.
        found: N x T, in the order of the true ones.
        data: Has the texts of tokens.
        evaluation: Of all of them.
    """
    pairs = []
    for original, ids in zip(true[:SHOWN, :MAX_TOKENS], found[:SHOWN, :MAX_TOKENS], strict=True):
        pieces = text_pieces(ids.tolist(), original.tolist(), data)
        pairs.append(
            Pair(
                (_short(data.text(original), MAX_TEXT),),
                tuple(Piece(_short(piece.text, MAX_TEXT), piece.right) for piece in pieces),
            )
        )
    return Recovered(len(true), true.shape[1], tuple(pairs), _scores(evaluation))


def text_pieces(found: Sequence[int], true: Sequence[int], data: DataSpec) -> list[Piece]:
    """Runs of recovered tokens, and whether they stand in the true sentence in this order.

    Args:
        found: Recovered token ids.
        true: Those of the true sentence.
        data: Has the texts of tokens.
    """
    matcher = SequenceMatcher(None, true, found, autojunk=False)
    # Ids that stand for themselves have no space of their own.
    space = "" if data.tokens else " "
    return [
        Piece(data.text(torch.tensor(found[start:end])) + space, kind == "equal")
        for kind, _, _, start, end in matcher.get_opcodes()
        if end > start
    ]


def recovered_records(
    columns: Columns, true: torch.Tensor, found: torch.Tensor, evaluation: Evaluation
) -> Recovered:
    """Records beside the true ones; cells are right as TabLeak counts them.

    Args:
        columns: What the features stand for.
        true: N x F.
        found: N x F, in the order of the true ones.
        evaluation: Of all of them.
    """
    true, found = true[:SHOWN].cpu(), found[:SHOWN].cpu()
    marks = right_cells(columns, found, true).tolist()
    words = (as_words(columns.decode(part)) for part in (true, found))
    pairs = [
        Pair(
            tuple(_short(cell, MAX_CELL) for cell in original[:MAX_COLUMNS]),
            tuple(
                Piece(_short(cell, MAX_CELL), ok)
                for cell, ok in zip(recovered[:MAX_COLUMNS], right[:MAX_COLUMNS], strict=True)
            ),
        )
        for original, recovered, right in zip(*words, marks, strict=True)
    ]
    named = [evaluation.columns[c.name] for c in columns.columns[:MAX_COLUMNS]]
    return Recovered(
        total=len(evaluation.per_image),
        of_each=len(columns),
        pairs=tuple(pairs),
        scores=_scores(evaluation),
        columns=tuple(_short(c.name, MAX_CELL) for c in columns.columns[:MAX_COLUMNS]),
        right=tuple(column["accuracy"] for column in named),
        guess=tuple(column["guess"] for column in named),
    )


def _scores(evaluation: Evaluation) -> tuple[tuple[str, float], ...]:
    """The mean of the first metric, and that of every guess."""
    metric = evaluation.metrics[0]
    means = {metric_title(metric): evaluation.summary()[metric]["mean"]}
    means |= {name: values[metric]["mean"] for name, values in evaluation.baselines.items()}
    return tuple((name, mean) for name, mean in means.items() if mean is not None)


def _rows(found: Recovered) -> Iterator[Sequence[object]]:
    """Everything that has an entry per column of a record."""
    if found.columns:
        yield from (found.right, found.guess)
        for pair in found.pairs:
            yield from (pair.true, pair.recovered)


def _part(found: Recovered) -> str:
    """Which part of the batch is shown, where it is not all."""
    samples, parts, most = (
        ("records", "columns", MAX_COLUMNS)
        if found.columns
        else ("sentences", "tokens", MAX_TOKENS)
    )
    said = ""
    if len(found.pairs) < found.total:
        said = f"The first {len(found.pairs)} of {found.total} {samples}."
    if found.of_each > most:
        said += f" The first {most} of {found.of_each} {parts}."
    return said.strip()


def _records(found: Recovered) -> Iterator[str]:
    yield f"<thead>{_row('record', '', found.columns, 'th')}</thead><tbody>"
    for number, pair in enumerate(found.pairs):
        yield _row(str(number), "true", map(_safe, pair.true), kind="true")
        yield _row("", "recovered", map(_marked, pair.recovered))
    yield "</tbody><tfoot>"
    for name, shares in (("share right", found.right), ("best guess", found.guess)):
        yield _row("", name, [f"{share:.3f}" for share in shares], kind="true")
    yield "</tfoot>"


def _row(first: str, second: str, cells: Any, tag: str = "td", kind: str = "") -> str:
    """A row of the table of records, whose cells are HTML already, unless they are names."""
    entries = "".join(f"<{tag}>{_safe(c) if tag == 'th' else c}</{tag}>" for c in cells)
    marked = f' class="{kind}"' if kind else ""
    return f"<tr{marked}><th>{first}</th><th>{second}</th>{entries}</tr>"


def _sentences(found: Recovered) -> Iterator[str]:
    yield "<thead><tr><th>true</th><th>recovered</th></tr></thead><tbody>"
    for pair in found.pairs:
        pieces = "".join(map(_marked, pair.recovered))
        yield f'<tr class="true"><td>{_safe("".join(pair.true))}</td><td>{pieces}</td></tr>'
    yield "</tbody>"


def _marked(piece: Piece) -> str:
    return _safe(piece.text) if piece.right else f"<mark>{_safe(piece.text)}</mark>"


def _safe(text: str) -> str:
    """A text of others' as HTML: no tag, and no character that turns the line."""
    return html.escape(printable(text))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
