"""Every registered attack against the shared table of targets."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from attack.attacks import attack_names, get_attack
from tests.attack_targets import CASES, FAILS, NOTHING_DB, SETTINGS, Case, Made, gain, run_case


@functools.cache
def made(setting: str) -> Made:
    return SETTINGS[setting]()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beats_the_guesses_by_its_margin_where_it_should(case: Case) -> None:
    target, truth = made(case.setting)
    found = run_case(case, (target, truth))
    assert found.images.shape == truth.images.shape
    assert float(found.images.min()) >= 0
    assert float(found.images.max()) <= 1
    over_guesses = gain(found, truth)
    if case.margin is FAILS:
        assert over_guesses < NOTHING_DB, f"it does work: {case.why}"
    else:
        assert over_guesses > case.margin


# Attacks on what is no image, and where they are shown to work.
ELSEWHERE = {
    "ares": "test_malicious_servers.py",
    "eggv": "test_malicious_servers.py",
    "loki": "test_malicious_servers.py",
    "dager": "test_text.py",
    "decepticons": "test_malicious_text.py",
    "robbing-the-fed-text": "test_malicious_text.py",
    "tag": "test_text.py",
    "lamp": "test_text.py",
    "tableak": "test_attacks_on_tables.py",
    "trap-weights": "test_attacks_on_tables.py",
}


@pytest.mark.parametrize("name", attack_names())
def test_every_attack_works_somewhere(name: str) -> None:
    if name in ELSEWHERE:
        assert f'"{name}"' in Path(__file__).with_name(ELSEWHERE[name]).read_text()
        return
    assert any(case.attack == name and case.margin is not FAILS for case in CASES)


@pytest.mark.parametrize("name", attack_names())
def test_every_attack_says_where_it_comes_from_and_what_it_takes(name: str) -> None:
    attack = get_attack(name)
    assert attack.__doc__
    assert attack.name == name
    assert isinstance(attack.requires, frozenset)
