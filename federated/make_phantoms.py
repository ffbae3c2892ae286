"""Draw procedural chest radiographs: `python -m federated.make_phantoms`."""

import sys

from federated.experiment.cli.make_phantoms import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
