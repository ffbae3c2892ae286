"""From a grid to records: cells, their store, and where they run."""
