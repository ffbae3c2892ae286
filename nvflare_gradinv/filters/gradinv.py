"""Published module path, see `federated.inverter`."""

from federated.inverter import GradInversionInverter, Inverter

__all__ = ["GradInversionInverter", "Inverter"]
