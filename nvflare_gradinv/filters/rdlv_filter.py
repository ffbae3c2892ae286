"""Published module path, see `federated.flare.rdlv_filter`."""

from federated.flare.rdlv_filter import RelativeDataLeakageValueFilter

__all__ = ["RelativeDataLeakageValueFilter"]
