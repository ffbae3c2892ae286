"""Federations on one machine: jobs, recipe, simulator, figures."""
