"""Adam without its preparations is Adam to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attack.loop.adam import PlainAdam


def walked(make: type[torch.optim.Adam], **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Where twenty steps at a falling rate lead, stopped and continued halfway."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 3, generator=generator, requires_grad=True) for _ in range(2))
    optimizer = make([first, second], lr=0.1, **options)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        # The second variable has no gradient at first.
        first.grad = torch.randn(5, 3, generator=generator)
        second.grad = torch.randn(5, 3, generator=generator) if step > 2 else None
        optimizer.step()
        if step == 10:
            state = optimizer.state_dict()
            optimizer = make([first, second], lr=0.1, **options)
            optimizer.load_state_dict(state)
    return torch.cat([first.detach(), second.detach()]), optimizer.state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}, {"weight_decay": 0.1}, {"amsgrad": True}],
    ids=str,
)
def test_it_goes_where_torch_goes(options: dict[str, Any]) -> None:
    found, state = walked(PlainAdam, **options)
    expected, theirs = walked(torch.optim.Adam, **options)
    assert torch.equal(found, expected)
    assert state["state"].keys() == theirs["state"].keys()
    for number, values in theirs["state"].items():
        for name, value in values.items():
            assert torch.equal(state["state"][number][name], value)


def test_a_closure_is_called() -> None:
    leaf = torch.ones(2, requires_grad=True)
    optimizer = PlainAdam([leaf], lr=0.1)
    for _ in range(2):
        leaf.grad = torch.ones(2)
        assert optimizer.step(lambda: 3.0) == 3.0
