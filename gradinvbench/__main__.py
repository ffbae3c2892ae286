"""The command `python -m gradinvbench`."""

import sys

from gradinvbench.command import main

sys.exit(main())
