"""Attacks at equal processor time: `python -m benchmarks.equal_time`."""

import sys

from benchmarks.speed.equal_time import main
from core.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(main))
