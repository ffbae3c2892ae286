"""The last iterations of an inversion: L-BFGS on the objective alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from attack.loop.problem import InversionProblem
    from attack.loop.restarts import Restart
    from attack.matching.match import Matcher


def polish(restart: Restart, problem: InversionProblem, matcher: Matcher, iteration: int) -> None:
    """Improve a restart's best iterate with exact gradients, without any prior.

    Args:
        restart: The restart; a better result replaces its own.
        problem: What is inverted; `config.optimiser.polish` iterations.
        matcher: The gradient loss of the iterations before.
        iteration: At which this happens.
    """
    if restart.best_inputs is None:
        return
    labels = problem.found_labels(restart)
    # Every process takes the same steps of the whole batch; its share of the
    # gradient alone would give each its own curvature.
    variable = problem.whole(restart.best_inputs).clone().requires_grad_()
    exact = matcher.exact()
    iterations = problem.config.optimiser.polish
    optimizer = torch.optim.LBFGS(
        [variable], max_iter=iterations, max_eval=5 * iterations,
        history_size=50, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def closure() -> float:
        mine = problem.mine(variable.detach())
        match = exact(mine, labels)
        variable.grad = problem.whole(match.input_gradient)
        value = float(match.value)
        # The trial points of a line search may be worse than where it began.
        if value < restart.best_value:
            restart.keep(mine, value, iteration, smallest=problem.config.stopping.smallest_loss)
        return value

    optimizer.step(closure)
