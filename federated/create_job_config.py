"""Write an NVFlare job folder: `python -m federated.create_job_config`."""

import sys

from federated.experiment.cli.create_job_config import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
