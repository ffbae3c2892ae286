"""Published module paths of the filters and of what they use."""
