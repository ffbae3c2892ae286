"""The figure over rounds, by its published module path."""

import sys

from federated.plot_rdlv_per_round import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
