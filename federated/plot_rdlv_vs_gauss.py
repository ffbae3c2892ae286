"""Draw leakage against noise: `python -m federated.plot_rdlv_vs_gauss`."""

import sys

from federated.experiment.cli.plot_rdlv_vs_gauss import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
