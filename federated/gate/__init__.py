"""The gate of a site, whatever the framework: what may leave, when to measure, what was decided."""
