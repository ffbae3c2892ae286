"""YAML whose every value knows its line, for errors that a person can act on."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.reading import read_bytes

# A hundred times the largest table of ours.
MAX_BYTES = 512 * 1024
MAX_VALUES = 50_000
MAX_DEPTH = 32
MAX_NUMBER_LENGTH = 64

Place = tuple[Hashable, ...]


@dataclass
class Document:
    """A parsed file.

    Attributes:
        file: File that the text came from.
        value: Plain dictionaries, lists and scalars.
        lines: Line (from 1) of every value, by the keys and indices that lead to it.
    """

    file: Path
    value: Any
    lines: dict[Place, int] = field(default_factory=dict)

    def error(self, message: str, *place: Hashable) -> InputError:
        """An error that names the file and the line of `place` or of what holds it."""
        while place and place not in self.lines:
            place = place[:-1]
        return InputError(f"{self.file}:{self.lines.get(place, 1)}: {message}")


def read_yaml(file: Path) -> Document:
    """Parse a YAML file.

    Raises:
        InputError: Not there, not YAML, or a key given twice.
    """
    yaml = _yaml()
    content = read_bytes(file, what="table", limit=MAX_BYTES)
    try:
        text = content.decode("utf-8")
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), file)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise InputError(f"the table {file} is not a text file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {str(error).splitlines()[0]}") from None
    document = Document(file, None)
    if root is None:
        raise InputError(f"{file}: the file is empty")
    try:
        document.value = _convert(root, (), document, yaml.SafeLoader(""))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file}:{line}: not plain YAML: {error.problem}") from None
    return document


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise InputError(
            "tables are YAML files and PyYAML is not installed: pip install 'gradinvbench[bench]'"
        ) from None
    return yaml


def _check_events(events: Iterable[Any], file: Path) -> None:
    """Refuse what is nested so deep that composing it would not end well."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        # The stream and the document are the first two.
        if depth - 2 > MAX_DEPTH:
            raise InputError(
                f"{file}:{event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels"
            )


def _convert(node: Any, place: Place, document: Document, loader: Any) -> Any:
    # An alias counts as what it stands for.
    if len(place) > MAX_DEPTH or len(document.lines) > MAX_VALUES:
        raise InputError(
            f"{document.file}:{node.start_mark.line + 1}: more than {MAX_VALUES} values, or "
            f"{MAX_DEPTH} levels, once aliases are replaced by what they stand for; "
            "perhaps a value contains itself"
        )
    document.lines[place] = node.start_mark.line + 1
    if node.id == "mapping":
        return _convert_mapping(node, place, document, loader)
    if node.id == "sequence":
        return [_convert(n, (*place, i), document, loader) for i, n in enumerate(node.value)]
    return _scalar(node, document, loader)


def _convert_mapping(node: Any, place: Place, document: Document, loader: Any) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        where = f"{document.file}:{key_node.start_mark.line + 1}"
        if key_node.id != "scalar" or key_node.tag.endswith(":merge"):
            raise InputError(f"{where}: a key is a single word, not << or a list or a mapping")
        key = _scalar(key_node, document, loader)
        if key in result:
            raise InputError(f"{where}: {key} is given twice")
        below = (*place, key)
        result[key] = _convert(value_node, below, document, loader)
        # The line of the key says more than that of a block below it.
        document.lines[below] = key_node.start_mark.line + 1
    return result


def _scalar(node: Any, document: Document, loader: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; everybody means a number. Dates stay text."""
    where = f"{document.file}:{node.start_mark.line + 1}"
    if len(node.value) > MAX_NUMBER_LENGTH and not node.tag.endswith(":str"):
        raise InputError(f"{where}: a number of {len(node.value)} characters")
    try:
        value = loader.construct_object(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        kind = node.tag.rpartition(":")[2]
        raise InputError(f"{where}: {node.value[:40]!r} is no {kind}") from None
    if not isinstance(value, (str, bool, int, float, type(None))):
        return str(value)
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.isascii() else value
        except ValueError:
            return value
    return value
