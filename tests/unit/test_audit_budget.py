"""What an audit makes of a small budget: what it cuts, and how long it says that it takes.

Time is counted in images that pass through the network, so that nothing depends on the machine.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from audit import run
from audit.attempts import scales_of, stand_ins
from audit.data import SiteData
from audit.planning import FEWEST_IMAGES, cuts_of, plan_for
from audit.record import AuditRecord
from audit.request import AuditRequest, AuditSettings, make_request
from core.data.specs import DataSpec
from core.target import Truth

SIDE, MEMBERS, OTHERS = 6, 300, 320
# Seconds that an image takes on its way through the network, and images that a pass costs more.
EACH, PASS = 4e-3, 40


class Counted(nn.Module):
    """A small network that counts what passes through it, over all of its copies."""

    seen = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(SIDE**2, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.seen += PASS + len(x)
        return self.layers(x.flatten(1))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every clock of the program counts images."""
    Counted.seen = 0
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: EACH * Counted.seen)
        yield


def samples(n: int, seed: int) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    return Truth(torch.rand((n, 1, SIDE, SIDE), generator=generator), torch.arange(n) % 2)


def asked(
    budget: float, n: int = MEMBERS, local: str = "sgd lr=0.05 batch-size=30", **settings: object
) -> AuditRequest:
    """A site that trained on all of its members."""
    spec = DataSpec("noise", (1, SIDE, SIDE), (0.0,), (1.0,), 2)
    data = SiteData(samples(n, 0), samples(OTHERS, 1), spec)
    model = Counted()
    after = copy.deepcopy(model)
    optimiser = torch.optim.SGD(after.parameters(), lr=0.05)
    for images, labels in zip(
        data.members.images.split(30), data.members.labels.split(30), strict=True
    ):
        optimiser.zero_grad()
        nn.functional.cross_entropy(after(images), labels).backward()
        optimiser.step()
    chosen = {"attack": "spectral", "remedies": False, **settings}
    return make_request(
        model, after, model=model, data=data, local=local,
        settings=AuditSettings(budget=budget, **chosen),
    )  # fmt: skip


def audited(request: AuditRequest) -> tuple[AuditRecord, float, float]:
    """The record, the seconds that were foretold and those that it took."""
    plan = plan_for(request)
    began = Counted.seen
    record = run.audit(request)
    return record, plan.forecast, EACH * (Counted.seen - began)


@pytest.mark.parametrize("budget", [240.0, 1200.0])
def test_keeps_to_a_budget_and_to_what_it_foretells(budget: float, clock: None) -> None:
    """All of 300 images in 50 iterations, once and in two plants, would take 400 seconds."""
    record, foretold, took = audited(asked(budget))
    assert foretold / 2 < took < 2 * foretold
    assert took < budget
    assert [power.of >= 2 for power in record.power] == [True, True]
    assert [power.batch_size for power in record.power] == [1, MEMBERS]
    # What was cut is said.
    made = record.attacks[-1]
    images = len(made.objectives)
    assert FEWEST_IMAGES <= images < MEMBERS
    assert len(made.similarities[0].best_member) == images
    (said,) = [w for w in record.warnings if "reconstructed, each standing" in w]
    assert f"({budget:.0f} s) is small for {MEMBERS} images: {images} are reconstructed" in said
    assert f"in {made.iterations} iterations" in said
    assert made.iterations >= 20
    short = any("finds less than it would" in warning for warning in record.warnings)
    assert short == (made.iterations < 50)
    # The test that decides is of everybody.
    assert made.test is not None
    assert (made.test.members, made.test.non_members) == (MEMBERS, OTHERS)


def test_cuts_nothing_where_there_is_time_or_iterations_are_stated(clock: None) -> None:
    for request in (asked(1e5), asked(60.0, iterations=3)):
        plan = plan_for(request)
        assert (plan.images or MEMBERS) == MEMBERS
        assert list(cuts_of(request, plan)) == []


def test_cuts_restarts_and_comparisons_and_says_so(clock: None) -> None:
    request = asked(120.0, restarts=50)
    plan = dataclasses.replace(plan_for(request), compared=40)
    assert 1 <= plan.restarts < 50
    said = " ".join(cuts_of(request, plan))
    assert f"class representatives have {plan.restarts} of 50 restarts" in said
    assert f"of 40 of {MEMBERS} members and 40 of {OTHERS} non-members" in said


@pytest.mark.parametrize(("n", "local"), [(300, "batch-size=30"), (90, "epochs=2 shuffle=3")])
def test_stand_ins_are_spread_over_classes_and_steps(n: int, local: str) -> None:
    request = asked(60.0, n, f"sgd lr=0.05 {local}")
    labels = request.data.members.labels.sort().values
    target, fewer = stand_ins(request.target, labels, 20)
    assert target.batch_size == len(fewer) == 20
    assert fewer.tolist() == [0] * 10 + [1] * 10
    assert target.local.steps == request.target.local.steps
    assert target.gradient is request.target.gradient
    same, all_labels = stand_ins(request.target, labels, 1000)
    assert same is request.target
    assert torch.equal(all_labels, labels)
    # No step is without an image.
    assert stand_ins(request.target, labels, 1)[0].batch_size == request.target.local.batches


def test_the_announcement_is_the_forecast(clock: None) -> None:
    request = asked(60.0)
    plan = plan_for(request)
    assert len(scales_of(request.data.spec.shape)) == 1
    said = run.announced(request, plan)
    assert said.startswith("This takes about ")
    assert "if it leaks" not in said
    assert "up to 18 s more" in run.announced(asked(60.0, remedies=True), plan)
