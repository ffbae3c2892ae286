"""Threat models: what they grant, refuse and hide."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from attack.attacks.optimisation import make_attack
from attack.cli.command import build_parser, make_run
from attack.cli.request import AttackRun
from attack.knowledge.requirements import check_knowledge
from attack.knowledge.threat_models import (
    LETTERS,
    Capability,
    check_capabilities,
    find_threat,
    letters_of,
    register_threat_model,
    threat_names,
)
from core.errors import InputError
from core.launch_arguments import given_flags
from core.models.building import ModelSpec
from core.target import LocalTraining, Target
from tests.targets import make_target


@pytest.fixture(scope="module")
def target() -> Target:
    made, _ = make_target(ModelSpec("cnn", 10, 8, width=4), 2, train_mode=True)
    return dataclasses.replace(made, defenses=("clip:1",))


def run_of(*words: str) -> AttackRun:
    words = ("--checkpoint", "x.tar", *words)
    parser = build_parser()
    return make_run(parser.parse_args(words), given_flags(parser, words))


def check(target: Target, *words: str) -> None:
    run = run_of(*words)
    check_knowledge(run.knowledge, make_attack(run.attack, run.settings, run.knowledge), target)


WITHHELD = [
    ("eavesdropper-no-labels", ["--pseudo-label-init", "known"], "labels known"),
    ("honest-server", ["--pseudo-label-init", "known"], "labels known"),
    ("honest-server", ["--exact-bn"], "exact BatchNorm statistics"),
    ("honest-server", ["--bn-from-update", "--BN", "0.1"], "exact BatchNorm statistics"),
    ("eavesdropper-no-labels", ["--adaptive"], "the client's defense known"),
    ("eavesdropper-no-labels", ["--pseudo-label-init", "fedavg"], "local hyper-parameters"),
]


@pytest.mark.parametrize(("name", "words", "sentence"), WITHHELD, ids=str)
def test_what_is_withheld_is_refused(
    name: str, words: list[str], sentence: str, target: Target
) -> None:
    with pytest.raises(InputError, match=f"needs what --threat {name} withholds: .*{sentence}"):
        check(target, "--threat", name, *words)
    check(target, "--threat", "worst-case", *words)
    check(target, *words)


def test_local_steps_need_the_clients_settings(target: Target) -> None:
    several = dataclasses.replace(target, local=LocalTraining(epochs=2))
    with pytest.raises(InputError, match="inverting 2 local steps needs"):
        check(several, "--threat", "eavesdropper-no-labels")
    check(several, "--threat", "honest-server")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="--threat nobody: unknown; known are custom, eaves"):
        find_threat("nobody")


def test_what_is_withheld_is_hidden(target: Target) -> None:
    eavesdropper, server = find_threat("eavesdropper-no-labels"), find_threat("worst-case")
    assert eavesdropper is not None
    assert server is not None
    assert eavesdropper.view(target).bn_statistics is None
    assert eavesdropper.view(target).defenses == ()
    assert server.view(target) == target


def test_without_a_name_the_flags_decide() -> None:
    assert Capability.LABELS not in run_of().knowledge.granted
    known = run_of("--pseudo-label-init", "known", "--exact-bn").knowledge.granted
    assert {Capability.LABELS, Capability.BATCH_STATISTICS} <= known
    assert Capability.DEFENSE not in known
    assert Capability.DEFENSE in run_of("--attack", "auto").knowledge.granted


def test_the_record_states_who_attacked() -> None:
    record = run_of("--threat", "honest-server", "--adaptive").knowledge.to_record()
    assert record["name"] == "honest-server"
    assert record["adaptive"]
    assert "labels known" not in record["granted"]
    assert run_of().knowledge.to_record()["name"] == "custom"


def test_each_server_is_granted_more() -> None:
    names = ["eavesdropper-no-labels", "honest-server", "honest-server-with-bn", "malicious-server"]
    granted = [threat.grants for name in names if (threat := find_threat(name)) is not None]
    assert all(low < high for low, high in itertools.pairwise(granted))
    worst = find_threat("worst-case")
    assert worst is not None
    assert worst.grants == frozenset(Capability)


def test_letters_stand_for_the_models_that_grant_the_same() -> None:
    # Rows of the systematization's table of threat models: basic knowledge, training details,
    # surrogate data, client data distribution, active manipulation.
    columns = [
        {Capability.BATCH_SIZE, Capability.RUNNING_STATISTICS},
        {Capability.LOCAL_TRAINING, Capability.DEFENSE},
        {Capability.PRIOR_DATA},
        {Capability.BATCH_STATISTICS},
        {Capability.MALICIOUS_SERVER},
    ]
    rows = {
        "A": "-----", "B": "x----", "C": "xx---", "D": "xxx--",
        "E": "xxxx-", "F": "xx--x", "G": "xxx-x", "H": "xxx-x",
    }  # fmt: skip
    assert rows.keys() == LETTERS.keys()
    for letter, row in rows.items():
        expected = {
            c for mark, column in zip(row, columns, strict=True) if mark == "x" for c in column
        }
        threat = find_threat(letter)
        assert threat is not None
        assert threat.grants == expected, letter
        assert letter in letters_of(threat.name)


def test_a_letter_is_the_name_in_records() -> None:
    assert run_of("--threat", "C").knowledge.to_record() == (
        run_of("--threat", "honest-server").knowledge.to_record()
    )
    with pytest.raises(InputError, match="letters A to H"):
        find_threat("I")
    assert letters_of("malicious-server-no-statistics") == "G, H"
    assert letters_of("worst-case") == ""


def test_names_are_taken_once() -> None:
    for name in ("worst-case", "custom"):
        with pytest.raises(ValueError, match="registered already"):
            register_threat_model(name, (), "")
    assert threat_names()[0] == "custom"


def test_the_message_names_who_asks() -> None:
    with pytest.raises(InputError, match="attack x needs what the threat model withholds: labels"):
        check_capabilities("attack x", {Capability.LABELS}, set())
