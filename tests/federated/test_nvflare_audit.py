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
from federated import AuditFilter
from federated.flare.taps import GlobalModelTap
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
