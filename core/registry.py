"""What is known by its name: attacks, defenses, losses, ... of the project and of plugins."""

from __future__ import annotations

from typing import TypeVar

from core.errors import InputError

V = TypeVar("V")


class Registry(dict[str, V]):
    """Values by name, of which none is taken twice.

    Args:
        what: They are, in the singular.
        reserved: A name that stands for something else; it is never free.

    Example:
        >>> attacks = Registry[type]("attack")
        >>> attacks.add("mine", object)
        <class 'object'>
        >>> attacks.names()
        ['mine']
    """

    def __init__(self, what: str, reserved: str | None = None) -> None:
        super().__init__()
        self._what, self._reserved = what, reserved

    def add(self, name: str, value: V) -> V:
        """Make a value known.

        Args:
            name: Of the value.
            value: Is returned, for decorators.

        Raises:
            ValueError: The name is taken.
        """
        if name in self or name == self._reserved:
            raise ValueError(f"{self._what} {name} is registered already")
        self[name] = value
        return value

    def names(self) -> list[str]:
        """Every name, in order of the alphabet."""
        return sorted(self)

    def find(self, name: str, unknown: str) -> V:
        """The value of a name.

        Args:
            name: That a user has given.
            unknown: What is said where there is none, before the names that there are.

        Raises:
            InputError: There is none.
        """
        if name not in self:
            raise InputError(f"{unknown}; known are {', '.join(self.names())}")
        return self[name]
