"""Refusing what is not a table, with the file and the line, before it is expanded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.declare.columns import find_view
from benchmarks.declare.figures import FIGURES
from benchmarks.declare.names import unknown
from benchmarks.declare.yaml_lines import Document
from benchmarks.run.stages import STAGES
from core.errors import InputError
from core.plugins import import_plugin

_TABLE_KEYS = {
    "title", "description", "like", "axes", "repeats", "presets", "columns", "figures", "published",
    "chain", "pivot", "plugin", "budget", "order", "compare", *STAGES,
}  # fmt: skip
_PRESET_KEYS = {"axes", "repeats", "data", "published", "plugin", "budget", *STAGES}


def check_structure(document: Document, preset: str, model: Mapping[str, Any]) -> None:
    """Refuse what is not a table before looking into it."""
    raw = document.value
    if not isinstance(raw, dict):
        raise document.error("a table is a mapping with title, axes and columns")
    _check_keys(document, raw, _TABLE_KEYS, ())
    for key in ("columns", "axes"):
        if not raw.get(key):
            raise document.error(f"the table has no {key}")
    _check_types(document, raw, ())
    presets = raw.get("presets", {})
    for name, value in presets.items():
        if not isinstance(value, dict):
            raise document.error(f"preset {name}: expected a mapping", "presets", name)
        _check_keys(document, value, _PRESET_KEYS, ("presets", name))
        _check_types(document, value, ("presets", name))
    available = presets or model.get("presets", {})
    if available and preset not in available:
        known = ", ".join(map(str, available))
        raise document.error(f"--preset {preset}: the table has {known}", "presets")
    _check_chain(document, raw.get("chain", []))


def _check_chain(document: Document, chain: list[Any]) -> None:
    """Stages in the order in which data flows."""
    for index, stage in enumerate(chain):
        if stage not in STAGES:
            raise document.error(unknown("stage", str(stage), STAGES), "chain", index)
    if chain != [stage for stage in STAGES if stage in chain]:
        raise document.error(f"chain: each once, in the order {', '.join(STAGES)}", "chain")


def _check_keys(document: Document, raw: dict[Any, Any], known: set[str], place: Any) -> None:
    for key in raw:
        if key not in known:
            raise document.error(unknown("key", str(key), sorted(known)), *place, key)


_TYPES: dict[str, type] = {
    "columns": list, "figures": list, "published": list, "chain": list, "order": list,
    "compare": dict, "axes": dict, "repeats": dict, "presets": dict, "pivot": dict, "plugin": str,
    "budget": str,
}  # fmt: skip
_KINDS: dict[type, str] = {list: "a list", dict: "a mapping"}
_WORDS = {"plugin": "the name of a module", "budget": "a time such as 30m"}


def _check_types(document: Document, raw: dict[Any, Any], place: tuple[Any, ...]) -> None:
    for key, value in raw.items():
        wanted = dict if key in STAGES else _TYPES.get(key)
        if wanted is not None and not isinstance(value, wanted):
            raise document.error(
                f"{key}: expected {_WORDS.get(key) or _KINDS[wanted]}", *place, key
            )
    for kind in ("axes", "repeats"):
        for name, axis in raw.get(kind, {}).items():
            if not isinstance(axis, (dict, list)) or not axis:
                raise document.error(f"axis {name} has no values", *place, kind, name)


def import_plugins(document: Document, model: Document | None, preset: str) -> None:
    """Import what registers the schemes, defenses, attacks and metrics that a table names."""
    for part in layers(document, model, preset):
        given = [part.get(key) for key in ("plugin", "axes", "repeats", *STAGES)]
        for name in dict.fromkeys(_plugins({"plugin": given[0], "rest": given[1:]})):
            try:
                import_plugin(name)
            except InputError as error:
                raise document.error(str(error), "plugin") from None


def _plugins(value: Any) -> Iterator[str]:
    """The value of every flag `plugin` in some flags or changes of flags."""
    if isinstance(value, list):
        for item in value:
            yield from _plugins(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if str(key).rpartition(".")[2] != "plugin":
                yield from _plugins(item)
            else:
                yield from (name for name in _listed(item) if isinstance(name, str))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def layers(document: Document, model: Document | None, preset: str) -> list[dict[str, Any]]:
    """What decides a table's flags; later layers win."""
    bases = [model.value if model else {}, document.value]
    return [layer for base in bases for layer in (base, at_keys(base, ("presets", preset)))]


def check_names(document: Document) -> None:
    """Refuse columns and figures that there are not; after the plugins are imported."""
    raw = document.value
    heads = [str(axis) for axis in raw.get("axes", {})]
    for index, name in enumerate(raw["columns"]):
        try:
            heads.append(find_view(str(name)).header)
        except InputError as error:
            raise document.error(str(error), "columns", index) from None
        if heads[-1] in heads[:-1]:
            raise document.error(
                f"column {name}: another column or an axis has its header {heads[-1]} as well",
                "columns",
                index,
            )
    for index, name in enumerate(raw.get("figures", [])):
        if name not in FIGURES:
            raise document.error(unknown("figure", str(name), FIGURES), "figures", index)


def at_keys(value: Any, path: Sequence[Any]) -> Any:
    """What lies at a path of keys; an empty dictionary where it ends early."""
    for key in path:
        value = value.get(key, {}) if isinstance(value, dict) else {}
    return value
