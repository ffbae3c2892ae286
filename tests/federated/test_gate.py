"""What a site's gate decides, whatever the framework."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

import gradinvbench as gib
from audit.data import SiteData, site_data
from audit.request import make_request
from core.errors import InputError
from core.target import Truth
from federated.gate.allowed import NotAllowedError, scores
from federated.gate.site_audit import Policy, named_by
from tests.federated import audited_site


@pytest.mark.parametrize(
    ("policy", "stay"),
    [
        (Policy(), ["leaks", "anything else"]),
        (Policy(withhold_cannot_tell=True), ["leaks", "cannot tell", "anything else"]),
        (Policy(record_only=True), []),
    ],
    ids=str,
)
def test_verdicts_that_withhold(policy: Policy, stay: list[str]) -> None:
    verdicts = ["leaks", "no leak found", "cannot tell", "anything else"]
    assert [verdict for verdict in verdicts if policy.withholds(verdict)] == stay


@pytest.mark.parametrize("value", [2**63, -(2**900), float("inf"), True, "1", [1.0], {"a": 1}])
def test_a_score_is_one_number_of_eight_bytes(value: Any) -> None:
    with pytest.raises(NotAllowedError):
        scores({"accuracy": value}, "metrics")
    kept = {"accuracy": 2**63 - 1, "loss": -1e300, "auc": None}
    assert scores(kept, "metrics") == kept


def test_without_flower_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import federated.flower

    monkeypatch.delitem(sys.modules, "federated.flower.audit_mod", raising=False)
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(InputError, match=r"needs Flower: pip install 'gradinvbench\[flower\]'"):
        _ = federated.flower.AuditMod


def test_arrays_without_names_are_those_of_the_state_or_of_the_parameters() -> None:
    model = torch.nn.Sequential(*[torch.nn.BatchNorm1d(2) for _ in range(6)])
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    for arrays in (state, parameters):
        numbered = {str(k): v for k, v in enumerate(arrays.values())}
        found = named_by(model, dict(sorted(numbered.items())))
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[name], value) for name, value in arrays.items())
    with pytest.raises(InputError, match="35 arrays without names; the model has 30 variables"):
        named_by(model, {str(k): np.zeros(2) for k in range(35)})


def test_counters_are_whole_numbers_again() -> None:
    model = torch.nn.BatchNorm1d(2)
    averaged = named_by(model, {"num_batches_tracked": np.array(2.6), "weight": np.ones(2)})
    assert averaged["num_batches_tracked"].dtype == torch.int64
    assert int(averaged["num_batches_tracked"]) == 3
    assert averaged["weight"].dtype == torch.float64


def test_a_site_with_hundreds_of_images_can_be_audited() -> None:
    """Their memberships are more than a floating-point number can count."""
    n = 600
    parts = [audited_site.pictures(n, seed) for seed in (2, 3)]
    data = gib.GivenData(*parts)
    spec = site_data(audited_site.one_picture()).spec
    many = SiteData(*(Truth(*part) for part in parts), spec)
    states = [
        {name: torch.tensor(value) for name, value in state.items()}
        for state in (audited_site.received(), audited_site.sent(data))
    ]
    request = make_request(*states, model=audited_site.build(), data=many, local=audited_site.LOCAL)
    assert int(request.is_member.sum()) == n
