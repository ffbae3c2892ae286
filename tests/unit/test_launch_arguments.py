"""What a command line says about processes, and which of its flags were really given."""

from __future__ import annotations

import pytest

from core.errors import InputError
from core.launch_arguments import (
    CommandParser,
    LaunchSettings,
    add_launch_arguments,
    given_flags,
)
from core.processes.distributed import Process
from core.processes.launch import launch


def parser() -> CommandParser:
    made = CommandParser()
    made.add_argument("--arch", default="resnet18")
    made.add_argument("--lr", "--learning-rate", type=float, default=0.1)
    made.add_argument("--sizes", type=float, nargs="+", default=[1.0])
    made.add_argument("--fast", action="store_true")
    add_launch_arguments(made)
    return made


def test_a_flag_given_with_its_default_is_given() -> None:
    assert given_flags(parser(), []) == {}
    words = ["--arch", "resnet18", "--learning-rate", "0.1", "--fast", "-p", "10"]
    assert given_flags(parser(), words) == {
        "arch": "resnet18", "lr": 0.1, "fast": True, "print_freq": 10,
    }  # fmt: skip


def test_negative_numbers_in_every_notation() -> None:
    assert parser().parse_args(["--lr", "-1e-6"]).lr == -1e-6
    assert parser().parse_args(["--lr=-1e-6"]).lr == -1e-6
    assert parser().parse_args(["--sizes", "1", "-2.5E3", "-.5e2"]).sizes == [1, -2500, -50]


def test_settings_are_what_the_flags_say() -> None:
    assert LaunchSettings.from_arguments(parser().parse_args([])) == LaunchSettings()
    args = parser().parse_args(["--seed", "4", "--cpu", "--nproc-per-node", "3"])
    assert LaunchSettings.from_arguments(args) == LaunchSettings(4, cpu=True, nproc_per_node=3)


def told(process: Process, *words: str) -> tuple[int, tuple[str, ...]]:
    return process.world_size, words


def test_one_process_returns_what_it_was_told() -> None:
    assert launch(told, LaunchSettings(cpu=True), "a", "b") == (1, ("a", "b"))
    with pytest.raises(InputError, match="--rank 2"):
        launch(told, LaunchSettings(rank=2))


def test_a_parser_knows_its_flags_by_group() -> None:
    parser = CommandParser(prog="x")
    parser.add_argument("word")
    group = parser.add_argument_group("speed")
    group.add_argument("--fast", action="store_true")
    commands = parser.add_subparsers()
    one = commands.add_parser("one")
    one.add_argument("--deep")
    assert {
        title: [a.dest for a in found] for title, found in parser.declared.items() if found
    } == {
        "": ["help", "word"],
        "speed": ["fast"],
    }
    assert [a.dest for a in parser.actions] == ["help", "word", "fast"]
    assert [a.dest for a in parser.commands["one"].actions] == ["help", "deep"]
    # As argparse itself counts them.
    own = set(parser._option_string_actions)
    assert {name for a in parser.actions for name in a.option_strings} == own
