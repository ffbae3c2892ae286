"""The federation whose site attacks its own update: what it averages and what it records."""

from __future__ import annotations

from pathlib import Path

import torch

from audit.show.store import record_of
from benchmarks.audit_federation import (
    Federation,
    client_of,
    command_of,
    membership,
    run,
    simulate,
)
from core.reading import read_json_object

SMALL = Federation(
    sites=2, images=8, non_members=8, rounds=2, size=16, training="adamw lr=0.01 batch-size=4",
    width=4,
)  # fmt: skip


def test_a_round_is_the_mean_of_what_the_sites_sent() -> None:
    trained = simulate(SMALL)
    assert [len(trained.rounds), len(trained.single_site)] == [3, 2]
    # One site alone and the same site in a federation of one are the same.
    alone = simulate(Federation(**{**vars(SMALL), "sites": 1, "non_members": 16}))
    for name, value in alone.rounds[-1].items():
        assert torch.equal(value, alone.single_site[-1][name])
        assert torch.equal(value, trained.single_site[-1][name])
    assert any(
        not torch.equal(value, trained.rounds[-1][name]) for name, value in trained.local.items()
    )


def test_the_update_is_that_of_torch_and_the_attacker_simulates_it() -> None:
    from gradients.local_update import unrolled_update

    trained = simulate(SMALL)
    client, members = client_of(SMALL, trained), trained.members
    update = unrolled_update(
        client.build_model(), members.images, members.labels, client.local, create_graph=False
    )
    for name, value in client.gradient.items():
        assert torch.allclose(value, update[name], atol=2e-3), name
    models = {rate.model for rate in membership(SMALL, trained)}
    assert models == {"global", "local", "single site"}


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[str] = []
    parts = {
        "membership": lambda trained: membership(SMALL, trained),
        "other": lambda trained: calls.append("other") or trained.accuracy,
    }
    path = tmp_path / "federation.json"
    first = run(SMALL, {"membership": parts["membership"]}, path, "a")
    assert [name for name, _ in first] == ["membership"]
    assert [name for name, _ in run(SMALL, parts, path, "a")] == ["other"]
    assert list(run(SMALL, parts, path, "a")) == []
    assert calls == ["other"]
    record = read_json_object(path, what="record")
    # Another command measures other numbers.
    assert [name for name, _ in run(SMALL, {"other": parts["other"]}, path, "b")] == ["other"]
    assert set(read_json_object(path, what="record")) == {
        "checksum", "command", "federation", "other",
    }  # fmt: skip
    assert record["membership"][0]["method"] == "loss threshold"
    assert 0 <= record["other"] <= 1


def test_the_record_names_the_command_with_what_changes_its_numbers() -> None:
    line = command_of(["--plants", "2", "--work", "here", "--budget", "60", "--output", "there"])
    assert line == "python -m benchmarks.audit_federation --budget 60 --plants 2"
    assert command_of([]) == "python -m benchmarks.audit_federation"


def test_the_committed_record_is_of_this_command_and_can_be_read() -> None:
    path = Path(__file__).parents[2] / "results" / "audit" / "federation.json"
    record = read_json_object(path, what="record")
    assert record["federation"] == vars(Federation())
    audit = record_of(record["audit"])
    assert audit.local.steps == Federation().images // 8
    assert {rate["model"] for rate in record["membership"]} == {"global", "local", "single site"}
    # What the document says of it is what the record says.
    page = " ".join((path.parents[2] / "docs" / "audit-my-update.md").read_text().split())
    (attack,) = [each for each in audit.attacks if each.test is not None]
    assert attack.test is not None
    assert f"says `{audit.verdict}`: p = {attack.test.p_value:.2f}" in page
    alone, together = audit.power
    found = f"alone ({alone.found} of {alone.of}) nor 64 together ({together.found} of"
    assert found in page
    above = attack.similarities[0].above_noise
    assert f"Yet {above} of 64 reconstructions are above" in page
    for rate in record["membership"]:
        if (
            rate["of_class"] is None
            and rate["model"] in ("global", "single site")
            and ("confidence" not in rate["method"])
        ):
            assert f"{rate['auroc']:.2f} ({rate['auroc_low']:.2f} to" in page
