"""The filter of calibrated noise by its published module path."""

from federated.gaussian_privacy import GaussianPrivacy

__all__ = ["GaussianPrivacy"]
