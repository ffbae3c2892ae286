"""Commands by their published module paths."""
