"""The flags common to the three commands; without torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from core.errors import InputError

# What argparse takes for a flag before Python 3.14
# (https://github.com/python/cpython/issues/105712).
_SCIENTIFIC_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
_NOT_GIVEN: Final = object()
DEFAULT_TIMEOUT = 600.0
# What may differ between the processes of a run: where they are and where they write.
_OF_ONE_PROCESS = frozenset(
    ("rank", "gpu", "dist_url", "timeout", "workers", "root", "results", "result_root", "data_root")
)


class CommandParser(argparse.ArgumentParser):
    """A parser that reads -1e-6 as a number on every version of Python, and knows its flags.

    Attributes:
        declared: What was added, in order, by the title of its group; "" is outside of any.
        commands: The parsers of its commands, by name.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        self.declared: dict[str, list[argparse.Action]] = {}
        self.commands: Mapping[str, CommandParser] = {}
        super().__init__(*words, **options)

    def add_argument(self, *words: Any, **options: Any) -> argparse.Action:
        """As argparse does it, and take note."""
        action = super().add_argument(*words, **options)
        self.declared.setdefault("", []).append(action)
        return action

    def add_argument_group(self, *words: Any, **options: Any) -> Any:
        """As argparse does it; the group takes note of its flags here."""
        group = super().add_argument_group(*words, **options)
        declared = self.declared.setdefault(group.title or "", [])
        add = group.add_argument

        def add_argument(*words: Any, **options: Any) -> argparse.Action:
            declared.append(add(*words, **options))
            return declared[-1]

        group.add_argument = add_argument  # type: ignore[method-assign]
        return group

    def add_subparsers(self, **options: Any) -> Any:
        """As argparse does it, and take note."""
        action = super().add_subparsers(**options)
        self.commands = action.choices
        return action

    @property
    def actions(self) -> list[argparse.Action]:
        """What was added in all groups."""
        return [action for actions in self.declared.values() for action in actions]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but for negative numbers with an exponent."""
        words: Iterable[str] = sys.argv[1:] if args is None else args
        return super().parse_known_args([_as_value(word) for word in words], namespace)


def named_values(flag: str, given: Iterable[str], known: Sequence[str] = ()) -> dict[str, str]:
    """The words NAME=PATH of a flag that may be given several times.

    Args:
        flag: For errors.
        given: Its words.
        known: Names that it takes; empty: any.

    Raises:
        InputError: A word has no "=", nothing behind it, or an unknown name before it.
    """
    pairs = {}
    for word in given:
        name, separator, value = word.partition("=")
        if not separator or not value or (known and name not in known):
            kinds = f" with KIND one of {', '.join(known)}" if known else ""
            raise InputError(f"{flag} {word}: expected NAME=PATH{kinds}")
        pairs[name] = value
    return pairs


def _as_value(word: str) -> str:
    # A word that starts with a space is never a flag, and float() ignores the space.
    return f" {word}" if _SCIENTIFIC_NUMBER.fullmatch(word) else word


def given_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """The flags that a command line really states, without any default.

    Args:
        parser: Of the command.
        argv: The words of the command line; `sys.argv` if None.

    Returns:
        Values by name; a flag given with its default value is among them.
    """
    names = vars(parser.parse_args(argv))
    # argparse sets a default only where the namespace has no value yet.
    empty = argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN))
    read = vars(parser.parse_args(argv, empty))
    return {name: value for name, value in read.items() if value is not _NOT_GIVEN}


def add_own_client_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a model and a loss of the user's own, as stages 1 and 2 take them."""
    group = parser.add_argument_group("a client of your own")
    group.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="your function that builds a model of your own, in place of --arch",
    )
    group.add_argument(
        "--loss",
        metavar="NAME",
        help="cross-entropy, binary-cross-entropy, mse, ... or MODULE:FUNCTION of your own",
    )


def add_text_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what is said of text to the flags of the data."""
    group.add_argument(
        "--tokens", type=int, default=16, metavar="T", help="of text: tokens of a sentence"
    )
    group.add_argument(
        "--shortest",
        type=int,
        metavar="T",
        help="of text: keep sentences of so many tokens and more, and pad them (default: --tokens)",
    )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags common to the three commands."""
    group = parser.add_argument_group("processes and devices")
    group.add_argument("--seed", type=int, default=0, help="seed of every random number")
    group.add_argument("-p", "--print-freq", type=int, default=10, metavar="N")
    group.add_argument("--gpu", type=int, default=None, metavar="N", help="use this one GPU")
    group.add_argument("--world-size", type=int, default=1, help="number of nodes")
    group.add_argument("--rank", type=int, default=0, help="index of this node")
    group.add_argument("--dist-url", default="tcp://127.0.0.1:10023", help="port 0: any free port")
    group.add_argument("--dist-backend", choices=["nccl", "gloo"], default=None)
    group.add_argument("--multiprocessing-distributed", action="store_true")
    group.add_argument(
        "--nproc-per-node", type=int, default=None, help="processes on this node (default: GPUs)"
    )
    group.add_argument("--cpu", action="store_true", help="do not use a GPU even if there is one")
    group.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="how long processes wait for one that does not answer",
    )


@dataclass(frozen=True)
class LaunchSettings:
    """How the processes of a command start and where they compute.

    Attributes:
        seed: Seed of every random number of the attack.
        gpu: Index of the one GPU to use; None for all.
        world_size: Number of nodes.
        rank: Index of this node.
        dist_url: Where processes meet, tcp://HOST:PORT; port 0 is any free one.
        dist_backend: "nccl" or "gloo"; None for the one that fits the devices.
        multiprocessing_distributed: Whether this node's processes are to be spawned.
        nproc_per_node: Processes on this node; None for one per GPU.
        cpu: Whether GPUs are left alone.
        timeout: Seconds that processes wait for one that does not answer.
        shared: What all processes must be told alike, by flag.
    """

    seed: int = 0
    gpu: int | None = None
    world_size: int = 1
    rank: int = 0
    dist_url: str = "tcp://127.0.0.1:10023"
    dist_backend: str | None = None
    multiprocessing_distributed: bool = False
    nproc_per_node: int | None = None
    cpu: bool = False
    timeout: float = DEFAULT_TIMEOUT
    shared: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def from_arguments(args: argparse.Namespace) -> LaunchSettings:
        """What a command line says, parsed with the flags of `add_launch_arguments`."""
        names = [each.name for each in dataclasses.fields(LaunchSettings) if each.compare]
        shared = {
            f"--{name.replace('_', '-')}": value
            for name, value in vars(args).items()
            if name not in _OF_ONE_PROCESS
        }
        return LaunchSettings(**{name: getattr(args, name) for name in names}, shared=shared)
