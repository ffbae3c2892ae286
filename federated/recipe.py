"""Simulate a federation over noise levels: `python -m federated.recipe`."""

import sys

from federated.experiment.cli.recipe import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
