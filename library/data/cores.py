"""How many processor cores are this process's own, for those who start threads and processes."""

from __future__ import annotations

import os


def own_cores() -> int:
    """The cores that the system lets this process use, shared out evenly among the processes that a launcher started here. At
    least 1."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return max(1, there // max(1, neighbours))
