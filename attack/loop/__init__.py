"""The optimisation: restarts, steps, schedules, races, fusion, stopping, saved states."""
