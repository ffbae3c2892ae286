"""Processes that compute together: groups, ranks, shards, exact sums, shared memory."""
