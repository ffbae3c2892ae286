"""The command that writes jobs, by its published module path."""

import sys

from federated.create_job_config import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
