"""How tests start several processes."""

from __future__ import annotations

from core.launch_arguments import LaunchSettings


def on_cpu(processes: int) -> LaunchSettings:
    """So many processes on the CPU, connected by gloo at a free port."""
    return LaunchSettings(
        cpu=True,
        dist_url="tcp://127.0.0.1:0",
        dist_backend="gloo",
        multiprocessing_distributed=True,
        nproc_per_node=processes,
    )
