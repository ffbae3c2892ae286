"""Stage 3 at its published path: `python main_run.py`."""

import sys

from attack.cli.command import main
from core.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(main))
