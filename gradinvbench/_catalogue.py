"""What can be named: attacks, defenses, losses and metrics, those of plugins included."""

from __future__ import annotations

from attack.attacks import attack_names, get_attack
from attack.metrics import metric_description, metric_names
from core.losses import loss_class, loss_names
from gradients.defenses import defense_class, defense_names
from gradinvbench._names import Catalogue, first_line


def attacks() -> Catalogue:
    """The attacks that `invert` knows."""
    return Catalogue({name: first_line(get_attack(name)) for name in attack_names()})


def defenses() -> Catalogue:
    """The defenses that `share` knows; parameters follow a name after colons, as in `clip:1`."""
    return Catalogue({name: first_line(defense_class(name)) for name in defense_names()})


def losses() -> Catalogue:
    """The losses that `share` knows by name; any function of (outputs, targets) will do as well."""
    return Catalogue({name: first_line(loss_class(name)) for name in loss_names()})


def metrics() -> Catalogue:
    """The metrics that `evaluate` knows."""
    return Catalogue({name: metric_description(name) for name in metric_names()})
