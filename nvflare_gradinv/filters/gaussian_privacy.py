"""Published module path, see `federated.gaussian_privacy`."""

from federated.gaussian_privacy import GaussianPrivacy

__all__ = ["GaussianPrivacy"]
