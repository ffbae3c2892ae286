"""The leakage filter by its published module path."""

from federated.rdlv_filter import RelativeDataLeakageValueFilter

__all__ = ["RelativeDataLeakageValueFilter"]
