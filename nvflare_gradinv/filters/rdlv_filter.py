"""Published module path, see `federated.rdlv_filter`."""

from federated.rdlv_filter import RelativeDataLeakageValueFilter

__all__ = ["RelativeDataLeakageValueFilter"]
