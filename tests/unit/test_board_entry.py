"""Protocols and entries: what they say, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import utility
from benchmarks.leaderboard.entry import check_against, entry_from, read_entry
from benchmarks.leaderboard.protocol import CURRENT, FILE, Protocol, read_protocol
from core.errors import InputError
from tests.board_entries import SMALL, entry, spread


def test_the_protocol_is_the_one_that_the_documents_describe() -> None:
    protocol = read_protocol()
    assert (protocol.name, protocol.images, protocol.batch_sizes) == (CURRENT, 32, (1, 4))
    assert len(protocol.victims) == 2
    assert protocol.states == ("initial", "trained")
    assert len(protocol.settings) == 8
    assert len({setting.name for setting in protocol.settings}) == 8


def test_utility_is_what_the_table_of_utility_measures() -> None:
    rules = read_protocol().utility
    assert (
        utility.Protocol(
            data=read_protocol().data,
            arch=rules.arch,
            width=rules.width,
            clients=rules.clients,
            batch=rules.batch_size,
            local_steps=1,
            rounds=rules.epochs * rules.rounds,
            lr=rules.lr,
        )
        == utility.PROTOCOL
    )
    assert (rules.epochs, rules.seeds) == (utility.EPOCHS, utility.SEEDS)


def test_every_value_is_part_of_the_fingerprint() -> None:
    changed = [
        dataclasses.replace(SMALL, evaluations=5),
        dataclasses.replace(SMALL, utility=dataclasses.replace(SMALL.utility, clients=3)),
        dataclasses.replace(SMALL, victims=(dataclasses.replace(SMALL.victims[0], width=3),)),
    ]
    assert len({p.fingerprint for p in [SMALL, *changed]}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_sizes": (1, 3)}, "batch_sizes: every one must divide 10 images"),
        ({"states": ("half-trained",)}, "states: expected initial and trained"),
        ({"worst_share": 0.0}, "worst_share must lie above 0"),
        ({"members": ()}, "members: is empty"),
        ({"images": "many"}, "its images is 'many'"),
    ],
)
def test_a_protocol_that_contradicts_itself_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **change).check()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("images: 32", "images: 31", "batch_sizes: every one must divide 31"),
        ("images: 32", "pictures: 32", "no protocol"),
        ("{arch: cnn, width: 8, clients", "{arch: cnn, size: 3, clients", "no protocol"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    text = FILE.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=rf"mine\.yaml:\d+: .*{message}"):
        read_protocol(file)


def test_attackers_are_those_of_the_protocol_and_may_be_letters() -> None:
    assert SMALL.chosen_threat(None) == "honest-server"
    assert SMALL.chosen_threat("C") == "honest-server"
    assert SMALL.chosen_threat("B") == "eavesdropper-no-labels"
    with pytest.raises(InputError, match="--threat worst-case: Small-v1 has honest-server"):
        SMALL.chosen_threat("worst-case")


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = entry("Mine", spread(0.5), epsilon=3.0, reference="somewhere")
    made.write(tmp_path / "mine.json")
    found = read_entry(tmp_path / "mine.json")
    check_against(found, SMALL, "mine")
    assert plain(found) == plain(made)


def plain(value: object) -> Any:
    """As JSON has it: a list for a tuple."""
    return json.loads(json.dumps(dataclasses.asdict(value)))  # type: ignore[call-overload]


FIRST = SMALL.settings[0].name


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("leaks", FIRST, "ssim", 0), 1.5, r"leaks\..*ssim has 1.5: must lie between -0.5 and 1"),
        (("leaks", FIRST, "ssim", 0), float("nan"), "ssim has nan"),
        (("leaks", FIRST, "ssim", 0), "0.5", "its ssim is"),
        (("leaks", FIRST, "ssim", 0), True, "its ssim is"),
        (("leaks", FIRST, "psnr", 3), float("inf"), "psnr has inf"),
        (("leaks", FIRST, "labels", 0), 1, "its labels is"),
        (("leaks", FIRST), {}, "no leaderboard entry"),
        (("leaks",), [], "no leaderboard entry"),
        (("guesses", "mean image", "psnr", 0), 1e9, "guesses.mean image.psnr"),
        (("guesses", "mean image"), {}, "no leaderboard entry"),
        (("accuracies", 0), 101, "101 is not a percentage"),
        (("accuracies", 0), float("nan"), "nan is not a percentage"),
        (("epsilon",), -1.0, "epsilon -1.0"),
        (("epsilon",), float("inf"), "epsilon inf"),
        (("defense",), "  ", "defense is empty"),
        (("defense",), "x" * 3000, "more than 2000 characters"),
        (("schema",), 3, "schema 3 instead of 2"),
        (("more",), 1, "unknown field more"),
    ],
)
def test_impossible_entries_are_refused(
    place: tuple[str | int, ...], value: Any, message: str
) -> None:
    values = plain(entry("Mine", spread(0.5)))
    entry_from(values, "mine")
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(InputError, match=f"^mine: .*{message}"):
        entry_from(values, "mine")


def test_a_missing_field_is_named() -> None:
    values = plain(entry("Mine", spread(0.5)))
    del values["threat"]
    with pytest.raises(InputError, match=r"mine: .*threat"):
        entry_from(values, "mine")


def without_a_setting() -> dict[str, Any]:
    made = entry("Mine", spread(0.5))
    return {"leaks": {FIRST: made.leaks[FIRST]}}


def of_fewer_images() -> dict[str, Any]:
    return {"leaks": entry("Mine", spread(0.5, n=9)).leaks}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": "0" * 12}, "measured by other values than those of Small-v1"),
        ({"threat": "worst-case"}, "Small-v1 has no attacker 'worst-case'"),
        ({"accuracies": (60.0,)}, "accuracies of 1 trainings"),
        (without_a_setting(), "leaks: lenet, initial, batch 2 is missing"),
        (of_fewer_images(), "is of 9 images, not 10"),
        ({"guesses": {}}, "guesses: best non-member is missing"),
    ],
)
def test_what_the_protocol_did_not_measure_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"mine: {message}|mine: .*{message}"):
        check_against(entry("Mine", spread(0.5), **fields), SMALL, "mine")


def test_the_small_protocol_is_one() -> None:
    SMALL.check()
    assert isinstance(SMALL, Protocol)
