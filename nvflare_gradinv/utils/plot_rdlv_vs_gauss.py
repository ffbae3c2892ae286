"""The figure over noise, by its published module path."""

import sys

from federated.plot_rdlv_vs_gauss import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
