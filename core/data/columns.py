"""Columns of a table: what each holds, and how a record becomes numbers and comes back.

A continuous or ordinal column is one feature, in standard deviations from its mean; a
categorical one is a feature per category, 1 for the record's own and 0 for the others.

>>> columns = Columns.infer(frame)
>>> columns.decode(columns.encode(frame))  # the frame again
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.errors import InputError
from core.escaping import in_one_line

if TYPE_CHECKING:
    import pandas

CONTINUOUS, ORDINAL, CATEGORICAL = "continuous", "ordinal", "categorical"
KINDS = (CONTINUOUS, ORDINAL, CATEGORICAL)
# Whole numbers of at most so many values are taken for ordered levels.
MAX_INFERRED_LEVELS = 12
# A column of more categories names records and does not describe them.
MAX_LEVELS = 1000
# A continuous column's distribution is kept as so many quantiles.
QUANTILES = 101
# As 2024-05-31, 31.05.2024 or 5/31/24, also with a time.
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}([ T]\d{1,2}:.*)?")
# Decimal digits of a standard deviation that a decoded number keeps.
_DIGITS = 5


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its header.
        kind: "continuous", "ordinal" (ordered numbers, one of `values`) or "categorical".
        values: Categories (words); levels of an ordinal column, growing; of a continuous one
            its quantiles from the smallest to the largest.
        shares: How often each of the values occurs.
        center: Mean of a continuous or ordinal column.
        scale: Its standard deviation.
    """

    name: str
    kind: str
    values: tuple[str | float, ...]
    shares: tuple[float, ...]
    center: float = 0.0
    scale: float = 1.0

    @property
    def width(self) -> int:
        """Features that it takes."""
        return len(self.values) if self.kind == CATEGORICAL else 1

    @property
    def levels(self) -> torch.Tensor:
        """The values of a continuous or ordinal column, encoded (float64)."""
        numbers = torch.tensor([float(value) for value in self.values], dtype=torch.float64)
        return (numbers - self.center) / self.scale

    def encode(self, cells: pandas.Series) -> torch.Tensor:
        """Cells as features (N x width, float64).

        Raises:
            InputError: A cell is no number, or none of the categories.
        """
        if self.kind != CATEGORICAL:
            numbers = _numbers(self.name, cells)
            return torch.from_numpy((numbers - self.center) / self.scale)[:, None]
        places = {value: place for place, value in enumerate(self.values)}
        words = [str(cell) for cell in cells]
        strange = next((word for word in words if word not in places), None)
        if strange is not None:
            raise InputError(f"column {self.name}: {strange!r:.40} is none of its categories")
        chosen = torch.tensor([places[word] for word in words])
        return torch.nn.functional.one_hot(chosen, self.width).double()

    def decode(self, features: torch.Tensor) -> list[str] | list[float]:
        """N x width features as cells: the likeliest category, the nearest level."""
        if self.kind == CATEGORICAL:
            return [str(self.values[i]) for i in self.chosen(features).tolist()]
        if self.kind == ORDINAL:
            return [float(self.values[i]) for i in self.chosen(features).tolist()]
        numbers = features[:, 0].double() * self.scale + self.center
        # What float32 keeps of a standard deviation; more digits are rounding.
        digits = _DIGITS - math.floor(math.log10(self.scale))
        return [round(number, digits) for number in numbers.tolist()]

    def chosen(self, features: torch.Tensor) -> torch.Tensor:
        """The place in `values` that ... x width features stand for, of categories and levels."""
        if self.kind == CATEGORICAL:
            return features.argmax(-1)
        levels = self.levels.to(features.device)
        return (features.double() - levels).abs().argmin(-1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The nearest features that a record may have."""
        if self.kind == CATEGORICAL:
            return torch.nn.functional.one_hot(self.chosen(features), self.width).to(features)
        levels = self.levels.to(features)
        if self.kind == ORDINAL:
            return levels[self.chosen(features)][..., None]
        return features.clamp(levels[0], levels[-1])

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Features of n cells drawn from the column's own distribution (n x width, float64)."""
        shares = torch.tensor(self.shares, dtype=torch.float64)
        drawn = torch.multinomial(shares, n, replacement=True, generator=generator)
        return self._features(drawn)

    def likeliest(self) -> torch.Tensor:
        """Features of the best guess without knowledge: the mode, of numbers the median."""
        if self.kind == CONTINUOUS:
            return self._features(torch.tensor([len(self.values) // 2]))
        return self._features(torch.tensor(self.shares).argmax()[None])

    def _features(self, places: torch.Tensor) -> torch.Tensor:
        if self.kind == CATEGORICAL:
            return torch.nn.functional.one_hot(places, self.width).double()
        return self.levels[places][:, None]


@dataclass(frozen=True)
class Columns:
    """The columns of a table, in the order of its features.

    Attributes:
        columns: One after the other.
    """

    columns: tuple[Column, ...]

    def __len__(self) -> int:
        return len(self.columns)

    def __str__(self) -> str:
        return "\n".join(f"{in_one_line(c.name)}: {_described(c)}" for c in self.columns)

    @property
    def width(self) -> int:
        """Features of a record."""
        return sum(column.width for column in self.columns)

    def parts(self) -> Iterator[tuple[Column, slice]]:
        """Every column with the place of its features."""
        start = 0
        for column in self.columns:
            yield column, slice(start, start + column.width)
            start += column.width

    def encode(self, frame: pandas.DataFrame) -> torch.Tensor:
        """Records as features (N x width, float32).

        Raises:
            InputError: A column is missing, or a cell does not fit it.
        """
        missing = [c.name for c in self.columns if c.name not in frame.columns]
        if missing:
            raise InputError(f"the table has no column {missing[0]}")
        return torch.cat([c.encode(frame[c.name]).float() for c in self.columns], 1)

    def decode(self, features: torch.Tensor) -> pandas.DataFrame:
        """N x width features as records; see `Column.decode`."""
        import pandas

        features = features.detach().cpu()
        return pandas.DataFrame({c.name: c.decode(features[:, at]) for c, at in self.parts()})

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The nearest features (... x width) that records may have."""
        return torch.cat([c.project(features[..., at]) for c, at in self.parts()], -1)

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """n records whose cells are drawn from the columns one by one (n x width, float32)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([c.sample(n, generator) for c in self.columns], 1).float()

    def likeliest(self) -> torch.Tensor:
        """The record of every column's likeliest cell (width features, float32)."""
        return torch.cat([c.likeliest() for c in self.columns], 1)[0].float()

    def to_list(self) -> list[dict[str, object]]:
        """Plain values, for a checkpoint or a record."""
        return [
            {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(c).items()}
            for c in self.columns
        ]

    @staticmethod
    def from_list(values: Sequence[Mapping[str, object]]) -> Columns:
        """The inverse of `to_list`.

        Raises:
            InputError: It describes no columns.
        """
        try:
            columns = tuple(
                Column(**{k: tuple(v) if isinstance(v, list) else v for k, v in each.items()})  # type: ignore[arg-type]
                for each in values
            )
            broken = not columns or any(not _is_whole(column) for column in columns)
        except (TypeError, ValueError, AttributeError):
            broken = True
        if broken:
            raise InputError("the description of its columns is broken")
        return Columns(columns)

    def constant(self) -> list[str]:
        """Names of the columns in which every cell is the same."""
        return [c.name for c in self.columns if c.values[0] == c.values[-1]]

    @staticmethod
    def infer(frame: pandas.DataFrame, kinds: Mapping[str, str] | None = None) -> Columns:
        """Describe the columns of a table.

        Args:
            frame: The table, without the column that a model predicts.
            kinds: Kind by column, where it is known. Otherwise words and columns of two values
                are categorical, a few whole numbers ordinal, all other numbers continuous; what
                seems to be dates, numbers with other things among them or names of records is
                refused.

        Raises:
            InputError: A kind or column that there is not, an empty cell, or a column that no
                kind fits.
        """
        kinds = kinds or {}
        unknown = [name for name in kinds if name not in frame.columns]
        if unknown:
            raise InputError(f"there is no column {unknown[0]}")
        return Columns(tuple(_column(str(n), frame[n], kinds.get(str(n))) for n in frame.columns))


def _is_whole(column: Column) -> bool:
    numbers = [*column.shares, column.center, column.scale]
    if column.kind != CATEGORICAL:
        numbers += [float(value) for value in column.values]
    return (
        column.kind in KINDS
        and 0 < len(column.values) == len(column.shares) <= MAX_LEVELS
        and bool(np.isfinite(numbers).all())
        and column.scale > 0
    )


def _described(column: Column) -> str:
    if column.kind == CONTINUOUS:
        low, high = float(column.values[0]), float(column.values[-1])
        return f"{column.kind}, {low:g} to {high:g}, standard deviation {column.scale:.3g}"
    shown = ", ".join(
        in_one_line(value) if isinstance(value, str) else f"{value:g}"
        for value in column.values[:8]
    )
    more = f" and {len(column.values) - 8} more" if len(column.values) > 8 else ""
    return f"{column.kind}, {len(column.values)} values: {shown}{more}"


def _column(name: str, cells: pandas.Series, kind: str | None) -> Column:
    if cells.isna().any():
        raise InputError(
            f"column {name}: {int(cells.isna().sum())} cells are empty; fill them or leave such "
            "records out"
        )
    kind = _kind_of(name, cells) if kind is None else kind
    if kind not in KINDS:
        raise InputError(f"column {name}: {kind!r:.40} is no kind; known are {', '.join(KINDS)}")
    if kind == CATEGORICAL:
        return _categorical(name, cells)
    numbers = _numbers(name, cells)
    with np.errstate(over="ignore", invalid="ignore"):
        center, scale = float(numbers.mean()), float(numbers.std()) or 1.0
    if not (math.isfinite(center) and math.isfinite(scale)):
        raise InputError(f"column {name}: its numbers are too large to be scaled")
    if kind == ORDINAL:
        levels, counts = np.unique(numbers, return_counts=True)
        if len(levels) > MAX_LEVELS:
            raise InputError(f"column {name}: {len(levels)} values are too many for an ordinal one")
        shares = tuple((counts / counts.sum()).tolist())
        return Column(name, kind, tuple(levels.tolist()), shares, center, scale)
    values = tuple(np.quantile(numbers, np.linspace(0, 1, QUANTILES)).tolist())
    return Column(name, kind, values, (1 / QUANTILES,) * QUANTILES, center, scale)


def _categorical(name: str, cells: pandas.Series) -> Column:
    counts = cells.map(str).value_counts().sort_index()
    if len(counts) > MAX_LEVELS:
        raise InputError(
            f"column {name}: {len(counts)} categories name records and do not describe them; leave "
            "the column out"
        )
    shares = tuple((counts / counts.sum()).tolist())
    return Column(name, CATEGORICAL, tuple(map(str, counts.index)), shares)


def _kind_of(name: str, cells: pandas.Series) -> str:
    """What a column seems to hold.

    Raises:
        InputError: Words that seem to be something else: who means them says so in a description.
    """
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    if is_bool_dtype(cells) or cells.nunique() <= 2:
        return CATEGORICAL
    if not is_numeric_dtype(cells):
        words = [str(cell) for cell in cells.unique()]
        if not all(map(is_number, words)):
            _check_words(name, words, len(cells))
            return CATEGORICAL
    numbers = cells.to_numpy(dtype=np.float64)
    few = cells.nunique() <= MAX_INFERRED_LEVELS
    return ORDINAL if few and bool((numbers == np.round(numbers)).all()) else CONTINUOUS


def _check_words(name: str, words: Sequence[str], records: int) -> None:
    """Refuse many different words that are numbers, dates or names of records.

    Args:
        name: Of the column.
        words: Each once.
        records: How many there are.
    """
    if len(words) <= MAX_INFERRED_LEVELS:
        return
    otherwise = "or describe the column as categorical"
    for is_one, said in (
        (is_number, "'{other}' stands among numbers; leave such records out"),
        (_has_commas, "'{one}' has a comma; write numbers without separators and with a point"),
        (_DATE.fullmatch, "'{one}' is a date; write a number instead, such as a year or an age"),
    ):
        met = [word for word in words if is_one(word)]
        if 2 * len(met) > len(words):
            other = next((word for word in words if not is_one(word)), "")
            shown = said.format(one=_quoted(met[0]), other=_quoted(other))
            raise InputError(f"column {name}: {shown}, {otherwise}")
    if len(words) == records:
        raise InputError(
            f"column {name}: every record has a category of its own, such as "
            f"'{_quoted(words[0])}', which names it and does not describe it; leave the column out"
        )


def _quoted(word: str) -> str:
    return in_one_line(word)[:40]


def is_number(word: str) -> bool:
    """Whether a cell reads as a finite number."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _has_commas(word: str) -> bool:
    return "," in word and is_number(word.replace(",", ""))


def _numbers(name: str, cells: pandas.Series) -> np.ndarray:
    try:
        numbers = cells.to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"column {name}: holds other things than numbers ({error})") from None
    if not np.isfinite(numbers).all():
        raise InputError(f"column {name}: a number is not finite")
    return numbers
