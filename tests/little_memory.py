"""A command that reads a file and may allocate little: `python -m tests.little_memory`.

Its words are a module, the name of its function that reads, a file, and bytes.
"""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path

from core.errors import exit_status


def main() -> int:
    """Read the file; the exit status of a command that does nothing else."""
    module, name, path, allowed = sys.argv[1:]
    read = getattr(importlib.import_module(module), name)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(allowed), -1))
    return exit_status(lambda: read(path))


if __name__ == "__main__":
    sys.exit(main())
