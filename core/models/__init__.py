"""Building networks: architectures, BatchNorm over processes, layers of a malicious server."""
