"""Against layers that are not shared: what is absent is not compared."""

from __future__ import annotations

from attack.knowledge.known_defenses import Adaptation, register_adaptation
from core.target import Target


@register_adaptation("layerdrop")
def _layerdrop(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    adaptation.notes.append("layerdrop: dropped layers are absent, and nothing is compared there")


@register_adaptation("enclave")
def _enclave(adaptation: Adaptation, target: Target, values: list[float]) -> None:
    """Nothing need be undone: later gradients pass through the hidden layers, which are known."""
    adaptation.notes.append("enclave: hidden layers are absent, and nothing is compared there")
