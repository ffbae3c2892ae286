"""Tables of records: those that come with packages, and any CSV file.

A table is a data set whose samples are rows. What the client's model predicts is one column,
the others are its inputs (see `core.data.columns`).

>>> table = load_table("randhie")
>>> print(table.columns)
>>> batch = table.batch(32, seed=1)
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from core.data.columns import CATEGORICAL, CONTINUOUS, ORDINAL, Columns, is_number
from core.data.data_sets import DataSets
from core.data.specs import DataSpec
from core.errors import InputError, first_line
from core.escaping import in_one_line
from core.processes.distributed import derived_seed
from core.reading import check_regular, read_bytes, read_json_object

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

MAX_CSV_BYTES = 256 * 2**20
# A model's first layer has a row of weights of so many numbers.
MAX_FEATURES = 20_000
# Features of all records together: half a gigabyte of them.
MAX_NUMBERS = 2**27
# A target of more values than this is no class.
MAX_CLASSES = 100
VALIDATION_SHARE = 0.2
# Beside a CSV file: {"target": NAME, "columns": {NAME: KIND}}.
DESCRIPTION = ".columns.json"


@dataclass(frozen=True, repr=False)
class Table:
    """Records with classes.

    Attributes:
        name: For file names and tables.
        columns: What the features stand for.
        inputs: N x F features, float32, see `Columns.encode`.
        targets: N class indices.
        class_names: Names in the order of the indices.
    """

    name: str
    columns: Columns
    inputs: torch.Tensor
    targets: torch.Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return (
            f"Table {in_one_line(self.name)}: {len(self)} records of {len(self.columns)} columns "
            f"({self.columns.width} features), classes "
            f"{in_one_line(', '.join(self.class_names))}\n"
            f"{self.columns}"
        )

    @property
    def spec(self) -> DataSpec:
        """The description that travels with checkpoints; features are the network's inputs."""
        width = self.columns.width
        return DataSpec(
            name=self.name,
            shape=(width,),
            mean=(0.0,) * width,
            std=(1.0,) * width,
            n_classes=len(self.class_names),
            class_names=self.class_names,
            bounded=False,
            columns=self.columns,
        )

    def take(self, rows: Sequence[int] | torch.Tensor) -> Table:
        """Some of the records, in the given order."""
        chosen = torch.as_tensor(rows)
        return dataclasses.replace(self, inputs=self.inputs[chosen], targets=self.targets[chosen])

    def batch(self, size: int, index: int = 0, seed: int = 0) -> Table:
        """The i-th batch of a seeded shuffle; batches do not overlap.

        Raises:
            InputError: There are too few records for it.
        """
        if size < 1 or index < 0 or (index + 1) * size > len(self):
            raise InputError(f"{len(self)} records have no batch {index} of {size}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[index * size : (index + 1) * size])

    def split(self, seed: int = 0, share: float = VALIDATION_SHARE) -> tuple[Table, Table]:
        """Records to train on, and others."""
        generator = torch.Generator().manual_seed(derived_seed(seed, 1) % 2**63)
        order = torch.randperm(len(self), generator=generator)
        held_out = round(share * len(self))
        return self.take(order[held_out:].sort().values), self.take(order[:held_out].sort().values)

    def to_frame(self) -> pandas.DataFrame:
        """The records as they were before they were encoded."""
        return self.columns.decode(self.inputs)


def is_table(data: str | Path) -> bool:
    """Whether `--data` names a table: one of `TABLES`, or a CSV file."""
    return str(data) in TABLES or Path(data).suffix.lower() == ".csv"


def load_table(
    data: str | Path,
    root: str | Path | None = None,
    flag: str = "--data",
    trained: DataSpec | None = None,
) -> Table:
    """Read a table.

    Args:
        data: A name in `TABLES`, or a CSV file with a header. Its last column holds the classes,
            and kinds are inferred, unless `FILE.columns.json` beside `FILE.csv` says otherwise.
        root: The folder with the files of a table that comes with no package (`--data-root`).
        flag: The flag that the user gave it with, for messages.
        trained: What the model was trained on: its columns' scales and categories and its classes
            are then taken, where they are known, and the table may lack some of them.

    Raises:
        InputError: It cannot be read as a table, or has other columns or classes than the model;
            one sentence says why.
    """
    if str(data) in TABLES:
        described = TABLES[str(data)](None if root is None else Path(root))
    else:
        described = _csv(Path(data).expanduser(), flag)
    try:
        return _table(described, None if trained is None or trained.columns is None else trained)
    except InputError as error:
        raise InputError(f"{flag} {data}: {error}") from None


def load_tables(paths: Sequence[Path], flag: str = "--data") -> list[Table]:
    """Read parts of one table from CSV files: columns and classes are those of all together.

    Args:
        paths: Files with the same header; a description beside the first holds for all.
        flag: The flag that the user gave them with, for messages.

    Raises:
        InputError: They cannot be read as parts of one table.
    """
    import pandas

    parts = [_csv(path, flag, fewest=1) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if list(part.frame.columns) != list(parts[0].frame.columns):
            raise InputError(f"{flag}: {path} has other columns than {paths[0]}")
    together = _Described(
        paths[0].stem,
        pandas.concat([part.frame for part in parts], ignore_index=True),
        [word for part in parts for word in part.classes],
        parts[0].kinds,
    )
    try:
        table = _table(together)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    ends = [0, *itertools.accumulate(len(part.classes) for part in parts)]
    return [table.take(range(first, last)) for first, last in itertools.pairwise(ends)]


class RecordSamples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Records with their classes, as training and extraction read them.

    Args:
        table: Its features are the network's inputs as they are.
    """

    in_memory = True

    def __init__(self, table: Table) -> None:
        self.table = table

    @property
    def labels(self) -> list[int]:
        """The class of every record."""
        return [int(target) for target in self.table.targets]

    def target_like(self) -> torch.Tensor:
        """A class, for the type of an empty batch's."""
        return self.table.targets.new_empty(())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The record of `key`: an index, or (epoch, index)."""
        index = key[1] if isinstance(key, tuple) else key
        return self.table.inputs[index], self.table.targets[index]


def table_data_sets(table: Table, split_seed: int) -> DataSets:
    """A table as training and extraction read it.

    Args:
        table: All records.
        split_seed: Seed of the held-out records.
    """
    train, held_out = map(RecordSamples, table.split(split_seed))
    return DataSets(table.spec, train, train, held_out)


@dataclass(frozen=True)
class _Described:
    """A table before it is encoded.

    Attributes:
        name: See `Table`.
        frame: Its columns, the inputs' only.
        classes: What is predicted, a word per record.
        kinds: Kind by column, as far as it is known.
    """

    name: str
    frame: pandas.DataFrame
    classes: Sequence[str]
    kinds: Mapping[str, str]


def _table(described: _Described, trained: DataSpec | None = None) -> Table:
    """Records and classes as numbers, by a model's own scales where there is one."""
    if trained is None or trained.columns is None:
        columns = Columns.infer(described.frame, described.kinds)
    else:
        columns = trained.columns
    if not 1 <= columns.width <= MAX_FEATURES:
        raise InputError(f"its columns make {columns.width} features; 1 to {MAX_FEATURES} are read")
    if columns.constant() and trained is None:
        log.warning(
            "%s: every cell of the column %s is the same, so that any guess has it right; leave it "
            "out to see what an attack adds",
            in_one_line(described.name),
            in_one_line(", ".join(columns.constant())),
        )
    numbers = columns.width * len(described.frame)
    if numbers > MAX_NUMBERS:
        raise InputError(
            f"{len(described.frame)} records of {columns.width} features are {numbers} numbers; up "
            f"to {MAX_NUMBERS} are read, so leave out columns of many categories"
        )
    names = sorted(set(described.classes)) if trained is None else list(trained.class_names)
    strange = sorted(set(described.classes) - set(names))
    if strange:
        raise InputError(f"the model has no class {in_one_line(strange[0])!r:.40}")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(
            f"the column to predict has {len(names)} values; 2 to {MAX_CLASSES} are classes"
        )
    inputs = columns.encode(described.frame)
    places = {name: place for place, name in enumerate(names)}
    targets = torch.tensor([places[word] for word in described.classes])
    return Table(described.name, columns, inputs, targets, tuple(names))


# --- files ----------------------------------------------------------------------


def _csv(path: Path, flag: str, fewest: int = 2) -> _Described:
    _check_header(path, flag)
    frame = _frame(path, flag, fewest)
    target, kinds = _description(path, [str(name) for name in frame.columns], flag)
    if frame[target].isna().any():
        raise InputError(
            f"{flag}: {path} has empty cells in the column {target}, the one to predict"
        )
    classes = frame[target].map(str).tolist()
    return _Described(path.stem, frame.drop(columns=target), classes, kinds)


def _description(path: Path, names: Sequence[str], flag: str) -> tuple[str, dict[str, str]]:
    """The column to predict and the kinds of others, as the file beside a table says.

    Raises:
        InputError: It is none, or of other columns.
    """
    beside = path.with_name(path.stem + DESCRIPTION)
    said = read_json_object(beside, flag, "column description") if beside.exists() else {}
    target, kinds = said.get("target", names[-1]), said.get("columns", {})
    form = '{"target": a column, "columns": {column: kind}}'
    if not set(said) <= {"target", "columns"} or not isinstance(kinds, dict):
        raise InputError(f"{flag}: {beside} must be {form}")
    for name in (target, *kinds):
        if not isinstance(name, str) or name not in names:
            raise InputError(f"{flag}: {beside} is about a column {name!r:.40}, which {path} lacks")
    # Classes are what they are; a kind of theirs says nothing.
    return target, {name: kind for name, kind in kinds.items() if name != target}


def _check_header(path: Path, flag: str) -> None:
    """Refuse what would be read for minutes, or as other columns than those that are meant.

    Raises:
        InputError: There are too many columns, the first record has more cells than those, or the
            first line does not name columns between commas.
    """
    content = read_bytes(path, flag, "CSV file", MAX_CSV_BYTES)
    # A mark of the byte order belongs to no name; other bytes are judged later.
    rows = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", errors="replace"))
    try:
        first = list(itertools.islice(filter(None, rows), 2))
    except csv.Error as error:
        raise InputError(f"{flag}: {path} cannot be read as CSV ({error})") from None
    widths = [len(row) for row in first]
    if max(widths, default=0) > MAX_FEATURES + 1:
        raise InputError(
            f"{flag}: {path} has {max(widths)} columns; up to {MAX_FEATURES} features are read"
        )
    if first:
        _check_names(first[0], f"{flag}: {path}")
    if len(widths) == 2 and widths[1] > widths[0]:
        raise InputError(
            f"{flag}: {path} names {widths[0]} columns and its first record has {widths[1]} cells"
        )


def _check_names(names: Sequence[str], place: str) -> None:
    """Refuse a first line that names no columns."""
    for mark, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and mark in names[0]:
            raise InputError(f"{place} has {word} between its columns; write it with commas")
    if len(names) > 1 and "" in (name.strip() for name in names):
        raise InputError(
            f"{place}: its column {[n.strip() for n in names].index('') + 1} has no name; name it, "
            "or leave it out if it numbers the records"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{place} has two columns named {in_one_line(twice)!r:.40}")
    if len(names) > 1 and all(map(is_number, names[:-1])):
        raise InputError(
            f"{place}: its first line holds numbers ({in_one_line(', '.join(names))[:40]}) where "
            "the names of the columns belong"
        )


def _frame(path: Path, flag: str, fewest: int = 2, **options: object) -> pandas.DataFrame:
    """A CSV file, gzipped if its name says so.

    Raises:
        InputError: It is no file, too large, or no table.
    """
    import pandas

    content = io.BytesIO(
        read_bytes(check_regular(path, flag, "CSV file"), flag, "CSV file", MAX_CSV_BYTES)
    )
    try:
        frame = pandas.read_csv(
            content, compression="gzip" if path.suffix == ".gz" else None, **options
        )  # type: ignore[call-overload]
    except UnicodeDecodeError:
        raise InputError(f"{flag}: {path} cannot be read as CSV: it is not in UTF-8") from None
    except (ValueError, OSError, EOFError, MemoryError, OverflowError) as error:
        # A ValueError: what pandas raises of its own, and bytes that are no text.
        raise InputError(f"{flag}: {path} cannot be read as CSV ({first_line(error)})") from None
    if len(frame) < fewest or len(frame.columns) < 2:
        raise InputError(
            f"{flag}: {path} has {len(frame)} records of {len(frame.columns)} columns; a table has "
            "at least two of each"
        )
    result: pandas.DataFrame = frame
    return result


def _packaged(package: str, *places: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(
            f"--data: this table comes with {package}, which is not installed; "
            "pip install 'gradinvbench[tabular]', or give a CSV file"
        )
    path = Path(found.origin).parent.joinpath("datasets", *places)
    if not path.is_file():
        raise InputError(f"--data: the installed {package} does not hold {places[-1]}")
    return path


def _yes_no(cells: pandas.Series, word: str) -> list[str]:
    return [word if cell else f"no {word}" for cell in cells]


def _randhie(root: Path | None) -> _Described:
    """RAND Health Insurance Experiment: 20,190 person-years; was there a visit to a physician?

    Source: Cameron and Trivedi, Microeconometrics, 2005; public domain; comes with statsmodels.
    """
    frame = _frame(_packaged("statsmodels", "randhie", "randhie.csv"), "--data")
    ratings = frame[["hlthg", "hlthf", "hlthp"]].to_numpy()
    words = np.array(["excellent", "good", "fair", "poor"])
    frame["health"] = words[np.where(ratings.any(1), ratings.argmax(1) + 1, 0)]
    visits = _yes_no(frame["mdvis"] > 0, "visit")
    kinds = {"lncoins": ORDINAL, "idp": CATEGORICAL, "health": CATEGORICAL}
    kinds |= dict.fromkeys(("lpi", "fmde", "physlm", "disea"), CONTINUOUS)
    return _Described("randhie", frame[list(kinds)], visits, kinds)


def _fair(root: Path | None) -> _Described:
    """Survey of 6,366 women on marriage: was there an affair?

    Source: Fair, Journal of Political Economy, 1978; comes with statsmodels.
    """
    frame = _frame(_packaged("statsmodels", "fair", "fair.csv"), "--data")
    affairs = _yes_no(frame.pop("affairs") > 0, "affair")
    kinds = {str(name): ORDINAL for name in frame.columns}
    kinds |= dict.fromkeys(("occupation", "occupation_husb"), CATEGORICAL)
    return _Described("fair", frame, affairs, kinds)


# In the order of the file.
_CELL = [
    "radius",
    "texture",
    "perimeter",
    "area",
    "smoothness",
    "compactness",
    "concavity",
    "concave_points",
    "symmetry",
    "fractal_dimension",
]
_BREAST_CANCER = [f"{kind}_{word}" for kind in ("mean", "error", "worst") for word in _CELL]
_DIABETES = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]


def _breast_cancer(root: Path | None) -> _Described:
    """Wisconsin diagnostic breast cancer: 569 tumours of 30 measurements; malignant?

    Source: https://doi.org/10.24432/C5DW2B; comes with scikit-learn.
    """
    path = _packaged("sklearn", "data", "breast_cancer.csv")
    frame = _frame(path, "--data", skiprows=1, header=None, names=[*_BREAST_CANCER, "benign"])
    benign = ["benign" if cell else "malignant" for cell in frame.pop("benign")]
    return _Described("breast_cancer", frame, benign, dict.fromkeys(_BREAST_CANCER, CONTINUOUS))


def _diabetes(root: Path | None) -> _Described:
    """442 patients with diabetes, ten measurements; did it progress more than in the median?

    Source: Efron, Hastie, Johnstone, Tibshirani, Least Angle Regression, 2004; comes with
    scikit-learn.
    """
    path = _packaged("sklearn", "data", "diabetes_data_raw.csv.gz")
    frame = _frame(path, "--data", names=_DIABETES, sep=r"\s+", header=None)
    progress = np.loadtxt(_packaged("sklearn", "data", "diabetes_target.csv.gz"))
    kinds = dict.fromkeys(_DIABETES, CONTINUOUS) | {"sex": CATEGORICAL}
    above = ["above" if more else "below" for more in progress > np.median(progress)]
    return _Described("diabetes", frame, above, kinds)


_ADULT = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "salary",
]


def _adult(root: Path | None) -> _Described:
    """Adult census income: records without unknown cells; more than 50,000 dollars a year?

    Source: https://doi.org/10.24432/C5XW20; `adult.data`, which the user brings.
    """
    if root is None:
        raise InputError("--data adult: give the folder that holds adult.data with --data-root")
    path = root / "adult.data"
    spaced = _frame(
        path, "--data-root", names=_ADULT, header=None, skipinitialspace=True, na_values="?"
    )
    frame = spaced.dropna()
    numbers = [n for n in _ADULT if frame[n].dtype.kind in "iuf"]
    kinds = {n: CONTINUOUS if n in numbers else CATEGORICAL for n in _ADULT[:-1]}
    return _Described("adult", frame.drop(columns="salary"), frame["salary"].tolist(), kinds)


TABLES: dict[str, Callable[[Path | None], _Described]] = {
    "randhie": _randhie,
    "fair": _fair,
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
    "adult": _adult,
}
