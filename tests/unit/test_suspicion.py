"""What an audit says of the model that a site received, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradinvbench as gib
from audit.request import make_request
from audit.show.received import words_of
from audit.suspicion import look_at_request, look_before_training
from core.errors import InputError
from core.models.architecture import GivenModel
from gradients.servers.fishing import _fish
from gradinvbench.command import main
from tests.unit.test_audit import QUICK, SIDE, _pair, as_folder, network, site, trained

WORDS = "sgd lr=0.05 batch-size=4"


def fished(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        _fish(model, 1)
    return model


def test_an_honest_round_is_told_from_one_that_fishes() -> None:
    data, _ = site(4)
    before = network()
    honest, model = trained(before, data.non_members, 4), GivenModel(network())
    given = {"model": model, "data": data, "local": WORDS, "previous": before.state_dict()}
    innocent = look_before_training(honest.state_dict(), **given)
    assert (innocent.compared, innocent.rounds) == (True, 19)
    assert not innocent.suspicious
    assert innocent.false_alarm == pytest.approx(0.05)
    cheat = look_before_training(fished(trained(before, data.members, 4)).state_dict(), **given)
    assert cheat.suspicious
    assert cheat.p_value == pytest.approx(1 / 20)
    assert "weights" in {each.detector for each in cheat.detectors if each.alarm}
    assert words_of(cheat).startswith("The received model is suspicious")
    assert "does not look as if" in words_of(innocent)


def test_the_audit_says_it_first_and_writes_numbers_alone(tmp_path: Path) -> None:
    data, _ = site(4)
    sent = fished(network())
    found = gib.audit(
        sent, trained(sent, data.members, 4), model=network(), members=_pair(data.members),
        non_members=_pair(data.non_members), local=WORDS, iterations=5, plants=1,
        membership=False, remedies=False, progress=False, report=tmp_path,
    )  # fmt: skip
    received = found.record.received
    assert received is not None
    assert received.suspicious
    assert not received.compared
    page = str(found)
    assert page.index("is suspicious") < page.index("What the site received")
    found.save(tmp_path)
    assert "is suspicious" in (tmp_path / "audit.html").read_text()
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["schema_version"] == 2
    assert set(written["received"]) == {
        "compared", "rounds", "p_value", "false_alarm", "suspicious", "detectors", "note",
    }  # fmt: skip
    stages = json.loads(next(tmp_path.glob("stages-*.json")).read_text())
    assert stages["received"]["suspicious"]


def test_the_round_before_is_found_among_the_rounds() -> None:
    data, _ = site(4)
    model = network()
    later = trained(model, data.non_members, 4)
    after = trained(later, data.members, 4)
    states = [m.state_dict() for m in (model, later, after)]
    given = {"model": network(), "data": data, "local": WORDS, "settings": QUICK}
    request = make_request(later, after, rounds=states, **given)
    assert request.before is not None
    for name, value in request.before.state_dict().items():
        np.testing.assert_array_equal(value, states[0][name])
    assert make_request(later, after, rounds=states[1:], **given).before is None
    told = make_request(later, after, previous=states[0], **given)
    assert told.before is not None
    assert told.digest != make_request(later, after, **given).digest


def test_says_why_nothing_is_known() -> None:
    data, _ = site(4)
    model = network()
    request = make_request(
        model, trained(model, data.members, 4), model=network(), data=data, local=WORDS,
        settings=dataclasses.replace(QUICK, budget=1e-3),
    )  # fmt: skip
    found = look_at_request(request)
    assert (found.rounds, found.p_value, found.suspicious) == (0, None, False)
    assert "more than this audit has for it" in words_of(found)


def test_looks_before_training_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, _ = site(4)
    as_folder(tmp_path / "scans", data)
    for path in (tmp_path / "scans").rglob("*.npy"):
        np.save(path, np.repeat(np.load(path), 3, 0))
    (tmp_path / "lookedmodel.py").write_text(
        "from tests.unit.test_audit import network\n\n\ndef build():\n    return network()\n"
    )
    torch.save(network().state_dict(), "P.pt")
    torch.save(fished(network()).state_dict(), "G.pt")
    words = ["audit", "--global", "G.pt", "--model", "lookedmodel:build", "--data", "scans"]
    words += ["--report", "out", "--device", "cpu"]
    only = [*words, "--received-only", "--local", WORDS, "--previous", "P.pt"]
    assert main(only) == 0
    assert "is suspicious" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "received.json").read_text())
    assert written["suspicious"]
    assert written["compared"]
    assert not any(isinstance(v, str) and "/" in v for v in written.values())
    assert main([*words, "--received-only", "--local", "P.pt"]) == 2
    assert "words of the local training alone" in capsys.readouterr().err
    assert main(words) == 2
    assert "give one file of the local model (none given)" in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused() -> None:
    data, _ = site(4)
    other = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 2))
    with pytest.raises(InputError, match="--global: a model is not of the same kind"):
        look_before_training(other.state_dict(), model=GivenModel(network()), data=data)
