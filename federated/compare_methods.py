"""Compare methods of inverting an update: `python -m federated.compare_methods`."""

import sys

from federated.experiment.cli.compare_methods import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
