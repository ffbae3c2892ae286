"""Draw a site's reconstructions over noise levels: `python -m federated.plot_reconstructions`."""

import sys

from federated.experiment.cli.plot_reconstructions import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
