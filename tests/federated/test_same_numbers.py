"""One update through files, NVFlare's filter and Flower's mod: the same audit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="needs pip install 'gradinvbench[federated]'")
pytest.importorskip("flwr", reason="needs pip install 'gradinvbench[flower]'")

from audit.data import site_data
from audit.request import make_request
from audit.run import audit
from audit.show.store import read_audit
from tests.federated import audited_site, test_flower_mod, test_nvflare_audit


def without_times(value: Any) -> Any:
    """Plain values without what depends on how fast the machine is."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "seconds"}
    return [without_times(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_one_update_has_the_same_numbers_everywhere(tmp_path: Path) -> None:
    data = audited_site.many_pictures()
    states = {"global": audited_site.received(), "local": audited_site.sent(data)}
    for name, state in states.items():
        torch.save({k: torch.tensor(v) for k, v in state.items()}, tmp_path / f"{name}.pt")
    request = make_request(
        tmp_path / "global.pt", tmp_path / "local.pt", model=audited_site.build(),
        data=site_data(data), local=audited_site.LOCAL, settings=audited_site.SETTINGS,
    )  # fmt: skip
    files = audit(request)

    checked = test_nvflare_audit.a_filter("many_pictures")
    at = test_nvflare_audit.site(tmp_path)
    checked.process(test_nvflare_audit.update(data), at.context)

    mod = test_flower_mod.a_mod(tmp_path, audited_site.many_pictures)
    answer = test_flower_mod.app_with(states["local"])
    mod(test_flower_mod.message(3), test_flower_mod.context(), answer)

    flare = read_audit(tmp_path / "audit_round3.json")
    flower = read_audit(tmp_path / "partition-4" / "run-7" / "audit_round3.json")
    expected = without_times(dataclasses.asdict(files))
    assert without_times(dataclasses.asdict(flare)) == expected
    assert without_times(dataclasses.asdict(flower)) == expected
