"""L-BFGS on many rows at once against `torch.optim.LBFGS` on each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from attack.loop.row_lbfgs import HISTORY, RowLBFGS

N = 6
Function = Callable[[torch.Tensor], torch.Tensor]
SCALES = torch.logspace(0, 2, N, dtype=torch.float64)


def quadratic(x: torch.Tensor) -> torch.Tensor:
    return (SCALES * x.square()).sum() / 2


def valley(x: torch.Tensor) -> torch.Tensor:
    """Rosenbrock's, without curvature enough for every step to be remembered."""
    return ((1 - x[:-1]).square() + (x[1:] - x[:-1].square()).square()).sum()


def waves(x: torch.Tensor) -> torch.Tensor:
    """Never at rest: memories fill."""
    return (x.sin() * SCALES.flip(0).sqrt()).sum() + 0.01 * x.square().sum()


def solved(x: torch.Tensor) -> torch.Tensor:
    """At its end from the beginning."""
    return 0 * x.sum()


def broken(x: torch.Tensor) -> torch.Tensor:
    """Not a number where the first coordinate has become negative."""
    return x[0].sqrt() + quadratic(x)


FUNCTIONS: dict[str, Function] = {
    "quadratic": quadratic,
    "valley": valley,
    "waves": waves,
    "solved": solved,
    "broken": broken,
}
RATES = {"quadratic": 0.5, "valley": 0.3, "waves": 0.05, "solved": 1.0, "broken": 0.5}


def begin(names: Sequence[str]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(len(names), N, dtype=torch.float64, generator=generator)
    return rows + 0.3


def value_and_gradient(name: str, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = row.detach().clone().requires_grad_()
    value = FUNCTIONS[name](leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def alone(name: str, row: torch.Tensor, rounds: int) -> tuple[torch.optim.LBFGS, torch.Tensor]:
    x = row.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], lr=RATES[name])

    def closure() -> float:
        value, gradient = value_and_gradient(name, x)
        if torch.isfinite(value):
            x.grad = gradient
        return float(value)

    for _ in range(rounds):
        optimizer.step(closure)
    return optimizer, x.detach()


def together(optimizer: RowLBFGS, names: Sequence[str], rows: torch.Tensor, rounds: int) -> None:
    def evaluate(places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        found = [value_and_gradient(names[place], rows[place]) for place in places]
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])

    rates = torch.tensor([RATES[name] for name in names], dtype=torch.float64)
    for _ in range(rounds):
        optimizer.step(rows, rates, evaluate)


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_every_row_goes_as_it_would_alone(rounds: int) -> None:
    names = list(FUNCTIONS)
    rows = begin(names)
    starts = rows.clone()
    optimizer = RowLBFGS([{}] * len(names), rows[0])
    together(optimizer, names, rows, rounds)
    for place, name in enumerate(names):
        single, x = alone(name, starts[place], rounds)
        torch.testing.assert_close(rows[place], x, rtol=1e-6, atol=1e-8, equal_nan=True)
        expected = single.state[single.param_groups[0]["params"][0]]
        state = optimizer.state_of(place)
        assert state["func_evals"] == expected["func_evals"]
        assert state["n_iter"] == expected["n_iter"]
        # Steps without curvature are not remembered.
        assert len(state.get("old_dirs", [])) == len(expected.get("old_dirs") or [])


def test_a_full_memory_forgets_the_oldest() -> None:
    """More steps than it holds, in one row only; the curvature stays above what is remembered."""
    names = ["waves", "quadratic"]
    rows = begin(names)
    starts = rows.clone()
    optimizer = RowLBFGS([{}] * 2, rows[0])
    together(optimizer, names, rows, 7)
    lengths = [len(optimizer.state_of(place)["old_dirs"]) for place in range(2)]
    assert lengths[1] < lengths[0] == HISTORY
    _, x = alone("waves", starts[0], 7)
    torch.testing.assert_close(rows[0], x, rtol=1e-6, atol=1e-8)


def test_a_row_goes_on_from_the_state_of_torch_and_back() -> None:
    name, start = "waves", begin(["waves"])[0]
    single, x = alone(name, start, 2)
    parameter = single.param_groups[0]["params"][0]
    rows = x.unsqueeze(0).clone()
    optimizer = RowLBFGS([single.state[parameter]], rows[0])
    together(optimizer, [name], rows, 1)
    _, expected = alone(name, start, 3)
    torch.testing.assert_close(rows[0], expected, rtol=1e-8, atol=1e-10)
    # Torch's own goes on from what it wrote.
    x = rows[0].clone().requires_grad_()
    other = torch.optim.LBFGS([x], lr=RATES[name])
    other.state[x] = optimizer.state_of(0)

    def closure() -> float:
        value, x.grad = value_and_gradient(name, x)
        return float(value)

    other.step(closure)
    _, expected = alone(name, start, 4)
    torch.testing.assert_close(x.detach(), expected, rtol=1e-7, atol=1e-9)


def test_a_forgotten_row_begins_anew() -> None:
    rows = begin(["waves", "valley"])
    starts = rows.clone()
    optimizer = RowLBFGS([{}] * 2, rows[0])
    together(optimizer, ["waves", "valley"], rows, 2)
    optimizer.forget(1)
    rows[1] = starts[1]
    together(optimizer, ["waves", "valley"], rows, 1)
    torch.testing.assert_close(rows[1], alone("valley", starts[1], 1)[1], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(rows[0], alone("waves", starts[0], 3)[1], rtol=1e-8, atol=1e-10)
