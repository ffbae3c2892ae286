"""Objects of the user's own code that a command is pointed at, as `module:name`.

A file never names code that is run: only who starts the command does.
"""

from __future__ import annotations

import difflib

from core.errors import InputError
from core.plugins import import_from_here


def is_object_name(text: str) -> bool:
    """Whether a text reads as `module:name`, not as a path or a word."""
    module, colon, name = text.partition(":")
    parts = [*module.split("."), name]
    return bool(colon) and all(part.isidentifier() for part in parts)


def named_object(text: str, flag: str) -> object:
    """Import an object of the user's own code.

    Args:
        text: `module:name`; the module is looked for in the current folder and on the Python
            path.
        flag: The flag that the user gave it with, for messages.

    Raises:
        InputError: No such module, or nothing of that name in it.
    """
    if not is_object_name(text):
        raise InputError(f"{flag} {text}: give a module and a name in it, as mymodule:build")
    module, _, name = text.partition(":")
    try:
        found = import_from_here(module)
    except ImportError as error:
        raise InputError(f"{flag} {text}: {module} cannot be imported ({error})") from None
    if not hasattr(found, name):
        near = difflib.get_close_matches(name, dir(found), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{flag} {text}: {module} has no {name}{hint}")
    value: object = getattr(found, name)
    return value


def called(text: str, flag: str) -> object:
    """What a function without arguments of the user's own code returns.

    Args:
        text: See `named_object`.
        flag: The flag that the user gave it with, for messages.

    Raises:
        InputError: See `named_object`, or it cannot be called without arguments.
    """
    function = named_object(text, flag)
    if not callable(function):
        raise InputError(f"{flag} {text}: is a {type(function).__name__}, not a function")
    try:
        return function()
    except TypeError as error:
        raise InputError(f"{flag} {text}: cannot be called without arguments ({error})") from error
