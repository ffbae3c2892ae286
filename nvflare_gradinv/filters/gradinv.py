"""Published module path, see `federated.flare.inverter`."""

from federated.flare.inverter import GradInversionInverter, Inverter

__all__ = ["GradInversionInverter", "Inverter"]
