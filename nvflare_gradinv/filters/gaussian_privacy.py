"""Published module path, see `federated.flare.gaussian_privacy`."""

from federated.flare.gaussian_privacy import GaussianPrivacy

__all__ = ["GaussianPrivacy"]
