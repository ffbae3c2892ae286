"""The learner by its published module path."""

from federated.learner import CXRLearner

__all__ = ["CXRLearner"]
