"""The name by which job folders of earlier versions ask for the global model."""

from federated.flare.global_model import global_model

__all__ = ["global_model"]
