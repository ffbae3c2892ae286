"""What every stage stands on: errors, files, processes, data, models, and what a client shares."""
