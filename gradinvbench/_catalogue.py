"""What can be named: attacks, defenses and metrics, those of plugins included."""

from __future__ import annotations

from attack.attacks import attack_names, get_attack
from attack.metrics import metric_description, metric_names
from gradients.defenses import defense_class, defense_names
from gradinvbench._names import Catalogue, first_line


def attacks() -> Catalogue:
    """The attacks that `invert` knows."""
    return Catalogue({name: first_line(get_attack(name)) for name in attack_names()})


def defenses() -> Catalogue:
    """The defenses that `share` knows; parameters follow a name after colons, as in `clip:1`."""
    return Catalogue({name: first_line(defense_class(name)) for name in defense_names()})


def metrics() -> Catalogue:
    """The metrics that `evaluate` knows."""
    return Catalogue({name: metric_description(name) for name in metric_names()})
