"""What a table is: its axes, stages, columns, and the YAML files that say so."""
