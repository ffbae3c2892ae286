"""Published path of the command `federated.create_job_config`."""

import sys

from federated.create_job_config import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
