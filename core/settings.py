"""Settings that are declared once: fields of a record that know their flags.

A setting is a field of a frozen dataclass whose metadata says which flag it has on the command
line, what it does and which values it may have. The command's parser and the checks come from
these. A refused value is told by the name of the field to a user of Python, and by the flag to a
user of the command. Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

from core.errors import InputError

# What a setting can be.
Value = bool | int | float | str | tuple[float, ...] | None
T = TypeVar("T")

_KEY = "setting"
# The command has the same default as the field.
_SAME = "the field's default"


class SettingError(InputError):
    """A setting has a value that cannot be used.

    Args:
        in_fields: The sentence for a user of Python, which names the field.
        in_flags: The sentence for a user of the command, which names the flag.
    """

    def __init__(self, in_fields: str, in_flags: str) -> None:
        super().__init__(in_fields, in_flags)
        self.in_fields, self.in_flags = in_fields, in_flags

    def __str__(self) -> str:
        return self.in_fields


@dataclass(frozen=True)
class Setting:
    """What a field knows about itself.

    Attributes:
        flags: Its flags; several for a tuple; none where only Python can set it.
        help: What `--help` says about it.
        choices: The values that it can have; empty: every value of its type.
        listed: Whether the parser shows and enforces the choices.
        at_least: The smallest value; None: no limit.
        above: The value must exceed this; None: no limit.
        metavar: What stands for the value in `--help`.
        flag_default: The command's default where it differs from the field's.
        off: The value of the flag that stands for None.
        flat_name: Its name among all settings, where it differs from the field's.
    """

    flags: tuple[str, ...] = ()
    help: str | None = None
    choices: tuple[str, ...] = ()
    listed: bool = False
    at_least: float | None = None
    above: float | None = None
    metavar: str | None = None
    flag_default: Value = _SAME
    off: Value = None
    flat_name: str | None = None


def setting(default: T, *flags: str, **told: Any) -> T:
    """Declare a setting: the field of a settings record.

    Args:
        default: Default of the setting.
        flags: Flags of the setting on the command line.
        told: Further fields of `Setting`.
    """
    return cast(T, field(default=default, metadata={_KEY: Setting(flags, **told)}))


@dataclass(frozen=True)
class Declared:
    """One declared setting of a record.

    Attributes:
        name: Name of the field.
        kinds: The types that its value can have.
        default: Default of the setting.
        about: Its flags, its help and its limits.
    """

    name: str
    kinds: tuple[type, ...]
    default: Value
    about: Setting

    @property
    def flat_name(self) -> str:
        """Its name among the settings of all topics."""
        return self.about.flat_name or self.name

    @property
    def flag(self) -> str:
        """Its flags as one word for a sentence; the field's name where it has none."""
        return "/".join(self.about.flags) or self.name

    @property
    def defaults_on_command_line(self) -> list[Value]:
        """The default of each flag."""
        if self.about.flag_default != _SAME:
            return [self.about.flag_default]
        return list(self.default) if isinstance(self.default, tuple) else [self.default]


def declared(record: type) -> tuple[Declared, ...]:
    """The settings that a dataclass declares, in order."""
    hints = get_type_hints(record)
    return tuple(
        Declared(
            each.name, _kinds(hints[each.name]), cast(Value, each.default), each.metadata[_KEY]
        )
        for each in fields(record)
    )


def _kinds(hint: Any) -> tuple[type, ...]:
    """The types of an annotation; a tuple counts as `tuple`."""
    if isinstance(hint, type) and not get_args(hint):
        return (hint,)
    if getattr(hint, "__origin__", None) is tuple:
        return (tuple,)
    return tuple(kind for part in get_args(hint) for kind in _kinds(part))


# -- Checks -----------------------------------------------------------------------


def complaint(setting: Declared, value: object) -> str | None:
    """What is wrong with a value, as the end of a sentence; None: nothing."""
    if value is None and NoneType in setting.kinds:
        return None
    wanted = _wrong_type(setting, value)
    if wanted is not None:
        return f"{value!r}: must be {wanted}"
    about = setting.about
    if about.choices and value not in about.choices:
        return f"{value}: choose one of {', '.join(about.choices)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}: must be a finite number"
    if about.at_least is not None and cast(float, value) < about.at_least:
        return f"must be at least {about.at_least}, not {value}"
    if about.above is not None and cast(float, value) <= about.above:
        return f"{value}: must be above {about.above}"
    return None


_WANTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _wrong_type(setting: Declared, value: object) -> str | None:
    """What the value should be instead; None where it is that."""
    kind = next(kind for kind in setting.kinds if kind is not NoneType)
    if kind is tuple:
        assert isinstance(setting.default, tuple)
        n = len(setting.default)
        fits = isinstance(value, (tuple, list)) and len(value) == n and all(map(_number, value))
        return None if fits else f"{n} numbers"
    if kind is float:
        fits = _number(value)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    return None if fits else _WANTED[kind]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- The command line -------------------------------------------------------------


def destination(flag: str) -> str:
    """The name under which argparse stores a flag's value."""
    return flag.lstrip("-").replace("-", "_")


def add_flags(parser: argparse.ArgumentParser, record: type, title: str) -> None:
    """Add a group of flags, one for each setting of a record that has one.

    Args:
        parser: Parser that receives the flags.
        record: A dataclass of settings.
        title: Of the group in `--help`.
    """
    group = parser.add_argument_group(title)
    for each in declared(record):
        for flag, default in zip(each.about.flags, each.defaults_on_command_line, strict=False):
            group.add_argument(flag, default=default, help=each.about.help, **_action(each))


def _action(each: Declared) -> dict[str, Any]:
    """How argparse reads the flag of a setting."""
    kind = next(kind for kind in each.kinds if kind is not NoneType)
    if kind is bool:
        (default,) = each.defaults_on_command_line
        switch = "store_true" if default is False else argparse.BooleanOptionalAction
        return {"action": switch}
    options: dict[str, Any] = {"type": float if kind is tuple else kind}
    if each.about.listed:
        options["choices"] = list(each.about.choices)
    if each.about.metavar is not None:
        options["metavar"] = each.about.metavar
    return options


def is_given(each: Declared, values: Mapping[str, Any]) -> bool:
    """Whether one of a setting's flags is among the given ones.

    Args:
        each: The declared setting.
        values: Values of flags under the names that argparse gives them.
    """
    return any(destination(flag) in values for flag in each.about.flags)


def from_flags(each: Declared, values: Mapping[str, Any], base: Value) -> Value:
    """The value of a setting under the given flags.

    Args:
        each: The declared setting.
        values: Values of flags under the names that argparse gives them.
        base: What it is, or what a part of it is, where no flag says anything.
    """
    if not is_given(each, values):
        return base
    names = [destination(flag) for flag in each.about.flags]
    if isinstance(base, tuple):
        return tuple(values.get(name, part) for name, part in zip(names, base, strict=True))
    value: Value = values[names[0]]
    return None if value == each.about.off else value
