"""Published module path, see `federated.learner`."""

from federated.learner import CXRLearner

__all__ = ["CXRLearner"]
