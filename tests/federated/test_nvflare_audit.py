"""An NVFlare site audits its update before it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from audit import gate_log
from audit.show.store import read_audit
from core.errors import InputError
from core.reading import read_json_object
from federated import AuditFilter, ReceivedModelFilter
from federated.flare.taps import GlobalModelTap
from federated.gate.passage import WithheldError
from tests.federated import audited_site
from tests.federated.site_context import Site

MODULE = "tests.federated.audited_site"


def a_filter(data: str = "one_picture", **more: Any) -> AuditFilter:
    settings = {"local": audited_site.LOCAL, "iterations": 20, "plants": 1}
    return AuditFilter(f"{MODULE}:build", f"{MODULE}:{data}", **{**settings, **more})


def site(folder: Path) -> Site:
    """A site that has received the global model of round 3."""
    found = Site(folder)
    task = DXO(DataKind.WEIGHTS, audited_site.received()).to_shareable()
    task.set_header(AppConstants.CURRENT_ROUND, 3)
    GlobalModelTap().process(task, found.context)
    return found


def asked(weights: dict[str, np.ndarray], number: int) -> Shareable:
    """A task with a global model."""
    task = DXO(DataKind.WEIGHTS, weights).to_shareable()
    task.set_header(AppConstants.CURRENT_ROUND, number)
    return task


def looks(**more: Any) -> ReceivedModelFilter:
    settings = {"local": audited_site.LOCAL, **more}
    return ReceivedModelFilter(f"{MODULE}:build", f"{MODULE}:many_pictures", **settings)


def update(data: Any) -> Shareable:
    before, after = audited_site.received(), audited_site.sent(data)
    return DXO(DataKind.WEIGHT_DIFF, {k: after[k] - before[k] for k in after}).to_shareable()


def leaves(checked: AuditFilter, given: Shareable, at: Site) -> bool:
    """Whether the update leaves as it is; else there must be nothing in it."""
    kept = {name: value.copy() for name, value in from_shareable(given).data.items()}
    found = from_shareable(checked.process(given, at.context)).data
    same = all(np.array_equal(found[name], value) for name, value in kept.items())
    assert same or not any(value.any() for value in found.values())
    return same


def test_an_update_that_leaks_stays(tmp_path: Path) -> None:
    assert not leaves(a_filter(), update(audited_site.one_picture()), site(tmp_path))
    record = read_audit(tmp_path / "audit_round3.json")
    assert record.verdict == "leaks"
    entry = gate_log.verify(tmp_path)[-1]
    assert entry["verdict"] == "withheld"
    assert entry["reason"] == " ".join([record.statement, *record.warnings])
    assert (entry["setting"]["iterations"], entry["setting"]["local"]) == (20, audited_site.LOCAL)


def test_an_update_in_which_nothing_is_found_leaves(tmp_path: Path) -> None:
    checked = a_filter("many_pictures", frequency=2)
    assert leaves(checked, update(audited_site.many_pictures()), site(tmp_path))
    assert read_audit(tmp_path / "audit_round3.json").verdict == "no leak found"
    later = site(tmp_path)
    later.context.set_prop("gradinvbench.round", 5, private=True, sticky=True)
    assert leaves(checked, update(audited_site.one_picture()), later)
    verdicts = [entry["verdict"] for entry in gate_log.verify(tmp_path)]
    assert verdicts == ["passed", "passed unmeasured"]


def test_a_filter_that_records_withholds_nothing(tmp_path: Path) -> None:
    given = update(audited_site.one_picture())
    assert leaves(a_filter(record_only=True), given, site(tmp_path))
    assert read_audit(tmp_path / "audit_round3.json").verdict == "leaks"
    assert gate_log.verify(tmp_path)[-1]["setting"]["record_only"] is True


def test_a_model_is_looked_at_before_anything_is_trained(tmp_path: Path) -> None:
    at, looking = Site(tmp_path), looks()
    task = asked(audited_site.received(), 3)
    assert looking.process(task, at.context) is task
    # Nothing is trained yet, and the site knows.
    first = read_json_object(tmp_path / "received_round3.json", what="look")
    assert (first["suspicious"], first["compared"]) == (False, False)
    assert first["rounds"] > 0
    looking.process(asked(audited_site.made_to_leak(), 4), at.context)
    second = read_json_object(tmp_path / "received_round4.json", what="look")
    assert (second["suspicious"], second["compared"]) == (True, True)
    lines = gate_log.verify(tmp_path)
    assert [(each["round"], each["verdict"]) for each in lines] == [
        (3, "not suspicious"), (4, "suspicious"),
    ]  # fmt: skip
    assert "Do not train it" in lines[1]["reason"]
    # The audit of what was trained takes over what was said, and does not look again.
    checked = a_filter("many_pictures", record_only=True)
    checked.process(update(audited_site.many_pictures()), at.context)
    record = read_audit(tmp_path / "audit_round4.json")
    assert record.received is not None
    assert record.received.suspicious
    assert record.received.p_value == second["p_value"]


def test_a_suspicious_model_is_not_trained_on_where_a_site_says_so(tmp_path: Path) -> None:
    at, looking = Site(tmp_path), looks(refuse_suspicious=True)
    looking.process(asked(audited_site.received(), 0), at.context)
    with pytest.raises(WithheldError, match="nothing is trained"):
        looking.process(asked(audited_site.made_to_leak(), 1), at.context)
    assert gate_log.verify(tmp_path)[-1]["verdict"] == "refused"


def test_a_model_that_cannot_be_looked_at_is_trained_all_the_same(tmp_path: Path) -> None:
    at, looking = Site(tmp_path), looks(refuse_suspicious=True)
    task = asked({"other": np.zeros(3, np.float32)}, 0)
    assert looking.process(task, at.context) is task
    entry = gate_log.verify(tmp_path)[-1]
    assert entry["verdict"] == "not looked at"
    assert entry["reason"]
    # A task without a model says nothing, and the next look has nothing to compare with.
    assert looking.process(Shareable(), at.context).get_return_code() is not None
    assert len(gate_log.verify(tmp_path)) == 1
    with pytest.raises(InputError, match="model"):
        ReceivedModelFilter("", "m:data")


@pytest.mark.parametrize("record_only", [False, True])
@pytest.mark.parametrize("broken", ["no tap", "no data", "another model"])
def test_what_cannot_be_audited_stays(tmp_path: Path, broken: str, record_only: bool) -> None:
    at = Site(tmp_path) if broken == "no tap" else site(tmp_path)
    checked = a_filter("nothing" if broken == "no data" else "one_picture", record_only=record_only)
    if broken == "another model":
        checked.model = f"{MODULE}:one_picture"
    assert leaves(checked, update(audited_site.one_picture()), at) == record_only
    assert not list(tmp_path.glob("audit_round*.json"))


@pytest.mark.parametrize(
    "setting",
    [
        {"frequency": 0},
        {"start_round": float("nan")},
        {"random_rounds": 1},
        {"record_only": "no"},
        {"withhold_cannot_tell": None},
        {"budget": 0},
        {"budget": float("nan")},
        {"attack": "magic"},
        {"model": None},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        AuditFilter(**{"model": "m:build", "data": "m:data", **setting})
