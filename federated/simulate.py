"""Run a job in NVFlare's simulator: `python -m federated.simulate`."""

import sys

from federated.experiment.cli.simulate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
