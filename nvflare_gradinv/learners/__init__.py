"""Learners by their published module paths."""
