"""Draw leakage over the rounds: `python -m federated.plot_rdlv_per_round`."""

import sys

from federated.experiment.cli.plot_rdlv_per_round import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
