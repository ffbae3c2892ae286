"""Published module paths of the commands."""
