"""From a grid to records: cells, the store of their results, and where their commands run.

Nothing here knows of tables or columns: a cell is a command with a configuration.
"""
