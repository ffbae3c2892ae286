"""The inverters by their published module path."""

from federated.inverter import GradInversionInverter, Inverter

__all__ = ["GradInversionInverter", "Inverter"]
