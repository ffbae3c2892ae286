"""TabLeak: records of a table from many starts at once (Vero et al. 2023)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import gradient_loss
from attack.matching.many_starts import ClientOfManyStarts
from attack.metrics.records import assign_records
from attack.reconstruction import Reconstruction
from core.data.columns import CATEGORICAL, Columns
from core.errors import InputError
from core.target import Target

# From records' features to one objective per start (R x N x F to R).
Objective = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TabLeakConfig:
    """TabLeak's settings.

    Attributes:
        iterations: Of every start.
        restarts: Starts, which run at once and are pooled.
        lr: Adam's learning rate; its gradient is the sign alone.
    """

    iterations: int = 1500
    restarts: int = 30
    lr: float = 0.06

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.restarts < 1 or not 0 < self.lr < float("inf"):
            raise InputError("tableak: iterations, restarts and lr must be positive")


@register_attack
class TabLeak(Attack):
    """Optimise relaxed categories from 30 starts, and let these vote.

    The softmax of its variables stands for a category, a sigmoid between the column's bounds
    for a number; the cosine distance of the gradients is minimised. The records of all starts
    are matched to those of the best one, and the median of each feature is taken. What the
    starts agree on is likely right: a cell's confidence is one less the entropy of their mean
    category over its maximum; of a number, one less their standard deviation in units of the
    column's, on which a normal distribution's entropy depends alone.

    All starts are one batch of independent copies (`torch.func.vmap`). Labels are those that
    the label rule finds; the paper takes them for known.

    Args:
        config: 1,500 iterations of Adam on signs, learning rate 0.06, 30 starts.

    Source: Vero, Balunovic, Dimitrov, Vechev, "TabLeak: Tabular Data Leakage in Federated
        Learning", ICML 2023, https://arxiv.org/abs/2210.01785, algorithm 1; settings of
        https://github.com/eth-sri/tableak.

    Published: on Adult at batch 32, a network of 100-100 neurons, 10 points above the baseline
        (the authors' README).

    Reproduced:
        tableak: not computed yet.
        tableak-adult: not computed yet.
        tableak-adult-short: 0.110 (0.099 to 0.120, n = 8), 2026-11-29: not comparable: fewer
          iterations and starts than published; beside the authors' code.

    Example:
        >>> target, truth = gib.share(model, gib.table("randhie").batch(32))
        >>> print(gib.evaluate(gib.invert(target, attack="tableak"), truth))
    """

    name = "tableak"

    def __init__(self, config: TabLeakConfig | None = None) -> None:
        self.config = config or TabLeakConfig()

    @classmethod
    def configured(cls, given: dict[str, Any]) -> TabLeak:
        """Under the flags given: `--epochs`, `--restarts` and `--lr` count."""
        known = {f.name for f in dataclasses.fields(TabLeakConfig)}
        return cls(TabLeakConfig(**{k: v for k, v in given.items() if k in known}))

    def reconstruct(
        self,
        target: Target,
        *,
        labels: torch.Tensor,
        device: torch.device,
        seed: int,
        progress: bool = False,
        **run: Any,
    ) -> Reconstruction:
        """See `Attack.reconstruct`.

        Raises:
            InputError: The target is no table with known columns, or its client computes what
                copies side by side cannot.
        """
        began = time.perf_counter()
        columns = target.data.columns
        if columns is None:
            raise InputError(
                f"--attack {self.name}: inverts records whose columns are known: give --data a "
                "table, or share a gradinvbench.table"
            )
        client = ClientOfManyStarts(target, labels, device)
        ensemble, losses = self._optimised(client, columns, device, seed, progress)
        ensemble = matched_to_best(columns, ensemble, losses)
        records = columns.project(ensemble.median(0).values).cpu()
        return Reconstruction(
            images=records,
            labels=labels.cpu(),
            objective=gradient_loss(target, target.data.normalize(records), labels, device),
            seconds=time.perf_counter() - began,
            iterations=self.config.iterations,
            details={"objectives": losses.tolist()},
            confidence=agreement(columns, ensemble).cpu(),
        )

    def _optimised(
        self,
        client: ClientOfManyStarts,
        columns: Columns,
        device: torch.device,
        seed: int,
        progress: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The relaxed records of every start (R x N x F), and their objectives (R)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.config.restarts, client.batch_size, columns.width)
        start = 2 * torch.rand(shape, generator=generator) - 1
        variables = start.to(device).requires_grad_()
        optimiser = torch.optim.Adam([variables], lr=self.config.lr)
        for _ in tqdm(range(self.config.iterations), desc=self.name, disable=not progress):
            records = relaxed(columns, variables)
            slope = client.slope(records.detach())
            (gradient,) = torch.autograd.grad(records, variables, slope)
            variables.grad = gradient.sign()
            optimiser.step()
        with torch.no_grad():
            records = relaxed(columns, variables)
            return records, client.distance(records)


def relaxed(columns: Columns, variables: torch.Tensor) -> torch.Tensor:
    """What variables (... x F) stand for: probabilities of categories, numbers within bounds."""
    parts = []
    for column, at in columns.parts():
        if column.kind == CATEGORICAL:
            parts.append(variables[..., at].softmax(-1))
        else:
            low, high = float(column.levels[0]), float(column.levels[-1])
            parts.append(low + (high - low) * variables[..., at].sigmoid())
    return torch.cat(parts, -1)


def matched_to_best(columns: Columns, ensemble: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Every start's records in the order of those of the start with the least objective."""
    best = ensemble[losses.nan_to_num(nan=torch.inf).argmin()]
    return torch.stack([records[assign_records(columns, records, best)] for records in ensemble])


def agreement(columns: Columns, ensemble: torch.Tensor) -> torch.Tensor:
    """How far the starts (R x N x F) agree on every cell, from 0 to 1 (N x columns)."""
    found = []
    for column, at in columns.parts():
        values = ensemble[..., at]
        if column.kind == CATEGORICAL:
            votes = values.mean(0)
            entropy = -torch.xlogy(votes, votes).sum(-1)
            most = torch.tensor(float(max(2, column.width))).log().to(entropy)
            found.append(1 - entropy / most)
        else:
            found.append(1 - values.std(0, correction=0)[..., 0].clamp(max=1))
    return torch.stack(found, -1)
