"""TabLeak's own code as the second implementation, on the same network, gradient and labels.

Who wants the comparison clones https://github.com/eth-sri/tableak and puts the folder behind the
checkout on `PYTHONPATH`. None of its code is in this project.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from attack.reconstruction import Reconstruction
from benchmarks.fidelity.beside import MODULES, TABLEAK
from benchmarks.fidelity.declare import Trial
from core.data.columns import CATEGORICAL, Column, Columns
from core.errors import InputError
from core.target import Target

# Their names of the kinds of columns.
NUMBER, WORD = "cont", "cat"


@dataclass(frozen=True)
class TabLeakOfItsAuthors:
    """Their attack as their README sets it: 1,500 iterations, 30 starts, median.

    Attributes:
        iterations: Of every start.
        starts: How many.
    """

    iterations: int = 1500
    starts: int = 30
    package: str = TABLEAK

    def __call__(self, target: Target, labels: torch.Tensor, trial: Trial) -> Reconstruction:
        """See `benchmarks.fidelity.beside.Beside`."""
        columns = target.data.columns
        assert columns is not None
        try:
            attacks: Any = importlib.import_module(MODULES[TABLEAK])
        except ImportError as error:
            raise InputError(
                f"the second implementation needs a clone of github.com/eth-sri/tableak on "
                f"PYTHONPATH ({error})"
            ) from None
        model = target.build_model().to(trial.device)
        torch.manual_seed(trial.number)
        began = time.perf_counter()
        with _bounds_of_copies(attacks):
            found = attacks.invert_grad(
                net=model,
                training_criterion=nn.CrossEntropyLoss(),
                true_grad=[target.gradient[name].clone() for name, _ in model.named_parameters()],
                true_label=labels,
                # Read for its shape.
                true_data=torch.zeros(len(labels), columns.width),
                reconstruction_loss="cosine_sim",
                dataset=Described(columns),
                max_iterations=self.iterations,
                post_selection=self.starts,
                softmax_trick=True,
                sigmoid_trick=True,
                pooling="median+softmax",
            )
        return Reconstruction(
            images=columns.project(found.detach().cpu()),
            labels=labels.cpu(),
            objective=float("nan"),
            seconds=time.perf_counter() - began,
            iterations=self.iterations,
        )


@contextlib.contextmanager
def _bounds_of_copies(attacks: Any) -> Iterator[None]:
    """Within the block their bounds are computed of a copy of the variables.

    The last of them writes into the variables themselves, which PyTorch 1.6 let pass, for which
    the code is, and later ones refuse.
    """
    theirs = attacks.continuous_sigmoid_bound

    def of_a_copy(x: torch.Tensor, dataset: Described) -> torch.Tensor:
        bounded: torch.Tensor = theirs(x.clone(), dataset=dataset)
        return bounded

    attacks.continuous_sigmoid_bound = of_a_copy
    try:
        yield
    finally:
        attacks.continuous_sigmoid_bound = theirs


class Described:
    """A table's columns as their attack asks a data set for them, in our encoding.

    Args:
        columns: What the features stand for.
    """

    standardized = True
    device = "cpu"

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        places = {c.name: list(range(at.start, at.stop)) for c, at in columns.parts()}
        kinds = {c.name: WORD if c.kind == CATEGORICAL else NUMBER for c in columns.columns}
        self.train_feature_index_map = {name: (kinds[name], places[name]) for name in places}
        self.train_features = {
            c.name: list(c.values) if c.kind == CATEGORICAL else None for c in columns.columns
        }
        numbers = [c for c in columns.columns if c.kind != CATEGORICAL]
        ends = {c.name: (float(c.values[0]), float(c.values[-1])) for c in numbers}
        self.continuous_bounds: Mapping[str, tuple[float, float]] = ends
        self.standardized_continuous_bounds: Mapping[str, tuple[float, float]] = {
            c.name: (float(c.levels[0]), float(c.levels[-1])) for c in numbers
        }
        # Those of a category are 0 and 1, which leave its features as they are.
        self.mean = torch.cat([torch.full((c.width,), c.center) for c in columns.columns])
        self.std = torch.cat([torch.full((c.width,), c.scale) for c in columns.columns])

    def create_tolerance_map(self, tol: float = 0.319) -> list[float | str]:
        """How far a number may be off; "cat" for a category."""
        return [WORD if c.kind == CATEGORICAL else tol * c.scale for c in self.columns.columns]

    def decode_batch(self, batch: torch.Tensor, standardized: bool = True) -> np.ndarray:
        """Features (N x F) as cells; whole numbers are rounded, as their tables are whole."""
        cells = np.empty((len(batch), len(self.columns)), dtype=object)
        for place, (column, at) in enumerate(self.columns.parts()):
            if column.kind == CATEGORICAL:
                cells[:, place] = column.decode(batch[:, at])
            else:
                numbers = batch[:, at.start].double() * column.scale + column.center
                cells[:, place] = (numbers.round() if _is_whole(column) else numbers).tolist()
        return cells

    def encode_batch(self, batch: np.ndarray, standardize: bool = True) -> torch.Tensor:
        """The inverse of `decode_batch`."""
        import pandas

        parts = []
        for place, column in enumerate(self.columns.columns):
            cells = batch[:, place]
            numbers = pandas.Series(
                cells if column.kind == CATEGORICAL else cells.astype(np.float64)
            )
            parts.append(column.encode(numbers).float())
        return torch.cat(parts, 1)

    def project_batch(self, batch: torch.Tensor, standardized: bool = True) -> torch.Tensor:
        """Features as those of cells."""
        return self.encode_batch(self.decode_batch(batch))


def _is_whole(column: Column) -> bool:
    """Whether its numbers seem to be whole; quantiles between the ends may lie between two."""
    ends = (float(column.values[0]), float(column.values[-1]))
    return all(end == round(end) for end in ends)
