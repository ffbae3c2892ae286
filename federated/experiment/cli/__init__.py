"""The commands of the experiment: flags in, settings out."""
