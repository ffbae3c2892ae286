"""The measurement of leakage inside a live federation of NVFlare clients."""
