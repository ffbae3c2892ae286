"""What a table is: its axes, its columns and figures, and the YAML file that declares them.

A table expands into rows of cells (`benchmarks.run`); nothing here computes or draws.
"""
