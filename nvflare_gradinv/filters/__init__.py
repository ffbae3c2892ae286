"""Filters by their published module paths."""
