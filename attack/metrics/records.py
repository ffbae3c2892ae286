"""How many cells of a table's records are right, beside what a guess gets right.

A cell is right if its category or level is the true one, or if its number lies within 0.319
standard deviations of the true one, as TabLeak counts (Vero et al., ICML 2023, section 5,
https://arxiv.org/abs/2210.01785). Guessing finds many cells so, which is why two guesses stand
beside every accuracy: cells drawn from the columns' own distributions, and the likeliest cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from attack.metrics.assignment import pairwise_mse
from core.data.columns import CONTINUOUS, Column, Columns

if TYPE_CHECKING:
    import pandas

# In standard deviations: a number is right, and a number is exact.
TOLERANCE, EXACT = 0.319, 1e-3
# Guesses are drawn so often.
DRAWS = 10
# Of confidences.
BINS = 10
RecordMetric = Callable[[Columns, torch.Tensor, torch.Tensor], torch.Tensor]


def right_cells(
    columns: Columns, found: torch.Tensor, truth: torch.Tensor, tolerance: float = TOLERANCE
) -> torch.Tensor:
    """Which cells are right.

    Args:
        columns: What the features stand for.
        found: ... x F features of records.
        truth: ... x F, of shapes that broadcast.
        tolerance: Of a number, in standard deviations of its column.

    Returns:
        ... x columns booleans.
    """
    parts = [_right(c, found[..., at], truth[..., at], tolerance) for c, at in columns.parts()]
    return torch.stack(torch.broadcast_tensors(*parts), -1)


def _right(
    column: Column, found: torch.Tensor, truth: torch.Tensor, tolerance: float
) -> torch.Tensor:
    if column.kind == CONTINUOUS:
        return (found - truth)[..., 0].abs() <= tolerance
    return column.chosen(found) == column.chosen(truth)


def record_accuracy(columns: Columns, found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Share of right cells of every record (N x F each, one against the other)."""
    return right_cells(columns, found, truth).double().mean(1)


def record_exact(columns: Columns, found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 for a record whose cells are all right, its numbers exactly, else 0."""
    return right_cells(columns, found, truth, EXACT).all(1).double()


# What each is called in tables; values are of one record.
RECORD_METRICS: dict[str, tuple[RecordMetric, str]] = {
    "record_accuracy": (record_accuracy, "cells right"),
    "record_exact": (record_exact, "exact"),
}


def assign_records(columns: Columns, found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Match records to originals: the fewest wrong cells, and among equals the smallest MSE.

    Args:
        columns: What the features stand for.
        found: M x F, M >= N.
        truth: N x F.

    Returns:
        N indices: `found[result]` stands in the order of the originals.
    """
    wrong = 1 - right_cells(columns, found[None], truth[:, None]).double().mean(-1)
    distance = pairwise_mse(truth.double(), found.double()).nan_to_num(nan=torch.inf)
    # Of all records together less than one cell.
    small = distance / (1 + distance) / (2 * len(truth) * len(columns))
    cost = (wrong + small.nan_to_num(nan=1.0)).cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(cost)[1]).to(truth.device)


def guesses(columns: Columns, truth: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Guesses without a gradient, by what they are, assigned to the originals (N x F each)."""
    drawn = [columns.sample(len(truth), seed).to(truth) for seed in range(DRAWS)]
    return {
        "marginal guess": [guess[assign_records(columns, guess, truth)] for guess in drawn],
        "likeliest record": [columns.likeliest().to(truth).expand_as(truth)],
    }


def by_column(
    columns: Columns,
    found: torch.Tensor,
    truth: torch.Tensor,
    guessed: Mapping[str, Sequence[torch.Tensor]],
) -> dict[str, dict[str, float]]:
    """Share of right cells of every column, and that of the best of `guesses`."""
    every = [torch.stack([_of_columns(columns, g, truth) for g in gs]) for gs in guessed.values()]
    best = torch.stack([shares.mean(0) for shares in every]).amax(0).tolist()
    right = _of_columns(columns, found, truth).tolist()
    return {
        column.name: {"accuracy": right[i], "guess": best[i]}
        for i, column in enumerate(columns.columns)
    }


def _of_columns(columns: Columns, found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return right_cells(columns, found, truth).double().mean(0)


def calibration(
    columns: Columns, found: torch.Tensor, truth: torch.Tensor, confidence: torch.Tensor
) -> dict[str, float]:
    """Whether the cells that an attack is sure of are the right ones.

    Args:
        columns: What the features stand for.
        found: N x F records.
        truth: N x F.
        confidence: N x columns, larger where the attack is surer.

    Returns:
        The accuracy of the surest and of the least sure quarter of cells, and the probability
        that a right cell has more confidence than a wrong one (0.5: it says nothing).
    """
    right = right_cells(columns, found, truth).flatten().cpu().numpy()
    sure = confidence.flatten().double().cpu().numpy()
    order = np.argsort(sure, kind="stable")
    quarter = max(1, len(order) // 4)
    values = {
        "accuracy of the surest quarter": float(right[order[-quarter:]].mean()),
        "accuracy of the least sure quarter": float(right[order[:quarter]].mean()),
    }
    if right.any() and not right.all():
        values["right cells surer than wrong ones"] = _auroc(sure[right], sure[~right])
    return values


def confidence_bins(
    columns: Columns, found: torch.Tensor, truth: torch.Tensor, confidence: torch.Tensor
) -> list[dict[str, float]]:
    """How often cells are right, by how sure an attack is of them.

    Args:
        columns: What the features stand for.
        found: N x F records.
        truth: N x F.
        confidence: N x columns, from 0 to 1.

    Returns:
        Of every tenth of the range that holds cells: their number, the sum of their confidences,
        and how many of them are right; such can be summed over batches.
    """
    right = right_cells(columns, found, truth).flatten()
    sure = confidence.flatten().double()
    places = (sure * BINS).floor().clamp(0, BINS - 1)
    return [
        {
            "bin": place,
            "cells": int(inside.sum()),
            "confidence": float(sure[inside].sum()),
            "right": int(right[inside].sum()),
        }
        for place in range(BINS)
        if (inside := places == place).any()
    ]


def _auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def comparison(columns: Columns, found: torch.Tensor, truth: torch.Tensor) -> pandas.DataFrame:
    """Originals and what was recovered of them, record under record; wrong cells have a star.

    Args:
        columns: What the features stand for.
        found: N x F records, in the order of the originals.
        truth: N x F.
    """
    import pandas

    right = right_cells(columns, found, truth).tolist()
    original, recovered = (as_words(columns.decode(part)) for part in (truth, found))
    rows = []
    for i, marks in enumerate(right):
        cells = [c if ok else f"{c} *" for c, ok in zip(recovered[i], marks, strict=True)]
        rows += [[str(i), "original", *original[i]], ["", "recovered", *cells]]
    return pandas.DataFrame(rows, columns=["record", "", *(c.name for c in columns.columns)])


def as_words(frame: pandas.DataFrame) -> list[list[str]]:
    """The cells of records as they are shown, numbers to four digits."""
    return [
        [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row]
        for row in frame.itertuples(index=False)
    ]
