"""Published path of the command `federated.plot_rdlv_vs_gauss`."""

import sys

from federated.plot_rdlv_vs_gauss import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
