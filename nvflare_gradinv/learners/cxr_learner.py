"""Published module path, see `federated.flare.learner`."""

from federated.flare.learner import CXRLearner

__all__ = ["CXRLearner"]
